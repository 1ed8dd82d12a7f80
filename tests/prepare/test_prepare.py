"""Posts to shards with a small random VAE: what is kept, what is set aside, and what a second run does."""

import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image

from support.posts_on_disk import (
    BUCKETS,
    REPOSITORY,
    copy_of,
    draw,
    hashes,
    make_base,
    make_config,
    make_posts,
    make_vae,
    read_jsonl,
    run,
    to_floats,
    write_yaml,
)  # fmt: skip
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.data.buckets import fit_image
from trainer.data.images import read_bytes, read_pixels
from trainer.data.index import open_index, read_raw_latents
from trainer.data.post import ImagePlace
from trainer.prepare import encode as encoding
from trainer.prepare import prepare as prepare_module
from trainer.prepare.prepare import Summary
from trainer.prepare.work import Work, hold_work


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Summary]:
    """23 good posts, prepared once; tests that change something copy the folder."""
    folder = tmp_path_factory.mktemp("done")
    make_posts(folder / "posts", 23)
    config = make_config(base, folder / "posts")
    return config, run(config)


def test_every_sample_is_what_the_recipe_says(base: Path, done: tuple[Config, Summary]) -> None:
    config, summary = done
    assert (summary.samples, summary.shards, summary.set_aside, summary.notes) == (23, 5, {}, {})
    index = open_index(config.data.shards)
    vae = make_vae(0).eval().requires_grad_(False)
    assert [index.row(n)["key"] for n in range(23)] == sorted(str(n) for n in range(1, 24))
    for number in range(len(index)):
        row = index.row(number)
        path = Path(str(config.data.images)) / f"{row['key']}.png"
        size = (row["original_width"], row["original_height"])
        with Image.open(path) as image:
            assert image.size == size
        fit = fit_image(size, **BUCKETS)
        assert (row["bucket_width"], row["bucket_height"]) == fit.bucket
        assert (row["crop_left"], row["crop_top"]) == (fit.left, fit.top)
        assert row["content_hash"] == sha256_file(path)
        mean = vae.encode(to_floats(read_pixels(read_bytes(ImagePlace(path)), fit))[None]).latent_dist.mean[0]
        assert np.array_equal(read_raw_latents(index, number), mean.half().numpy())
        assert (row["rating"], row["year"], row["source"]) == ("g", 2020, "posts.jsonl")
        assert (row["caption"], row["tags_general"], row["tags_artist"]) == (None, f"1girl tag_{row['key']}", None)
        assert json.loads(row["extra"]) == {"id": int(row["key"]), "created_at": "2020-01-01"}


def test_the_manifest_says_what_made_them(base: Path, done: tuple[Config, Summary]) -> None:
    config, _ = done
    manifest = open_index(config.data.shards).manifest
    assert manifest["format_version"] == 1
    latents = manifest["latents"]
    assert (latents["vae_dtype"], latents["scaling_factor"], latents["buckets"]) == ("fp32", 0.5, BUCKETS)
    assert len(latents["vae_sha256"]) == 64 and latents["pixels"]["transparency"] == "on white"
    assert manifest["counts"] == {"inputs": 23, "samples": 23, "set_aside": {}, "filtered": {}, "notes": {}}
    assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == [
        ("shard-00000.tar", 5), ("shard-00001.tar", 5), ("shard-00002.tar", 5), ("shard-00003.tar", 5),
        ("shard-00004.tar", 3)]  # fmt: skip
    for shard in manifest["shards"]:
        assert shard["sha256"] == sha256_file(Path(config.data.shards) / shard["name"])
    names = {path.name for path in Path(config.data.shards).iterdir()}
    assert names - {shard["name"] for shard in manifest["shards"]} == {
        "index.arrow", "latents.arrow", "manifest.json", "quarantine.jsonl", "notes.jsonl"}  # fmt: skip
    assert not Path(f"{config.data.shards}.unfinished").exists()


def test_the_same_posts_give_the_same_bytes(done: tuple[Config, Summary], tmp_path: Path) -> None:
    again = copy_of(done[0], tmp_path / "again")
    run(again)
    assert hashes(Path(again.data.shards)) == hashes(Path(done[0].data.shards))


def test_the_fingerprint_does_not_know_the_shards(done: tuple[Config, Summary], tmp_path: Path) -> None:
    other = copy_of(done[0], tmp_path / "other")
    summary = run(replace(other, data=replace(other.data, samples_per_shard=9)))
    assert summary.shards == 3
    assert open_index(other.data.shards).fingerprint == open_index(done[0].data.shards).fingerprint


def test_a_second_run_changes_nothing(done: tuple[Config, Summary], monkeypatch: pytest.MonkeyPatch) -> None:
    config, summary = done
    before = hashes(Path(config.data.shards))
    monkeypatch.setattr(prepare_module, "build_vae", None)  # nothing may be encoded
    again = run(config)
    assert "23 of 23 samples were encoded before, nothing to do" in str(again)
    assert again == replace(summary, encoded=0) and hashes(Path(config.data.shards)) == before


def test_other_settings_are_refused_by_name(base: Path, done: tuple[Config, Summary], tmp_path: Path) -> None:
    config, _ = done
    before = hashes(Path(config.data.shards))
    make_vae(1).save_pretrained(tmp_path / "vae")
    for other, named in (
        (replace(config, precision=replace(config.precision, vae="bf16")), "vae_dtype was fp32, is bf16"),
        (replace(config, buckets=replace(config.buckets, max_side=96)), "buckets.max_side was 128, is 96"),
        (replace(config, buckets=replace(config.buckets, upscale=False)), "upscale was True, is False"),
        (replace(config, model=replace(config.model, vae=str(tmp_path / "vae"))), "vae_sha256"),
    ):
        with pytest.raises(UserError) as caught:
            run(other)
        assert named in str(caught.value) and config.data.shards in str(caught.value)
    assert hashes(Path(config.data.shards)) == before


def test_foreign_folders_are_refused(done: tuple[Config, Summary], tmp_path: Path) -> None:
    config = copy_of(done[0], tmp_path / "more")
    shutil.copytree(done[0].data.shards, config.data.shards)
    run(config)
    (Path(config.data.shards) / "manifest.json").unlink()
    with pytest.raises(UserError, match="not empty and holds no complete set"):
        run(config)


def spoil(folder: Path) -> dict[str, str]:
    """Ten broken inputs beside the good ones; returns key -> expected reason."""
    images = folder / "images"
    whole = images / "1.png"
    (images / "101.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (images / "102.png").write_bytes(b"")
    (images / "103.jpg").write_text("404 not found")
    draw(images / "wide.bmp", 0, (300, 2))
    (images / "wide.bmp").rename(images / "104.webp")  # a wrong extension is no harm: the content decides
    bomb = Image.new("1", (10_000, 9_000))
    bomb.save(images / "105.png")
    lines: list[Any] = [{"id": number} for number in (101, 102, 103, 104, 105, 106)]
    lines += [{"id": 107, "file": "../posts.jsonl"}, {"id": 108, "file": "1.png", "rating": "high"}, "{broken"]
    draw(images / "ünïcode 名前.png", 3)
    lines += [{"id": 109, "file": "ünïcode 名前.png", "image_width": 5, "image_height": 5}]
    with (folder / "posts.jsonl").open("a", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return {"101": "undecodable", "102": "empty", "103": "not_an_image", "105": "bomb", "106": "image_missing",
            "107": "outside_folder", "108": "bad_record"}  # fmt: skip


def test_broken_inputs_are_set_aside_and_the_rest_goes_on(done: tuple[Config, Summary], tmp_path: Path) -> None:
    config = copy_of(done[0], tmp_path / "broken")
    expected = spoil(tmp_path / "broken")
    config = replace(config, data=replace(config.data, max_bad_fraction=0.5))
    summary = run(config)
    folder = Path(config.data.shards)
    lines = read_jsonl(folder / "quarantine.jsonl")
    assert {line["key"]: line["reason"] for line in lines if line["key"]} == expected
    assert [line["origin"] for line in lines if line["key"] is None] == ["posts.jsonl line 32"]
    assert all(line["detail"] for line in lines) and len(lines) == 8
    assert summary.samples == 23 + 2 and sum(summary.set_aside.values()) == 8
    index = open_index(folder)
    assert {"104", "109"} <= set(index.table["key"].to_pylist())
    assert index.manifest["counts"]["set_aside"] == summary.set_aside
    notes = read_jsonl(folder / "notes.jsonl")
    assert [(n["key"], n["note"], n["stated"], n["file"]) for n in notes if n["note"] == "stated_size"] == [
        ("109", "stated_size", [5, 5], [200, 50])]  # fmt: skip
    # 109's drawing is number 3's, and it has no tags
    assert [(n["key"], n["of"]) for n in notes if n["note"] == "duplicate"] == [("109", "3")]
    assert summary.notes == {"stated_size": 1, "empty_caption": 2, "duplicate": 1}
    for text in (
        "25 samples",
        "set aside: 1 whose image cannot be decoded",
        "stated_size: 1",
        "quarantine.jsonl",
        "notes.jsonl",
    ):
        assert text in str(summary)


def test_too_many_bad_ones_stop_it(done: tuple[Config, Summary], tmp_path: Path) -> None:
    config = copy_of(done[0], tmp_path / "broken")
    spoil(tmp_path / "broken")
    # 33 inputs: 7 set aside are within 0.22, the eighth, in the second chunk, is not, and ends it before it counts
    with pytest.raises(UserError) as caught:
        run(replace(config, data=replace(config.data, max_bad_fraction=0.22)))
    for text in ("8 of 33 inputs", "1 whose image cannot be decoded", "max_bad_fraction", "be decoded, such as"):
        assert text in str(caught.value)
    quarantine = Path(f"{config.data.shards}.unfinished") / "quarantine.jsonl"
    assert str(quarantine) in str(caught.value) and len(read_jsonl(quarantine)) == 8
    assert not Path(config.data.shards).exists()
    # what was encoded counts once the fraction is raised
    summary = run(replace(config, data=replace(config.data, max_bad_fraction=0.5)))
    assert (summary.samples, summary.encoded) == (25, 23)


def test_only_bad_ones(base: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "posts.jsonl").write_text('{"id": 1}\nnot\n{"id": 2}\n')
    with pytest.raises(UserError, match="is left of 3 inputs: 2 whose image is not there, 1 not valid JSON") as caught:
        run(make_config(base, tmp_path, max_bad_fraction=1.0))
    assert "whose image is not there, such as posts.jsonl line 1: no image is called 1" in str(caught.value)
    assert "not valid JSON, such as posts.jsonl line 2: Expecting value" in str(caught.value)
    quarantine = tmp_path / "shards.unfinished" / "quarantine.jsonl"
    assert str(quarantine) in str(caught.value) and len(read_jsonl(quarantine)) == 3
    (tmp_path / "posts.jsonl").write_text("\n")
    shutil.rmtree(tmp_path / "shards.unfinished")
    with pytest.raises(UserError, match="no posts in"):
        run(make_config(base, tmp_path))


def test_a_key_that_occurs_twice_is_an_error(base: Path, tmp_path: Path) -> None:
    make_posts(tmp_path, 3)
    with (tmp_path / "posts.jsonl").open("a") as file:
        file.write('{"id": "2", "file": "1.png"}\n')
    with pytest.raises(UserError, match=r"key 2 occurs twice: posts.jsonl line \d and posts.jsonl line 4"):
        run(make_config(base, tmp_path))
    assert not (tmp_path / "shards.unfinished").exists()


def test_without_upscaling_small_ones_are_set_aside(base: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(50, 40), (40, 30), (70, 64)]):
        draw(tmp_path / "images" / f"{number}.png", number, size)
        (tmp_path / "images" / f"{number}.txt").write_text("a caption")
    config = make_config(base, tmp_path, posts=None, max_bad_fraction=0.5)
    summary = run(replace(config, buckets=replace(config.buckets, upscale=False)))
    assert summary.set_aside == {"too_small": 1}
    index = open_index(config.data.shards)
    rows = [index.row(number) for number in range(2)]
    assert [(row["key"], row["bucket_width"], row["bucket_height"], row["crop_left"]) for row in rows] == [
        ("0%2Epng", 32, 32, 9), ("2%2Epng", 64, 64, 3)]  # fmt: skip
    assert {(row["caption"], row["source"], row["extra"]) for row in rows} == {("a caption", "images", None)}


def test_latents_that_are_not_finite_are_set_aside(
    done: tuple[Config, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(done[0], tmp_path / "nan")
    real, calls = encoding.encode_raw_latents, []

    def overflowing(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real(vae, pixels) * (1e6 if len(calls) == 3 else 1)  # beyond fp16

    monkeypatch.setattr(encoding, "encode_raw_latents", overflowing)
    summary = run(replace(config, data=replace(config.data, max_bad_fraction=0.1)))
    assert summary.set_aside == {"non_finite_latents": 1} and summary.samples == 22


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_vaes_precision(done: tuple[Config, Summary], tmp_path: Path, dtype: Any) -> None:
    config = copy_of(done[0], tmp_path / dtype)
    run(replace(config, precision=replace(config.precision, vae=dtype)))
    index, full = open_index(config.data.shards), open_index(done[0].data.shards)
    difference = np.abs(read_raw_latents(index, 0).astype(float) - read_raw_latents(full, 0)).max()
    assert 0 < difference < 0.05
    assert index.fingerprint != full.fingerprint


def test_two_at_once_are_refused(done: tuple[Config, Summary], tmp_path: Path) -> None:
    config = copy_of(done[0], tmp_path / "twice")
    work = Work(Path(config.data.shards))
    ready, told = os.pipe()
    if not (child := os.fork()):
        with hold_work(work):
            os.write(told, b"x")
            time.sleep(60)
    os.read(ready, 1)
    with pytest.raises(UserError, match="another process"):
        run(config)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run(config).samples == 23


def run_script(monkeypatch: pytest.MonkeyPatch, config: Path, *words: str) -> None:
    """The script in this process: another would spend ten seconds on imports."""
    monkeypatch.setattr(sys, "argv", ["build_shards.py", "--config", str(config), *words])
    runpy.run_path(str(REPOSITORY / "scripts" / "build_shards.py"), run_name="__main__")


def test_the_command_line(
    done: tuple[Config, Summary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = copy_of(done[0], tmp_path / "posts")
    run_script(monkeypatch, write_yaml(config, tmp_path / "config.yaml"), "data.samples_per_shard=12")
    out, _ = capsys.readouterr()
    assert re.search(rf"23 samples in 2 shards, .* kB: {config.data.shards}\n", out)
    samples = webdataset.WebDataset(f"{config.data.shards}/shard-{{00000..00001}}.tar", shardshuffle=False).decode()
    assert sorted(sample["__key__"] for sample in samples) == sorted(str(number) for number in range(1, 24))
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, tmp_path / "config.yaml", "buckets.step=64", "buckets.min_side=64")
    assert caught.value.code == 2
    _, err = capsys.readouterr()
    assert "buckets.step was 32, is 64" in err and "buckets.min_side was 32, is 64" in err and "Traceback" not in err


@pytest.mark.skipif(not (REPOSITORY / "demo" / "posts.jsonl").exists(), reason="the demo's drawings are not there")
def test_the_demos_drawings(base: Path, tmp_path: Path) -> None:
    demo = REPOSITORY / "demo"
    config = make_config(base, tmp_path, posts=[str(demo / "posts.jsonl")], images=str(demo / "images"))
    summary = run(config)
    posts = read_jsonl(demo / "posts.jsonl")
    assert (summary.samples, summary.set_aside, summary.notes) == (len(posts), {}, {})
    index = open_index(config.data.shards)
    rows = {row["key"]: row for row in (index.row(number) for number in range(len(index)))}
    for post in posts:
        row = rows[str(post["id"])]
        assert row["tags_general"] == post["tag_string_general"] and row["caption"] is None
        assert (row["original_width"], row["original_height"]) == (post["image_width"], post["image_height"])
        assert row["year"] == (int(post["created_at"][:4]) if "created_at" in post else None)
        assert (row["rating"], row["score"]) == (post.get("rating"), post.get("score"))

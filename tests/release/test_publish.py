"""A published folder is whole, opens for strangers, and holds nothing of its maker's machine; all else is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from support.checkpoints import change_record
from support.fake_hub import TOKEN, run_hub
from support.paths import LICENCE_TEXT, REPOSITORY
from support.published_run import OURS, SOURCE, change, parts, request_of, run, stages, stand_in, write_png
from support.scripts import run_script
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.lineage import read_lineage
from trainer.model.weights_file import LazyFile
from trainer.release import licence
from trainer.release.artefacts import check_stamp, read_sums
from trainer.release.export import export
from trainer.release.folder import check_fit, check_published
from trainer.release.publish import Request, publish, read_publish_config

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures
LISTED = {"modelspec.usage_hint", "modelspec.tags"}  # of a published file, not of an export


def test_the_folder_holds_what_it_should_and_no_more(run: Path, request_of: Request) -> None:
    write_png(run / "export/samples/a.png", prompt="1girl", negative_prompt="lowres", settings='{"steps": 28}')
    (run / "export/samples/notes.txt").write_text("not for strangers")
    folder, release = publish(request_of, [SOURCE])
    assert folder == run / "published/stage2" and len(release.samples) == 1
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in names if "/" not in name} == {
        "README.md", "LICENSE.md", "CHANGES.md", "SHA256SUMS", "lineage.json", "model_index.json",
        "stage2-fp16.safetensors",
    }  # fmt: skip
    assert {name.split("/")[0] for name in names if "/" in name} == {
        "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler", "configs", "samples",
    }  # fmt: skip
    assert {name for name in names if name.startswith(("configs/", "samples/"))} == {
        "configs/1-stage1.yaml", "configs/2-stage2.yaml", "samples/a.png",
    }  # fmt: skip
    assert (folder / "LICENSE.md").read_text() == "# A *stand-in*\n"
    card = (folder / "README.md").read_text()
    assert "| hardware | 2 x A100 |" in card and "| 1.5 |" in card and "not recorded" in card and OURS in card
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder)
    assert done.returncode == 0 and read_sums(folder / "SHA256SUMS").keys() == names - {"SHA256SUMS"}
    assert [path.name for path in folder.parent.iterdir()] == ["stage2"]  # no leftovers


def test_a_stranger_opens_it(request_of: Request, tmp_path: Path) -> None:
    folder, _ = publish(request_of, [SOURCE])
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere/model"))
    images = []
    for loaded in (
        StableDiffusionXLPipeline.from_pretrained(moved, local_files_only=True, torch_dtype=torch.float32),
        StableDiffusionXLPipeline.from_single_file(
            str(moved / "stage2-fp16.safetensors"), config=str(moved), local_files_only=True, torch_dtype=torch.float32
        ),
    ):
        loaded.set_progress_bar_config(disable=True)
        drawn = loaded("bird", num_inference_steps=2, height=64, width=64, output_type="np",
                       generator=torch.Generator().manual_seed(1))  # fmt: skip
        images.append(drawn.images)
    assert images[0].shape == (1, 64, 64, 3) and np.allclose(images[0], images[1], atol=1e-4)


def test_it_answers_where_it_comes_from(run: Path, request_of: Request, tiny_base: Path) -> None:
    folder, release = publish(request_of, [SOURCE])
    newest = find_newest(run)
    assert newest is not None
    state = read_train_state(newest)
    for made in (read_lineage(folder), read_lineage(folder / "stage2-fp16.safetensors")):
        assert made is not None
        assert made["step"] == 30 and made["index_fingerprint"] == "ab12" and made["code"]["version"]
        assert made["base"]["sha256"] == state["base"]["sha256"]
        assert made["base"]["lineage"]["run"] == "stage1" and made["base"]["lineage"]["step"] == 20
    first = yaml.safe_load((folder / "configs/1-stage1.yaml").read_text())
    assert first["data"]["images"] == "${oc.env:HOME}/images" and first["run"]["name"] == "stage1"
    assert first["optim"]["unet_lr"] == 1e-3
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert str(tiny_base).encode() not in everything and str(run.parent).encode() not in everything
    assert [made["run"] for made in release.stages] == ["stage1", "stage2"]


def test_doing_it_again_changes_nothing_and_nothing_is_overwritten(request_of: Request) -> None:
    folder, _ = publish(request_of, [SOURCE])
    sums, changed = (folder / "SHA256SUMS").read_bytes(), (folder / "README.md").stat().st_mtime_ns
    assert publish(request_of, [SOURCE])[0] == folder
    assert (folder / "SHA256SUMS").read_bytes() == sums and (folder / "README.md").stat().st_mtime_ns == changed
    (folder / "README.md").write_text("a better card by hand")
    with pytest.raises(UserError, match=r"stage2 exists and is not what would be written now; it is left alone"):
        publish(request_of, [SOURCE])
    assert (folder / "README.md").read_text() == "a better card by hand"
    other, _ = publish(change(request_of, out=folder.parent / "other"), [SOURCE])
    assert (other / "SHA256SUMS").read_bytes() == sums


def test_every_reason_is_told_and_nothing_is_written(run: Path) -> None:
    with pytest.raises(UserError) as caught:
        publish(Request(run=run))
    told = str(caught.value)
    assert "is not published, for 3 reasons" in told
    for part in (
        "does not say under which licence",
        "the text of FAIPL-1.0-SD is missing",
        "publish.source_url is not set",
    ):
        assert part in told
    assert not (run / "published").exists()


def test_the_bases_own_texts_travel_along(
    run: Path, stand_in: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    request = Request(run=run, license_files=[stand_in], base=str(base))
    with pytest.raises(UserError, match="the text of CreativeML Open RAIL"):
        publish(request, [SOURCE])
    (base / "LICENSE.md").write_text("another stand-in")
    digest = hashlib.sha256(b"another stand in").hexdigest()
    monkeypatch.setitem(licence.KNOWN_WORDS, digest, licence.OPENRAIL)
    folder, release = publish(request, [SOURCE])
    assert (folder / "LICENSE-base.md").read_text() == "another stand-in"
    assert (folder / "LICENSE.md").read_text() == "# A *stand-in*\n"
    assert "Attachment A" in (folder / "README.md").read_text() and release.terms.name == licence.OPENRAIL
    (base / "NOTICE").write_text("no licence")
    (base / "LICENSE-more.txt").write_text("and a postcard")
    with pytest.raises(UserError, match=r"with more: LICENSE-more\.txt is not the text"):
        publish(request, [SOURCE])
    folder, _ = publish(change(request, acknowledged="postcard sent", out=tmp_path / "out"), [SOURCE])
    assert (folder / "LICENSE-base-2.md").read_text() == "and a postcard"


def test_knobs(run: Path, request_of: Request, tmp_path: Path) -> None:
    shutil.rmtree(run / "export", ignore_errors=True)
    words = [SOURCE, "publish.title=My model", "publish.dtype=bf16", "publish.formats=[single_file]"]
    folder, release = publish(change(request_of, out=tmp_path / "a", full_precision=True), words)
    assert {path.name for path in folder.iterdir() if path.suffix == ".safetensors"} == {
        "my-model-bf16.safetensors", "my-model-fp32.safetensors",
    }  # fmt: skip
    assert not (folder / "unet").exists() and release.full_precision == "my-model-fp32.safetensors"
    assert {tensor.dtype for tensor in load_file(folder / "my-model-bf16.safetensors").values()} == {
        torch.bfloat16, torch.int64, torch.float32,
    } - {torch.float32} | {torch.int64}  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "[`my-model-fp32.safetensors`](my-model-fp32.safetensors)" in card and "`my-model-bf16.safetensors`" in card
    check_published(folder, release.config)
    with pytest.raises(UserError, match=r"--full-precision has no effect: publish\.dtype is fp32"):
        publish(change(request_of, full_precision=True), [SOURCE, "publish.dtype=fp32"])
    with pytest.raises(UserError, match=r"optim\.unet_lr=1 has no effect on a run that is made"):
        read_publish_config(run, ["optim.unet_lr=1"])
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
        read_publish_config(tmp_path, [])


def test_the_cards_template(run: Path, request_of: Request, tmp_path: Path) -> None:
    """A relative path in the config begins where training ran."""
    record = json.loads((run / "run.json").read_text())
    record["attempts"][0]["working_folder"] = str(tmp_path)
    (run / "run.json").write_text(json.dumps(record))
    words = [SOURCE, "publish.card_template=mine.md"]
    with pytest.raises(UserError, match=r"the template mine\.md cannot be read"):
        publish(request_of, words)
    assert not (run / "published").exists()
    (tmp_path / "mine.md").write_text("---\n{{ header | safe }}---\n# {{ title }} by me\n")
    folder, _ = publish(request_of, words)
    assert (folder / "README.md").read_text().endswith("---\n# stage2 by me\n")
    (tmp_path / "mine.md").write_text("drawn in /home/someone/pictures\n")
    with pytest.raises(UserError, match=r"an absolute path .* in README\.md line 1"):
        publish(change(request_of, out=tmp_path / "out"), words)


# --- what lies in RUN/export


def test_an_export_that_lies_there_is_published_as_it_is(run: Path, request_of: Request, tmp_path: Path) -> None:
    file, diffusers = export(run)
    folder, _ = publish(change(request_of, out=tmp_path / "a"), [SOURCE])
    said, exported = (LazyFile(path).metadata for path in (folder / "stage2-fp16.safetensors", file))
    assert {key for key in said.keys() | exported.keys() if said.get(key) != exported.get(key)} == LISTED
    check_stamp(folder / "stage2-fp16.safetensors")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (diffusers / weights).read_bytes()
    # without checkpoint and base it is all there is
    shutil.rmtree(run / "checkpoints")
    again, _ = publish(change(request_of, out=tmp_path / "b"), [SOURCE])
    assert (again / "SHA256SUMS").read_bytes() == (folder / "SHA256SUMS").read_bytes()
    with pytest.raises(UserError, match=r"--full-precision needs the run's checkpoint"):
        publish(change(request_of, out=tmp_path / "c", full_precision=True), [SOURCE])
    with pytest.raises(UserError, match=r"neither a complete checkpoint nor an export in bf16"):
        publish(request_of, [SOURCE, "publish.dtype=bf16"])
    shutil.rmtree(diffusers)
    with pytest.raises(UserError, match=r"lacks one of publish\.formats"):
        publish(request_of, [SOURCE])


def test_sums_name_the_files_of_their_export_and_no_others(run: Path) -> None:
    file, diffusers = export(run)
    bf16 = export(run, dtype="bf16")
    sums = file.with_name("stage2-step-00000030-fp16.sha256")
    done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", sums.name], cwd=run / "export")
    inside = {f"{diffusers.name}/{path.relative_to(diffusers).as_posix()}" for path in diffusers.rglob("*.*")}
    assert done.returncode == 0 and read_sums(sums).keys() == {file.name, *inside}
    assert {name.partition("/")[0] for name in read_sums(bf16[0].with_suffix(".sha256"))} == {
        path.name for path in bf16
    }
    # one format again: the other keeps its sums
    before = sums.read_bytes()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  - diffusers\n", ""))
    file.unlink()
    assert export(run) == [file] and sums.read_bytes() == before


def test_an_export_without_sums_is_built_again(run: Path, request_of: Request, tmp_path: Path) -> None:
    """As version 0.2 left it, or an export that was interrupted; a damaged one does no harm then."""
    file, diffusers = export(run)
    whole, _ = publish(change(request_of, out=tmp_path / "whole"), [SOURCE])
    weights = diffusers / "unet/diffusion_pytorch_model.safetensors"
    file.with_suffix(".sha256").unlink()
    for path in (file, weights):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    folder, _ = publish(change(request_of, out=tmp_path / "built"), [SOURCE])
    assert (folder / "SHA256SUMS").read_bytes() == (whole / "SHA256SUMS").read_bytes()


def test_an_export_without_sums_and_checkpoint_is_proven_by_its_stamp(
    run: Path, request_of: Request, tmp_path: Path
) -> None:
    file, diffusers = export(run)
    built, _ = publish(change(request_of, out=tmp_path / "built"), [SOURCE])
    file.with_suffix(".sha256").unlink()
    shutil.rmtree(run / "checkpoints")
    folder, _ = publish(change(request_of, out=tmp_path / "copied"), [SOURCE])
    assert (folder / "SHA256SUMS").read_bytes() == (built / "SHA256SUMS").read_bytes()
    weights = diffusers / "text_encoder/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(
        UserError, match=r"text_encoder is damaged: .* its checkpoint is gone, so that it cannot be built"
    ):
        publish(change(request_of, out=tmp_path / "other"), [SOURCE])
    weights.write_bytes(whole)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"fp16\.safetensors is damaged: its tensors are not those"):
        publish(change(request_of, out=tmp_path / "other"), [SOURCE])
    file.unlink()
    with pytest.raises(UserError, match=r"neither sums nor its single file beside it, which could prove it"):
        publish(change(request_of, out=tmp_path / "other"), [SOURCE, "publish.formats=[diffusers]"])
    assert not (tmp_path / "other").exists()


def test_an_export_that_says_something_else_is_refused(run: Path, request_of: Request) -> None:
    file, diffusers = export(run)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"damaged export: stage2-step-00000030-fp16\.safetensors is not what was"):
        publish(request_of, [SOURCE])
    file.write_bytes(whole)
    lineage = (diffusers / "lineage.json").read_text()
    (diffusers / "lineage.json").write_text(lineage.replace("ab12", "cd34"))
    with pytest.raises(UserError, match=r"damaged export: stage2-step-00000030-fp16/lineage\.json is not what"):
        publish(request_of, [SOURCE])
    (diffusers / "lineage.json").write_text(lineage)
    checkpoint = run / "checkpoints/step-00000030"
    change_record(checkpoint, lineage=read_train_state(checkpoint)["lineage"] | {"index_fingerprint": "cd34"})
    with pytest.raises(UserError, match=r"was made from another checkpoint: move that export away, and it is built"):
        publish(request_of, [SOURCE])
    assert file.is_file() and not list((run / "published").glob("*"))


def test_only_whole_and_unlinked_exports_are_copied(run: Path, request_of: Request, tmp_path: Path) -> None:
    _, diffusers = export(run)
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (diffusers / "unet/notes.json").symlink_to(secret)
    (diffusers / ".env").write_text("x")
    with pytest.raises(UserError) as caught:
        publish(request_of, [SOURCE])
    name = diffusers.name
    assert f"damaged export: {name}/.env, {name}/unet/notes.json is not what was exported" in str(caught.value)
    # of an export without sums, too, nothing else is published
    (run / f"export/{name}.sha256").unlink()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError) as caught:
        publish(request_of, [SOURCE])
    assert "unet/notes.json is a link" in str(caught.value)
    assert ".env is not a file that is published" in str(caught.value)
    assert not list((run / "published").glob("*"))


# --- samples


@pytest.mark.parametrize(
    ("name", "chunks", "part"),
    [
        ("a.png", {}, "does not say from which prompt"),
        ("a.png", {"prompt": "x", "settings": "no json"}, "is not a PNG with readable settings"),
        ("a.png", {"prompt": "x", "settings": "[1]"}, "does not say from which prompt"),
        ("a b.png", {"prompt": "x"}, "has a name of other than letters"),
        (
            "a.png",
            {"prompt": "x", "workflow": "/home/someone/ComfyUI/x.json"},
            r"an absolute path .* in samples/a\.png workflow",
        ),
        ("a.png", {"prompt": "hf_" + "a" * 30}, r"a token in README\.md line 17, samples/a\.png prompt"),
        ("a.png", {"prompt": "x", "Software": "y"}, r"a\.png holds Software beside negative_prompt, prompt, settings"),
    ],
)
def test_samples_must_be_fit(request_of: Request, tmp_path: Path, name: str, chunks: dict[str, str], part: str) -> None:
    write_png(tmp_path / "drawn" / name, **chunks)
    with pytest.raises(UserError, match=part):
        publish(change(request_of, samples=tmp_path / "drawn"), [SOURCE])


def test_sample_folders_must_hold_some(request_of: Request, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--samples .* holds no PNG"):
        publish(change(request_of, samples=tmp_path / "none"), [SOURCE])
    write_png(tmp_path / "real/a.png", prompt="x")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.png").symlink_to(tmp_path / "real/a.png")
    with pytest.raises(UserError, match=r"a\.png is a link"):
        publish(change(request_of, samples=tmp_path / "links"), [SOURCE])


# --- what no stranger should see


def test_a_path_within_a_config_stops_the_publication(run: Path, request_of: Request) -> None:
    """The lineage cuts paths that begin a value; one in the middle of a text is found by the check."""
    checkpoint = run / "checkpoints/step-00000030"
    lineage = read_train_state(checkpoint)["lineage"]
    lineage["config"]["run"]["stage"] = "as told in /home/someone/notes/x"
    change_record(checkpoint, lineage=lineage)
    with pytest.raises(UserError) as caught:
        publish(request_of, [SOURCE])
    told = str(caught.value)
    assert told.startswith(f"{run / 'published/stage2'} is not fit") and told.count("/home/someone/notes/x") == 1
    for place in (
        "configs/2-stage2.yaml line",
        "lineage.json config.run.stage",
        "stage2-fp16.safetensors trainer.lineage.",
    ):
        assert f" {place}" in told
    assert "change it there, in checkpoint.json, then python scripts/lineage.py CHECKPOINT --seal, move" in told


@pytest.mark.parametrize(
    "name",
    ["optimizer.safetensors", ".gitattributes", "train_state.json", "metrics.jsonl", "x/README.md",
     "model.ckpt", "checkpoint.json", "model-00001.safetensors", "unet/model.py", 
     "checkpoints/step-00000001/model.safetensors", "samples/a.txt", "trackers/log.txt"],
)  # fmt: skip
def test_only_files_on_the_list_are_published(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is not a file that is published"):
        check_fit(tmp_path, ["stage2.safetensors"])


def test_a_folder_changed_since_is_not_uploaded(run: Path, request_of: Request) -> None:
    folder, release = publish(request_of, [SOURCE])
    check_published(folder, release.config)
    (folder / "CHANGES.md").write_text("nothing was changed")
    with pytest.raises(UserError, match=r"is not what its SHA256SUMS says: CHANGES\.md"):
        check_published(folder, release.config)


# --- the command, with the licence's real text


def publish_anew(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """As a program of its own: the Hub's package reads its variables when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "scripts/publish.py", *words], cwd=REPOSITORY, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": str(REPOSITORY), **variables},
    )  # fmt: skip


def test_the_command_refuses_then_builds_and_uploads_only_when_asked(run: Path, tmp_path: Path) -> None:
    if not LICENCE_TEXT.is_file():
        pytest.skip("the licence's text is not part of this repository and is not beside it (shared/licenses)")
    refused = run_script("scripts/publish.py", run)
    assert refused.returncode == 2 and "--license-file FILE" in refused.stderr and "Traceback" not in refused.stderr
    words = [str(run), SOURCE, "--license-file", str(LICENCE_TEXT), "--acknowledge-base-terms", "a = b: ours"]
    built = run_script("scripts/publish.py", *words)
    assert built.returncode == 0 and "nothing was uploaded" in built.stdout, built.stderr
    for part in ("--full-precision", "scripts/sample.py", "sha256sum --check"):
        assert part in built.stdout
    assert (run / "published/stage2/LICENSE.md").read_text() == LICENCE_TEXT.read_text()
    asked = run_script("scripts/publish.py", *words, "--upload")
    assert asked.returncode == 2 and "--upload needs publish.repo_id=owner/name" in asked.stderr
    nowhere = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    asked = publish_anew(*words, "publish.repo_id=owner/name", "--upload", **nowhere)
    assert asked.returncode == 2 and "no token for the Hub" in asked.stderr
    with run_hub() as hub:
        there = {"HF_HOME": str(tmp_path / "hub"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        sent = publish_anew(*words, "publish.repo_id=owner/name", "--upload", **there)
        assert sent.returncode == 0 and f"uploaded and verified: {hub.url}/owner/name (private" in sent.stdout, (
            sent.stderr
        )
        folder, repo = run / "published/name", hub.repos["owner/name"]  # whose card names the repository
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert repo.private and len(repo.commits) == 2 and repo.files.keys() - {".gitattributes"} == files.keys()
        assert all(repo.files[name] == path.read_bytes() for name, path in files.items())
        written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
        assert TOKEN not in sent.stdout + sent.stderr and TOKEN.encode() not in written
    for wrong in (["extra"], ["--replace"]):
        assert run_script("scripts/publish.py", *words, *wrong).returncode == 2

"""A preparation that is killed, shared out, or done again with other posts: always the set that one quiet run makes."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.posts_on_disk import (
    copy_of,
    draw,
    hashes,
    make_base,
    make_config,
    make_posts,
    read_jsonl,
    run,
    start_script,
    write_yaml,
)
from support.ranks import add_posts, fork, kill, start_ranks, wait_for
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.files import write_json
from trainer.data.index import open_index, read_raw_latents
from trainer.data.manifest import seal_manifest
from trainer.prepare import encode as encoding
from trainer.prepare import prepare
from trainer.prepare.verify import verify_shards

POSTS = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Sixty good posts and one bad one, prepared by one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    make_posts(folder / "posts", POSTS)
    (folder / "posts" / "images" / "900.png").write_text("404 not found")
    add_posts(folder / "posts", {"id": 900})
    config = make_config(base, folder / "posts", max_bad_fraction=0.1)
    run(config)
    return config


def edit_posts(folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace each post by what ``edit`` makes of it; None removes it."""
    edited = [edit(post) for post in read_jsonl(folder / "posts.jsonl")]
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in edited if post is not None))


def copied(config: Config, target: Path, shards: bool = False) -> Config:
    """The same posts elsewhere; with the set that was made of them, if asked."""
    other = copy_of(config, target)
    if shards:
        shutil.copytree(config.data.shards, other.data.shards)
    return replace(other, data=replace(other.data, max_bad_fraction=0.1))


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_nothing(whole: Config, tmp_path: Path, world: int) -> None:
    config = copied(whole, tmp_path / "shared")
    wait_for(start_ranks(config, world))
    assert hashes(Path(config.data.shards)) == hashes(Path(whole.data.shards))


def test_killed_at_twenty_random_moments(whole: Config, tmp_path: Path) -> None:
    config = copied(whole, tmp_path / "killed")
    began = time.monotonic()
    wait_for([fork(lambda: run(copied(whole, tmp_path / "timed")))])
    usual = time.monotonic() - began
    moments = np.random.default_rng(7)
    killed = 0
    for number in range(200):
        if killed >= 20:
            break
        # one or two processes; a fraction of the time that it takes undisturbed, so that it is killed everywhere
        children = start_ranks(config, 2) if number % 3 == 2 else [fork(lambda: run(config))]
        time.sleep(moments.uniform(0, 0.6 * usual))
        finished = [os.waitpid(child, os.WNOHANG)[0] for child in children]
        if all(finished):  # it was quicker: from the beginning
            shutil.rmtree(config.data.shards)
            continue
        kill([child for child, done in zip(children, finished, strict=True) if not done])
        killed += 1
    run(config)
    assert killed == 20
    assert hashes(Path(config.data.shards)) == hashes(Path(whole.data.shards))
    assert not Path(f"{config.data.shards}.unfinished").exists()


@pytest.mark.slow
def test_the_script_is_killed_and_shared_by_a_launcher(whole: Config, tmp_path: Path) -> None:
    config = copied(whole, tmp_path / "script")
    yaml = write_yaml(config, tmp_path / "config.yaml")
    sidecars = Path(f"{config.data.shards}.unfinished") / "rows"
    process = start_script(yaml, "data.max_bad_fraction=0.1")
    while process.poll() is None and len(list(sidecars.glob("shard-*.arrow"))) < 3:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()
    complete = len(list(sidecars.glob("shard-*.arrow")))
    with pytest.raises(UserError, match=r"samples_per_shard was 5, is 6"):
        run(replace(config, data=replace(config.data, samples_per_shard=6)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    process = start_script(yaml, "data.max_bad_fraction=0.1", launcher=launcher)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"{5 * complete} of {POSTS} samples were encoded before" in out and out.count("samples in") == 1
    assert hashes(Path(config.data.shards)) == hashes(Path(whole.data.shards))


def test_a_lost_shard_of_an_unfinished_run_is_made_again(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copied(whole, tmp_path / "lost")
    monkeypatch.setattr(prepare, "finish", lambda *_: prepare.Summary(Path(), 0, 0, {}, {}, {}, 0))
    run(config)
    monkeypatch.undo()
    unfinished = Path(f"{config.data.shards}.unfinished")
    (unfinished / "set" / "shard-00002.tar").write_bytes(b"short")
    (unfinished / "set" / ".tmp-shard-00099.tar").write_bytes(b"half")
    assert run(config).encoded == 5
    assert hashes(Path(config.data.shards)) == hashes(Path(whole.data.shards))


def test_a_lost_shard_of_an_earlier_plan_is_made_again(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its posts were none of those to encode when the second run was begun."""
    config = copied(whole, tmp_path / "lost")
    fewer = replace(config.data, posts=[str(tmp_path / "fewer.jsonl")])
    lines = Path(str(config.data.posts and config.data.posts[0])).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:30]))
    monkeypatch.setattr(prepare, "finish", lambda *_: prepare.Summary(Path(), 0, 0, {}, {}, {}, 0))
    run(replace(config, data=fewer))
    run(config)
    monkeypatch.undo()
    (Path(f"{config.data.shards}.unfinished") / "set" / "shard-00001.tar").unlink()
    summary = run(config)
    assert (summary.samples, summary.encoded) == (POSTS, 5)
    assert [row["key"] for row in read_jsonl(Path(config.data.shards) / "quarantine.jsonl")] == ["900"]
    verify_shards(Path(config.data.shards))


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one number, the size of its batch, with each forward of the VAE."""
    sizes: list[int] = []
    real = encoding.encode_raw_latents

    def counting(vae: Any, pixels: Any) -> Any:
        sizes.append(len(pixels))
        return real(vae, pixels)

    monkeypatch.setattr(encoding, "encode_raw_latents", counting)
    return sizes


def test_added_posts_alone_are_encoded(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copied(whole, tmp_path / "more", shards=True)
    folder, before = tmp_path / "more", hashes(Path(config.data.shards))
    for number in range(1000, 1007):
        draw(folder / "images" / f"{number}.png", number)
        add_posts(folder, {"id": number, "tag_string_general": "new"})
    encoded = count_encoded(monkeypatch)
    summary = run(config)
    assert (summary.samples, summary.encoded, sum(encoded)) == (POSTS + 7, 7, 7)
    after = hashes(Path(config.data.shards))
    assert {name: after[name] for name in before if name.endswith(".tar")} == {
        name: value for name, value in before.items() if name.endswith(".tar")
    }
    fresh = copied(config, tmp_path / "fresh")
    run(fresh)
    index, other = open_index(config.data.shards), open_index(fresh.data.shards)
    assert index.fingerprint == other.fingerprint and len(index) == POSTS + 7
    assert all(np.array_equal(read_raw_latents(index, n), read_raw_latents(other, n)) for n in range(len(index)))
    verify_shards(Path(config.data.shards))
    assert run(config).encoded == 0 and hashes(Path(config.data.shards)) == after


def test_posts_are_added_to_a_killed_run(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copied(whole, tmp_path / "both")
    sidecars = Path(f"{config.data.shards}.unfinished") / "rows"
    child = fork(lambda: run(config))
    while len(list(sidecars.glob("shard-*.arrow"))) < 4:
        time.sleep(0.001)
    kill([child])
    draw(tmp_path / "both" / "images" / "1000.png", 1000)
    add_posts(tmp_path / "both", {"id": 1000})
    encoded = count_encoded(monkeypatch)
    summary = run(config)
    assert summary.samples == POSTS + 1 and sum(encoded) == summary.encoded <= POSTS + 1 - 20
    fresh = copied(config, tmp_path / "fresh")
    run(fresh)
    assert open_index(config.data.shards).fingerprint == open_index(fresh.data.shards).fingerprint
    verify_shards(Path(config.data.shards))


def test_what_changed_costs_only_itself(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copied(whole, tmp_path / "edited", shards=True)
    folder, shards = tmp_path / "edited", Path(config.data.shards)
    encoded = count_encoded(monkeypatch)

    def keys() -> list[str]:
        return open_index(shards).table["key"].to_pylist()

    # other tags: in the index, nothing is encoded
    edit_posts(folder, lambda post: post | {"tag_string_general": "other"} if post["id"] == 7 else post)
    run(config)
    index = open_index(shards)
    assert index.row(keys().index("7"))["tags_general"] == "other" and encoded == []
    # a post that is gone and one that comes back
    before = hashes(shards)
    edit_posts(folder, lambda post: None if post["id"] == 7 else post)
    assert run(config).samples == POSTS - 1 and "7" not in keys()
    verify_shards(shards)
    add_posts(folder, {"id": 7, "tag_string_general": "other"})
    assert run(config).samples == POSTS and "7" in keys() and encoded == []
    # the same bytes at another time
    os.utime(folder / "images" / "8.png", (1, 1))
    assert run(config).encoded == 0 and encoded == []
    # another drawing
    draw(folder / "images" / "8.png", 4000, (90, 60))
    assert run(config).encoded == 1 and encoded == [1]
    fresh = copied(config, tmp_path / "fresh")
    run(fresh)
    assert open_index(shards).fingerprint == open_index(fresh.data.shards).fingerprint
    verify_shards(shards)
    # a drawing that is broken now: what was encoded of the old one does not stand for it
    (folder / "images" / "8.png").write_bytes(b"")
    assert run(config).set_aside == {"not_an_image": 1, "empty": 1} and "8" not in keys()
    assert {name: value for name, value in hashes(shards).items() if name in before and name.endswith("tar")} == {
        name: value for name, value in before.items() if name.endswith("tar")
    }


def test_a_set_of_an_older_version_is_hashed(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copied(whole, tmp_path / "old", shards=True)
    (Path(config.data.shards) / "latents.arrow").unlink()
    with pytest.raises(UserError, match=r"latents.arrow is missing; restore it from a copy"):
        edit_posts(tmp_path / "old", lambda post: post | {"score": 2})
        run(config)
    manifest = Path(config.data.shards) / "manifest.json"
    kept = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "latents_sha256"}
    write_json(manifest, seal_manifest(kept))
    edit_posts(tmp_path / "old", lambda post: post | {"score": 1})
    encoded = count_encoded(monkeypatch)
    summary = run(config)
    assert (summary.samples, summary.encoded, encoded) == (POSTS, 0, [])
    assert set(open_index(config.data.shards).table["score"].to_pylist()) == {1}
    assert (Path(config.data.shards) / "latents.arrow").exists()


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_new_shards_join_a_set(whole: Config, tmp_path: Path, moment: int) -> None:
    config = copied(whole, tmp_path / "joined", shards=True)
    for number in (1000, 1001):
        draw(tmp_path / "joined" / "images" / f"{number}.png", number)
        add_posts(tmp_path / "joined", {"id": number})

    def interrupted() -> None:
        moved: list[Path] = []
        real = Path.replace

        def replace_some(path: Path, target: Path) -> Path:
            if target.parent == Path(config.data.shards):
                if len(moved) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                moved.append(path)
            return real(path, target)

        Path.replace = replace_some  # type: ignore[assignment, method-assign]
        run(config)

    child = fork(interrupted)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed == (moment < 6)
    summary = run(config)
    assert summary.samples == POSTS + 2
    verify_shards(Path(config.data.shards))
    fresh = copied(config, tmp_path / "fresh")
    run(fresh)
    assert open_index(config.data.shards).fingerprint == open_index(fresh.data.shards).fingerprint
    assert not Path(f"{config.data.shards}.unfinished").exists()


def test_images_of_a_bucket_share_a_forward(whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copied(whole, tmp_path / "batched")
    config = replace(config, data=replace(config.data, encode_batch_size=4, samples_per_shard=30, decode_processes=0))
    encoded = count_encoded(monkeypatch)
    summary = run(config)
    assert sum(encoded) == summary.samples == POSTS and set(encoded) == {1, 2, 3, 4} - ({1, 2, 3, 4} - set(encoded))
    assert max(encoded) == 4
    index, other = open_index(config.data.shards), open_index(whole.data.shards)
    assert index.table["key"].equals(other.table["key"])
    for number in range(len(index)):
        batched, single = read_raw_latents(index, number), read_raw_latents(other, number)
        assert batched.shape == single.shape and np.abs(batched - single).max() < 2e-3

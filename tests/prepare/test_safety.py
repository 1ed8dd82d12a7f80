"""What a fresh reading of the preparation found: each way in which posts, sets or latents were lost or mixed up."""

import io
import os
import shutil
import signal
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.posts_on_disk import copy_of, draw, hashes, make_base, make_config, make_posts, read_jsonl, run
from support.ranks import add_posts, fork, kill, start_ranks
from trainer.config.schema import Config, FiltersConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.data.post import ImagePlace, Post
from trainer.prepare import encode as encoding
from trainer.prepare import inputs, merge, prepare
from trainer.prepare.inputs import survey_inputs
from trainer.prepare.verify import verify_shards
from trainer.prepare.work import Work, make_folders, read_pending


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Config:
    make_posts(tmp_path / "posts", 10)
    return make_config(base, tmp_path / "posts", max_bad_fraction=0.9)


def keys(config: Config) -> list[str]:
    return open_index(config.data.shards).table["key"].to_pylist()


def test_chunks_without_a_shard_are_not_taken_for_others(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files touched, killed before the end; then posts are added, and killed again right after the new plan."""
    run(config)
    folder = Path(str(config.data.images))
    for image in folder.iterdir():
        os.utime(image, (1, 1))
    monkeypatch.setattr(prepare, "finish", lambda *_: os._exit(1))
    for _ in range(2):
        os.waitpid(fork(lambda: run(config)), 0)
        for number in range(1000, 1005):
            if not (folder / f"{number}.png").exists():
                draw(folder / f"{number}.png", number)
                add_posts(folder.parent, {"id": number, "tags": "1girl"})
        monkeypatch.setattr(prepare, "read_done", lambda *_: os._exit(1))
    monkeypatch.undo()
    assert run(config).samples == 15 and {"1000", "1004"} <= set(keys(config))
    verify_shards(Path(config.data.shards))


def test_ranks_that_outlive_their_main_process_keep_others_out(config: Config, tmp_path: Path) -> None:
    unfinished_folder = Path(f"{config.data.shards}.unfinished")
    real = prepare.encode_chunk

    def slow(*words: object) -> object:
        time.sleep(0 if os.environ["RANK"] == "0" else 5)
        return real(*words)  # type: ignore[arg-type]

    prepare.encode_chunk = slow  # type: ignore[assignment]
    try:
        main, other = start_ranks(config, 2)
    finally:
        prepare.encode_chunk = real
    while not list((unfinished_folder / "rows").glob("*.arrow")):
        time.sleep(0.005)
    kill([main])
    with pytest.raises(UserError, match="another process is preparing"):
        run(config)
    kill([other])
    assert run(config).samples == 10


def test_where_a_set_cannot_be_put_is_said_first(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file"):
        run(replace(config, data=replace(config.data, shards=str(tmp_path / "file"))))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    linked = replace(config, data=replace(config.data, shards=str(tmp_path / "link")))
    assert run(linked).samples == 10 and (tmp_path / "link").is_symlink()
    add_posts(tmp_path / "posts", {"id": 11, "file": "1.png", "tags": "1girl"})
    assert run(linked).samples == 11 and len(list((tmp_path / "elsewhere").glob("*.tar"))) == 3
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(UserError, match="mount point"):
        run(replace(config, data=replace(config.data, shards=str(tmp_path / "volume"))))


def test_another_image_of_the_same_size_and_time_is_seen(config: Config, tmp_path: Path) -> None:
    images = Path(str(config.data.images))
    for number in (1, 2):
        pixels = np.full((64, 64, 3), 100 * number, dtype=np.uint8)
        (images / f"x{number}.bmp").write_bytes(bitmap(pixels))
        os.utime(images / f"x{number}.bmp", (5, 5))
    add_posts(tmp_path / "posts", {"id": 50, "file": "x1.bmp", "tags": "1girl"})
    run(config)
    posts = tmp_path / "posts" / "posts.jsonl"
    posts.write_text(posts.read_text().replace("x1.bmp", "x2.bmp"))
    assert run(config).encoded == 1


def bitmap(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="BMP")
    return buffer.getvalue()


def png(width: int, height: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of zeros with chunks of one's own choice in front of the pixels."""
    depth = {2: 3, 3: 1}[colour]
    rows = zlib.compress(bytes((1 + depth * width) * height), 9)
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    parts = [head, *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_small_files_that_promise_much(config: Config, tmp_path: Path, workers: int) -> None:
    """Palettes that are not there or too long, and slivers that would become giants."""
    hostile = {
        "no_palette": png(64, 64, 3),
        "long_transparency": png(64, 64, 3, (b"PLTE", bytes(9)), (b"tRNS", bytes(300))),
        "sliver": png(1, 400_000, 2),
        "needle": png(1, 80_000, 2),
    }
    images = Path(str(config.data.images))
    for number, (name, content) in enumerate(hostile.items()):
        (images / f"{name}.png").write_bytes(content)
        add_posts(tmp_path / "posts", {"id": 100 + number, "file": f"{name}.png", "tags": "1girl"})
    summary = run(replace(config, data=replace(config.data, decode_processes=workers)))
    reasons = {line["key"]: line["reason"] for line in read_jsonl(Path(config.data.shards) / "quarantine.jsonl")}
    assert reasons["102"] == "too_narrow" and summary.samples + len(reasons) == 14 and "100" in reasons


def test_a_set_that_came_in_between_is_left_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "place_set", lambda *_: os._exit(1))
    os.waitpid(fork(lambda: run(config)), 0)
    monkeypatch.undo()
    other = copy_of(config, tmp_path / "other")
    add_posts(tmp_path / "other", {"id": 11, "file": "1.png", "tags": "1girl"})
    run(other)
    shutil.copytree(other.data.shards, config.data.shards)
    before = hashes(Path(config.data.shards))
    with pytest.raises(UserError, match="is not the set any more"):
        run(config)
    assert hashes(Path(config.data.shards)) == before
    shutil.rmtree(config.data.shards)
    assert run(config).samples == 10


def test_what_is_too_long_for_a_post_or_caption_is_set_aside(base: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        draw(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / "images" / "1.txt").write_text("a caption")
    with (tmp_path / "images" / "2.txt").open("wb") as file:
        file.truncate(2**33)
    folder = make_config(base, tmp_path, posts=None, max_bad_fraction=0.9)
    assert run(folder).set_aside == {"bad_record": 1}
    with (tmp_path / "posts.jsonl").open("wb") as file:
        file.write(b'{"id": 1, "tags": "a"}\n"' + b"x" * 9_000_000 + b'"\n{"id": 2, "tags": "a"}\n')
    lines = make_config(base, tmp_path, shards=str(tmp_path / "lines"), max_bad_fraction=0.9)
    assert (run(lines).samples, run(lines).set_aside) == (2, {"bad_record": 1})


def test_settings_of_work_that_does_not_exist_bind_nobody(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "survey_inputs", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(fork(lambda: run(config)), 0)
    monkeypatch.undo()
    assert run(replace(config, data=replace(config.data, samples_per_shard=3))).shards == 4


def test_what_was_encoded_before_is_told_as_it_is(config: Config, tmp_path: Path) -> None:
    run(config)
    for number in range(100, 109):
        add_posts(tmp_path / "posts", {"id": number, "file": f"{1 if number < 108 else number}.png", "tags": "1girl"})
    draw(tmp_path / "posts" / "images" / "108.png", 108)
    summary = run(replace(config, filters=replace(config.filters, drop_duplicates=True)))
    assert (summary.samples, summary.encoded, summary.filtered) == (11, 1, {"drop_duplicates": 8})
    assert "10 of 11 samples were encoded before" in str(summary)


def test_batch_sizes_of_the_vae_are_not_mixed(config: Config, tmp_path: Path) -> None:
    run(config)
    add_posts(tmp_path / "posts", {"id": 11, "file": "1.png", "tags": "1girl"})
    with pytest.raises(UserError, match="encode_batch_size was None, is 4"):
        run(replace(config, data=replace(config.data, encode_batch_size=4)))
    four = copy_of(config, tmp_path / "four")
    four = replace(four, data=replace(four.data, encode_batch_size=4))
    run(four)
    add_posts(tmp_path / "four", {"id": 12, "file": "2.png", "tags": "1girl"})
    with pytest.raises(UserError, match="encode_batch_size was 4, is None"):
        run(replace(four, data=replace(four.data, encode_batch_size=1)))


def test_an_image_that_was_mended_counts_though_its_size_and_time_are_the_same(base: Path, tmp_path: Path) -> None:
    """As after a restored backup, or a plug-in that was installed: what was set aside is not done yet."""
    make_posts(tmp_path, 6)
    image = sorted((tmp_path / "images").iterdir())[2]
    content, times = image.read_bytes(), (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    config = make_config(base, tmp_path, max_bad_fraction=0.0, samples_per_shard=10)
    image.write_bytes(bytes(len(content)))
    os.utime(image, ns=times)
    with pytest.raises(UserError, match="1 of 6 inputs are set aside"):
        run(config)
    image.write_bytes(content)
    os.utime(image, ns=times)
    assert run(config).samples == 6


def test_wide_posts_get_memory_for_whole_runs_of_a_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, given = Work(tmp_path / "shards"), list[int]()
    make_folders(work)
    words = "a" * 6000  # with 300 MB and a tenth of the inputs a sort of 90,000 such posts failed
    posts = (Post(key=f"{n:08d}", source="s", caption=words, image=ImagePlace(tmp_path)) for n in range(2000))
    survey = survey_inputs(posts, FiltersConfig(), "|||", work.inputs)
    connect = merge.connect
    monkeypatch.setattr(merge, "connect", lambda *args, **tables: given.append(args[1]) or connect(*args, **tables))
    merge.plan_chunks(work, None, survey, 1500)
    assert [len(batch) for batch in read_pending(work).values()] == [1500, 500]
    assert given[0] > 122_880 * 6000


def test_what_could_not_be_read_once_is_looked_at_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right that was missing, a disk that failed for a moment: neither size nor time of the file tells of its end."""
    read_place = encoding.read_place

    def read_nowhere(struct: dict[str, Any]) -> ImagePlace:
        place = read_place(struct)
        return place._replace(offset=0, length=10**9) if place.path.stem == "3" else place

    monkeypatch.setattr(encoding, "read_place", read_nowhere)
    assert run(config).set_aside == {"unreadable": 1}
    monkeypatch.undo()
    summary = run(config)
    assert (summary.samples, summary.encoded, summary.set_aside) == (10, 1, {})
    make_posts(tmp_path / "sound", 10)
    quiet = make_config(Path(config.model.pretrained), tmp_path / "sound")
    run(quiet)
    assert open_index(config.data.shards).fingerprint == open_index(quiet.data.shards).fingerprint


def test_a_plug_in_that_was_installed_lets_images_be_looked_at_again(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "posts" / "images" / "20.png").write_bytes(b"as of a phone")
    add_posts(tmp_path / "posts", {"id": 20, "file": "20.png", "tags": "1girl"})
    run(config)
    looked: list[int] = []
    plan_chunks = prepare.plan_chunks
    monkeypatch.setattr(prepare, "plan_chunks", lambda *words: (looked.append(1), plan_chunks(*words)))
    assert run(config).set_aside == {"not_an_image": 1} and not looked
    monkeypatch.setattr(inputs, "list_formats", lambda: {"PNG": ("png",), "HEIF": ("heic",)})
    for _ in range(2):
        assert run(config).set_aside == {"not_an_image": 1} and looked == [1]


def test_a_newer_version_that_encodes_nothing_leaves_the_fingerprint(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Images with other times, as on another disk, are hashed, and are the same: no run may be kept from resuming."""
    run(config)
    before = open_index(config.data.shards)
    monkeypatch.setattr(prepare, "__version__", "99.0.0")
    for image in (tmp_path / "posts" / "images").iterdir():
        os.utime(image, (1e9, 1e9))
    assert run(config).encoded == 0
    after = open_index(config.data.shards)
    assert after.fingerprint == before.fingerprint and after.manifest["latents"] == before.manifest["latents"]
    add_posts(tmp_path / "posts", {"id": 12, "file": "12.png", "tags": "1girl"})
    draw(tmp_path / "posts" / "images" / "12.png", 12)
    assert run(config).encoded == 1
    assert open_index(config.data.shards).manifest["latents"]["code_version"] == "99.0.0"

"""What sources say beside posts and rejects is counted by source and kind: manifest, terminal, page, notes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support.posts_on_disk import draw, make_base, make_config, read_jsonl, run
from trainer.config.schema import Config
from trainer.data.index import open_index
from trainer.data.post import ImagePlace, Note, Post
from trainer.data.sources.records import Item, Remark
from trainer.prepare import prepare
from trainer.prepare.remarks import EXAMPLES_OF_A_KIND
from trainer.report.data_page import make_report, render_data, summarise


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for number in range(30):
        draw(tmp_path / f"{number}.png", number)
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "posts.jsonl").touch()  # looked for, and never read: the sources are replaced
    return make_config(make_base(tmp_path / "base"), tmp_path)


def say(monkeypatch: pytest.MonkeyPatch, folder: Path, *remarks: Remark, noted: int = 0) -> None:
    """Have the sources bring 30 posts, ``noted`` of which carry a note, and some remarks."""

    def iterate(_: object) -> Iterator[Item]:
        yield from remarks[:1]
        for number in range(30):
            notes = (Note("unreadable score", f"score 'x{number}'"),) if number < noted else ()
            image, origin = ImagePlace(folder / f"{number}.png"), f"line {number}"
            yield Post(str(number), source="a", tags_general="1girl", image=image, origin=origin, notes=notes)
        yield from remarks[1:]

    monkeypatch.setattr(prepare, "iterate_sources", iterate)


def test_remarks_reach_manifest_terminal_and_page(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = [Remark("b", "file of no known kind: .mp4", count, "x.mp4", "see the formats") for count in (2, 3)]
    say(monkeypatch, tmp_path, *twice, noted=25)
    summary = run(config)
    manifest = open_index(config.data.shards).manifest
    counted = {"b": {"file of no known kind: .mp4": 5}, "a": {"unreadable score": 25}}
    assert manifest["counts"]["by_source"] == counted
    # they are neither inputs nor set aside
    assert (manifest["counts"]["inputs"], manifest["counts"]["set_aside"]) == (30, {})
    assert "noted in b: file of no known kind: .mp4: 5" in str(summary) and "notes.jsonl" in str(summary)
    lines = read_jsonl(Path(config.data.shards) / "notes.jsonl")
    assert [line["note"] for line in lines].count("unreadable score") == EXAMPLES_OF_A_KIND < 25
    assert lines[0] == {"key": None, "origin": "x.mp4", "note": "file of no known kind: .mp4", "source": "b",
                        "detail": "see the formats"}  # fmt: skip
    assert lines[1]["key"] == "0" and lines[1]["detail"] == "score 'x0'"
    report = make_report(replace(config, schedule=replace(config.schedule, max_steps=1)))
    page, table = render_data(report), summarise(report)
    assert "25 unreadable score (a)" in table and "5 file of no known kind: .mp4 (b)" in table
    assert "Noted in a" in page and "unreadable score" in page and "Noted in b" in page


def test_a_set_beside_its_images_is_no_input_of_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for number in range(3):
        draw(tmp_path / "sub" / f"{number}.png", number)
        (tmp_path / "sub" / f"{number}.txt").write_text("a caption")
    (tmp_path / "film.mp4").write_bytes(b"x")
    base = make_base(tmp_path.with_name(tmp_path.name + "_base"))
    config = make_config(base, tmp_path, posts=None, images=str(tmp_path))
    first = run(config)
    assert first.by_source == {tmp_path.name: {"unread file: .mp4": 1}}
    before = open_index(config.data.shards).manifest
    assert run(config).encoded == 0 and open_index(config.data.shards).manifest == before


def test_remarks_alone_are_a_change_of_the_set(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, tmp_path)
    run(config)
    before = open_index(config.data.shards)
    assert "by_source" not in before.manifest["counts"]  # as in the sets of older versions
    say(monkeypatch, tmp_path, Remark("b", "unread"))
    summary = run(config)
    after = open_index(config.data.shards)
    assert (summary.encoded, summary.by_source) == (0, {"b": {"unread": 1}})
    assert after.fingerprint == before.fingerprint and after.manifest["inputs"] != before.manifest["inputs"]
    assert str(run(config)) == str(summary)  # nothing to do: told from the manifest

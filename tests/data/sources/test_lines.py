"""Captions of several lines: the first, all as tags, or one of them in each draw; the same for every kind of source."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.captions import draw_caption
from support.paths import REPOSITORY
from trainer.config.schema import CaptionsConfig, DataConfig, FiltersConfig, SourceConfig
from trainer.core.rng import rng
from trainer.data.captions import VARIANT_SEPARATOR
from trainer.data.post import Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import settle_caption
from trainer.data.template import ready_rules
from trainer.prepare.inputs import find_filter
from trainer.report.survey import count_finished

PNG = (REPOSITORY / "demo" / "images" / "bee.png").read_bytes()
TEXT = "1girl, solo\r\n\n a second, caption ,\nthird\n"
WANTED = {"first": "1girl, solo", "tags": "1girl, solo, a second, caption, third",
          "variants": VARIANT_SEPARATOR.join(["1girl, solo", "a second, caption ,", "third"])}  # fmt: skip


def source_of(folder: Path, kind: str) -> dict[str, Any]:
    """A source of this kind whose only post has the caption."""
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(PNG)
    images = str(folder / "images")
    match kind:
        case "folder":
            (folder / "images" / "a.txt").write_bytes(TEXT.encode())
            return {"path": images}
        case "tars":
            with tarfile.open(folder / "t.tar", "w") as tar:
                for name, content in (("a.png", PNG), ("a.txt", TEXT.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            return {"path": str(folder / "t.tar")}
        case "posts":
            pq.write_table(pa.Table.from_pylist([{"file": "a.png", "caption": TEXT}]), folder / "posts.parquet")
            return {"path": str(folder / "posts.parquet"), "images": images}
        case _:
            (folder / "meta.json").write_text(json.dumps({"a": {"caption": TEXT}}))
            return {"path": str(folder / "meta.json"), "images": images}


@pytest.mark.parametrize("kind", ["folder", "tars", "posts", "kohya"])
@pytest.mark.parametrize("lines", sorted(WANTED))
def test_every_kind_of_source_reads_lines_alike(tmp_path: Path, kind: Any, lines: Any) -> None:
    source = SourceConfig(kind=kind, lines=lines, **source_of(tmp_path, kind))
    (post,) = (item for item in iterate_sources(DataConfig("s", sources=[source])) if isinstance(item, Post))
    assert post.caption == WANTED[lines]
    (note,) = post.notes
    assert note.kind.startswith("captions of several lines")
    assert "'a second, caption ,'" in note.detail if lines == "first" else note.detail == "3 lines"


def test_first_is_the_default_and_one_line_is_left_alone() -> None:
    assert SourceConfig("folder", "a").lines == "first"
    for caption in (None, "", "1girl, solo", " kept \n", "\n\n", "1girl  ||| solo"):
        post = Post("a", caption=caption)
        assert settle_caption(post, "first") == settle_caption(post, "variants") == post
    assert settle_caption(Post("a", caption=f"a{VARIANT_SEPARATOR}"), "first").caption == "a "
    assert settle_caption(Post("a", caption=f"a{VARIANT_SEPARATOR}b"), "first").caption == "a"


def test_tags_of_sd_scripts_join_each_variant(tmp_path: Path) -> None:
    source = source_of(tmp_path, "kohya")
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"caption": "one\ntwo", "tags": "x, y"}}))
    for lines, wanted in (("first", "one"), ("variants", f"one,x, y{VARIANT_SEPARATOR}two,x, y")):
        (post,) = (item for item in iterate_sources(DataConfig("s", sources=[SourceConfig(
            "kohya", lines=lines, **source)])) if isinstance(item, Post))  # type: ignore[arg-type]  # fmt: skip
        assert post.caption == wanted


def test_each_pass_draws_one_variant() -> None:
    caption = VARIANT_SEPARATOR.join(["a ||| b, c", "d, e", "f"])
    rules = ready_rules(CaptionsConfig())
    drawn = [draw_caption(caption, rules, rng("caption", 1, pass_, "key")) for pass_ in range(60)]
    assert {frozenset(each.split(", ")) for each in drawn} == {frozenset("abc"), frozenset("de"), frozenset("f")}
    assert drawn == [draw_caption(caption, rules, rng("caption", 1, pass_, "key")) for pass_ in range(60)]
    assert all(each.startswith("a, ") for each in drawn if "a" in each)


def test_a_caption_without_variants_draws_what_it_always_did() -> None:
    tags = "abcdefgh"
    order = np.random.default_rng(3)
    order.random()  # whether it is dropped
    expected = ", ".join(tags[place] for place in order.permutation(len(tags)))
    assert draw_caption(", ".join(tags), ready_rules(CaptionsConfig()), np.random.default_rng(3)) == expected


def test_filters_and_the_page_see_the_tags_of_all_variants() -> None:
    caption = VARIANT_SEPARATOR.join(["1girl, long hair", "solo"])
    row = {"caption": caption, "tags_general": None}
    assert find_filter(row, FiltersConfig(required_tags=["long_hair", "solo"]), "|||") is None
    assert find_filter(row, FiltersConfig(forbidden_tags=["solo"]), "|||") == "forbidden_tags"
    counted = count_finished(pa.table({"caption": [caption]}), "|||", 9)
    assert sorted(counted.top) == [("1girl", 1), ("long hair", 1), ("solo", 1)]

"""Tables of Danbooru over a post's tags: what is replaced, left out as implied, removed, and what is refused."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.captions import compose_caption
from trainer.config.schema import CaptionsConfig
from trainer.core.errors import UserError
from trainer.data.tag_maps import TagMaps, hash_tag_maps, map_tags, read_tag_maps
from trainer.data.template import ready_rules


def pair(tag: str, end: str, **more: Any) -> dict[str, Any]:
    return {"id": 1, "antecedent_name": tag, "consequent_name": end, "status": "active"} | more


ALIASES = [pair("miku", "miku_hatsune"), pair("miku_hatsune", "hatsune_miku"), pair("solo", "x", status="deleted")]
IMPLICATIONS = [pair("thighhighs", "legwear"), pair("striped_thighhighs", "thighhighs"), pair("2girls", "girls")]


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        rows = [",".join(lines[0]), *(",".join(str(value) for value in line.values()) for line in lines)]
        path.write_text("\n".join(rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(lines))
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(params=[".jsonl", ".csv", ".json"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> CaptionsConfig:
    end = request.param
    deprecated = [{"name": "hair", "is_deprecated": True}, {"name": "smile", "is_deprecated": False}]
    return CaptionsConfig(
        tag_aliases=write(tmp_path / f"tag_aliases{end}", ALIASES),
        tag_implications=write(tmp_path / f"tag_implications{end}", IMPLICATIONS),
        tag_removals=write(tmp_path / f"tags{end}", deprecated),
    )


def test_the_tables_of_danbooru(config: CaptionsConfig) -> None:
    maps = read_tag_maps(config)
    assert maps.aliases == {"miku": "hatsune_miku", "miku_hatsune": "hatsune_miku"}
    assert maps.implied["striped_thighhighs"] == {"thighhighs", "legwear"}
    assert maps.removed == {"hair"}
    counts: Counter[str] = Counter()
    own = {"general": ["striped_thighhighs", "legwear", "hair", "solo"], "character": ["miku", "hatsune_miku"]}
    assert map_tags(own, maps, counts) == {"general": ["striped_thighhighs", "solo"], "character": ["hatsune_miku"]}
    assert counts == {"replaced": 1, "implied": 1, "removed": 1}


def test_they_reach_captions(config: CaptionsConfig) -> None:
    record = dict.fromkeys(("caption", "rating", "score", "year", "extra", "tags_copyright", "tags_artist"))
    record |= {"tags_general": "2girls girls hair smile", "tags_character": "miku", "tags_meta": ""}
    assert compose_caption(record, ready_rules(config)) == "2girls, hatsune miku ||| smile"


def test_protected_tags_are_neither_implied_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("legwear\n\n hair \n")
    (tmp_path / "gone.txt").write_text("hair\nsolo\n")
    implications = write(tmp_path / "tag_implications.csv", IMPLICATIONS)
    maps = read_tag_maps(CaptionsConfig(tag_implications=implications, tag_removals=str(tmp_path / "gone.txt"),
                                        protected_tags_file=str(tmp_path / "keep.txt")))  # fmt: skip
    own = {"general": ["thighhighs", "legwear", "hair", "solo"]}
    assert map_tags(own, maps) == {"general": ["thighhighs", "legwear", "hair"]}


def test_their_hash_is_of_what_they_say(tmp_path: Path) -> None:
    first = CaptionsConfig(tag_aliases=write(tmp_path / "a.csv", ALIASES))
    again = CaptionsConfig(tag_aliases=write(tmp_path / "b.jsonl", [ALIASES[1], ALIASES[0]]))
    other = CaptionsConfig(tag_aliases=write(tmp_path / "c.csv", ALIASES[:1]))
    hashes = [hash_tag_maps(read_tag_maps(each)) for each in (first, again, other, CaptionsConfig())]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3 and hashes[3] == hash_tag_maps(TagMaps())
    assert hash_tag_maps(read_tag_maps(CaptionsConfig(protected_tags=["a_b"]))) != hashes[3]


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("tag_aliases", [pair("a", "b"), pair("b", "a")], "captions.tag_aliases: a circle: a -> b -> a"),
        ("tag_implications", [pair("a", "b"), pair("b", "a")], "captions.tag_implications: a implies itself"),
        ("tag_aliases", [{"name": "a"}], "a line needs antecedent_name and consequent_name, but has name"),
        ("tag_removals", [{"tag": "a"}], "captions.tag_removals: .*: a line needs name"),
        ("tag_aliases", None, "captions.tag_aliases: .* cannot be read: No such file"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, field: str, content: list[dict[str, Any]] | None, message: str) -> None:
    file = tmp_path / "table.jsonl"
    if content is not None:
        write(file, content)
    with pytest.raises(UserError, match=message):
        read_tag_maps(CaptionsConfig(**{field: str(file)}))  # type: ignore[arg-type]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(pair("a", "b")) + "\n{broken\n")
    with pytest.raises(UserError, match=r"captions\.tag_aliases: .*a\.jsonl: line 2: "):
        read_tag_maps(CaptionsConfig(tag_aliases=str(tmp_path / "a.jsonl")))
    with pytest.raises(UserError, match=r"captions\.protected_tags_file: .* cannot be read"):
        read_tag_maps(CaptionsConfig(protected_tags_file=str(tmp_path / "none.txt")))


def test_what_a_removed_tag_implies_stands_for_itself(tmp_path: Path) -> None:
    """No other tag of the caption says it."""
    implications = write(tmp_path / "i.csv", [pair("animal_ear_fluff", "animal_ears"), pair("cat_ears", "animal_ears")])
    (tmp_path / "gone.txt").write_text("animal_ear_fluff\n")
    maps = read_tag_maps(CaptionsConfig(tag_implications=implications, tag_removals=str(tmp_path / "gone.txt")))
    counts = Counter[str]()
    own = {"general": ["animal_ear_fluff", "animal_ears", "solo"]}
    assert map_tags(own, maps, counts) == {"general": ["animal_ears", "solo"]}
    assert counts == {"removed": 1, "implied": 0, "replaced": 0}
    own["general"].append("cat_ears")
    assert map_tags(own, maps) == {"general": ["solo", "cat_ears"]}


@pytest.mark.parametrize("name", ["danbooru.tags.csv", "2026.11.tags.json", "tags.jsonl.gz"])
def test_a_table_is_known_by_the_end_of_its_name(tmp_path: Path, name: str) -> None:
    """And a line that does not say whether it is deprecated is not, in any format, where others say."""
    lines = [{"name": "hair", "is_deprecated": True}, {"name": "smile", "is_deprecated": None}]
    file = tmp_path / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    elif name.endswith(".csv"):
        file.write_text("name,is_deprecated\nhair,t\nsmile,\n")
    else:
        file.write_text(json.dumps(lines))
    assert read_tag_maps(CaptionsConfig(tag_removals=str(file))).removed == {"hair"}

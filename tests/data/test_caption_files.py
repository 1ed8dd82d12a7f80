"""The captions of other models, one file each: the order that their authors publish, over any stage, explained."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from support.captions import compose_caption
from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.data.caption_draws import draw_record, explain_parts, join_drawn
from trainer.data.index import open_index
from trainer.data.percentiles import resolve_anew
from trainer.data.shards import SCHEMA
from trainer.data.template import CaptionRules, ready_rules
from trainer.report.explain import explain_step

FOLDER = REPOSITORY / "configs/captions"
POST: dict[str, Any] = {
    "key": "7", "caption": None, "rating": "g", "score": 151, "year": 2017,
    "extra": '{"aesthetic_score": 0.9, "fav_count": 9}',
    "tags_general": "1girl smile", "tags_character": "hatsune_miku", "tags_copyright": "vocaloid",
    "tags_artist": "someone", "tags_meta": "highres",
}  # fmt: skip
PUBLISHED = {
    "animagine_2_0": "||| 1girl, smile, hatsune miku, vocaloid, someone, highres, masterpiece",
    "animagine_3_0": "1girl, hatsune miku, vocaloid, someone ||| rating: general, smile, mid, highres, masterpiece",
    "animagine_3_1": (
        "1girl, hatsune miku, vocaloid, someone ||| safe, smile, mid, highres, masterpiece, very aesthetic"
    ),
    "animagine_4_0": "1girl, hatsune miku, vocaloid, safe ||| someone, smile, highres, mid ||| masterpiece",
    "illustrious_v0_1": "1girl, hatsune miku, rating: general ||| smile ||| someone, masterpiece, oldest",
    "kohaku_epsilon": "1girl, hatsune miku, vocaloid, someone ||| smile ||| masterpiece, mid, highres, safe",
    "kohaku_zeta": "1girl, hatsune miku, vocaloid, someone ||| smile ||| masterpiece, mid, highres, safe",
    "noobai_1_0": "1girl, hatsune miku, vocaloid, someone, masterpiece, safe ||| smile, highres",
}


def read_rules(name: str, *stage: str) -> CaptionRules:
    """The rules of a file laid over a stage, with thresholds of scores from 0 up to the post's."""
    files = [REPOSITORY / "configs" / f"{each}.yaml" for each in stage]
    config = load_config([*files, FOLDER / f"{name}.yaml"]).captions
    schema = pa.schema([field.with_nullable(True) for field in SCHEMA])
    rows = [dict.fromkeys(SCHEMA.names) | {"rating": "g", "score": score} for score in range(152)]
    rows += [dict.fromkeys(SCHEMA.names) | {"rating": "g", "extra": f'{{"fav_count": {count}}}'} for count in range(10)]
    return ready_rules(resolve_anew(config, pa.Table.from_pylist(rows, schema=schema), "").captions)


def test_every_file_is_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED)
    named = (REPOSITORY / "docs/captions.md").read_text()
    assert all(f"({Path('../configs/captions') / name}.yaml)" in named for name in PUBLISHED)


@pytest.mark.parametrize("stage", ["stage1_feature_alignment", "stage2_refine_unet", "stage3_aesthetic"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_order_is_the_published_one(name: str, stage: str) -> None:
    rules = read_rules(name, stage)
    assert compose_caption(POST, rules) == PUBLISHED[name]
    for pass_ in range(5):
        drawn = draw_record(POST, pass_, 42, rules)
        parts = explain_parts(drawn)
        assert not any(part["left_out"] for part in parts)
        words = sorted(word.strip(" |") for word in PUBLISHED[name].replace("|||", ",").split(",") if word.strip())
        assert sorted(tag for part in parts for tag in part["tags"]) == words


def test_what_is_free_is_shuffled_and_nothing_else() -> None:
    for name, published in PUBLISHED.items():
        rules = read_rules(name, "stage1_feature_alignment")
        fixed, free, *tail = [part.split(", ") for part in published.replace("|||", "|").split("|")]
        first = [tag.strip() for tag in fixed if tag.strip()]
        last = [tag.strip() for part in tail for tag in part]
        seen = [join_drawn(draw_record(POST, pass_, 42, rules)).split(", ") for pass_ in range(30)]
        assert all(tags[: len(first)] == first and tags[len(tags) - len(last) :] == last for tags in seen)
        assert len({tuple(tags) for tags in seen}) > 1 or len(free) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_is_explained_with_each(tiny_settings: list[str], name: str, tmp_path: Path) -> None:
    words = [*tiny_settings, "run.name=x", "schedule.max_steps=1", f"run.output_dir={tmp_path}"]
    config = load_config([FOLDER / f"{name}.yaml"], words)
    index = open_index(config.data.shards)
    for line in explain_step(config, index, 0):
        assert line["kind"] == "tags" and line["parts"]
        tags = [tag for part in line["parts"] for tag in part["tags"]]
        assert sorted(tags) == sorted(line["caption"].split(", "))


def test_the_name_of_0_2_0_stays() -> None:
    stage = REPOSITORY / "configs/stage1_feature_alignment.yaml"
    old, new = (load_config([stage, REPOSITORY / f"configs/{name}.yaml"]) for name in (
        "captions_3_1", "captions/animagine_3_1"))  # fmt: skip
    assert old.captions == new.captions


def test_3_0_is_the_default() -> None:
    assert (
        load_config([REPOSITORY / "configs/stage1_feature_alignment.yaml", FOLDER / "animagine_3_0.yaml"]).captions
        == load_config([REPOSITORY / "configs/stage1_feature_alignment.yaml"]).captions
    )

"""What captions could be made of, counted over the index: the facts by which a card leaves out what nobody taught."""

import pyarrow as pa

from support.captions import compose_caption
from trainer.config.caption_fields import ColumnRule
from trainer.config.schema import CaptionsConfig
from trainer.data.captions import column_tags
from trainer.data.index import CAPTION_FIELDS, count_fields
from trainer.data.shards import SCHEMA
from trainer.data.template import ready_rules

EMPTY = dict.fromkeys(("caption", *CAPTION_FIELDS), 0)


def table_of(*rows: dict) -> pa.Table:
    schema = pa.schema([field.with_nullable(True) for field in SCHEMA])
    return pa.Table.from_pylist([dict.fromkeys(SCHEMA.names) | row for row in rows], schema=schema)


def test_a_finished_caption_hides_what_stands_beside_it() -> None:
    rows = [{"caption": "a fox", "score": 200, "rating": "g", "year": 2020, "tags_general": "1girl"}, {"caption": ""}]
    assert count_fields(table_of(*rows)) == EMPTY | {"caption": 2}
    assert compose_caption(rows[0], ready_rules(CaptionsConfig())) == "a fox"


def test_fields_are_counted_where_they_hold_something() -> None:
    rows = [{"score": 0, "tags_artist": ""}, {"rating": "e", "tags_artist": "someone"}, {"year": 2020, "score": -3}]
    assert count_fields(table_of(*rows)) == EMPTY | {"score": 2, "rating": 1, "year": 1, "tags_artist": 1}
    assert count_fields(table_of()) == EMPTY


def test_a_column_is_counted_where_it_gives_a_tag() -> None:
    extra = ['{"a": 0.5, "b(": -1}', '{"a": "0.5"}', '{"ab": 1}', '{"a": null}', None, '{"x": 1, "a": 7}']
    table = table_of(*({"extra": text} for text in extra), {"extra": extra[0], "caption": "finished"})
    assert count_fields(table, ["a", "b(", "c"]) == EMPTY | {"caption": 1, "extra.a": 2, "extra.b(": 1, "extra.c": 0}
    rules = CaptionsConfig(columns=[ColumnRule(column="a", tag="any")])
    assert sum(bool(column_tags({"extra": text}, rules)) for text in extra) == 2

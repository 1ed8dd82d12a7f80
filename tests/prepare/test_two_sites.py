"""Two sites number their posts alike: an error that says what to do, and prefix_keys, which does it."""

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

from support.posts_on_disk import draw, make_base, make_config, run
from trainer.config.schema import Config, SourceConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for number, site in enumerate(("danbooru", "gel.booru")):
        (tmp_path / site).mkdir()
        draw(tmp_path / site / "8001.png", number)
        (tmp_path / f"{site}.jsonl").write_text(json.dumps({"id": 8001, "tags": site}) + '\n{"id": 9}\n')
    return make_config(make_base(tmp_path / "base"), tmp_path, posts=None, images=None, max_bad_fraction=1.0)


def sources(folder: Path, *prefixed: bool) -> list[SourceConfig]:
    return [
        SourceConfig("posts", str(folder / f"{site}.jsonl"), str(folder / site), site, prefix_keys=prefix)
        for site, prefix in zip(("danbooru", "gel.booru"), prefixed, strict=True)
    ]


def test_the_error_says_how(config: Config, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, sources=sources(tmp_path, False, False)))
    with pytest.raises(UserError, match=r"the key 8001 occurs twice.* set prefix_keys: true for gel.booru in data"):
        run(config)
    # within one source a prefix would be of no use
    (tmp_path / "danbooru.jsonl").write_text('{"id": 8001}\n{"id": 8001}\n')
    config = replace(config, data=replace(config.data, sources=sources(tmp_path, True, False)))
    with pytest.raises(UserError, match=r"occurs twice: .*; remove one of the posts$"):
        run(config)


def test_keys_with_their_source(config: Config, tmp_path: Path) -> None:
    config = replace(config, data=replace(config.data, sources=sources(tmp_path, False, True)))
    run(config)
    table = open_index(config.data.shards).table
    assert table["key"].to_pylist() == ["8001", "gel%2Ebooru%2F8001"]
    assert [unquote(key) for key in table["key"].to_pylist()] == ["8001", "gel.booru/8001"]
    assert table["tags_general"].to_pylist() == ["danbooru", "gel.booru"]
    lines = (Path(config.data.shards) / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["9", "gel%2Ebooru%2F9"]

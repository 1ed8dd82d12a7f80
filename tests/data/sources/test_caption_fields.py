"""Captions where people have them: recognised by name, or refused with the fields that there are; never empty ones."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainer.config.schema import DataConfig, SourceConfig
from trainer.core.errors import UserError
from trainer.data.post import Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import Item, Reject


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, 0.png to 2.png."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def items_of(source: SourceConfig) -> list[Item]:
    return list(iterate_sources(DataConfig("shards", sources=[source])))


def told(items: list[Item]) -> list[Any]:
    """The caption of each post, the reason of each reject."""
    return [
        item.caption if isinstance(item, Post) else item.reason for item in items if isinstance(item, Post | Reject)
    ]


def notes_of(items: list[Item]) -> list[tuple[str, str]]:
    return [tuple(note) for item in items if isinstance(item, Post) for note in item.notes]  # type: ignore[misc]


def read_posts(images: Path, *records: dict[str, Any], **more: Any) -> list[Item]:
    file = images.with_name("posts.jsonl")
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return items_of(SourceConfig("posts", str(file), str(images), **more))


def read_table(images: Path, columns: dict[str, Any], **more: Any) -> list[Item]:
    file = images.with_name("posts.parquet")
    pq.write_table(pa.table({"id": [0, 1, 2]} | columns), file)
    return items_of(SourceConfig("posts", str(file), str(images), **more))


def read_dataset(images: Path, columns: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[Item]:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", images.with_name("cache"))
    content = [file.read_bytes() for file in sorted(images.iterdir())]
    datasets.Dataset(pa.table({"image": content} | columns)).save_to_disk(images.with_name("hub"))
    return items_of(SourceConfig("dataset", str(images.with_name("hub")), **more))


NAMES = ["caption", "captions", "text", "txt", "prompt", "Text"]


@pytest.mark.parametrize("name", NAMES)
def test_known_names(images: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = ["a cat", "a dog", None]
    rows = [{"file_name": f"{number}.png", name: text} for number, text in enumerate(texts)]
    assert told(read_posts(images, *rows)) == texts
    assert told(read_table(images, {name: texts})) == texts
    assert told(read_dataset(images, {name: texts}, monkeypatch)) == texts


def test_a_list_of_captions_is_several_lines(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = pa.array([["one", " two\nlines "], [], None], pa.list_(pa.string()))
    firsts = [(text or "").split("\n")[0] for text in told(read_dataset(images, {"caption": column}, monkeypatch))]
    assert firsts == ["one", "", ""]
    meta = images.with_name("meta.json")
    meta.write_text(
        json.dumps({"0": {"caption": ["a", "b"]}, "1": {"tags": ["1girl", "long hair"]}, "2": {"text": "c"}})
    )
    assert told(items_of(SourceConfig("kohya", str(meta), str(images)))) == ["a", "1girl, long hair", "c"]


def test_tags_make_the_caption_and_text_beside_them_is_noted(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = read_posts(images, {"id": 0, "tags": "1girl", "text": "a cat"}, {"id": 1, "tags": "", "text": "a dog"})
    assert told(items) == [None, "a dog"]
    assert [kind for kind, _ in notes_of(items)] == ["text beside tags, which make the caption"]
    columns = {"tag_string_general": ["1girl", "", "1boy"], "prompt": ["a cat", "a dog", ""]}
    assert told(read_dataset(images, columns, monkeypatch)) == [None, "a dog", None]
    # an empty text is no caption, in a column that is named too
    assert told(read_table(images, columns, caption_column="prompt")) == ["a cat", "a dog", None]


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"text": ["a"] * 3, "prompt": ["b"] * 3},
            r"several columns of captions \(text, prompt\): set its",
        ),
        ({"en": ["a"] * 3, "size": [1] * 3}, r"none that is called caption, .* caption_column to one of \w+, en, size"),
        ({"blip": [["a", "b"]] * 3}, r"caption_column to one of \w+, blip"),
    ],
)
def test_unclear_columns_are_refused(
    images: Path, monkeypatch: pytest.MonkeyPatch, kind: str, columns: dict[str, Any], said: str
) -> None:
    def read(**more: Any) -> list[Item]:
        return read_table(images, columns, **more) if kind == "parquet" else read_dataset(
            images, columns, monkeypatch, **more)  # fmt: skip

    with pytest.raises(UserError, match=r"^data\.sources\.0: .*" + said):
        read()
    assert told(read(caption_column=next(iter(columns))))[0].startswith("a")
    with pytest.raises(UserError, match=r"has no column none, only \w+, " + next(iter(columns))):
        read(caption_column="none")


def test_unclear_records(images: Path) -> None:
    items = read_posts(images, {"id": 0, "text": "a", "prompt": "b"}, {"id": 1, "en": "c", "rating": "g"}, {"id": 2})
    assert told(items) == ["bad_record", None, None]
    assert [item.detail for item in items if isinstance(item, Reject)] == [
        "text, prompt may each be the caption: set caption_column to one of them"]  # fmt: skip
    assert notes_of(items) == [("neither caption nor tags, but other text", "the record has text in en")]
    assert told(read_posts(images, {"id": 0, "en": "a", "caption": "b"}, {"id": 1}, caption_column="en")) == ["a", None]
    with pytest.raises(UserError, match=r"caption_column none has no effect: no record of posts\.jsonl has a field"):
        read_posts(images, {"id": 0, "en": "a"}, caption_column="none")


def test_further_columns_are_variants(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of posts, tables and datasets, beside tags or not; each column has lines of its own."""
    columns = {"tags": ["1girl", "", "1boy"], "short": ["a cat", None, ""], "long": ["It sits.\nOn a mat.", "b", None]}
    rows = [{"id": number} | {name: values[number] for name, values in columns.items()} for number in range(3)]
    more = {"caption_column": "short", "more_caption_columns": ["long"]}
    for read in (
        lambda **given: read_posts(images, *rows, **given),
        lambda **given: read_table(images, columns, **given),
        lambda **given: read_dataset(images, columns, monkeypatch, **given),
    ):
        assert told(read(**more)) == ["a cat\x1eIt sits.", "b", None]
        assert told(read(**more, lines="variants")) == ["a cat\x1eIt sits.\x1eOn a mat.", "b", None]
        assert told(read(more_caption_columns=["short", "long"], lines="tags"))[0] == "a cat\x1eIt sits., On a mat."
        items = read(**more)
        assert [item.tags_general for item in items if isinstance(item, Post)] == ["1girl", "", "1boy"]
    with pytest.raises(UserError, match="has no column none, only id, tags, short, long"):
        read_table(images, columns, more_caption_columns=["none"])
    with pytest.raises(UserError, match=r"more_caption_columns none has no effect: no record of posts\.jsonl"):
        read_posts(images, *rows, more_caption_columns=["long", "none"])
    with_lists = [{"id": 0, "text": ["one", "two"], "other": ["three"]}]
    found = read_posts(images, *with_lists, more_caption_columns=["other"], lines="variants")
    assert told(found) == ["one\x1etwo\x1ethree"]


def test_a_record_without_a_name_says_what_it_has(images: Path) -> None:
    (item, *_) = read_posts(images, {"image_path": "0.png", "text": "a"})
    assert isinstance(item, Reject) and "its fields: image_path, text" in item.detail


def test_posts_beside_images_and_in_tars(images: Path, tmp_path: Path) -> None:
    (images / "0.json").write_text('{"prompt": "a cat"}')
    (images / "1.json").write_text('{"prompt": "a cat", "tags": ["1girl"]}')
    (images / "2.json").write_text('{"text": "no"}')
    (images / "2.txt").write_text("a bird")
    assert told(items_of(SourceConfig("folder", str(images)))) == ["a cat", None, "a bird"]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("0.png", "0.json"):
            tar.add(images / name, name)
    assert told(items_of(SourceConfig("tars", str(tmp_path / "t.tar")))) == ["a cat"]

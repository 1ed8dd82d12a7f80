"""How a record leads to its image: by id, md5 and gallery-dl's names, in folders and tars, from any machine's paths."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trainer.config.schema import DataConfig, SourceConfig
from trainer.core.errors import UserError
from trainer.data.images import read_bytes
from trainer.data.post import Post
from trainer.data.sources import iterate_sources
from trainer.data.sources.records import Item, Reject, Remark

MD5, OTHER_MD5 = "0123456789abcdef" * 2, "f" * 32
LEFT_OVER = "images without a post"


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def put(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))


def write_tar(path: Path, *members: tuple[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def items_of(folder: Path, records: Any, **more: Any) -> list[Item]:
    """What a source of these records says; a mapping is one of sd-scripts."""
    kohya = isinstance(records, dict)
    file = folder / ("meta.json" if kohya else "posts.jsonl")
    file.write_text(json.dumps(records) if kohya else "".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig("kohya" if kohya else "posts", str(file), str(folder / "images"), **more)
    return list(iterate_sources(DataConfig("shards", sources=[source])))


def found(items: list[Item], folder: Path) -> list[str]:
    """The image of each post below the folder of images, or the reason of a reject."""
    told = []
    for item in items:
        if isinstance(item, Reject):
            told.append(item.reason)
        elif isinstance(item, Post):
            assert item.image[1:] == (None,) * 4
            told.append(str(item.image.path.relative_to(folder / "images")))
    return told


def remarks(items: list[Item]) -> dict[str, int]:
    counts = Counter[str]()
    for item in items:
        counts.update({item.kind: item.count} if isinstance(item, Remark) else {})
    return dict(counts)


def test_by_md5_and_by_any_sites_names(tmp_path: Path) -> None:
    by_md5, download = f"{MD5}.png", f"deep/__hatsune_miku_drawn_by_someone__{'1' + MD5[1:]}.png"
    put(tmp_path / "images", by_md5, download, f"gelbooru_7_{OTHER_MD5}.png", "danbooru_8_x.png", "long_1_2.png")
    records = [
        {"id": 5001, "md5": MD5.upper()},
        {"id": 5002, "media_asset": {"md5": "1" + MD5[1:]}},
        {"id": 7, "category": "gelbooru", "subcategory": "tag"},
        {"id": 8},
        {"id": 2},
        {"md5": MD5},
    ]
    items = items_of(tmp_path, records)
    assert found(items, tmp_path) == [
        by_md5, download, f"gelbooru_7_{OTHER_MD5}.png", "danbooru_8_x.png", "image_missing", by_md5]  # fmt: skip
    assert [item.key for item in items if isinstance(item, Post)][-1] == f"{MD5}%2Epng"
    assert remarks(items) == {LEFT_OVER: 1}  # long_1_2.png


def test_equal_ids_of_two_sites_are_told_apart(tmp_path: Path) -> None:
    danbooru, gelbooru = f"danbooru_7_{MD5}.png", f"gelbooru_7_{OTHER_MD5}.png"
    put(tmp_path / "images", danbooru, gelbooru, f"yandere_9_{MD5}.png", "12.png", f"yandere_12_{OTHER_MD5}.png")
    of = {"subcategory": "tag"}
    records = [
        {"id": 7, "category": "danbooru", **of},
        {"id": 7, "category": "gelbooru", **of},
        {"id": 7, "md5": OTHER_MD5},
        {"id": 9, "category": "danbooru", **of},  # yandere's is another post's
        {"id": 9, "md5": "e" * 32},
        {"id": 12},
    ]
    want = [danbooru, gelbooru, gelbooru, "image_missing", "image_missing", "12.png"]
    assert found(items_of(tmp_path, records), tmp_path) == want


def test_images_in_tars_with_the_metadata_elsewhere(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_tar(
        images / "a" / "data-0001.tar", ("./0001/4001.png", png(1)), (f"0002/{MD5}.webp", png(2)), ("x.json", b"")
    )
    write_tar(images / "data-0002.tar", ("4003.png", png(3)), ("4004.png", png(4)), ("4004.jpg", png(5)))
    put(images, "4003.png")
    rows = [{"id": 4001, "md5": None}, {"id": 4002, "md5": MD5}, {"id": 4003}, {"id": 4004}, {"id": 4005}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    source = SourceConfig("posts", str(tmp_path / "metadata.parquet"), str(images))
    items = list(iterate_sources(DataConfig("shards", sources=[source])))
    one, two, three, *rest = [item for item in items if not isinstance(item, Remark)]
    for item, shade in ((one, 1), (two, 2)):
        assert isinstance(item, Post) and item.image.length and read_bytes(item.image) == png(shade)
    assert isinstance(three, Post) and three.image.path == images / "4003.png"  # a file comes before a tar
    assert [item.reason for item in rest if isinstance(item, Reject)] == ["image_ambiguous", "image_missing"]
    assert remarks(items) == {"members of tars that are no images": 1, LEFT_OVER: 3}
    named = items_of(tmp_path, [{"file": "0001\\4001.png"}, {"file": "data-0002.tar/4004.jpg"}])
    assert [item.key for item in named if isinstance(item, Post)] == [
        "a%2Fdata-0001%2Etar%2F0001%2F4001%2Epng", "data-0002%2Etar%2F4004%2Ejpg"]  # fmt: skip
    meta = items_of(tmp_path, {"0001/4001": {"tags": "1girl"}, "4001": {"tags": "1girl"}})
    assert len({item.image for item in meta if isinstance(item, Post)}) == 1


def test_a_damaged_tar_of_images_costs_what_it_holds(tmp_path: Path) -> None:
    tar = tmp_path / "images" / "t.tar"
    write_tar(tar, ("1.png", png(1)), ("2.png", png(2)))
    content = tar.read_bytes()
    tar.write_bytes(b"\xff" * 512 + content[512:])
    items = items_of(tmp_path, [{"id": 1}, {"id": 2}])
    assert [item.reason for item in items if isinstance(item, Reject)] == ["bad_tar", "image_missing"]
    (tmp_path / "images" / "t.tar").unlink()
    with tarfile.open(tmp_path / "images" / "t.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"t\.tar\.gz is compressed"):
        items_of(tmp_path, [{"id": 1}])
    put(tmp_path / "images", "1.png")
    assert remarks(items_of(tmp_path, [{"id": 1}])) == {"compressed tars, not read": 1}


def test_more_posts_than_images(tmp_path: Path) -> None:
    put(tmp_path / "images", "1.png")
    records = [{"id": 1}, {"id": 2}, {"file": "3.png"}, {"id": 4, "file": 5}]
    assert found(items_of(tmp_path, records), tmp_path) == ["1.png", "image_missing", "image_missing", "bad_record"]
    items = items_of(tmp_path, records, missing_images="ignore")
    assert found(items, tmp_path) == ["1.png", "bad_record"] and remarks(items) == {"posts without an image": 2}
    meta = items_of(tmp_path, {"1": {"tags": "1girl"}, "2": {"tags": "1girl"}}, missing_images="ignore")
    assert found(meta, tmp_path) == ["1.png"] and [type(item) for item in meta] == [Post, Remark]
    with pytest.raises(UserError, match=r"no post of .*posts\.jsonl has an image in .*images: 2 have none"):
        items_of(tmp_path, [{"id": 8}, {"id": 9}], missing_images="ignore")


@pytest.mark.parametrize("kohya", [False, True])
@pytest.mark.parametrize(
    ("start", "prefix"),
    [
        ("C:\\Users\\someone\\train\\", "c:\\users\\Someone\\train"),
        ("C:\\Users\\someone\\train\\", "C:/Users/someone/train/"),
        ("\\\\server\\share\\", "//server/share"),
        ("/workspace/train/", "/workspace/train"),
        ("train\\", "train"),
        ("./train/", "train/"),
        ("../train/", "../train"),
        ("file:///mnt/old/", "file:///mnt/old"),
    ],
)
def test_paths_of_another_machine(tmp_path: Path, kohya: bool, start: str, prefix: str) -> None:
    put(tmp_path / "images", "a.png", "sub/a.png", "sub/b.png")
    names = [start + name for name in ("a.png", "sub\\a.png" if "\\" in start else "sub/a.png", "sub/b.png")]
    records: Any = {name: {"tags": "1girl"} for name in names} if kohya else [{"file": name} for name in names]
    items = items_of(tmp_path, records, strip_prefix=prefix)
    assert found(items, tmp_path) == ["a.png", "sub/a.png", "sub/b.png"]
    assert [item.key for item in items if isinstance(item, Post)] == ["a%2Epng", "sub%2Fa%2Epng", "sub%2Fb%2Epng"]
    with pytest.raises(UserError, match=r"^data\.sources\.0: 3 of 3 names .* set strip_prefix: '(.*)' for") as caught:
        items_of(tmp_path, records)
    suggested = str(caught.value).split("strip_prefix: '")[1].split("'")[0]
    assert found(items_of(tmp_path, records, strip_prefix=suggested), tmp_path) == ["a.png", "sub/a.png", "sub/b.png"]


def test_what_needs_no_prefix(tmp_path: Path) -> None:
    put(tmp_path / "images", "sub/c.png", "d.png", "odd\\name.png")
    inside = str(tmp_path / "images" / "d.png")
    records = [{"file": "sub\\c.png"}, {"file": ".\\d.png"}, {"file": "odd\\name.png"}, {"file": inside}]
    assert found(items_of(tmp_path, records), tmp_path) == ["sub/c.png", "d.png", "odd\\name.png", "d.png"]


def test_a_few_names_from_elsewhere_are_set_aside_with_advice(tmp_path: Path) -> None:
    put(tmp_path / "images", "a.png", "b.png", "c.png")
    records = [{"file": "a.png"}, {"file": "D:\\old\\b.png"}, {"file": "/mnt/c.png"}, {"file": "/mnt/none.png"}]
    items = items_of(tmp_path, records)
    assert found(items, tmp_path) == ["a.png", "outside_folder", "outside_folder", "outside_folder"]
    details = [item.detail for item in items if isinstance(item, Reject)]
    assert "strip_prefix: 'D:/old' would find it" in details[0] and "strip_prefix: '/mnt' would" in details[1]
    assert "strip_prefix" not in details[2]


def test_a_prefix_without_effect_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images", "1.png")
    for records, said in (
        ([{"file": "1.png"}], "none of 1 names of images begins with it"),
        ([{"id": 1}], "no record"),
    ):
        with pytest.raises(UserError, match=f"strip_prefix '/old' has no effect: {said}"):
            items_of(tmp_path, records, strip_prefix="/old")
    # whole folders only
    with pytest.raises(UserError, match="has no effect"):
        items_of(tmp_path, [{"file": "/older/1.png"}, {"file": "1.png"}], strip_prefix="/old")

"""What names, sizes and links of inputs could do to a preparation: each is counted or refused, none stops it."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from trainer.config.schema import FiltersConfig
from trainer.data.images import BadImage, open_image
from trainer.data.jxl_header import CODESTREAM, CONTAINER
from trainer.data.post import Post
from trainer.data.sources.folders import iterate_folder
from trainer.data.sources.image_folders import list_images
from trainer.data.sources.posts_files import iterate_posts_file
from trainer.data.sources.record_files import BoundedLines, Damaged, iterate_records
from trainer.data.sources.records import MAX_SIDECAR, Reject, Remark
from trainer.data.sources.tars import iterate_tars
from trainer.prepare.inputs import survey_inputs
from trainer.prepare.remarks import MAX_KINDS, OTHER_KINDS, Remarks


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    return path


def test_an_unread_file_whose_name_is_no_utf8_is_counted(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "images" / "a.txt").write_text("1girl")
    Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/b.\xff\xfe")).write_bytes(b"x")
    items = iterate_folder(tmp_path / "images", "s")
    inputs = survey_inputs(items, FiltersConfig(), "|||", tmp_path / "inputs.arrow")
    assert inputs.remarks.counts == {"s": {"unread file: another extension": 1}}


def test_kinds_that_inputs_choose_are_bounded() -> None:
    remarks = Remarks()
    for number in range(1000):
        remarks.add(Remark("s", f"unreadable field{number}"))
    assert len(remarks.counts["s"]) == MAX_KINDS + 1 and remarks.counts["s"][OTHER_KINDS] == 1000 - MAX_KINDS


def test_a_date_that_is_no_float_costs_no_post(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png())
    (tmp_path / "posts.jsonl").write_text('{"id": 1, "tags": "1girl", "created_at": %s}\n' % ("9" * 400))
    (post,) = iterate_posts_file(tmp_path / "posts.jsonl", list_images(tmp_path / "images"), "s")
    assert (
        isinstance(post, Post) and post.year is None and [note.kind for note in post.notes] == ["unreadable created_at"]
    )


@pytest.mark.parametrize("data", [CODESTREAM[:2] + b"", CONTAINER + b"\0\0\0\x08free" * 70])
def test_a_jpeg_xl_that_hides_its_size_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage, match="does not state its size"), open_image(data):
        pass


def test_a_linked_tar_is_read_where_links_are_followed_only(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "x.tar", "7.png")
    (tmp_path / "images" / "x.tar").symlink_to("../x.tar")
    (tmp_path / "images" / "gone.tar").symlink_to("../gone.tar")
    listed = list_images(tmp_path / "images", "s")
    assert not listed.members
    assert [(remark.kind, remark.origin) for remark in listed.damages if isinstance(remark, Remark)] == [
        ("linked tars, not read", "gone.tar"), ("linked tars, not read", "x.tar")]  # fmt: skip
    write_tar(tmp_path / "images" / "own.tar", "8.png")
    items = list(iterate_tars(tmp_path / "images", "s"))
    assert [item.key for item in items if isinstance(item, Reject)] == ["own%2F8"]  # of the tar that lies there
    assert [item.origin for item in items if isinstance(item, Remark)] == ["gone.tar", "x.tar"]
    (tmp_path / "images" / "gone.tar").unlink()
    followed = iterate_tars(tmp_path / "images", "s", follow_links=True)
    assert [item.key for item in followed if isinstance(item, Reject)] == ["own%2F8", "x%2F7"]
    followed = list_images(tmp_path / "images", "s", follow_links=True)
    assert list(followed.members) == ["own.tar/8.png", "x.tar/7.png"]


def test_system_folders_and_second_copies_in_a_tar_are_counted(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "images" / "m.tar", "7.png", "@eaDir/7.png", "__MACOSX/8.png", "9.png", "9.png")
    listed = list_images(tmp_path / "images", "s")
    assert listed.find("7") == ["m.tar/7.png"] and not listed.find("8") and listed.find("9") == ["m.tar/9.png"]
    assert not [item for item in listed.damages if isinstance(item, Reject)]
    assert {item.kind: item.count for item in listed.damages if isinstance(item, Remark)} == {
        "members of hidden or system folders in tars, not read": 2, "members of tars written again later, not read": 1,
    }  # fmt: skip


def test_a_long_line_of_a_table_is_not_read_whole(tmp_path: Path) -> None:
    text = io.TextIOWrapper(io.BytesIO(b"x" * (MAX_SIDECAR + 10)), encoding="utf-8")
    with pytest.raises(Damaged, match="longer than"):
        list(BoundedLines(text))
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(b"id,tags\n1," + b"x" * (MAX_SIDECAR + 10) + b"\n")
    with pytest.raises(Exception, match="longer than"):
        list(iterate_records(tmp_path / "a.csv.gz"))

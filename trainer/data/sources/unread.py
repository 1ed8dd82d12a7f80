"""What a source finds and does not read, as remarks of the kinds that are counted."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from trainer.data.formats import PLUG_INS
from trainer.data.sources.records import Remark, show_name

CAPTIONS = ("txt", "caption", "tags")  # extensions of finished captions
POSTS = ("json",)
PACKAGE_OF = {end: plug_in.package for plug_in in PLUG_INS for end in plug_in.extensions}


# beside hidden ones: what systems, file servers and tools put among images, with copies and previews of them
SYSTEM_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
MAX_EXTENSION = 12  # characters
HIDDEN_FOLDER = "hidden or system folder, not entered"
LINKED_FOLDER = "linked folder, not entered"


class Skipped(NamedTuple):
    """A folder that a walk did not enter."""

    name: str  # relative to the walk's folder
    kind: str
    detail: str


def is_system_folder(name: str) -> bool:
    """Whether a folder's own name says that what it holds is no one's images."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Whether a file's own name is a hidden one, or one that a system leaves in folders."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def remark_folders(source: str, skipped: list[Skipped]) -> Iterator[Remark]:
    """The folders that a walk did not enter."""
    yield from (Remark(source, each.kind, origin=show_name(each.name + "/"), detail=each.detail) for each in skipped)


def remark_file(source: str, name: str, origin: str) -> Remark:
    """A file, or a member of a tar, that no one reads. ``name`` is its own, without folders."""
    extension = extension_of(name)
    kind, detail = f"unread file: {kind_of(extension)}", ""
    if is_system_file(name):
        kind = "hidden or system file, not read"
    elif extension in PACKAGE_OF:
        detail = f"pip install {PACKAGE_OF[extension]} to have it read"
    elif extension in CAPTIONS:
        kind = f"caption without an image: .{extension}"
    elif extension in POSTS:
        kind = f"post without an image: .{extension}"
    return Remark(source, kind, origin=show_name(origin), detail=detail)


@dataclass
class Unread:
    """Files of one folder that no one reads, summed by kind: there may be as many as images."""

    remarks: dict[str, Remark] = field(default_factory=dict)

    def add(self, name: str, origin: str) -> None:
        """A file that is no image, where records and not sidecars say which images there are."""
        remark = remark_file("", name, origin)
        if extension_of(name) in (*CAPTIONS, *POSTS) and not is_system_file(name):  # it need not lack an image
            remark = replace(remark, kind=f"unread file: {kind_of(extension_of(name))}")
        before = self.remarks.get(remark.kind)
        self.remarks[remark.kind] = replace(before, count=before.count + 1) if before else remark

    def tell(self, source: str) -> Iterator[Remark]:
        """The sums, for a source that is called this."""
        yield from (replace(remark, source=source) for remark in self.remarks.values())


def remark_second(source: str, name: str, origin: str) -> Remark:
    """A sidecar of an image whose other sidecar was read instead."""
    kind = f"second sidecar of an image, not read: .{extension_of(name)}"
    return Remark(source, kind, origin=show_name(origin), detail="another one of the same image was read")


def kind_of(extension: str) -> str:
    """An extension in words; one that is a number, long or strange may be of one file only, and has no kind."""
    if not extension:
        return "no extension"
    usual = extension.isascii() and extension.isalnum() and not extension.isdigit() and len(extension) <= MAX_EXTENSION
    return f".{extension}" if usual else "another extension"


def extension_of(name: str) -> str:
    """A name's extension in lower case, without the dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def without_extension(name: str) -> str:
    """A name, or a path, up to its last dot; it must have one."""
    return name[: name.rfind(".")]

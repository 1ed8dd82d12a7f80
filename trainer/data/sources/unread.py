"""What a source finds and does not read, as remarks of the kinds that are counted."""

from dataclasses import replace

from trainer.data.fields import show_text
from trainer.data.formats import PLUG_INS
from trainer.data.sources.records import Remark

CAPTIONS = ("txt", "caption", "tags")  # extensions of finished captions
POSTS = ("json",)
PACKAGE_OF = {end: plug_in.package for plug_in in PLUG_INS for end in plug_in.extensions}

# beside hidden ones: what systems, file servers and tools put among images, with copies and previews of them
SYSTEM_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
MAX_NAMED_EXTENSION = 12  # characters


def is_system_folder(name: str) -> bool:
    """Whether a folder's own name says that what it holds is no one's images."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Whether a file's own name is a hidden one, or one that a system leaves in folders."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def remark_file(source: str, name: str, origin: str, sidecars: bool = True) -> Remark:
    """A file, or a member of a tar, that no one reads. ``name`` is its own, without folders.

    Args:
        sidecars: whether captions and posts lie beside images here, so that this one lacks its image.
    """
    extension = extension_of(name)
    kind, detail = f"unread file: {kind_of(extension)}", ""
    if is_system_file(name):
        kind = "hidden or system file, not read"
    elif extension in PACKAGE_OF:
        detail = f"pip install {PACKAGE_OF[extension]} to have it read"
    elif sidecars and extension in CAPTIONS:
        kind = f"caption without an image: .{extension}"
    elif sidecars and extension in POSTS:
        kind = f"post without an image: .{extension}"
    return Remark(source, kind, origin=show_text(origin), detail=detail)


def remark_second(source: str, name: str, origin: str) -> Remark:
    """A sidecar of an image whose other sidecar was read instead."""
    kind = f"second sidecar of an image, not read: .{extension_of(name)}"
    return Remark(source, kind, origin=show_text(origin), detail="another one of the same image was read")


def add_up(sums: dict[str, Remark], remark: Remark) -> None:
    """Sum remarks by kind, where there may be as many as images; the first one is the example."""
    before = sums.get(remark.kind)
    sums[remark.kind] = replace(before, count=before.count + remark.count) if before else remark


def kind_of(extension: str) -> str:
    """An extension in words; one that is a number, long or strange may be of one file only, and has no kind."""
    if not extension:
        return "no extension"
    usual = extension.isascii() and extension.isalnum() and not extension.isdigit()
    return f".{extension}" if usual and len(extension) <= MAX_NAMED_EXTENSION else "another extension"


def extension_of(name: str) -> str:
    """A name's extension in lower case, without the dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def without_extension(name: str) -> str:
    """A name, or a path, up to its last dot; it must have one."""
    return name[: name.rfind(".")]

"""Folders: what lies in them, whether a name stays inside, and what of it, or of a tar, no one reads.

A folder is a source of its own where captions and posts lie beside its images.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from trainer.core.errors import UserError
from trainer.core.layout import INDEX_FILE, MANIFEST_FILE, WORK_LOCK_FILE, WORK_SUFFIX
from trainer.data.fields import show_text
from trainer.data.formats import PLUG_INS, image_extensions, is_image_name
from trainer.data.post import ImagePlace, Post, encode_key
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, Item, Reject, Remark, Sidecar, read_sidecars, reject

CAPTIONS = ("txt", "caption", "tags")  # extensions of finished captions
POSTS = ("json",)
SIDECARS = (*CAPTIONS, *POSTS)
PACKAGE_OF = {end: plug_in.package for plug_in in PLUG_INS for end in plug_in.extensions}

# beside hidden ones: what systems, file servers and tools put among images, with copies and previews of them
SYSTEM_FOLDERS = {
    "__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
MAX_NAMED_EXTENSION = 12  # characters

EXTENSIONS = tuple(f".{end}" for end in image_extensions())
PLAIN_CAPTIONS = (".txt", ".caption")  # after the image's name without extension; other spellings come after these
NO_SIDECAR = f"no caption ({', '.join('.' + end for end in CAPTIONS)}) and no post (.json) beside the image"
HIDDEN_FOLDER = "hidden or system folder, not entered"
LINKED_FOLDER = "linked folder, not entered"


@dataclass(frozen=True)
class Found:
    """A file as a walk finds it. Its name is relative to the folder."""

    name: str
    plain: bool  # a regular file, not a link: such a one lies inside the folder for certain
    parent: str  # its folder, "" or ending with a slash
    siblings: dict[str, bool]  # all that lies beside it but folders: name -> plain

    @property
    def last(self) -> str:
        """Its name in its own folder."""
        return self.name[len(self.parent) :]


@dataclass
class Walk:
    """A walk through a tree."""

    folder: Path
    source: str = ""
    follow_links: bool = False
    skipped: list[Remark] = field(default_factory=list)  # on folders that are not entered
    entered: set[tuple[int, int]] = field(default_factory=set)  # (device, inode) of folders, where links are followed

    def files(self) -> Iterator[Found]:
        """All files of the tree in the order of their relative paths; remarks on folders that are not entered go to
        ``skipped``.

        Hidden and system folders below it are not entered, linked ones only with ``follow_links``.

        Raises:
            UserError: when a folder in it cannot be listed.
        """
        if self.follow_links and self.folder.is_dir():
            self.may_enter("", os.fspath(self.folder), linked=False)
        waiting = [self.list_one("")]  # not by recursion: folders may be nested deeper than Python's stack
        while waiting:
            item = next(waiting[-1], None)
            if item is None:
                waiting.pop()
            elif isinstance(item, str):
                waiting.append(self.list_one(item))
            else:
                yield item

    def list_one(self, parent: str) -> Iterator[Found | str]:
        """One folder's files, and between them its folders by name, ending with a slash."""
        plain: dict[str, bool] = {}  # by name, a folder's with a slash at its end: False for links and the like
        path = os.path.join(self.folder, parent)  # noqa: PTH118
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    is_file, is_folder = entry.is_file(follow_symlinks=False), entry.is_dir(follow_symlinks=False)
                    leads_to_folder = is_folder or (not is_file and os.path.isdir(entry.path))  # noqa: PTH112
                    plain[entry.name + "/" if leads_to_folder else entry.name] = is_file or is_folder
        except OSError as error:
            raise UserError(f"{path} cannot be listed: {error.strerror}") from error
        siblings = {name: each for name, each in plain.items() if not name.endswith("/")}
        for name in sorted(plain):  # with the slash, so that this is the order of whole paths
            if name in siblings:
                yield Found(parent + name, plain[name], parent, siblings)
            elif self.may_enter(parent + name[:-1], path + name[:-1], linked=not plain[name]):
                yield parent + name

    def may_enter(self, name: str, path: str, linked: bool) -> bool:
        """Whether a folder is entered; it is listed where not. Where links are followed, each folder is entered once:
        under its own name where it lies in the walk's folder itself, so that no chain of links leads on for ever."""
        # a set that was made here, or one on its way, may lie beside its images
        own = (WORK_LOCK_FILE,) if path.endswith(WORK_SUFFIX) else (MANIFEST_FILE, INDEX_FILE)
        if all(os.path.isfile(f"{path}/{name}") for name in own):  # noqa: PTH113
            return False
        if is_system_folder(name[name.rfind("/") + 1 :]):
            return self.skip(name, HIDDEN_FOLDER, "never entered: hidden, or of a system")
        if linked and not self.follow_links:
            return self.skip(name, LINKED_FOLDER, "a link: follow_links: true for this source enters it")
        if not self.follow_links:
            return True
        status = Path(path).stat()
        place = (status.st_dev, status.st_ino)
        inside = linked and Path(path).resolve().is_relative_to(self.folder.resolve())
        if inside or place in self.entered:
            return self.skip(name, LINKED_FOLDER, "entered under another name")
        self.entered.add(place)
        return True

    def skip(self, name: str, kind: str, detail: str) -> bool:
        """Remark on a folder that is not entered."""
        self.skipped.append(Remark(self.source, kind, origin=show_text(f"{name}/"), detail=detail))
        return False


def check_inside(folder: Path, name: str, follow_links: bool = False) -> Path:
    """``folder / name``, if that is a file inside the folder; links are followed before judging.

    Args:
        follow_links: a link may lead to a file elsewhere.
    """
    if "\0" in name or name.startswith("/") or ".." in PurePath(name).parts:
        raise BadRecord("outside_folder", f"{name!r} does not stay inside the folder")
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise BadRecord("image_missing", f"{name!r} is not in the folder") from error
    if not follow_links and not real.is_relative_to(folder.resolve()):
        raise BadRecord("outside_folder", f"{name!r} is a link that leads out of the folder: see follow_links")
    return path


def is_system_folder(name: str) -> bool:
    """Whether a folder's own name says that what it holds is no one's images."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in SYSTEM_FOLDERS


def remark_file(source: str, name: str, origin: str, *, sidecars: bool = True, second: bool = False) -> Remark:
    """A file, or a member of a tar, that no one reads. ``name`` is its own, without folders.

    Args:
        sidecars: whether captions and posts lie beside images here, so that this one lacks its image.
        second: it is a sidecar of an image whose other sidecar was read instead.
    """
    extension = extension_of(name)
    kind, detail = f"unread file: {kind_of(extension)}", ""
    if second:
        kind, detail = f"second sidecar of an image, not read: .{extension}", "another one of the same image was read"
    elif name.startswith(".") or name.lower() in SYSTEM_FILES:
        kind = "hidden or system file, not read"
    elif extension in PACKAGE_OF:
        detail = f"pip install {PACKAGE_OF[extension]} to have it read"
    elif sidecars and extension in CAPTIONS:
        kind = f"caption without an image: .{extension}"
    elif sidecars and extension in POSTS:
        kind = f"post without an image: .{extension}"
    return Remark(source, kind, origin=show_text(origin), detail=detail)


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


@dataclass
class Beside:
    """The files of one folder: which sidecars are read for which image."""

    siblings: dict[str, bool]
    names: dict[str, list[str]] = field(default_factory=dict)  # of sidecars, by their name with the extension lowered
    bare: set[str] = field(default_factory=set)  # names of images, with and without extension
    read: set[str] = field(default_factory=set)  # names of the sidecars that are read

    def __post_init__(self) -> None:
        for name in self.siblings:
            if is_image_name(name):
                self.bare |= {name, without_extension(name)}
            elif extension_of(name) in SIDECARS:
                self.names.setdefault(f"{without_extension(name)}.{extension_of(name)}", []).append(name)
        for image in filter(is_image_name, self.siblings):
            self.read.update(*self.choose(image))

    def choose(self, image: str) -> tuple[list[str], list[str]]:
        """The captions of an image, of which there should be one, and its post, if it has one.

        ``a.txt`` or ``a.caption`` count before ``a.png.txt``, ``a.TXT`` and ``a.tags``, of a post ``a.png.json`` before
        ``a.json``.
        """
        bare = without_extension(image)
        plain = [bare + end for end in PLAIN_CAPTIONS if bare + end in self.siblings]
        posts = self.find([image, bare], POSTS)
        return plain or self.find([bare, image], CAPTIONS), posts[:1]

    def find(self, starts: list[str], extensions: tuple[str, ...]) -> list[str]:
        return [name for start in starts for end in extensions for name in self.names.get(f"{start}.{end}", [])]

    def remark(self, found: Found, source: str) -> Remark | None:
        """What is to be said of a file that is no image; nothing of a sidecar that is read."""
        if found.last in self.read:
            return None
        second = extension_of(found.last) in SIDECARS and without_extension(found.last) in self.bare
        return remark_file(source, found.last, found.name, second=second)


def iterate_folder(folder: Path, source: str, follow_links: bool = False) -> Iterator[Item]:
    """Images with sidecars beside them, sorted by path, and between them remarks on all that is not read.

    Raises:
        UserError: when the folder holds no images.
    """
    walk, images, unread = Walk(folder, source, follow_links), 0, Counter[str]()
    besides: dict[str, Beside] = {}  # of the folders on the way to the file that is looked at
    for found in walk.files():
        if found.parent not in besides:
            besides = {parent: each for parent, each in besides.items() if found.parent.startswith(parent)}
            besides[found.parent] = Beside(found.siblings)
        beside = besides[found.parent]
        if is_image_name(found.last):
            images += 1
            yield read_beside(folder, found, beside, source, follow_links)
        elif (remark := beside.remark(found, source)) is not None:
            unread[remark.kind] += 1
            yield remark
    yield from walk.skipped
    if not images:
        unread.update(remark.kind for remark in walk.skipped)
        there = ", ".join(f"{count} {kind}" for kind, count in unread.items())
        raise UserError(
            f"{folder} holds no images ({', '.join(EXTENSIONS)})" + (f"; there are: {there}" if there else "")
        )


def read_beside(folder: Path, found: Found, beside: Beside, source: str, follow_links: bool) -> Post | Reject:
    """The post of one image: a caption beside it is a finished one, a ``.json`` a post.

    A caption and a post may both be there: the caption then wins over the post's tags.
    """
    key = encode_key(os.fsencode(found.name))
    origin = show_text(found.name)
    try:
        path = folder / found.name if found.plain else check_inside(folder, found.name, follow_links)
        captions, posts = beside.choose(found.last)
        if len(captions) > 1:
            raise BadRecord("caption_ambiguous", f"several captions: {', '.join(captions)}; keep one of them")
        if not captions and not posts:
            raise BadRecord("no_sidecar", NO_SIDECAR)
        caption = read_sidecar(folder, found, captions[0], follow_links) if captions else None
        post = read_sidecar(folder, found, posts[0], follow_links) if posts else None
        return read_sidecars(caption, post, key=key, source=source, image=ImagePlace(path), origin=origin)
    except ValueError as error:
        return reject(key, origin, error)


def read_sidecar(folder: Path, found: Found, name: str, follow_links: bool) -> Sidecar:
    """A sidecar beside an image."""
    path = folder / (found.parent + name)
    if not found.siblings[name] and not check_inside(folder, found.parent + name, follow_links).is_file():
        raise BadRecord("bad_record", f"{name} is not a regular file")
    try:
        if (size := path.stat().st_size) > MAX_SIDECAR:
            raise BadRecord("bad_record", f"{name} has {size} bytes, above {MAX_SIDECAR}")
        return Sidecar(name, path.read_bytes())
    except OSError as error:
        raise BadRecord("bad_record", f"{name} cannot be read: {error.strerror}") from error

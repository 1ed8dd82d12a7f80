"""Folders of images with sidecars beside them, and what else lies there."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core.errors import UserError
from trainer.data.fields import show_text
from trainer.data.formats import is_image_name
from trainer.data.post import Post, encode_key
from trainer.data.sources.folders import (
    CAPTIONS,
    EXTENSIONS,
    POSTS,
    Found,
    check_inside,
    extension_of,
    remark_file,
    remark_second,
    walk_files,
    without_extension,
)
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, Item, Reject, Remark, Sidecar, read_sidecars, reject

PLAIN_CAPTIONS = (".txt", ".caption")  # after the image's name without extension; other spellings come after these
NO_SIDECAR = f"no caption ({', '.join('.' + end for end in CAPTIONS)}) and no post (.json) beside the image"


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
            elif extension_of(name) in (*CAPTIONS, *POSTS):
                self.names.setdefault(f"{without_extension(name)}.{extension_of(name)}", []).append(name)
        for name in self.siblings:
            if is_image_name(name):
                captions, posts = self.choose(name)
                self.read.update(captions, posts)

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
        if extension_of(found.last) in (*CAPTIONS, *POSTS) and without_extension(found.last) in self.bare:
            return remark_second(source, found.last, found.name)
        return remark_file(source, found.last, found.name)


def iterate_folder(folder: Path, source: str, follow_links: bool = False) -> Iterator[Item]:
    """Images with sidecars beside them, sorted by path, and between them remarks on all that is not read.

    Raises:
        UserError: when the folder holds no images.
    """
    images, unread, skipped = 0, Counter[str](), list[Remark]()
    besides: dict[str, Beside] = {}  # of the folders on the way to the file that is looked at
    for found in walk_files(folder, source, follow_links=follow_links, skipped=skipped):
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
    yield from skipped
    if not images:
        unread.update(remark.kind for remark in skipped)
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
        return read_sidecars(caption, post, key=key, source=source, image=path, origin=origin)
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

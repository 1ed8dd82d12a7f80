"""Folders of images: what lies in them, listed once, and what a name in a record leads to. No name leads out."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from trainer.core.errors import UserError
from trainer.data.sites import image_stems
from trainer.data.sources.records import BadRecord, show_name

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
GALLERY_DL_PREFIX = "danbooru_"  # gallery-dl's file names: danbooru_<id>_<md5>.<ext>


@dataclass(frozen=True)
class Found:
    """A file as a walk finds it. Its name is relative to the folder."""

    name: str
    plain: bool  # a regular file, not a link: such a one lies inside the folder for certain
    parent: str  # its folder, "" or ending with a slash
    siblings: dict[str, bool]  # all that lies beside it but folders: name -> plain


def walk_files(folder: Path) -> Iterator[Found]:
    """All files of a tree in the order of their relative paths; folders that are links are not entered.

    Raises:
        UserError: when a folder in it cannot be listed.
    """
    waiting = [walk_one(folder, "")]  # not by recursion: folders may be nested deeper than Python's stack
    while waiting:
        for item in waiting[-1]:
            if isinstance(item, str):
                waiting.append(walk_one(folder, item))
                break
            yield item
        else:
            waiting.pop()


def walk_one(folder: Path, parent: str) -> Iterator[Found | str]:
    """One folder's files, and between them its folders by name, ending with a slash."""
    siblings: dict[str, bool] = {}
    names: list[str] = []
    path = os.path.join(folder, parent)  # noqa: PTH118
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name + "/")
                elif entry.is_file(follow_symlinks=False) or not os.path.isdir(entry.path):  # noqa: PTH112
                    siblings[entry.name] = entry.is_file(follow_symlinks=False)
                    names.append(entry.name)
    except OSError as error:
        raise UserError(f"{path} cannot be listed: {error.strerror}") from error
    for name in sorted(names):  # with the slash, so that this is the order of whole paths
        if name.endswith("/"):
            yield parent + name
        else:
            yield Found(parent + name, siblings[name], parent, siblings)


def is_image_name(name: str) -> bool:
    """Whether a file's name is an image's, hidden files excluded."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder by the name that a record may give: the file's stem, or the id in gallery-dl's name."""

    path: Path
    by_stem: dict[str, str | list[str]]  # stem or id -> relative path, or several
    links: set[str] = field(default_factory=set)  # relative paths that are no plain files

    def find(self, stem: str) -> list[str]:
        """The relative paths of all images of this stem or id."""
        found = self.by_stem.get(stem, [])
        return [found] if isinstance(found, str) else found

    def place(self, name: str) -> Path:
        """The image of this relative path, which must stay inside the folder.

        Raises:
            BadRecord: image_missing or outside_folder.
        """
        if name in self.links or name not in self.find(stem_or_id(name)):
            return check_inside(self.path, name)
        return self.path / name


def list_images(folder: Path) -> ImageFolder:
    """List a folder of images once; after that no name of a plain file in it costs another look at the disk."""
    listed = ImageFolder(folder, {})
    for found in walk_files(folder):
        if not is_image_name(found.name[len(found.parent) :]):
            continue
        if not found.plain:
            listed.links.add(found.name)
        stem = stem_or_id(found.name)
        before = listed.by_stem.setdefault(stem, found.name)
        if isinstance(before, list):
            before.append(found.name)
        elif before is not found.name:
            listed.by_stem[stem] = [before, found.name]
    return listed


def stem_or_id(name: str) -> str:
    """A path's last part without its extension, or the id where gallery-dl named the file."""
    stem = name[name.rfind("/") + 1 :]
    dot = stem.rfind(".")
    stem = stem[:dot] if dot > 0 else stem
    if stem.startswith(GALLERY_DL_PREFIX):
        number = stem[len(GALLERY_DL_PREFIX) :].split("_", 1)[0]
        return number if number.isdecimal() else stem
    return stem


def check_inside(folder: Path, name: str) -> Path:
    """``folder / name``, if that is a file inside the folder; links are followed before judging."""
    if "\0" in name or name.startswith("/") or ".." in PurePath(name).parts:
        raise BadRecord("outside_folder", f"{name!r} does not stay inside the folder")
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise BadRecord("image_missing", f"{name!r} is not in the folder") from error
    if not real.is_relative_to(folder.resolve()):
        raise BadRecord("outside_folder", f"{name!r} is a link that leads out of the folder")
    return path


def find_image(record: dict[str, Any], images: ImageFolder) -> Path:
    """A record's image: by its ``file``, a path relative to the folder, or else by its id or gallery-dl's filename.

    Raises:
        BadRecord: when there is none, more than one, or it lies outside the folder.
    """
    file = record.get("file")
    if file is not None and not isinstance(file, Mapping):  # e621 has facts of the file there
        if not isinstance(file, str) or not file:
            raise BadRecord("bad_record", f"file must be a path as text, not {file!r}")
        return images.place(file)
    stems = image_stems(record)
    if not stems:
        raise BadRecord("bad_record", "neither id nor file: no way to find its image")
    found = next((names for stem in stems if (names := images.find(stem))), [])
    called = " or ".join(stems)
    if not found:
        raise BadRecord("image_missing", f"no image is called {called} and one of {', '.join(EXTENSIONS)}")
    if len(found) > 1:
        raise BadRecord("image_ambiguous", f"{called} has several images: {show_name(', '.join(sorted(found)))}")
    return images.place(found[0])

"""Folders: what lies in them, and whether a name stays inside."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from trainer.core.errors import UserError
from trainer.data.sources.records import BadRecord

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tiff")


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

"""What a name says: which post and site an image's file is of, and where a path from another machine leads here."""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.data.sources.records import BadRecord

# gallery-dl's file names: <site>_<id>_<md5>; danbooru's are known without the sum
SITE_NAME = re.compile(
    r"(?P<site>danbooru(?=_[0-9]+(?:_|\Z))|[a-z0-9][a-z0-9.-]*(?=_[0-9]+_[0-9a-f]{32}\Z))_(?P<id>[0-9]+).*", re.DOTALL
)
MD5 = re.compile(r"[0-9a-f]{32}")
MD5_AT_END = re.compile(r"(?:^|[_-])([0-9a-f]{32})$")  # Danbooru's downloads: __tags_drawn_by_someone__<md5>
DRIVE = re.compile(r"[A-Za-z]:/")


def stem_of(name: str) -> str:
    """A path's last part without its extension."""
    last = name[name.rfind("/") + 1 :]
    dot = last.rfind(".")
    return last[:dot] if dot > 0 else last


def stem_or_id(name: str) -> str:
    """A path's last part without its extension, or the id where gallery-dl named the file."""
    stem = stem_of(name)
    matched = SITE_NAME.fullmatch(stem) if "_" in stem else None
    return matched["id"] if matched else stem


def md5_in(name: str) -> str | None:
    """The md5 sum at the end of a file's stem."""
    matched = MD5_AT_END.search(stem_of(name))
    return matched[1] if matched else None


def site_in(name: str) -> str | None:
    """The site in the name that gallery-dl gives a file."""
    matched = SITE_NAME.fullmatch(stem_of(name))
    return matched["site"] if matched else None


def read_md5(record: Mapping[str, Any]) -> str | None:
    """The md5 sum that a record states of its image, at its top or as Danbooru and e621 nest it."""
    for holder in (record, record.get("media_asset"), record.get("file")):
        md5 = holder.get("md5") if isinstance(holder, Mapping) else None
        if isinstance(md5, str) and MD5.fullmatch(md5.lower()):
            return md5.lower()
    return None


def plain_path(name: str) -> str:
    """A path as this machine writes it: slashes, and no ``./`` at its beginning."""
    return re.sub(r"^(?:\./+)+", "", name.replace("\\", "/"))


def strip_start(path: str, prefix: str) -> str | None:
    """What follows whole leading folders of a path; None where it does not begin with them.

    Both are as ``plain_path`` gives them. On a Windows drive upper and lower case are the same.
    """
    start = prefix.rstrip("/") + "/"
    fold = str.casefold if DRIVE.match(start) else str
    return path[len(start) :].lstrip("/") if fold(path[: len(start)]) == fold(start) else None


@lru_cache(maxsize=64)
def own_paths(folder: Path) -> tuple[Path, Path]:
    """A folder's absolute paths, as it is written and with links resolved; asked of the disk once."""
    return folder.absolute(), folder.resolve()


def relative_path(name: str, folder: Path) -> str:
    """A plain path relative to the folder, which it must not leave.

    Raises:
        BadRecord: outside_folder.
    """
    if name.startswith("/"):
        for start in own_paths(folder):
            if PurePosixPath(name).is_relative_to(start):
                name = str(PurePosixPath(name).relative_to(start))
                break
    if "\0" in name or name.startswith("/") or DRIVE.match(name) or ".." in name.split("/"):
        raise BadRecord("outside_folder", f"{name!r} does not stay inside {folder}")
    return str(PurePosixPath(name))

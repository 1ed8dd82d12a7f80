"""Iterators of posts. What cannot be a Post comes out as a Reject, in place; nothing is raised over one record."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.post import Post, encode_key, read_key, read_post

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
GALLERY_DL_NAME = re.compile(r"danbooru_(\d+)(_.*)?")  # gallery-dl's file names: danbooru_<id>_<md5>.<ext>


@dataclass(frozen=True)
class Reject:
    """One input that was set aside: a short reason to count by, and the details."""

    key: str | None  # None where the record did not get as far as having one
    origin: str  # file and line, or relative path
    reason: str
    detail: str


class BadRecord(Exception):
    """Why a record is set aside: (reason, detail)."""


def iterate_posts(posts: Sequence[str] | None, images: str | None) -> Iterator[Post | Reject]:
    """All posts of the posts files, in order, or else of the image folder's sidecars, sorted by path.

    Args:
        posts: JSONL files, one post a line, whose images lie under ``images``; None reads sidecars beside the images.
        images: the folder of images.

    Raises:
        UserError: when a file or the folder cannot be read at all.
    """
    if images is None:
        raise UserError("data.images is not set: name the folder that holds the images")
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"data.images: {folder} is not a folder")
    if posts is None:
        yield from iterate_folder(folder)
        return
    by_id = index_images(folder)
    for file in posts:
        yield from iterate_jsonl(Path(file), folder, by_id)


def iterate_jsonl(file: Path, folder: Path, by_id: dict[str, list[str]]) -> Iterator[Post | Reject]:
    """The posts of one JSONL file; empty lines are skipped."""
    try:
        lines = file.open("rb")
    except OSError as error:
        raise UserError(f"data.posts: {file} cannot be read: {error.strerror}") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield read_line(line, file.name, f"{file.name} line {number}", folder, by_id)


def read_line(line: bytes, source: str, origin: str, folder: Path, by_id: dict[str, list[str]]) -> Post | Reject:
    """One line of a posts file."""
    key = None
    try:
        record = parse_record(line)
        key = read_key(record)
        path = find_image(record, key, folder, by_id)
        # a file name is as good a key as an id
        own_key = key or encode_key(os.fsencode(path.relative_to(folder)))
        return read_post(record, source=source, image=path, origin=origin, key=own_key)
    except BadRecord as error:
        return Reject(key, origin, *error.args)
    except ValueError as error:
        return Reject(key, origin, "bad_record", str(error))


def parse_record(text: bytes) -> dict[str, Any]:
    """One JSON object. NaN and Infinity, which JSON does not have, are refused."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        record = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadRecord("bad_record", f"a post must be a JSON object, not {type(record).__name__}")
    return record


def find_image(record: dict[str, Any], key: str | None, folder: Path, by_id: dict[str, list[str]]) -> Path:
    """The record's image: by its ``file``, a path relative to the folder, or else by its id.

    Raises:
        BadRecord: when there is none, more than one, or it lies outside the folder.
    """
    file = record.get("file")
    if file is not None:
        if not isinstance(file, str) or not file:
            raise BadRecord("bad_record", f"file must be a path as text, not {file!r}")
        return check_inside(folder, file)
    if key is None:
        raise BadRecord("bad_record", "neither id nor file: no way to find its image")
    found = by_id.get(str(record["id"]), [])
    if not found:
        raise BadRecord("image_missing", f"no image is called {record['id']} and one of {', '.join(EXTENSIONS)}")
    if len(found) > 1:
        raise BadRecord("image_ambiguous", f"id {record['id']} has several images: {', '.join(sorted(found))}")
    return check_inside(folder, found[0])


def check_inside(folder: Path, name: str) -> Path:
    """``folder / name``, if that is a file inside the folder; links are followed before judging."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadRecord("outside_folder", f"{name!r} does not stay inside the image folder")
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        raise BadRecord("image_missing", f"{name!r} is not in the image folder") from error
    if not real.is_relative_to(folder.resolve()):
        raise BadRecord("outside_folder", f"{name!r} is a link that leads out of the image folder")
    return path


def index_images(folder: Path) -> dict[str, list[str]]:
    """Id -> relative paths of the images that bear it: ``<id>.<ext>`` or gallery-dl's ``danbooru_<id>_<md5>.<ext>``."""
    by_id: dict[str, list[str]] = {}
    for name in list_images(folder):
        stem = Path(name).stem
        gallery = GALLERY_DL_NAME.fullmatch(stem)
        by_id.setdefault(gallery[1] if gallery else stem, []).append(name)
    return by_id


def list_images(folder: Path) -> list[str]:
    """The relative paths of all files with an allowed extension, sorted; folders that are links are not entered."""
    names = []
    for parent, _, files in os.walk(folder):
        relative = os.path.relpath(parent, folder)
        names += [os.path.normpath(os.path.join(relative, file)) for file in files if is_image_name(file)]  # noqa: PTH118
    return sorted(names)


def is_image_name(name: str) -> bool:
    """Whether the name is an image's, hidden files excluded."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def iterate_folder(folder: Path) -> Iterator[Post | Reject]:
    """Images with sidecars beside them, sorted by path."""
    names = list_images(folder)
    if not names:
        raise UserError(f"data.images: {folder} holds no images ({', '.join(EXTENSIONS)})")
    for name in names:
        yield read_sidecars(folder, name)


def read_sidecars(folder: Path, name: str) -> Post | Reject:
    """The post of one image: ``a.txt`` is a finished caption, ``a.json`` or gallery-dl's ``a.png.json`` a post.

    Both may be there: the caption then wins over the post's tags.
    """
    key = encode_key(os.fsencode(name))
    origin = os.fsencode(name).decode(errors="backslashreplace")
    try:
        path, bare = check_inside(folder, name), str(Path(name).with_suffix(""))
        caption = read_sidecar(folder, bare + ".txt")
        post = read_sidecar(folder, name + ".json") or read_sidecar(folder, bare + ".json")
        if caption is None and post is None:
            raise BadRecord("no_sidecar", "no caption (.txt) and no post (.json) beside the image")
        record = parse_record(post) if post is not None else {}
        text = None if caption is None else caption.decode("utf-8-sig").strip()
        return read_post(record, source=folder.name, image=path, origin=origin, key=key, caption=text)
    except BadRecord as error:
        return Reject(key, origin, *error.args)
    except ValueError as error:  # UnicodeDecodeError is one
        return Reject(key, origin, "bad_record", str(error))


def read_sidecar(folder: Path, name: str) -> bytes | None:
    """A sidecar's bytes, or None where there is no such file."""
    if not (folder / name).is_file():
        return None
    try:
        return check_inside(folder, name).read_bytes()
    except OSError as error:
        raise BadRecord("bad_record", f"{name} cannot be read: {error.strerror}") from error

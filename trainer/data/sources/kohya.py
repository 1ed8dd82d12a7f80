"""Metadata files of sd-scripts (``meta_*.json``) as posts, so that a data set can be moved over.

Captions are what sd-scripts trains on without its option enable_wildcard, keys what its option --full_path and the
one without it write (library/train_util.py, FineTuningDataset and process_caption).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.data.fields import read_text
from trainer.data.post import Post, encode_key, read_post
from trainer.data.sources.folders import ImageFolder, stem_or_id
from trainer.data.sources.records import BadRecord, Reject, parse_record, show_name

CAPTION_SEPARATOR = ","  # sd-scripts' default


def iterate_kohya(file: Path, images: ImageFolder, source: str) -> Iterator[Post | Reject]:
    """The images of one metadata file, in its order.

    Raises:
        UserError: when the file cannot be read or is not an object of JSON.
    """
    try:
        metadata = parse_record(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except BadRecord as error:
        raise UserError(f"{file} is not a metadata file of sd-scripts: {error.args[1]}") from error
    for name, entry in metadata.items():
        yield read_entry(name, entry, file.name, images, source)


def read_entry(name: str, entry: Any, file: str, images: ImageFolder, source: str) -> Post | Reject:
    """The post of one image. The resolution that sd-scripts chose for it is no size of the file: not kept."""
    origin, key = show_name(f"{file}: {name}"), None
    try:
        path = find_by_key(name, images)
        key = encode_key(os.fsencode(path.relative_to(images.path)))
        if not isinstance(entry, dict):
            raise BadRecord("bad_record", f"an image's entry must be a JSON object, not {type(entry).__name__}")
        return read_post({}, source=source, image=path, origin=origin, key=key, caption=join_caption(entry))
    except BadRecord as error:
        return Reject(key, origin, error.args[0], show_name(error.args[1]))
    except ValueError as error:
        return Reject(key, origin, "bad_record", str(error))


def join_caption(entry: dict[str, Any]) -> str:
    """caption and tags joined by sd-scripts' separator; of several lines it trains on the first."""
    tags = entry.get("tags")
    if isinstance(tags, list):  # which sd-scripts does not write, but other taggers do
        tags = ", ".join(text for tag in tags if (text := read_text("a tag", tag)))
    parts = [text for text in (read_text("caption", entry.get("caption")), read_text("tags", tags)) if text]
    return CAPTION_SEPARATOR.join(parts).split("\n")[0].strip()


def find_by_key(name: str, images: ImageFolder) -> Path:
    """The image of a key: a path, absolute or relative to the folder, with or without extension, or a stem.

    Raises:
        BadRecord: when there is none, more than one, or it lies outside the folder.
    """
    relative = relative_key(name, images.path)
    if ".." in relative.split("/"):
        raise BadRecord("outside_folder", f"{name!r} does not stay inside {images.path}")
    last = relative[relative.rfind("/") + 1 :]
    # a key's last dot need not begin an extension
    near = sorted({found for stem in (stem_or_id(last), stem_or_id(last + ".x")) for found in images.find(stem)})
    exact = [found for found in near if found == relative]
    bare = [found for found in near if strip(found) == relative]
    stem = [found for found in near if strip(found).endswith("/" + relative)] if last == relative else []
    found = exact or bare or stem
    if not found:
        raise BadRecord("image_missing", f"no image in the folder is called {name!r}")
    if len(found) > 1:
        raise BadRecord("image_ambiguous", f"{name!r} may be {', '.join(found)}")
    return images.place(found[0])


def relative_key(name: str, folder: Path) -> str:
    """A key as a path relative to the folder."""
    if not name.startswith("/"):
        return name.removeprefix("./")
    for start in (folder.absolute(), folder.resolve()):
        if Path(name).is_relative_to(start):
            return os.fspath(Path(name).relative_to(start))
    raise BadRecord("outside_folder", f"{name!r} does not lie in {folder}")


def strip(name: str) -> str:
    """A path without its extension."""
    return name[: name.rfind(".")]

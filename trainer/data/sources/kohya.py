"""Metadata files of sd-scripts (``meta_*.json``) as posts, so that a data set can be moved over.

Captions are what sd-scripts trains on without its option enable_wildcard, keys what its option --full_path and the
one without it write (library/train_util.py, FineTuningDataset and process_caption).
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.files import read_regular
from trainer.data.fields import read_text, show_text
from trainer.data.post import Note, Post, encode_key, read_post
from trainer.data.sources.image_folders import ImageFolder
from trainer.data.sources.records import BadRecord, Reject, find_caption, join_captions, parse_record, reject

MAX_METADATA = 2**32  # bytes
CAPTION_SEPARATOR = ","  # sd-scripts' default
LATENTS_SUFFIX = ".npz"  # of the latents that sd-scripts writes beside an image


def iterate_kohya(file: Path, images: ImageFolder, source: str, variants: bool = False) -> Iterator[Post | Reject]:
    """The images of one metadata file, in its order.

    Args:
        variants: each line of a caption is one of its own.

    Raises:
        UserError: when the file cannot be read or is not an object of JSON.
    """
    try:
        metadata = parse_record(read_regular(file, MAX_METADATA))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except BadRecord as error:
        raise UserError(f"{file} is not a metadata file of sd-scripts: {error.args[1]}") from error
    for name, entry in metadata.items():
        yield read_entry(name, entry, file.name, images, source, variants)


def read_entry(name: str, entry: Any, file: str, images: ImageFolder, source: str, variants: bool) -> Post | Reject:
    """The post of one image. The resolution that sd-scripts chose for it is no size of the file: not kept."""
    origin, key = show_text(f"{file}: {name}"), None
    try:
        found = images.locate(name.removesuffix(LATENTS_SUFFIX), bare=True)
        image, key = images.place(found), encode_key(os.fsencode(found))
        if not isinstance(entry, dict):
            raise BadRecord("bad_record", f"an image's entry must be a JSON object, not {type(entry).__name__}")
        notes: list[Note] = []
        caption = join_caption(entry, notes, variants)
        post = read_post({}, source=source, image=image, origin=origin, key=key, caption=caption)
        return replace(post, notes=tuple(notes))
    except ValueError as error:
        return reject(key, origin, error)


def join_caption(entry: dict[str, Any], notes: list[Note], variants: bool) -> str:
    """caption and tags joined by sd-scripts' separator; where lines are variants, tags join each, as with
    enable_wildcard."""
    tags = entry.get("tags")
    if isinstance(tags, list):  # which sd-scripts does not write, but other taggers do
        tags = ", ".join(text for tag in tags if (text := read_text("a tag", tag)))
    caption = read_text("caption", join_captions(entry.get("caption")))
    parts = [text for text in (caption, read_text("tags", tags)) if text]
    if not parts and (other := find_caption(entry, notes)):
        parts = [join_captions(entry[other])]
    if variants and len(parts) == 2:
        joined = CAPTION_SEPARATOR.join(parts[1].splitlines())
        return "\n".join(f"{line}{CAPTION_SEPARATOR}{joined}" for line in parts[0].splitlines() if line.strip())
    return CAPTION_SEPARATOR.join(parts).strip()

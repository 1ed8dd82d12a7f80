"""Folders of images with sidecars beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.core.errors import UserError
from trainer.data.post import Post, encode_key
from trainer.data.sources.folders import EXTENSIONS, Found, check_inside, is_image_name, walk_files
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, Reject, read_sidecars, show_name

CAPTION_EXTENSIONS = (".txt", ".caption")


def iterate_folder(folder: Path, source: str) -> Iterator[Post | Reject]:
    """Images with sidecars beside them, sorted by path.

    Raises:
        UserError: when the folder holds no images.
    """
    images = 0
    for found in walk_files(folder):
        if is_image_name(found.name[len(found.parent) :]):
            images += 1
            yield read_beside(folder, found, source)
    if not images:
        raise UserError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")


def read_beside(folder: Path, found: Found, source: str) -> Post | Reject:
    """The post of one image: ``a.txt`` or ``a.caption`` is a finished caption, ``a.json`` or gallery-dl's
    ``a.png.json`` a post.

    A caption and a post may both be there: the caption then wins over the post's tags.
    """
    key = encode_key(os.fsencode(found.name))
    origin = show_name(found.name)
    try:
        path = folder / found.name if found.plain else check_inside(folder, found.name)
        name = found.name[len(found.parent) :]
        bare = name[: name.rfind(".")]
        captions = [bare + extension for extension in CAPTION_EXTENSIONS if bare + extension in found.siblings]
        if len(captions) > 1:
            raise BadRecord(
                "caption_ambiguous", f"several captions: {show_name(', '.join(captions))}; keep one of them"
            )
        posts = [each for each in (name + ".json", bare + ".json") if each in found.siblings]
        if not captions and not posts:
            raise BadRecord("no_sidecar", "no caption (.txt, .caption) and no post (.json) beside the image")
        caption = read_sidecar(folder, found, captions[0]) if captions else None
        post = read_sidecar(folder, found, posts[0]) if posts else None
        return read_sidecars(caption, post, key=key, source=source, image=path, origin=origin)
    except BadRecord as error:
        return Reject(key, origin, *error.args)
    except ValueError as error:  # UnicodeDecodeError is one
        return Reject(key, origin, "bad_record", str(error))


def read_sidecar(folder: Path, found: Found, name: str) -> bytes:
    """The bytes of a sidecar beside an image."""
    path = folder / (found.parent + name)
    if not found.siblings[name] and not check_inside(folder, found.parent + name).is_file():
        raise BadRecord("bad_record", f"{show_name(name)} is not a regular file")
    try:
        if (size := path.stat().st_size) > MAX_SIDECAR:
            raise BadRecord("bad_record", f"{show_name(name)} has {size} bytes, above {MAX_SIDECAR}")
        return path.read_bytes()
    except OSError as error:
        raise BadRecord("bad_record", f"{show_name(name)} cannot be read: {error.strerror}") from error

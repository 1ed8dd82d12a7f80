"""Which image of a folder a record means: by its path, its id or gallery-dl's filename, or its md5."""

from collections.abc import Mapping
from typing import Any

from trainer.data.sites import image_stems
from trainer.data.sources.folders import EXTENSIONS
from trainer.data.sources.image_folders import ImageFolder
from trainer.data.sources.image_names import md5_in, read_md5, read_site, site_in
from trainer.data.sources.records import BadRecord, show_name

FILE_FIELDS = ("file", "file_name")  # the second as imagefolder's metadata.jsonl has it


def find_image(record: Mapping[str, Any], images: ImageFolder) -> str:
    """The name of a record's image: by its ``file``, a path relative to the folder, else by its id or gallery-dl's
    filename, else by its md5.

    Raises:
        BadRecord: when there is none, more than one, or it lies outside the folder.
    """
    for name in FILE_FIELDS:
        file = record.get(name)
        if file is not None and not isinstance(file, Mapping):  # e621 has facts of the file there
            if not isinstance(file, str) or not file:
                raise BadRecord("bad_record", f"{name} must be a path as text, not {file!r}")
            return images.locate(file)
    stems, md5 = image_stems(record), read_md5(record)
    if not stems and md5 is None:
        there = show_name(", ".join(record)) or "none"
        raise BadRecord("bad_record", f"no id, file, file_name or md5 by which to find its image; its fields: {there}")
    found = next((names for stem in stems if (names := find_stem(stem, record, md5, images))), [])
    if not found and md5 is not None:
        found = images.find(md5) or images.find_md5(md5)
    found = choose(found, record, md5) if len(found) > 1 else found
    called = " or ".join([*stems, *([] if md5 is None or md5 in stems else [md5])])
    if not found:
        raise BadRecord("image_missing", f"no image is called {called} and one of {', '.join(EXTENSIONS)}")
    if len(found) > 1:
        raise BadRecord("image_ambiguous", f"{called} has several images: {show_name(', '.join(sorted(found)))}")
    return found[0]


def find_stem(stem: str, record: Mapping[str, Any], md5: str | None, images: ImageFolder) -> list[str]:
    """The images of a stem or id that may be the record's."""
    return [name for name in images.find(stem) if agrees(name, record, md5)]


def agrees(name: str, record: Mapping[str, Any], md5: str | None) -> bool:
    """Whether a file found by the id may be the post's: ids of different sites are different posts."""
    site, stated = site_in(name), md5_in(name)
    if site is None or (stated is not None and stated == md5):
        return True
    if (own := read_site(record)) is not None:
        return own == site
    # an image may have been replaced since, but of an unknown site only the sum tells that it is this post's
    return site == "danbooru" or md5 is None


def choose(found: list[str], record: Mapping[str, Any], md5: str | None) -> list[str]:
    """Of several images those that the record means: by its md5, by its site, or called by the id alone."""
    for fits in (
        lambda name: md5 is not None and md5_in(name) == md5,
        lambda name: site_in(name) is not None and site_in(name) == read_site(record),
        lambda name: site_in(name) is None,
    ):
        if some := [name for name in found if fits(name)]:
            return some
    return found

"""The one front door to all posts: every source that a config names, in order.

What cannot be a Post comes out as a Reject, in place; nothing is raised over one record.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from trainer.config.schema import DataConfig, SourceConfig
from trainer.core.errors import UserError
from trainer.data.post import Post, encode_key
from trainer.data.sources.folders import iterate_folder
from trainer.data.sources.hub_datasets import iterate_dataset
from trainer.data.sources.image_folders import ImageFolder, list_images
from trainer.data.sources.kohya import iterate_kohya
from trainer.data.sources.posts_files import iterate_posts_file
from trainer.data.sources.records import Item, Reject, Remark, settle_caption
from trainer.data.sources.tars import iterate_tars

Folders = dict[tuple[str, bool], ImageFolder]  # by path, and whether links are followed


def iterate_sources(data: DataConfig) -> Iterator[Item]:
    """All posts of all sources, in order, and between them what sources say of other inputs.

    Raises:
        UserError: when a source cannot be read at all, naming its key in the config.
    """
    folders: Folders = {}  # several sources may share a folder of images, which is listed once
    for where, source in name_sources(data):
        try:
            if source.images is not None and (source.images, source.follow_links) not in folders:
                place = existing_folder(source.images)
                listed = list_images(place, source.label, source.follow_links, files_in(place, data))
                folders[source.images, source.follow_links] = listed
                yield from listed.damages
            items = iterate_source(source, folders)
            items = ignore_missing(items, source) if source.missing_images == "ignore" else items
            items = prefix_keys(items, source.label) if source.prefix_keys else items
            for item in items:
                several = source.more_caption_columns is not None
                yield settle_caption(item, source.lines, several) if isinstance(item, Post) and item.caption else item
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    for folder in folders.values():
        yield from folder.remark_unused()


def files_in(folder: Path, data: DataConfig) -> set[str]:
    """The files in a folder of images that are sources themselves, such as its posts file, by their names in it."""
    files, inside = [Path(source.path).resolve() for _, source in name_sources(data)], folder.resolve()
    return {str(file.relative_to(inside)) for file in files if file.is_relative_to(inside)}


def ignore_missing(items: Iterator[Item], source: SourceConfig) -> Iterator[Item]:
    """A source whose posts without an image are counted apart.

    Raises:
        UserError: when no post has an image.
    """
    found, missing = 0, 0
    for item in items:
        if isinstance(item, Reject) and item.reason == "image_missing":
            missing += 1
            yield Remark(source.label, "posts without an image", origin=item.origin, detail=item.detail)
        else:
            found += isinstance(item, Post)
            yield item
    if missing and not found:
        raise UserError(f"no post of {source.path} has an image in {source.images or 'it'}: {missing} have none")


def name_sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    """The sources by their dotted keys; data.posts and data.images are a short form of some."""
    if data.sources is not None:
        return [(f"data.sources.{number}", source) for number, source in enumerate(data.sources)]
    if data.images is None:
        raise UserError("data.images is not set: name the folder that holds the images, or data.sources")
    if data.posts is None:
        return [("data.images", SourceConfig("folder", data.images))]
    if not Path(data.images).is_dir():
        raise UserError(f"data.images: {data.images} is not a folder")
    return [("data.posts", SourceConfig("posts", file, data.images)) for file in data.posts]


def iterate_source(source: SourceConfig, folders: Folders) -> Iterator[Item]:
    """The posts of one source, of whatever kind."""
    path = Path(source.path)
    listed = None if source.images is None else folders[source.images, source.follow_links]
    images = None if listed is None else listed.of_source(source.strip_prefix)
    match source.kind:
        case "posts":
            assert images is not None
            yield from iterate_posts_file(
                path, images, source.label, source.caption_column, source.more_caption_columns or ()
            )
        case "folder":
            yield from iterate_folder(existing_folder(source.path), source.label, source.follow_links)
        case "tars":
            yield from iterate_tars(path, source.label, source.follow_links)
        case "dataset":
            yield from iterate_dataset(source)
        case "kohya":
            assert images is not None
            yield from iterate_kohya(path, images, source.label, source.lines == "variants")
        case _:
            assert_never(source.kind)
    if images is not None:
        images.judge_names()


def prefix_keys(items: Iterator[Item], name: str) -> Iterator[Item]:
    """Items whose keys begin with their source's name and a slash, as if the source were a folder."""
    for item in items:
        if isinstance(item, Remark) or item.key is None:
            yield item
        else:
            yield replace(item, key=f"{encode_key(f'{name}/')}{item.key}")


def existing_folder(name: str) -> Path:
    """The folder of this name."""
    if not Path(name).is_dir():
        raise UserError(f"{name} is not a folder")
    return Path(name)

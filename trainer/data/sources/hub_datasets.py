"""Datasets of Hugging Face's package ``datasets`` as posts: saved to disk, or by hub id or folder.

The package only says which Arrow files a split is made of. Rows are read from these files here, without their images:
an image is a cell of such a file, or a file of its own where the row has only a path. Since version 4 the package
runs no code that comes with a dataset.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import SourceConfig
from trainer.core.errors import UserError
from trainer.data.images import open_arrow
from trainer.data.post import ImagePlace, Post, encode_key
from trainer.data.sources.posts_files import plain_value
from trainer.data.sources.record_files import ROWS_AT_A_TIME
from trainer.data.sources.records import BadRecord, Reject, check_columns, read_captioned, reject

NOT_INSTALLED = (
    "the package datasets is not installed: make setup brings it, and so does pip install --constraint constraints.txt "
    "datasets"
)


def iterate_dataset(source: SourceConfig) -> Iterator[Post | Reject]:
    """The rows of a split, in order. Columns are named as Danbooru's fields; others are kept as ``extra``.

    Raises:
        UserError: when the package, the dataset, the split or a column is missing, or a file is damaged.
    """
    files, root = find_split(source)
    number = 0
    for file in files:
        try:
            table = open_arrow(file)
            image = find_image_column(source, table.schema)
            others = source.more_caption_columns or ()
            check_columns(table.schema, source.caption_column, f"the dataset {source.path}", others)
            for row, (values, path) in enumerate(iterate_dataset_rows(table, image)):
                place = ImagePlace(file, row=row, column=image) if path is True else path
                yield read_dataset_row(source, number, values, place, root)
                number += 1
        except (pa.ArrowException, OSError, ValueError) as error:  # a name that is not UTF-8 is a ValueError
            raise UserError(f"{file} is damaged: {error}") from error


def find_split(source: SourceConfig) -> tuple[list[Path], Path]:
    """Let the package find, fetch and, for anything but a saved dataset, build the Arrow files of a split, in order.

    With them the folder in which files must lie that rows name by their paths.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    folder, name = Path(source.path), source.split or "train"
    saved = any((folder / each).is_file() for each in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(source.path, keep_in_memory=False)
        else:
            found = datasets.load_dataset(source.path, split=name, revision=source.revision, keep_in_memory=False)
    except Exception as error:  # the package raises whatever its many readers do
        raise UserError(f"the dataset {source.path} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        if name not in found:
            raise UserError(f"the dataset {source.path} has no split {name}, only {', '.join(found)}; set its split")
        found = found[name]
    elif saved and source.split is not None and str(found.split) != source.split:
        raise UserError(f"the dataset {source.path} is the split {found.split}, not {source.split}")
    files = [Path(each["filename"]) for each in found.cache_files]
    if sum(open_arrow(file).num_rows for file in files) != len(found):
        raise UserError(f"the split {name} is a part of its files only: name a whole split of {source.path}")
    root = folder if folder.is_dir() else Path(datasets.config.HF_CACHE_HOME)
    return files, root.resolve()


def find_image_column(source: SourceConfig, schema: pa.Schema) -> str:
    """The column of images: the one that the config names, or the only one."""
    if source.image_column is not None:
        if source.image_column not in schema.names:
            there = ", ".join(schema.names)
            raise UserError(f"the dataset {source.path} has no column {source.image_column}, only {there}")
        if not holds_bytes(schema.field(source.image_column).type):
            raise UserError(f"the column {source.image_column} of {source.path} holds no images")
        return source.image_column
    images = [column.name for column in schema if holds_bytes(column.type)]
    if len(images) != 1:
        there = f"several columns ({', '.join(images)})" if images else "no column"
        raise UserError(f"the dataset {source.path} has {there} of images: set its image_column")
    return images[0]


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether cells of this type are bytes, or the package's own images: a struct of ``bytes`` and ``path``."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def iterate_dataset_rows(table: pa.Table, image: str) -> Iterator[tuple[dict[str, Any], bool | str]]:
    """Each row's values but bytes, and where its image is: True in its cell, a path beside it, or False for nowhere."""
    columns = [column.name for column in table.schema if not holds_bytes(column.type)]
    for batch in table.select([*columns, image]).to_batches(ROWS_AT_A_TIME):
        values, cells = batch.select(columns), batch.column(image)
        values.validate(full=True)  # offsets of a damaged file would lead anywhere
        cells.validate()
        within, paths = cells, [None] * len(cells)
        if pa.types.is_struct(cells.type):
            within = pc.struct_field(cells, "bytes")  # null where the whole cell is
            if cells.type.get_field_index("path") >= 0:
                cells.field("path").validate(full=True)
                paths = pc.struct_field(cells, "path").to_pylist()
        for row, path, has_bytes in zip(values.to_pylist(), paths, within.is_valid().to_pylist(), strict=True):
            yield row, has_bytes or path or False


def read_dataset_row(
    source: SourceConfig, number: int, values: dict[str, Any], place: ImagePlace | bool | str, root: Path
) -> Post | Reject:
    """The post of one row."""
    key, origin = encode_key(f"{source.label}/{number}"), f"{source.label} row {number}"
    try:
        record = plain_value(values)
        image = place if isinstance(place, ImagePlace) else place_file(place, root)
        columns, others = source.caption_column, source.more_caption_columns or ()
        return read_captioned(record, columns, others, source=source.label, image=image, origin=origin, key=key)
    except ValueError as error:
        return reject(key, origin, error)


def place_file(path: bool | str, root: Path) -> ImagePlace:
    """The file of a row that has only a path."""
    if not isinstance(path, str):
        raise BadRecord("image_missing", "the row has neither an image nor its path")
    real = Path(os.path.realpath(path))
    if not os.path.isabs(path) or not real.is_relative_to(root):  # noqa: PTH117
        raise BadRecord("outside_folder", f"{path!r} does not lie in {root}: save the dataset with its images in it")
    if not real.exists():
        raise BadRecord("image_missing", f"{path!r} is not there")
    return ImagePlace(Path(path))

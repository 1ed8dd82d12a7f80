"""What the rows of an index must be, whoever wrote them: checked once when a set is opened, by whole columns.

A million rows take about a second. Behind these checks a row's bytes lie in its shard and are as many as its bucket
needs; whether they are the right ones its CRC-32 says when they are read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trainer.core.layout import INDEX_FILE, MANIFEST_FILE
from trainer.data.shards import SCHEMA

MAX_SIDE = 2**14  # pixels of a bucket; latents of 16,384 x 16,384 are 33 MB
MAX_HEADER = 2**16  # bytes of a .npy header, of which NumPy writes 128
LATENT_BYTES = 4 * 2  # of a place of 8 x 8 pixels: four channels in fp16


def find_columns_problem(schema: pa.Schema, wanted: pa.Schema = SCHEMA, file: str = INDEX_FILE) -> str | None:
    """Which column is not as this program writes it, if one is not."""
    if schema.equals(wanted):
        return None
    problem = f"{file} has other columns than this program's"
    for field in wanted:
        if field.name not in schema.names:
            return f"{problem}: {field.name} is missing"
        if not schema.field(schema.get_all_field_indices(field.name)[0]).equals(field):
            found = schema.field(schema.get_all_field_indices(field.name)[0])
            return f"{problem}: {field.name} is {describe_field(found)}, not {describe_field(field)}"
    return problem


def describe_field(field: pa.Field) -> str:
    """A column's type in words."""
    return f"{field.type}{'' if field.nullable else ', never null'}"


def find_rows_problem(table: pa.Table, shards: list[dict[str, Any]], file: str = INDEX_FILE) -> str | None:
    """The first thing that is wrong with the rows, naming shard and key; None where nothing is.

    Args:
        table: of the index's columns, in order of the keys, or of those of ``file`` in another.
        shards: as the manifest lists them.
    """
    try:
        table.validate(full=True)  # places within the columns, and UTF-8: reading others could end the process
    except pa.ArrowException as error:
        return f"{file} is damaged: {error}"
    for field in table.schema:
        if not field.nullable and table[field.name].null_count:
            return f"{file} has rows without {field.name}"
    sizes = {shard["name"]: shard["size"] for shard in shards}
    named = pc.unique(table["shard"]).to_pylist()
    if strange := sorted(set(named) - sizes.keys()):
        return f"{file} names shard {strange[0]}, {MANIFEST_FILE} does not list it"
    for what, wrong in list_conditions(table, sizes, file == INDEX_FILE):
        if pc.any(wrong).as_py():
            row = table.slice(pc.index(wrong, True).as_py(), 1)
            return f"{file}: shard {row['shard'][0]}, key {row['key'][0]}: {what}"
    return None


def list_conditions(table: pa.Table, sizes: Mapping[str, int], by_key: bool) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """What no row may be, and of each row whether it is that."""
    keys = table["key"]
    if by_key and len(keys) > 1:
        unsorted = pc.greater_equal(keys[:-1], keys[1:])
        first = pa.chunked_array([pa.array([False]), *unsorted.chunks])
        yield "its key is not after the one before it", first
    yield "its key is empty", pc.equal(pc.binary_length(keys), 0)
    for side in ("bucket_width", "bucket_height"):
        value = table[side]
        whole = pc.equal(pc.multiply(pc.divide(value, 8), 8), value)
        fits = pc.and_(pc.greater_equal(value, 8), pc.less_equal(value, MAX_SIDE))
        yield f"{side} is no multiple of 8 up to {MAX_SIDE}", pc.invert(pc.and_(whole, fits))
    for name in ("original_width", "original_height"):
        yield f"{name} is below 1", pc.less(table[name], 1)
    offset, length = table["offset"], table["length"]
    width, height = (pc.cast(table[f"bucket_{side}"], pa.int64()) for side in ("width", "height"))
    needed = pc.multiply(pc.multiply(pc.divide(width, 8), pc.divide(height, 8)), LATENT_BYTES)
    surplus = pc.subtract_checked(pc.min_element_wise(length, 2**50), needed)
    too_few, too_many = pc.less_equal(surplus, 0), pc.greater(surplus, MAX_HEADER)
    yield "length is not that of its bucket's latents", pc.or_(too_few, too_many)
    names = pa.array(list(sizes), pa.string())
    size = pc.take(pa.array(sizes.values(), pa.int64()), pc.index_in(table["shard"], names))
    beyond = pc.greater(offset, pc.subtract(size, length))
    yield "its bytes lie outside of the shard", pc.or_(pc.less(offset, 0), beyond)

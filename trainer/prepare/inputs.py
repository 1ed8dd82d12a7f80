"""All that the sources hold, read once into an Arrow table: what a preparation works through.

No image is opened here. The table is written in batches, so that a million posts never stand in memory as objects.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from duckdb import DuckDBPyConnection

from trainer.config.schema import FiltersConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_json
from trainer.core.layout import QUERIES_FOLDER
from trainer.core.progress import format_count, metered
from trainer.data.captions import VARIANT_SEPARATOR
from trainer.data.fields import show_text
from trainer.data.formats import BUILT_IN, list_formats
from trainer.data.images import BadImage, stat_image
from trainer.data.post import POST_FIELDS, STATED_FIELDS, ImagePlace, Post
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.sources.records import NO_CAPTION, Item, Reject, Remark
from trainer.data.tables import connect, stream_table, write_batches
from trainer.prepare.remarks import Remarks

SURVEY_ROWS = 16384  # of a batch, which is hashed as a whole
MAX_ORIGINS = 3  # that a message names
PLACE_FIELDS = [  # of an ImagePlace
    pa.field("path", pa.binary(), nullable=False),  # of the file that holds the image; file names need not be Unicode
    pa.field("offset", pa.int64()),  # of a tar's member
    pa.field("length", pa.int64()),
    pa.field("row", pa.int64()),  # of a dataset's cell
    pa.field("column", pa.string()),
]
STAT_FIELDS = [  # what tells without reading it that an image is another one
    *(pa.field(name, pa.int64(), nullable=False) for name in ("image_size", "image_mtime_ns")),
    pa.field("image_place", pa.string(), nullable=False),
]
INPUTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("image", pa.struct(PLACE_FIELDS), nullable=False),
        *STAT_FIELDS,
        *POST_FIELDS,
        *STATED_FIELDS,
    ]
)

OF_A_POST = tuple(name for name in INPUTS_SCHEMA.names if name in Post.__dataclass_fields__)

# SQL: whether a row of posts has an empty caption, the usual separator and commas included. Such a caption comes of a
# finished one without words, or of neither a caption nor tags; a rating, a score and a year say nothing of the image
TAGS = ", ".join(f"tags_{category}" for category in TAG_CATEGORIES)
EMPTY_CAPTION = f"""(CASE WHEN caption IS NULL THEN trim(concat_ws('', {TAGS}), E' \\t\\r\\n')
                     ELSE trim(caption, E' \\t\\r\\n,|') END = '')"""


@dataclass(frozen=True)
class Survey:
    """What a look at all sources found."""

    total: int  # posts, those that a filter removed, and rejects
    sha256: str  # of all that decides what is prepared
    set_aside: list[dict[str, Any]]  # rejects, as the quarantine lists them
    filtered: dict[str, int]  # by filter
    remarks: Remarks = field(default_factory=Remarks)  # of filtered posts too


def survey_inputs(items: Iterable[Item], filters: FiltersConfig, separator: str, path: Path) -> Survey:
    """Read all posts once into the table ``path``; filtered ones and remarks are only counted, rejects are kept.

    Args:
        separator: captions.keep_tokens_separator. It decides what a filter takes for a tag of a finished caption, and
            nothing of what is prepared.

    Raises:
        UserError: when a key occurs twice, naming both places.
    """
    set_aside: list[dict[str, Any]] = []
    filtered: Counter[str] = Counter()
    total, digest, remarks = 0, hashlib.sha256(), Remarks()

    def accept() -> Iterator[dict[str, Any]]:
        nonlocal total
        for item in metered(items, "read posts", "post"):
            if isinstance(item, Remark):
                remarks.add(item)
                continue
            total += 1
            if isinstance(item, Post):
                remarks.add(item)
                remarks.add_separator(item, separator)
            record = item if isinstance(item, Reject) else describe_post(item)
            if isinstance(record, Reject):
                set_aside.append(describe_reject(record))
            elif (name := find_filter(record, filters, separator)) is not None:
                filtered[name] += 1
            else:
                yield record

    def hashed() -> Iterator[pa.RecordBatch]:
        accepted = accept()
        while records := list(islice(accepted, SURVEY_ROWS)):
            batch = pa.RecordBatch.from_pylist(records, schema=INPUTS_SCHEMA)
            digest.update(batch.drop_columns(["origin", "image"]).serialize())  # not where they lie
            yield batch

    write_batches(path, INPUTS_SCHEMA, hashed())
    with connect(path.with_name(QUERIES_FOLDER), inputs=stream_table(path)) as tables:
        refuse_double_keys(tables)
    # what the filters let through is in the table; only the shorter side is judged later, by the image itself
    decided: list[Any] = [digest.hexdigest(), set_aside, filters.min_side, filters.drop_duplicates]
    decided += [remarks.counts] if remarks.counts else []  # so that a set that has none is known again
    plug_ins = sorted(list_formats().keys() - BUILT_IN)  # with another one, what was set aside may be an image
    decided += [plug_ins] if plug_ins else []
    return Survey(total, sha256_json(decided), set_aside, dict(filtered), remarks)


def describe_post(post: Post) -> dict[str, Any] | Reject:
    """The table's row of a post, with its file's size and time; a Reject where the file is missing."""
    try:
        size, mtime = stat_image(post.image)
    except BadImage as error:
        return Reject(post.key, post.origin, error.reason, error.detail)
    row = {name: getattr(post, name) for name in OF_A_POST}
    extra = json.dumps(post.extra, ensure_ascii=False) if post.extra else None
    stat = {"image_size": size, "image_mtime_ns": mtime, "image_place": name_place(post.image)}
    image = post.image._asdict() | {"path": os.fsencode(post.image.path)}
    return row | stat | {"image": image, "extra": extra}


def name_place(place: ImagePlace) -> str:
    """An image's place as far as it stays when its folder is moved."""
    name = f"{place.path.parent.name}/{place.path.name}"
    if place.offset is not None:
        name = f"{place.path.name}:{place.offset}"
    elif place.row is not None:
        name = f"{place.path.name}:{place.column}:{place.row}"
    return os.fsencode(name).decode(errors="backslashreplace")


def read_place(struct: dict[str, Any]) -> ImagePlace:
    """An image's place as the table's struct holds it."""
    return ImagePlace(**struct | {"path": Path(os.fsdecode(struct["path"]))})


def describe_reject(reject: Reject) -> dict[str, Any]:
    """A line of the quarantine. A file name need not be Unicode, and details quote it."""
    return asdict(reject) | {"detail": show_text(reject.detail)}


def find_filter(row: dict[str, Any], filters: FiltersConfig, separator: str) -> str | None:
    """The first filter that removes a post, by its name; ``min_side`` needs the image and is judged later."""
    if filters.min_score is not None and (row["score"] is None or row["score"] < filters.min_score):
        return "min_score"
    if filters.ratings is not None and row["rating"] not in filters.ratings:
        return "ratings"
    if filters.first_year is not None and (row["year"] is None or row["year"] < filters.first_year):
        return "first_year"
    if filters.last_year is not None and (row["year"] is None or row["year"] > filters.last_year):
        return "last_year"
    if filters.required_tags or filters.forbidden_tags:
        tags = list_tags(row, separator)
        if not all(tag.replace("_", " ") in tags for tag in filters.required_tags):
            return "required_tags"
        if any(tag.replace("_", " ") in tags for tag in filters.forbidden_tags):
            return "forbidden_tags"
    return None


def list_tags(row: dict[str, Any], separator: str) -> set[str]:
    """All tags of a post, with spaces for underscores; of a finished caption what stands between its commas, and
    between the separators that captions are cut at.
    """
    strings = [value for name, value in row.items() if name.startswith("tags_") and value]
    tags = {tag.replace("_", " ") for string in strings for tag in string.split()}
    finished = (row["caption"] or "").replace(VARIANT_SEPARATOR, ",").replace(separator, ",").replace("_", " ")
    return tags | {tag.strip() for tag in finished.split(",")}


def refuse_double_keys(tables: DuckDBPyConnection) -> None:
    """A key names one sample, its latents and its noise.

    Raises:
        UserError: naming two places of such a key.
    """
    double = tables.sql("SELECT key FROM inputs GROUP BY key HAVING count(*) > 1 ORDER BY key").fetchall()
    if not double:
        return
    key = double[0][0]
    found = "SELECT source, origin FROM inputs WHERE key = $key ORDER BY length(origin), origin"
    (_, origin), (source, other), *_ = places = tables.sql(found, params={"key": key}).fetchall()
    advice = "remove one of the posts"
    if places[0][0] != source:
        advice += f", or, where they are different ones, set prefix_keys: true for {source} in data.sources"
    others = f" ({len(double) - 1} other keys do too)" if len(double) > 1 else ""
    raise UserError(f"the key {key} occurs twice: {origin} and {other}; {advice}{others}")


def refuse_empty_captions(work_inputs: Path, share: float, remarks: Remarks) -> None:
    """Refuse more empty captions than data.max_empty_captions allows, among the posts that filters have let through.

    Raises:
        UserError: with some of them, and the text that their records hold under other names.
    """
    with connect(work_inputs.with_name(QUERIES_FOLDER), inputs=stream_table(work_inputs)) as tables:
        counts = f"SELECT count(*) FILTER ({EMPTY_CAPTION}), count(*) FROM inputs"
        ((empty, total),) = tables.sql(counts).fetchall()
        if empty <= share * total:
            return
        some = f"SELECT origin FROM inputs WHERE {EMPTY_CAPTION} ORDER BY key LIMIT {MAX_ORIGINS}"
        origins = ", ".join(origin for (origin,) in tables.sql(some).fetchall())
    lines = [
        f"{empty} of {format_count(total, 'post')} have neither a caption nor tags, above data.max_empty_captions "
        f"{share}: {origins}{' ...' if empty > MAX_ORIGINS else ''}. Name the field of captions by a posts "
        "or dataset source's caption_column, mend the posts, or raise the share"
    ]
    others = {(line["source"], line["detail"]) for line in remarks.examples if line["note"] == NO_CAPTION}
    raise UserError("\n".join(lines + [f"  {source}: {detail}" for source, detail in sorted(others)[:MAX_ORIGINS]]))

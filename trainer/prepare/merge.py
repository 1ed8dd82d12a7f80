"""What the sources say now, joined to what is encoded: the posts that are pending, and at the end the set.

The index is always the join of both: a post that changed its tags has them in the index at once, one that is gone, or
filtered now, is left out, and its latents stay in their tar, known to latents.arrow, should it come back. A post has
valid latents where the newest ones of its key were made from an image file of the same place, size and time.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from duckdb import DuckDBPyConnection

from trainer.config.schema import FiltersConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.core.layout import INDEX_FILE, LATENTS_FILE, NOTES_FILE, QUARANTINE_FILE, shard_number
from trainer.core.progress import format_count
from trainer.data.index import Index
from trainer.data.shards import INDEX_ROWS, SCHEMA, ShardFile, write_index
from trainer.data.tables import (
    MEMORY,
    READ_ROWS,
    ArrowStream,
    connect,
    cut_batches,
    read_batches,
    read_facts,
    read_rows,
    read_table,
    stream_table,
    write_batches,
)
from trainer.prepare.inputs import EMPTY_CAPTION, TAGS, Survey
from trainer.prepare.remarks import count_reasons, format_counts, format_remarks, list_examples, write_jsonl
from trainer.prepare.work import LATENTS_SCHEMA, DoneChunk, Work, read_done, remove_unfinished

UNKNOWN_FILE = {"image_size": -1, "image_mtime_ns": -1, "image_place": ""}  # of the images of a set of version 0.1
SORTED_ROWS = 200_000  # that DuckDB must have room for at once, whatever their width
PARTS_SCHEMA = LATENTS_SCHEMA.append(pa.field("part", pa.int32()))

# of each key the latents that count: shards are numbered as they are made, the hundred thousandth by one more digit
MAKE_NEWEST = """
CREATE TABLE newest AS SELECT parts.* EXCLUDE part FROM parts SEMI JOIN shards USING (shard)
QUALIFY row_number() OVER (PARTITION BY key ORDER BY length(shard) DESC, shard DESC, part DESC) = 1
"""
PENDING = """
SELECT inputs.*, CASE WHEN newest.key IS NOT NULL THEN newest END AS known
FROM inputs LEFT JOIN newest ON inputs.key = newest.key
WHERE (inputs.image_size, inputs.image_mtime_ns, inputs.image_place)
    IS DISTINCT FROM (newest.image_size, newest.image_mtime_ns, newest.image_place)
ORDER BY inputs.key
"""
# posts with valid latents. Of equal images the first by key counts that has a caption or tags, else the first of all
MAKE_SAMPLES = rf"""
CREATE TABLE samples AS SELECT *, NOT small AND (first = key OR NOT $drop_duplicates) AS kept FROM (
    SELECT *, first_value(key) OVER (PARTITION BY small, content_hash ORDER BY worded DESC, key) AS first FROM (
        SELECT key, origin, content_hash, stated_width, stated_height, original_width, original_height, several_frames,
            coalesce(least(original_width, original_height) < $min_side, false) AS small, {EMPTY_CAPTION} AS empty,
            regexp_matches(concat_ws('', caption, {TAGS}), '[^\s\x0b\x1c-\x1f\x85\p{{Z}}]') AS worded
        FROM inputs JOIN newest USING (key, image_size, image_mtime_ns, image_place)))
"""
COUNTS = """
SELECT count(*) FILTER (small) AS min_side, count(*) FILTER (NOT small AND NOT kept) AS drop_duplicates,
    count(*) FILTER (kept) AS samples FROM samples
"""
NOTES = (
    """SELECT key, origin, 'stated_size' AS note, [stated_width, stated_height] AS stated,
    [original_width, original_height] AS file
    FROM samples WHERE kept AND (stated_width <> original_width OR stated_height <> original_height) ORDER BY key""",
    "SELECT key, origin, 'empty_caption' AS note FROM samples WHERE kept AND empty ORDER BY key",
    "SELECT key, origin, 'several_frames' AS note FROM samples WHERE kept AND several_frames ORDER BY key",
    """SELECT key, origin, 'duplicate' AS note, first AS "of" FROM samples
    WHERE NOT small AND first <> key ORDER BY key""",
)
INDEX = f"""
SELECT {", ".join(f'"{name}"' for name in SCHEMA.names)}
FROM inputs JOIN newest USING (key) ORDER BY key
"""
# after notes are made, so that no query has more than one join and a sort to hold
DROP_OTHERS = "DELETE FROM newest WHERE key NOT IN (SELECT key FROM samples WHERE kept); DROP TABLE samples"
# every sample that lies in a tar, as it was last looked at
LATENTS = """
SELECT * FROM parts SEMI JOIN shards USING (shard)
QUALIFY row_number() OVER (PARTITION BY shard, "offset" ORDER BY part DESC) = 1 ORDER BY length(shard), shard, "offset"
"""


def list_shards(old: Index | None, done: dict[int, DoneChunk]) -> dict[str, ShardFile]:
    """All complete shards, by name."""
    listed = [ShardFile(**shard) for shard in old.manifest["shards"]] if old else []
    return {shard.name: shard for shard in chain(listed, *(chunk.shards for chunk in done.values()))}


def read_parts(old: Index | None, done: dict[int, DoneChunk]) -> Iterator[pa.RecordBatch]:
    """The latents of a complete set, and of chunks that are done, in the order in which they were made."""
    paths = [chunk.path for chunk in done.values()]
    if old:  # a set of version 0.1 has its index alone
        paths.insert(0, old.folder / (LATENTS_FILE if "latents_sha256" in old.manifest else INDEX_FILE))
    for part, path in enumerate(paths):
        fill = UNKNOWN_FILE | {"part": part}
        for batch in read_batches(path):
            columns = [
                batch[field.name] if field.name in batch.schema.names
                else pa.array([fill.get(field.name)] * len(batch), field.type)
                for field in PARTS_SCHEMA
            ]  # fmt: skip
            yield pa.RecordBatch.from_arrays(columns, schema=PARTS_SCHEMA)


@contextmanager
def join_tables(work: Work, old: Index | None, done: dict[int, DoneChunk]) -> Iterator[DuckDBPyConnection]:
    """Queries over the inputs, all parts that are encoded, and of each key the newest latents."""
    parts = ArrowStream(PARTS_SCHEMA, lambda: read_parts(old, done))
    shards = pa.table({"shard": pa.array(list_shards(old, done), pa.string())})
    # DuckDB holds whole runs of a sort, of 122,880 rows each, however wide they are
    size, rows = work.inputs.stat().st_size, len(read_table(work.inputs))
    memory = max(MEMORY, size // 10, SORTED_ROWS * size // max(rows, 1))
    with connect(work.queries, memory, inputs=stream_table(work.inputs), parts=parts, shards=shards) as tables:
        tables.execute(MAKE_NEWEST)
        yield tables


def plan_chunks(work: Work, old: Index | None, survey: Survey, samples_per_shard: int) -> None:
    """Write the pending posts down, chunk by chunk.

    The same inputs as when the work was begun keep their chunks. Others are planned anew, and what is encoded by then
    counts.

    Args:
        old: the complete set that is joined.
    """
    done = read_done(work)
    remove_unfinished(work, done)
    shards = list_shards(old, done)
    made_of = {
        "inputs_sha256": survey.sha256,
        "inputs_file_sha256": sha256_file(work.inputs),  # also of where the images lie
        "index_sha256": old.manifest["index_sha256"] if old else None,
        "samples_per_shard": samples_per_shard,
    }
    if work.pending.exists() and read_facts(work.pending).items() >= made_of.items() and not find_lost(work, old, done):
        return
    first = max([*done, *map(shard_number, shards)], default=-1) + 1
    with join_tables(work, old, done) as tables:
        pending = tables.sql(PENDING).to_arrow_reader(READ_ROWS)
        chunks = cut_batches(pending, pending.schema, samples_per_shard)
        write_batches(work.pending, pending.schema, chunks, made_of | {"first_shard": first, "shards": [*shards]})


def find_lost(work: Work, old: Index | None, done: dict[int, DoneChunk]) -> set[str]:
    """Shards that counted as encoded when the pending posts were written down, and are not whole any more."""
    return set(read_facts(work.pending)["shards"]) - list_shards(old, done).keys()


def merge_set(
    work: Work,
    old: Index | None,
    done: dict[int, DoneChunk],
    survey: Survey,
    latents: dict[str, Any],
    filters: FiltersConfig,
) -> dict[str, Any]:
    """Write everything but the shards into ``work.set``, the manifest last; returns it.

    Args:
        survey: with what became of all chunks.
        latents: what made them, the manifest's section.

    Raises:
        UserError: when no sample is left.
    """
    with join_tables(work, old, done) as tables:
        tables.execute(MAKE_SAMPLES, {"min_side": filters.min_side, "drop_duplicates": filters.drop_duplicates})
        (counted,) = read_rows(tables, COUNTS)
        samples = counted.pop("samples")
        filtered = dict((Counter(survey.filtered) + Counter(counted)).most_common())  # a sum of counters has no zeros
        if not samples:
            refuse_empty(work, survey, filtered)
        write_jsonl(work.set / QUARANTINE_FILE, survey.set_aside)
        notes: Counter[str] = Counter()
        write_jsonl(work.set / NOTES_FILE, chain(iterate_notes(tables, notes), survey.remarks.examples))
        write_latents(work.set / LATENTS_FILE, tables)
        counts = {
            "inputs": survey.total,
            "samples": samples,
            "set_aside": count_reasons(survey.set_aside),
            "filtered": filtered,
            "notes": dict(notes.most_common()),
            **({"by_source": survey.remarks.counts} if survey.remarks.counts else {}),
        }
        tables.execute(DROP_OTHERS)
        return write_index(
            work.set, tables.sql(INDEX).to_arrow_reader(READ_ROWS), list_shards(old, done).values(), latents,
            counts=counts, inputs={"total": survey.total, "sha256": survey.sha256},
            latents_sha256=sha256_file(work.set / LATENTS_FILE),
        )  # fmt: skip


def iterate_notes(tables: DuckDBPyConnection, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """The notes of all samples, which are counted on their way."""
    for query in NOTES:
        for note in read_rows(tables, query):
            counts[note["note"]] += 1
            yield note


def write_latents(path: Path, tables: DuckDBPyConnection) -> None:
    """latents.arrow; a set without images of several frames has no column for them, as before there was one."""
    ((several,),) = tables.sql("SELECT coalesce(bool_or(several_frames), false) FROM parts").fetchall()
    schema = LATENTS_SCHEMA if several else LATENTS_SCHEMA.remove(len(LATENTS_SCHEMA) - 1)
    schema = schema.with_metadata(None)  # which writes empty metadata, as version 0.2.0 did: the bytes are the same
    write_batches(path, schema, cut_batches(tables.sql(LATENTS).to_arrow_reader(READ_ROWS), schema, INDEX_ROWS))


def refuse_empty(work: Work, survey: Survey, filtered: dict[str, int]) -> None:
    """Say where all inputs went; the quarantine is written all the same.

    Raises:
        UserError: always.
    """
    removed = {f"removed by {name}": count for name, count in filtered.items()}
    where = format_counts(count_reasons(survey.set_aside) | removed)
    lines = [f"no sample is left of {format_count(survey.total, 'input')}: {where}"]
    if survey.set_aside:
        write_jsonl(work.quarantine, survey.set_aside)
        lines += [*list_examples(survey.set_aside), f"  {work.quarantine} names each"]
    lines += [f"  noted in {line}" for line in format_remarks(survey.remarks.counts)]
    raise UserError("\n".join(lines))

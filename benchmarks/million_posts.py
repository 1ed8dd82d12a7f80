"""A million posts: from their JSON through filters, the table of a preparation, planning and merge, captions and plan.

``python benchmarks/million_posts.py [--posts 1271990] [--prepare-only] [--folder /tmp]``

Metadata only: posts as benchmarks/posts.py makes them, their images one file that is never opened, their latents taken
as encoded. Each measurement runs in a process of its own, with all libraries of a preparation loaded: "peak" is the
highest resident memory of the whole process (VmHWM).
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from million import list_shards, measure
from posts import make_rows, plain_config

from trainer.config.schema import FiltersConfig
from trainer.data.caption_draws import draw_sample_caption
from trainer.data.index import open_index
from trainer.data.plan import Plan
from trainer.data.post import ImagePlace, Post, read_post
from trainer.data.tables import read_table
from trainer.data.template import ready_rules
from trainer.prepare import prepare  # noqa: F401, so that its libraries are loaded
from trainer.prepare.inputs import Survey, survey_inputs
from trainer.prepare.merge import merge_set, plan_chunks
from trainer.prepare.work import LATENTS_SCHEMA, DoneChunk, Work, make_folders, read_done, read_pending, write_done

DISTINCT = 20_000  # posts that differ in more than their ids
SHARD = 2000  # samples
FILTERS = FiltersConfig(min_score=0, ratings=["g", "s", "q"], first_year=2007, forbidden_tags=["comic", "4koma"])


def write_posts(folder: Path, count: int) -> None:
    """Danbooru's JSON, one post a line."""
    bodies = []
    for row in make_rows(DISTINCT):
        tags = {f"tag_string_{name.removeprefix('tags_')}": row[name] for name in row if name.startswith("tags_")}
        facts = {
            "rating": row["rating"],
            "score": row["score"],
            "created_at": f"{row['year']}-05-01T00:00:00.000+09:00",
        }
        sizes = {"image_width": 2048, "image_height": 2048, "file_ext": "jpg", "md5": row["content_hash"][:32]}
        bodies.append(json.dumps(tags | facts | sizes)[1:])
    with (folder / "posts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f'{{"id": {number}, {bodies[number % DISTINCT]}\n' for number in range(count))


def read_posts(folder: Path) -> Iterator[Post]:
    """As the sources do, but for finding an image."""
    image = folder / "posts.jsonl"
    with image.open("rb") as lines:
        for number, line in enumerate(lines):
            place = ImagePlace(image, number, 1)
            yield read_post(
                json.loads(line), source="posts.jsonl", image=place, origin=f"posts.jsonl line {number + 1}"
            )


def read_only(folder: Path) -> str:
    """read and check the posts"""
    return f"{sum(1 for _ in read_posts(folder)):,} posts"


def survey(folder: Path, filters: FiltersConfig) -> Survey:
    work = Work(folder / "shards")
    make_folders(work)
    return survey_inputs(read_posts(folder), filters, "|||", work.inputs)


def survey_filtered(folder: Path) -> str:
    """read, filter, and write the table of a preparation"""
    return ", ".join(f"{name} {count:,}" for name, count in survey(folder, FILTERS).filtered.items()) + " removed"


def survey_all(folder: Path) -> str:
    """read, and write the table of a preparation, all posts"""
    total, size = survey(folder, FiltersConfig()).total, Work(folder / "shards").inputs.stat().st_size
    return f"{total:,} posts, {size / 1e6:,.0f} MB"


def count_inputs(work: Work) -> Survey:
    return Survey(len(read_table(work.inputs)), "0", [], {})


def plan_new(folder: Path) -> str:
    """find the pending posts (all), and cut them into chunks"""
    work = Work(folder / "shards")
    plan_chunks(work, None, count_inputs(work), SHARD)
    return f"{len(read_pending(work)):,} chunks"


def write_latents(folder: Path) -> str:
    """write what would have been encoded, chunk by chunk"""
    work, generator = Work(folder / "shards"), np.random.default_rng(0)
    inputs, count = read_table(work.pending), len(read_table(work.pending))
    sides = np.array([[832, 1216], [1024, 1024], [1216, 832], [896, 1152]])
    for number, shard in enumerate(list_shards(work.set, count)):
        posts = inputs.slice(number * SHARD, SHARD)
        numbers, size = np.arange(len(posts)), sides[generator.integers(0, 4, len(posts))]
        columns = {name: posts[name] for name in posts.column_names} | {
            "shard": pa.array([shard.name] * len(posts)),
            "content_hash": pa.array([f"{number * SHARD + place:064x}" for place in numbers]),
            "offset": pa.array(numbers * 131_072),
            "bucket_width": pa.array(size[:, 0]),
            "bucket_height": pa.array(size[:, 1]),
            "several_frames": pa.nulls(len(posts)),
        }
        filler = pa.array(np.full(len(posts), 2048))
        latents = pa.table(
            [columns.get(field.name, filler).cast(field.type) for field in LATENTS_SCHEMA], LATENTS_SCHEMA
        )
        write_done(DoneChunk(work.done / f"{Path(shard.name).stem}.arrow", [shard], [], {}), latents)
    return f"{number + 1:,} chunks"


def plan_again(folder: Path) -> str:
    """find the pending posts (none)"""
    work = Work(folder / "shards")
    work.pending.unlink()  # as if the inputs were others
    plan_chunks(work, None, count_inputs(work), SHARD)
    return f"{len(read_pending(work)):,} chunks"


def merge(folder: Path) -> str:
    """merge the set: latents.arrow, notes, index, fingerprint"""
    work = Work(folder / "shards")
    counts = merge_set(work, None, read_done(work), count_inputs(work), {}, plain_config().filters)["counts"]
    return f"{counts['samples']:,} samples"


def plan(folder: Path) -> str:
    """open the index, and plan the run"""
    index = open_index(Work(folder / "shards").set)
    plan = Plan(index.bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96)
    return f"{plan.steps_for_epochs(10):,} steps for 10 epochs"


def captions(folder: Path) -> str:
    """compose and draw the caption of every sample"""
    index, rules = open_index(Work(folder / "shards").set), ready_rules(plain_config().captions)
    rows = chain.from_iterable(batch.to_pylist() for batch in index.table.to_batches())
    lengths = [len(draw_sample_caption(row, 0, 42, rules)) for row in rows]
    return f"{np.mean(lengths):.0f} letters on average"


def main() -> None:
    parser = argparse.ArgumentParser(description="Posts, filters, merge, captions and plan at the recipe's size.")
    parser.add_argument("--posts", type=int, default=1_271_990)
    parser.add_argument("--prepare-only", action="store_true", help="leave out filters, plan and captions")
    parser.add_argument("--folder", help="where to put everything meanwhile: 4 GB a million posts")
    arguments = parser.parse_args()
    begin, end = (read_only, survey_filtered), (plan, captions)
    works = [survey_all, plan_new, write_latents, plan_again, merge]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_posts(folder, arguments.posts)
        print(f"{'':<58} {'time':>11} {'kept':>12} {'peak':>12}")
        for work in works if arguments.prepare_only else (*begin, *works, *end):
            measure(work, folder)


if __name__ == "__main__":
    main()

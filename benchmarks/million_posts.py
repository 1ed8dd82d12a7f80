"""A million posts: from their JSON through filters, the table of a preparation, its merge, captions and plan.

``python benchmarks/million_posts.py [--posts 1271990]``

Metadata only: posts as benchmarks/posts.py makes them, their images one file that is never opened, their latents taken
as encoded before. Each measurement runs in a process of its own, so that memory is what that work adds.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from million import list_shards, measure, name_shards
from posts import make_rows, plain_config

from trainer.config.schema import FiltersConfig
from trainer.core.rng import rng
from trainer.data.captions import compose_caption, draw_caption
from trainer.data.index import open_index
from trainer.data.plan import Plan
from trainer.data.post import Post, TarMember, read_post
from trainer.data.tables import read_table
from trainer.prepare.inputs import Inputs, survey_inputs
from trainer.prepare.merge import merge_set
from trainer.prepare.work import LATENTS_SCHEMA, STAT, Stock, Work, make_folders, plan_todo, write_stock

DISTINCT = 20_000  # posts that differ in more than their ids
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
            place = TarMember(image, number, 1)
            yield read_post(
                json.loads(line), source="posts.jsonl", image=place, origin=f"posts.jsonl line {number + 1}"
            )


def read_only(folder: Path) -> str:
    """read and check the posts"""
    return f"{sum(1 for _ in read_posts(folder)):,} posts"


def survey(folder: Path, filters: FiltersConfig) -> Inputs:
    work = Work(folder / "work")
    make_folders(work)
    return survey_inputs(read_posts(folder), filters, "|||", work.inputs)


def survey_filtered(folder: Path) -> str:
    """read, filter, and write the table of a preparation"""
    return ", ".join(f"{name} {count:,}" for name, count in survey(folder, FILTERS).filtered.items()) + " removed"


def survey_all(folder: Path) -> str:
    """read, and write the table of a preparation, all posts"""
    return (
        f"{survey(folder, FiltersConfig()).total:,} posts, {Work(folder / 'work').inputs.stat().st_size / 1e6:,.0f} MB"
    )


def write_latents(folder: Path) -> None:
    """What would have been encoded, as an earlier preparation leaves it."""
    work, count = Work(folder / "work"), len(read_table(Work(folder / "work").inputs))
    inputs, generator = read_table(work.inputs), np.random.default_rng(0)
    numbers = np.arange(count)
    sides = np.array([[832, 1216], [1024, 1024], [1216, 832], [896, 1152]])[generator.integers(0, 4, count)]
    columns = {
        "key": inputs["key"].combine_chunks(),
        "shard": name_shards(numbers // 2000),
        "content_hash": pa.array([f"{number:064x}" for number in numbers]),
        "offset": pa.array(numbers % 2000 * 131_072),
        "bucket_width": pa.array(sides[:, 0]),
        "bucket_height": pa.array(sides[:, 1]),
        "several_frames": pa.nulls(count),
    } | {name: inputs[name].combine_chunks() for name in STAT}
    filler = pa.array(np.full(count, 2048))
    table = pa.table([columns.get(field.name, filler).cast(field.type) for field in LATENTS_SCHEMA], LATENTS_SCHEMA)
    write_stock(work.store, Stock(table, list_shards(work.set, count)))


def merge(folder: Path) -> str:
    """find what is left to encode (nothing), and merge the set"""
    work, config = Work(folder / "work"), plain_config()
    inputs = Inputs(len(read_table(work.inputs)), "0", [], {})
    todo = plan_todo(work, read_table(work.inputs), Stock(LATENTS_SCHEMA.empty_table(), []), "0", 2000)
    assert not len(todo)
    counts = merge_set(work, todo, [], inputs, {}, config.filters)["counts"]
    return f"{counts['samples']:,} samples"


def plan(folder: Path) -> str:
    """open the index, and plan the run"""
    index = open_index(folder / "work" / "set")
    plan = Plan(index.bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96)
    return f"{plan.steps_for_epochs(10):,} steps for 10 epochs"


def captions(folder: Path) -> str:
    """compose and draw the caption of every sample"""
    index, rules = open_index(folder / "work" / "set"), plain_config().captions
    rows = chain.from_iterable(batch.to_pylist() for batch in index.table.to_batches())
    lengths = [
        len(draw_caption(compose_caption(row, rules), rules, rng("caption", 42, 0, number)))
        for number, row in enumerate(rows)
    ]
    return f"{np.mean(lengths):.0f} letters on average"


def main() -> None:
    parser = argparse.ArgumentParser(description="Posts, filters, merge, captions and plan at the recipe's size.")
    parser.add_argument("--posts", type=int, default=1_271_990)
    count = parser.parse_args().posts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_posts(folder, count)
        print(f"{'':<58} {'time':>11} {'kept':>12} {'peak':>12}")
        for work in (read_only, survey_filtered, survey_all):
            measure(work, folder)
        write_latents(folder)
        for work in (merge, plan, captions):
            measure(work, folder)


if __name__ == "__main__":
    main()

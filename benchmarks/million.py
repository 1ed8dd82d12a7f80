"""A million images: the index and the plan at the recipe's size, metadata only. Prints one table.

``python benchmarks/million.py [--rows 1271990]``

The rows are synthetic: a spread of shapes over the 33 buckets and tags of a danbooru-like length. Each measurement runs
in a process of its own, so that memory is what that work adds.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from posts import plain_config

from trainer.config.schema import DataConfig, SubsetRule, WeightRule
from trainer.core.files import sha256_bytes
from trainer.core.layout import shard_name
from trainer.data.buckets import list_buckets
from trainer.data.caption_draws import draw_sample_caption
from trainer.data.index import open_index
from trainer.data.index_checks import LATENT_BYTES
from trainer.data.loader import draw_sample_noise, draw_sample_timestep
from trainer.data.plan import Plan
from trainer.data.plan import build_plan as make_plan
from trainer.data.sample_weights import find_sample_weights
from trainer.data.shards import SCHEMA, ShardFile, write_index
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.subset import open_chosen, write_subset
from trainer.data.tag_counts import find_frequent
from trainer.data.template import ready_rules
from trainer.report.survey import count_rules, count_sources, count_tags, find_duplicates

SHARD_SIZE = 2**20  # bytes


def make_table(rows: int) -> pa.Table:
    """An index of made-up posts; columns are made whole, without an object a row."""
    generator = np.random.default_rng(0)
    buckets = np.array(list_buckets(1024, 512, 2048, 64), dtype=np.int32)
    aspect = np.log(buckets[:, 0] / buckets[:, 1])
    weights = np.exp(-(((aspect + 0.3) / 0.4) ** 2)) + 1e-4  # mostly portrait, as drawings are
    size = buckets[generator.choice(len(buckets), rows, p=weights / weights.sum())]
    words = np.array([f"tag_{number:05d}" for number in range(20000)])
    lines = np.array([" ".join(generator.choice(words, 25)) for _ in range(5000)])
    numbers = pa.array(np.arange(rows))
    text = numbers.cast(pa.string())
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "key": text,
        "source": pa.array(np.full(rows, "posts.jsonl")),
        "shard": name_shards(np.arange(rows) // 2000),
        "content_hash": text,
        "rating": pa.array(np.array(list("gsqe"))[generator.integers(0, 4, rows)]),
        "score": pa.array(generator.integers(-20, 300, rows, dtype=np.int32)),
        "year": pa.array(generator.integers(2005, 2024, rows, dtype=np.int32)),
        "tags_general": pa.array(lines[generator.integers(0, len(lines), rows)]),
        "tags_character": pa.array(words[generator.integers(0, 20000, rows)]),
        "tags_copyright": pa.array(words[generator.integers(0, 500, rows)]),
        "tags_artist": pa.array(words[generator.integers(0, 20000, rows)]),
        "bucket_width": pa.array(size[:, 0]),
        "bucket_height": pa.array(size[:, 1]),
        "original_width": pa.array(size[:, 0]),
        "original_height": pa.array(size[:, 1]),
        "length": pa.array((size.astype(np.int64) // 8).prod(axis=1) * LATENT_BYTES + 128),
    }
    for field in SCHEMA:
        if field.name not in columns:
            zeros = np.zeros(rows, dtype=np.int64)
            columns[field.name] = pa.nulls(rows, field.type) if field.nullable else pa.array(zeros)
    return pa.table({field.name: columns[field.name].cast(field.type) for field in SCHEMA}, schema=SCHEMA)


def measure(work: Callable[[Path], str], folder: Path) -> None:
    """Run ``work`` in a fresh process and print its time and the memory that it added."""

    def child() -> None:
        before, start = resident(), time.perf_counter()
        said = work(folder)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{work.__doc__:<58} {seconds:9.2f} s {resident() - before:9.0f} MB {peak:9.0f} MB  {said}", flush=True)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} failed")


def resident() -> float:
    """Private memory of this process in MB: pages of the memory-mapped index belong to the page cache."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def open_only(folder: Path) -> str:
    """open the index (hash of the whole file included)"""
    return f"{len(open_index(folder)):,} rows"


def build_plan(folder: Path) -> str:
    """open, and plan the run"""
    plan = Plan(open_index(folder).bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96)
    return f"{plan.steps_for_epochs(10):,} steps for 10 epochs"


def one_epoch(folder: Path) -> str:
    """open, plan, and list every sample of an epoch at once"""
    rows = Plan(open_index(folder).bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96).epoch_rows(1)[1]
    return f"{rows.size:,} samples, the last row {rows[-1, -1]}"


def one_epoch_by_steps(folder: Path) -> str:
    """open, plan, and list every sample of an epoch step by step"""
    plan = Plan(open_index(folder).bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96)
    steps = plan.steps_for_epochs(1)
    seen = sum(len(plan.unit_samples(unit)) for step in range(steps) for unit in plan.step_units(step))
    return f"{seen:,} samples"


def weigh(folder: Path) -> str:
    """open, weigh by four rules, plan, and list an epoch"""
    index, rules = open_index(folder), [
        WeightRule(factor=2.0, artist_count_below=60), WeightRule(factor=1.5, tag="masterpiece"),
        WeightRule(factor=0.5, rating="e"), WeightRule(factor=0.3, column="score", below=0),
    ]  # fmt: skip
    data = DataConfig("", weights=rules, bucket_batch_size=48, global_batch_size=96)
    plan = make_plan(index, 42, data, find_sample_weights(index, data, plain_config().captions))
    return f"{plan.epoch_rows(1)[1].size:,} samples in an epoch, {plan.steps_for_epochs(10):,} steps for 10"


def choose(folder: Path) -> str:
    """open, choose a part by a rule, write its keys, open by them"""
    captions, file = plain_config().captions, folder.with_name(f"{folder.name}.txt")
    rules = DataConfig(str(folder), subset_rules=[SubsetRule(column="score", above=200)])
    chosen = open_chosen(rules, captions)
    write_subset(file, chosen)
    again = open_chosen(DataConfig(str(folder), subset=str(file)), captions)
    file.unlink()
    assert again.fingerprint == chosen.fingerprint
    return f"{len(again):,} rows"


def find_frequent_tags(folder: Path) -> str:
    """open, and find the frequent tags, 10,000 aliases replaced"""
    table, file = open_index(folder).table, folder.with_name(f"{folder.name}.csv")
    pairs = "".join(f"tag_{number:05d},tag_{number + 10000:05d}\n" for number in range(10000))
    file.write_text(f"antecedent_name,consequent_name\n{pairs}")
    captions = replace(
        plain_config().captions, frequent_tag_dropout=0.5, frequent_tag_share=0.004, tag_aliases=str(file)
    )
    found = find_frequent(captions, table)
    file.unlink()
    assert found is not None
    return f"{len(found['tags']):,} tags"


def deep_resume(folder: Path) -> str:
    """open, plan, and draw all of step 100,000 but latents"""
    index = open_index(folder)
    plan = Plan(index.bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96)
    config = plain_config()
    rules = ready_rules(config.captions)
    for sample in plan.step_samples(100_000):
        record = index.row(sample.row)
        draw_sample_caption(record, sample.pass_, 42, rules)
        draw_sample_timestep(record["key"], sample.pass_, 42, config.diffusion)
        shape = (4, record["bucket_height"] // 8, record["bucket_width"] // 8)
        draw_sample_noise(shape, record["key"], sample.pass_, 42, 0.0)
    return "96 samples"


def count_set(folder: Path) -> str:
    """open, and count tags, rules, sources and duplicates"""
    table = open_index(folder).table
    distinct = sum(count_tags(table, category, 40).distinct for category in TAG_CATEGORIES)
    rules, sources = count_rules(table, plain_config().captions), count_sources(table)
    return (
        f"{distinct:,} tags, {rules.composed:,} images of {len(sources)} source, {find_duplicates(table).groups} copied"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The index and the plan at the recipe's size.")
    parser.add_argument("--rows", type=int, default=1_271_990)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write(folder: Path) -> str:
            """sort, fingerprint and write the index"""
            table = make_table(rows)
            write_index(folder, table.sort_by("key"), list_shards(folder, rows), {})
            return f"{(folder / 'index.arrow').stat().st_size / 1e6:,.0f} MB"

        print(f"{'':<58} {'time':>11} {'kept':>12} {'peak':>12}")
        for work in (
            write,
            open_only,
            build_plan,
            one_epoch,
            one_epoch_by_steps,
            weigh,
            choose,
            find_frequent_tags,
            deep_resume,
            count_set,
        ):
            measure(work, folder)


def name_shards(numbers: np.ndarray) -> pa.Array:
    """The shards' names of their numbers."""
    return pa.array(np.array([shard_name(number) for number in range(numbers.max() + 1)])[numbers])


def list_shards(folder: Path, rows: int) -> list[ShardFile]:
    """Files of holes under the shards' names: nothing here reads a latent."""
    shards = [ShardFile(shard_name(number), 2000, SHARD_SIZE, sha256_bytes(b"")) for number in range(-(-rows // 2000))]
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.truncate(SHARD_SIZE)
    return shards


if __name__ == "__main__":
    main()

"""How fast samples are loaded, stage by stage, beside webdataset's own pipeline over the same shards. Prints one table.

``python benchmarks/loading.py [--samples 2000] [--rounds 5] [--tokenizers FOLDER]``

Latents of 4x128x128 in shards of 500, written by our own ShardWriter to a temporary folder and read back from the page
cache. All is measured in turn, round after round; the table has the median, and the median of each round's ratio to
webdataset's pipeline in that round. ``--tokenizers`` names a base model whose two tokenizers are used; without
it, tiny ones are made, which cut words into more pieces than CLIP's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset
from posts import find_tokenizer_base, load_base_tokenizers, make_rows, plain_config, print_rates
from torch.utils.data import DataLoader

from trainer.data.index import Index, latents_shape, open_index, read_latents_into
from trainer.data.loader import MicroBatches, load_batches
from trainer.data.plan import Plan
from trainer.data.shards import SCHEMA, ShardWriter, write_index
from trainer.data.template import ready_rules

SAMPLES_PER_SHARD = 500
MICRO_BATCH_SIZE = 16
SHUFFLE_BUFFER = 1000  # samples; webdataset's usual size

Measured = dict[str, Callable[[], int]]  # by name: do it once; returns how many samples it was


def write_shards(folder: Path, samples: int) -> None:
    """Shards of made-up posts with normal noise for latents."""
    generator = np.random.default_rng(0)
    posts = list(make_rows(samples))
    files, rows = [], []
    for number, start in enumerate(range(0, samples, SAMPLES_PER_SHARD)):
        writer = ShardWriter(folder, number)
        for post in posts[start : start + SAMPLES_PER_SHARD]:
            writer.add(post, generator.standard_normal((4, 128, 128), dtype=np.float32).astype(np.float16))
        files.append(writer.finish())
        rows += writer.rows
    write_index(folder, pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=SCHEMA), files, {})


def read_and_collate(data: MicroBatches, number: int) -> torch.Tensor:
    """Latents of one micro-batch and its rows, as ``make_batch`` reads them: no text, no noise."""
    step, place = divmod(number, data.per_step)
    records = [data.index.row(sample.row) for sample in data.plan.micro_batch(step, place, MICRO_BATCH_SIZE)]
    raw_latents = np.empty((len(records), *latents_shape(records[0])), dtype=np.float16)
    for place, record in enumerate(records):
        read_latents_into(raw_latents[place], data.index, record)
    return torch.from_numpy(raw_latents)


def webdataset_pipeline(index: Index) -> webdataset.WebDataset:
    """Shards and samples shuffled, members decoded, latents collated: what one would write without an index."""
    names = [str(index.folder / shard["name"]) for shard in index.manifest["shards"]]
    pipeline = webdataset.WebDataset(names, shardshuffle=100, seed=0, empty_check=False)
    return pipeline.shuffle(SHUFFLE_BUFFER).decode().to_tuple("npy", "json").batched(MICRO_BATCH_SIZE, collate)


def collate(samples: list[tuple[np.ndarray, dict[str, Any]]]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Latents stacked, rows as they are: less than webdataset's default collation does."""
    return torch.from_numpy(np.stack([latents for latents, _ in samples])), [row for _, row in samples]


class Processes(torch.utils.data.Dataset[Any]):
    """Micro-batches for torch's DataLoader, which loads in processes: what threads are measured against."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def list_work(data: MicroBatches, micro_batches: int) -> Measured:
    """All that is measured, ``webdataset`` first."""
    steps = micro_batches // data.per_step

    def count(batches: Iterable[Any]) -> int:
        return sum(MICRO_BATCH_SIZE for _ in batches)

    def in_threads(threads: int) -> int:
        return count(
            load_batches(
                data, first_step=0, last_step=steps, rank=0, world=1, threads=threads, prefetch_factor=2,
                pin_memory=False,
            )
        )  # fmt: skip

    def in_processes(make: Callable[[int], Any], processes: int) -> int:
        loader = DataLoader(
            Processes(make), batch_size=None, sampler=range(micro_batches), num_workers=processes,
            prefetch_factor=2, multiprocessing_context="fork",
        )  # fmt: skip
        return count(loader)

    def read(number: int) -> torch.Tensor:
        return read_and_collate(data, number)

    def webdataset_in_processes() -> int:
        loader = DataLoader(
            webdataset_pipeline(data.index), batch_size=None, num_workers=2, prefetch_factor=2,
            multiprocessing_context="fork",
        )  # fmt: skip
        return count(loader)

    return {
        "webdataset: read, shuffle, decode, collate": lambda: count(webdataset_pipeline(data.index)),
        "webdataset, the same in 2 processes": webdataset_in_processes,
        "read and collate": lambda: count(map(read, range(micro_batches))),
        "read and collate, in 2 processes": lambda: in_processes(read, 2),
        "whole batches: with captions, tokens, noise": lambda: in_threads(0),
        "whole batches, 1 process": lambda: in_processes(data.__getitem__, 1),
        "whole batches, 2 processes": lambda: in_processes(data.__getitem__, 2),
        "whole batches, 1 thread": lambda: in_threads(1),
        "whole batches, 2 threads": lambda: in_threads(2),
        "whole batches, 4 threads": lambda: in_threads(4),
    }


def measure(work: Measured, rounds: int) -> dict[str, list[float]]:
    """Samples per second of each work, by round."""
    rates: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, do in work.items():
            start = time.perf_counter()
            samples = do()
            if turn:  # the first round fills caches
                rates[name].append(samples / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples per second, stage by stage.")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizers", type=Path, help="a base model's folder with tokenizer and tokenizer_2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = plain_config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        write_shards(folder / "shards", arguments.samples)
        index = open_index(folder / "shards")
        plan = Plan(index.bucket_sizes, seed=42, bucket_batch_size=48, global_batch_size=96)
        tokenizers = load_base_tokenizers(find_tokenizer_base(arguments.tokenizers, folder))
        data = MicroBatches(plan, index, tokenizers, ready_rules(config.captions), config.diffusion, MICRO_BATCH_SIZE)
        work = list_work(data, arguments.samples // 96 * data.per_step)
        print_rates("latents of 4x128x128", "samples/s", measure(work, arguments.rounds))


if __name__ == "__main__":
    main()

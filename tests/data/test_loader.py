"""Batches are what plain reading, drawing and tokenizing make of their samples; threads keep order and end."""

import io
import tarfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.captions import compose_caption, draw_caption
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.rng import philox_key
from trainer.data.index import open_index
from trainer.data.loader import MicroBatches, draw_noise, load_batches, make_ahead, make_time_ids
from trainer.data.plan import build_plan
from trainer.data.template import ready_rules
from trainer.data.tokens import load_tokenizers
from trainer.model.base import find_base, find_tokenizers, read_vocab_sizes

MakeConfig = Callable[..., Config]
STAGES = {
    "stage 1": ["captions.max_token_length=225"],
    "stage 2": ["captions.max_token_length=225", "diffusion.noise_offset=0.0357"],
    "all turned": ["captions.max_token_length=150", "captions.shuffle=false", "captions.tag_dropout=0.3",
                   "captions.caption_dropout=0.2", "diffusion.min_timestep=100", "run.seed=7"],
}  # fmt: skip


def open_batches(config: Config) -> MicroBatches:
    index = open_index(config.data.shards)
    base = find_base(config.model.pretrained)
    tokenizers = load_tokenizers(*find_tokenizers(base, None), read_vocab_sizes(base))
    plan = build_plan(index, config.run.seed, config.data)
    return MicroBatches(
        plan, index, tokenizers, ready_rules(config.captions), config.diffusion, config.data.micro_batch_size
    )


def generator(purpose: str, seed: int, pass_: int, key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=philox_key(purpose, seed, pass_, key)))


def frame(ids: list[int], start: int, bos: int, eos: int, padding: int) -> list[int]:
    part = ids[start : start + 75]
    return ([bos, *part, eos] + [padding] * 75)[:77]


@pytest.mark.parametrize("stage", STAGES)
def test_batches_are_what_plain_reading_and_drawing_make(make_config: MakeConfig, stage: str) -> None:
    config = make_config(*STAGES[stage])
    data, seed, size = open_batches(config), config.run.seed, config.data.micro_batch_size
    rows = data.index.table.to_pylist()
    for number in [*range(12), 9_999]:
        step, place = divmod(number, data.per_step)
        batch = data[number]
        for position, sample in enumerate(data.plan.step_samples(step)[place * size : (place + 1) * size]):
            row = rows[sample.row]
            key = row["key"]
            assert batch.keys[position] == key
            with tarfile.open(data.index.folder / row["shard"]) as shard:
                member = shard.extractfile(f"{key}.npy")
                assert member is not None
                latents = np.load(io.BytesIO(member.read()), allow_pickle=False)
            assert np.array_equal(batch.raw_latents[position].numpy(), latents) and latents.dtype == np.float16
            noise = draw_noise(
                latents.shape, config.diffusion.noise_offset, generator("noise", seed, sample.pass_, key)
            )
            assert np.array_equal(batch.noise[position].numpy(), noise)
            bounds = (config.diffusion.min_timestep, config.diffusion.max_timestep)
            timestep = generator("timestep", seed, sample.pass_, key).integers(*bounds)
            assert batch.timesteps[position] == timestep
            assert batch.time_ids[position].tolist() == make_time_ids(row)
            rules = ready_rules(config.captions)
            caption = draw_caption(compose_caption(row, rules), rules, generator("caption", seed, sample.pass_, key))
            for tokenizer, input_ids in zip(data.tokenizers, (batch.input_ids_1, batch.input_ids_2), strict=True):
                ids = tokenizer.tag_ids.bpe.encode(caption, add_special_tokens=False).ids
                fills = tokenizer.bos_id, tokenizer.eos_id, tokenizer.padding_id
                expected = [frame(ids, start, *fills) for start in range(0, config.captions.max_token_length, 75)]
                assert input_ids[batch.chunk_map[position]].tolist() == expected


class Slow:
    """Stands for micro-batches: the earlier ones take longer; number 7 cannot be read."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.threads: set[str] = set()

    def __getitem__(self, number: int) -> int:
        self.begun.append(number)
        self.threads.add(threading.current_thread().name)
        time.sleep(0.02 / (1 + number % 4))
        if number == 7:
            raise UserError("shard a, key 7: damaged")
        return number


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_order_is_kept_and_an_error_comes_in_its_place(threads: int) -> None:
    data: Any = Slow()
    batches = make_ahead(data, range(1, 20, 2), threads, 2 * threads)
    assert [next(batches) for _ in range(3)] == [1, 3, 5]
    with pytest.raises(UserError, match="key 7"):
        next(batches)
    assert not loader_threads() and list(batches) == []
    assert all(name.startswith("loader") for name in data.threads) or threads == 0


def test_no_more_is_made_ahead_than_asked_for_and_closing_ends_it() -> None:
    data: Any = Slow()
    batches = make_ahead(data, range(8, 100), 2, 4)
    assert next(batches) == 8 and len(loader_threads()) == 2
    deadline = time.monotonic() + 60
    while len(data.begun) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # nothing more begins
    assert data.begun == [8, 9, 10, 11, 12]
    batches.close()
    assert not loader_threads() and len(data.begun) == 5


def test_a_shard_stays_open_for_its_reader(make_config: MakeConfig) -> None:
    """Of two threads that open a shard at once the cache keeps one's; and it drops shards that are still read."""
    data = open_batches(make_config())
    expected = data[0].raw_latents
    data.index.__dict__["_open_shard"] = lambda name: io.FileIO(data.index.folder / name)  # kept by nobody else
    assert np.array_equal(data[0].raw_latents, expected)


def test_threads_make_the_same_batches(make_config: MakeConfig) -> None:
    data = open_batches(make_config("diffusion.noise_offset=0.0357"))
    loaded = load_batches(
        data, first_step=3, last_step=9, rank=0, world=1, threads=3, prefetch_factor=2, pin_memory=False
    )
    for number, batch in enumerate(loaded, 3 * data.per_step):
        alone = data[number]
        assert batch.keys == alone.keys
        assert np.array_equal(batch.noise, alone.noise) and np.array_equal(batch.raw_latents, alone.raw_latents)
        assert np.array_equal(batch.input_ids_2, alone.input_ids_2) and np.array_equal(batch.chunk_map, alone.chunk_map)
    assert not loader_threads()

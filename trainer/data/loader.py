"""Batches from a plan and a first micro-step, made ahead in threads. All randomness of training is drawn here.

A batch is data: it holds latents, noise, timesteps, the distinct chunks of token ids with each sample's map to them,
size conditioning and the sample keys. What is drawn is a function of (seed, pass, key), so that the number of
threads, processes or interruptions changes nothing. Design, ideas 1 and 2.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.config.schema import DiffusionConfig
from trainer.core.rng import rng
from trainer.data.caption_draws import draw_sample_caption
from trainer.data.index import Index, latents_shape
from trainer.data.plan import Plan, Planned
from trainer.data.shards import Row
from trainer.data.substitutes import Substitutes, read_or_substitute
from trainer.data.template import CaptionRules
from trainer.data.tokens import TextTokenizer, tokenize_captions

LOOK_SECONDS = 0.2  # between looks whether the run stops, while a batch is waited for

Tokenizers = tuple[TextTokenizer, TextTokenizer]


@dataclass(frozen=True)
class Batch:
    """The samples of one forward: all share a bucket."""

    keys: list[str]
    raw_latents: Tensor  # fp16 (B, 4, H/8, W/8), not scaled
    noise: Tensor  # fp32 (B, 4, H/8, W/8)
    timesteps: Tensor  # int64 (B,)
    input_ids_1: Tensor  # int64 (K, 77), distinct chunks
    input_ids_2: Tensor  # int64 (K, 77)
    chunk_map: Tensor  # int64 (B, chunks), rows of input_ids
    time_ids: Tensor  # fp32 (B, 6): original height, width, crop top, left, target height, width
    captions: list[str] = field(default_factory=list)  # as drawn; for records, no step depends on them

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, which the device reads by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Any) -> "Batch":
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return Batch(**{name: change(value) if isinstance(value, Tensor) else value for name, value in fields.items()})


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batch n of the whole run, counted over all steps and ranks, as a pure function of n."""

    plan: Plan
    index: Index
    tokenizers: Tokenizers
    captions: CaptionRules
    diffusion: DiffusionConfig
    micro_batch_size: int
    substitutes: Substitutes | None = None  # what may stand in for bad samples; None: a bad one is an error

    @property
    def per_step(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.plan.unit_size * self.plan.units_per_step // self.micro_batch_size

    def __getitem__(self, number: int) -> Batch:
        step, place = divmod(number, self.per_step)
        return make_batch(step, self.plan.micro_batch(step, place, self.micro_batch_size), self)


class Stratum(NamedTuple):
    """One of the equal parts of the range of timesteps."""

    number: int
    of: int


def draw_strata(plan: Plan, step: int, config: DiffusionConfig) -> list[Stratum | None]:
    """The part in which each sample of a step, by its position, has its timestep; None where it is free to be in any.

    All parts are taken, in an order that is drawn for each step: no place in the batch has timesteps of its own.
    """
    size = plan.unit_size * plan.units_per_step
    match config.timestep_sampling:
        case "uniform":
            return [None] * size
        case "stratified":
            return [Stratum(number, size) for number in rng("strata", plan.seed, step).permutation(size).tolist()]


def draw_sample_timestep(
    key: str, pass_: int, seed: int, config: DiffusionConfig, stratum: Stratum | None = None
) -> int:
    """The timestep of a sample in one pass, uniform over its stratum or all of min_timestep .. max_timestep - 1."""
    generator = rng("timestep", seed, pass_, key)
    if stratum is None:
        return int(generator.integers(config.min_timestep, config.max_timestep))
    # u = (stratum + r) / B in whole numbers: as floats, the last stratum's could be rounded up to 1
    place = (stratum.number << 32) + int(generator.integers(1 << 32))
    return config.min_timestep + place * (config.max_timestep - config.min_timestep) // (stratum.of << 32)


def draw_sample_noise(shape: tuple[int, int, int], key: str, pass_: int, seed: int, noise_offset: float) -> np.ndarray:
    """The noise of a sample in one pass, fp32 (4, H/8, W/8)."""
    return draw_noise(shape, noise_offset, rng("noise", seed, pass_, key))


def draw_noise(shape: tuple[int, int, int], noise_offset: float, generator: np.random.Generator) -> np.ndarray:
    """Noise of one sample, fp32 (4, H/8, W/8), with one extra normal a channel times ``noise_offset``.

    The pixel noise is drawn first, so that it is the same with and without an offset.
    """
    noise = generator.standard_normal(shape, dtype=np.float32)
    if noise_offset:
        noise += np.float32(noise_offset) * generator.standard_normal((shape[0], 1, 1), dtype=np.float32)
    return noise


def make_time_ids(record: Mapping[str, Any]) -> list[float]:
    """SDXL's six size conditions, in pixels: original (height, width), crop (top, left), target (height, width)."""
    names = ("original_height", "original_width", "crop_top", "crop_left", "bucket_height", "bucket_width")
    return [float(record[name]) for name in names]


def make_batch(step: int, planned: list[Planned], data: MicroBatches) -> Batch:
    """Read, draw and collate the samples of one micro-batch of a step.

    Raises:
        UserError: when a sample cannot be read or fails its checksum, naming shard and key.
    """
    seed = data.plan.seed
    records: list[Row] = []
    shape = latents_shape(data.index.row(planned[0].row))  # of all: they share a bucket
    raw_latents = np.empty((len(planned), *shape), dtype=np.float16)
    noise = np.empty((len(planned), *shape), dtype=np.float32)
    captions, timesteps, strata = [], [], draw_strata(data.plan, step, data.diffusion)
    for place, sample in enumerate(planned):
        record, pass_ = read_or_substitute(raw_latents[place], data.index, data.plan, step, sample, data.substitutes)
        key = record["key"]
        records.append(record)
        noise[place] = draw_sample_noise(shape, key, pass_, seed, data.diffusion.noise_offset)
        captions.append(draw_sample_caption(record, pass_, seed, data.captions))
        timesteps.append(draw_sample_timestep(key, pass_, seed, data.diffusion, strata[sample.position]))
    chunks = tokenize_captions(captions, data.tokenizers, data.captions.config.max_token_length)
    return Batch(
        keys=[record["key"] for record in records],
        raw_latents=torch.from_numpy(raw_latents),
        noise=torch.from_numpy(noise),
        timesteps=torch.tensor(timesteps, dtype=torch.int64),
        input_ids_1=torch.from_numpy(chunks.input_ids_1),
        input_ids_2=torch.from_numpy(chunks.input_ids_2),
        chunk_map=torch.from_numpy(chunks.chunk_map),
        time_ids=torch.tensor([make_time_ids(record) for record in records], dtype=torch.float32),
        captions=captions,
    )


def micro_batch_numbers(first_step: int, last_step: int, per_step: int, rank: int, world: int) -> range:
    """Numbers of the micro-batches of one rank from ``first_step`` up to ``last_step``.

    Micro-step m of a step on rank r of W takes the step's micro-batch m W + r.
    """
    assert per_step % world == 0
    return range(first_step * per_step + rank, last_step * per_step, world)


def load_batches(
    data: MicroBatches,
    *,
    first_step: int,
    last_step: int,
    rank: int,
    world: int,
    threads: int,
    prefetch_factor: int | None,
    pin_memory: bool,
    stopped: Callable[[], bool] = lambda: False,
) -> Generator[Batch, None, None]:
    """This rank's batches of the steps ``first_step`` .. ``last_step - 1``, in order.

    Close it when done: then the threads end, at the latest with the batches that they are making. Once ``stopped``, it
    ends as soon as it would have to wait for a batch.

    Raises:
        UserError: as ``make_batch``, in place of the batch.
    """
    numbers = micro_batch_numbers(first_step, last_step, data.per_step, rank, world)
    with closing(make_ahead(data, numbers, threads, threads * (prefetch_factor or 2), stopped)) as batches:
        for batch in batches:
            # here and not in a loader's thread, for which another device would be the current one
            yield batch.pin_memory() if pin_memory else batch


def make_ahead(
    data: MicroBatches, numbers: range, threads: int, ahead: int, stopped: Callable[[], bool] = lambda: False
) -> Generator[Batch, None, None]:
    """The micro-batches of these numbers, in order, made in threads, ``ahead`` of them before they are wanted.

    Threads and not processes: most of the work is done outside Python's lock, and handing a batch to another process
    costs more than reading it (benchmarks/loading.py).
    """
    if threads == 0:
        for number in numbers:
            if stopped():
                return
            yield data[number]
        return
    ready: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    try:
        for number in numbers:
            ready.append(pool.submit(data.__getitem__, number))
            if len(ready) > ahead:
                if has_to_go(ready[0], stopped):
                    return
                yield ready.popleft().result()
        while ready and not has_to_go(ready[0], stopped):
            yield ready.popleft().result()
    finally:
        pool.shutdown(wait=not stopped(), cancel_futures=True)


def has_to_go(batch: Future[Batch], stopped: Callable[[], bool]) -> bool:
    """Wait until a batch is there; whether it is not, because the run stops: its files may never come."""
    while not wait([batch], timeout=LOOK_SECONDS).done:
        if stopped():
            return True
    return False

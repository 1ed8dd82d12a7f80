"""Dataset, batches from a plan and a first micro-step, collate. All randomness of training is drawn here.

A batch is data: it holds latents, noise, timesteps, the distinct chunks of token ids with each sample's map to them,
size conditioning and the sample keys. What is drawn is a function of (seed, pass, key), so that the number of
workers, processes or interruptions changes nothing. Design, ideas 1 and 2.
"""

import dataclasses
import signal
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.draws import draw_sample_caption, draw_sample_noise, draw_sample_timestep
from trainer.data.plan import Plan, Planned
from trainer.data.shards import Index, latents_shape, read_latents_into
from trainer.errors import UserError
from trainer.models.text import TextTokenizer, tokenize_captions
from trainer.schema import CaptionsConfig, DiffusionConfig

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

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory; the DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Any) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: change(value) if isinstance(value, Tensor) else value for name, value in fields.items()})


@dataclass(frozen=True)
class MicroBatches(Dataset[Batch | UserError]):
    """Micro-batch n of the whole run, counted over all steps and ranks, as a pure function of n."""

    plan: Plan
    index: Index
    tokenizers: Tokenizers
    captions: CaptionsConfig
    diffusion: DiffusionConfig
    micro_batch_size: int

    def __getitem__(self, number: int) -> "Batch | UserError":
        try:
            return self.make(number)
        except UserError as error:
            return error  # raised in a worker it would reach the user as a traceback

    def make(self, number: int) -> Batch:
        """Micro-batch ``number``."""
        per_step = self.plan.unit_size * self.plan.units_per_step // self.micro_batch_size
        step, place = divmod(number, per_step)
        planned = self.plan.micro_batch(step, place, self.micro_batch_size)
        return make_batch(planned, self)


def make_time_ids(record: Mapping[str, Any]) -> list[float]:
    """SDXL's six size conditions, in pixels: original (height, width), crop (top, left), target (height, width)."""
    names = ("original_height", "original_width", "crop_top", "crop_left", "bucket_height", "bucket_width")
    return [float(record[name]) for name in names]


def make_batch(planned: list[Planned], data: MicroBatches) -> Batch:
    """Read, draw and collate the samples of one micro-batch.

    Raises:
        UserError: when a sample cannot be read or fails its checksum, naming shard and key.
    """
    seed = data.plan.seed
    records = [data.index.row(sample.row) for sample in planned]
    named = [(record["key"], sample.pass_) for record, sample in zip(records, planned, strict=True)]
    shape = latents_shape(records[0])  # of all: they share a bucket
    raw_latents = np.empty((len(records), *shape), dtype=np.float16)
    noise = np.empty((len(records), *shape), dtype=np.float32)
    for place, record in enumerate(records):
        read_latents_into(raw_latents[place], data.index, record)
    captions = [
        draw_sample_caption(record, sample.pass_, seed, data.captions)
        for record, sample in zip(records, planned, strict=True)
    ]
    chunks = tokenize_captions(captions, data.tokenizers, data.captions.max_token_length)
    offset = data.diffusion.noise_offset
    for place, (key, pass_) in enumerate(named):
        noise[place] = draw_sample_noise(shape, key, pass_, seed, offset)
    timesteps = [draw_sample_timestep(key, pass_, seed, data.diffusion) for key, pass_ in named]
    return Batch(
        keys=[key for key, _ in named],
        raw_latents=torch.from_numpy(raw_latents),
        noise=torch.from_numpy(noise),
        timesteps=torch.tensor(timesteps, dtype=torch.int64),
        input_ids_1=torch.from_numpy(chunks.input_ids_1),
        input_ids_2=torch.from_numpy(chunks.input_ids_2),
        chunk_map=torch.from_numpy(chunks.chunk_map),
        time_ids=torch.tensor([make_time_ids(record) for record in records], dtype=torch.float32),
    )


def micro_batch_numbers(first_step: int, last_step: int, per_step: int, rank: int, world: int) -> list[int] | range:
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
    num_workers: int,
    prefetch_factor: int | None,
    pin_memory: bool,
) -> Generator[Batch, None, None]:
    """This rank's batches of the steps ``first_step`` .. ``last_step - 1``, in order.

    Close it when done: the workers end with it, and a process that dies of an error would wait for them for ever.
    """
    per_step = data.plan.unit_size * data.plan.units_per_step // data.micro_batch_size
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=micro_batch_numbers(first_step, last_step, per_step, rank, world),
        num_workers=num_workers,
        prefetch_factor=(prefetch_factor or 2) if num_workers else None,
        pin_memory=pin_memory,
        # workers share the memory-mapped index and the plan by fork; they never touch the accelerator
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def ignore_signals(_: int) -> None:
    """Leave stopping to the training process: a signal to the whole group must not end the workers before it saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

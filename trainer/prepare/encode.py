"""The posts of a chunk -> pixels -> raw latents -> one shard.

What a chunk gives depends on the chunk alone. Images of a bucket may share a forward of the VAE: with one at a time
latents are a function of the image alone, in a batch its neighbours decide the last bits.

A GPU never waits for the host: a batch's latents are read and written when the next batch has been launched, and images
are looked at ahead across the ends of chunks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL

from trainer.config.schema import BucketsConfig
from trainer.core.distributed import send_to_host
from trainer.core.layout import done_name
from trainer.data.buckets import Size
from trainer.data.shards import Row, ShardWriter
from trainer.data.sources.records import Reject
from trainer.model.vae import encode_raw_latents, pixels_to_tensor
from trainer.prepare.decode import Decoded, Decoders, Filtered, Outcome, Task, Unchanged
from trainer.prepare.inputs import STAT_FIELDS, describe_reject, read_place
from trainer.prepare.work import LATENTS_SCHEMA, DoneChunk, Work, write_done


@dataclass(frozen=True)
class Encoder:
    """What turns posts into latents."""

    vae: AutoencoderKL
    decoders: Decoders
    buckets: BucketsConfig
    min_side: int | None
    batch_size: int


@dataclass(frozen=True)
class PendingBatch:
    """Images that the device may still be at; their latents are on their way to the host."""

    images: list[tuple[Row, Decoded]]
    raw_latents: torch.Tensor  # fp16 (B, 4, H/8, W/8), on the host
    arrived: torch.cuda.Event | None  # None where nothing has to be waited for


class Chunk:
    """What has become of a chunk's posts so far, and its shard on its way."""

    def __init__(self, work: Work, number: int, encoder: Encoder) -> None:
        self.work, self.number, self.encoder = work, number, encoder
        self.writer: ShardWriter | None = None
        self.waiting: dict[Size, list[tuple[Row, Decoded]]] = {}  # by bucket, fewer than a batch each
        self.launched: PendingBatch | None = None
        self.latents: list[Row] = []
        self.set_aside: list[dict[str, Any]] = []
        self.filtered: Counter[str] = Counter()

    def add(self, post: Row, outcome: Outcome) -> None:
        """Take the outcome of one post, a row of the pending ones."""
        match outcome:
            case Reject():
                self.settle()  # what is set aside stays in order
                self.set_aside.append(describe_reject(outcome))
            case Filtered():
                self.filtered[outcome.name] += 1
            case Unchanged():
                self.latents.append(post["known"] | {field.name: post[field.name] for field in STAT_FIELDS})
            case Decoded():
                batch = self.waiting.setdefault(outcome.fit.bucket, [])
                batch.append((post, outcome))
                if len(batch) == self.encoder.batch_size:
                    self.encode(self.waiting.pop(outcome.fit.bucket))

    def encode(self, batch: list[tuple[Row, Decoded]]) -> None:
        """Launch the encoding of images of one bucket; then, while the device is at it, write those before."""
        vae = self.encoder.vae
        device = next(vae.parameters()).device  # vae.device walks over all modules
        pixels = pixels_to_tensor([image.pixels for _, image in batch], device)  # (B, 3, H, W)
        launched = PendingBatch(batch, *send_to_host(encode_raw_latents(vae, pixels).half()))
        self.settle()
        self.launched = launched

    def settle(self) -> None:
        """Wait for the latents of the batch that was launched, if there is one, and write them."""
        if self.launched is None:
            return
        batch, self.launched = self.launched, None
        if batch.arrived is not None:
            batch.arrived.synchronize()
        for (row, image), latents in zip(batch.images, batch.raw_latents.numpy(), strict=True):
            if not np.isfinite(latents).all():
                detail = "the VAE gave NaN or infinity; SDXL's own overflows in fp16: set precision.vae to fp32"
                self.set_aside.append(describe_reject(Reject(row["key"], row["origin"], "non_finite_latents", detail)))
                continue
            self.writer = self.writer or ShardWriter(self.work.set, self.number)
            written = self.writer.add(row | place_image(image), latents)
            made = {name: written.get(name, row.get(name)) for name in LATENTS_SCHEMA.names}
            self.latents.append(made | {"several_frames": image.several_frames or None})

    def encode_rest(self) -> None:
        """Encode what waits for full batches, and write all that is not written yet."""
        for bucket in list(self.waiting):
            self.encode(self.waiting.pop(bucket))
        self.settle()

    def finish(self) -> DoneChunk:
        """End the shard, and make the chunk count."""
        assert not self.waiting and self.launched is None
        shards = [self.writer.finish()] if self.writer else []
        done = DoneChunk(self.work.done / done_name(self.number), shards, self.set_aside, dict(self.filtered))
        write_done(done, pa.Table.from_pylist(self.latents, schema=LATENTS_SCHEMA))
        return done


def place_image(image: Decoded) -> Row:
    """The index's columns that say how an image became a sample."""
    return {
        "content_hash": image.content_hash,
        "bucket_width": image.fit.bucket[0],
        "bucket_height": image.fit.bucket[1],
        "original_width": image.size[0],
        "original_height": image.size[1],
        "crop_left": image.fit.left,
        "crop_top": image.fit.top,
    }


def look_ahead(encoder: Encoder, chunks: Iterable[pa.RecordBatch]) -> Iterator[tuple[Row, Outcome]]:
    """The pending posts of one chunk after the other, each with its outcome; some images are looked at in advance."""
    posts, same = tee(post for pending in chunks for post in pending.to_pylist())
    tasks = (
        Task(post["key"], post["origin"], read_place(post["image"]), post["known"] and post["known"]["content_hash"],
             encoder.min_side, encoder.buckets)
        for post in same
    )  # fmt: skip
    return zip(posts, encoder.decoders.look_at(tasks), strict=True)


def encode_chunk(
    chunk: Chunk, posts: Iterable[tuple[Row, Outcome]], advance: Callable[[Chunk, int], object]
) -> DoneChunk:
    """Encode the posts of a chunk and make it count.

    ``advance`` is called after each image with 1, and once more with 0 before the chunk counts.
    """
    for post, outcome in posts:
        chunk.add(post, outcome)
        advance(chunk, 1)
    chunk.encode_rest()
    advance(chunk, 0)
    return chunk.finish()

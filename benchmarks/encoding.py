"""How much of the VAE's own speed a preparation reaches: images looked at, encoded and written, beside the VAE alone.

``python benchmarks/encoding.py VAE [--images 8] [--side 256] [--per-shard 4] [--rounds 5] [--processes 1]
[--threads 1] [--dtype fp32] [--stand-in 50]``

VAE is a folder or a file as ``model.vae`` takes them (a full-size one with random weights: ``random_sdxl.py``). The
images are the demo's drawings on pages of twice the bucket's side, JPEG, each with 25 tags. In turn, round after round,
on the same images, device and threads:

- the VAE alone: pixels lie as floats on the device, latents are fp16 there, nothing is written;
- a preparation's encoding as version 0.2.0 made it, written out below: one image after the other;
- the product's: ``look_ahead`` and ``encode_chunk``, as ``prepare`` calls them;
- the VAE alone with its weights in channels_last, which the product leaves out.

Decoding processes start before the clock does. Latents and tars are compared first: the script fails unless the
product's are those of version 0.2.0's way to the bit. The clock counts what a user waits for; the CPU's seconds are
those of this process, all threads, without the decoding processes: the VAE's, and of all that stands beside it.

``--stand-in MS`` puts in the place of the VAE a device that computes nothing and takes so long for an image, beside the
host as a GPU does: a thread that sleeps. It says how far the host keeps such a device busy, and nothing of a GPU.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from preparing import DRAWINGS, make_image

from trainer.config.schema import BucketsConfig, FiltersConfig, ModelConfig
from trainer.core.distributed import choose_device
from trainer.data.post import ImagePlace, Post
from trainer.data.shards import Row, ShardFile, ShardWriter
from trainer.model.base import read_vae_alone
from trainer.model.sdxl import DTYPES
from trainer.model.vae import build_vae, pixels_to_tensor
from trainer.prepare import encode as encoding
from trainer.prepare.decode import Decoded, decoders
from trainer.prepare.encode import Chunk, Encoder, encode_chunk, look_ahead, place_image
from trainer.prepare.inputs import survey_inputs
from trainer.prepare.merge import plan_chunks
from trainer.prepare.work import Work, make_folders, read_pending

QUALITY, GRAIN = 92, 6.0


@dataclass(frozen=True)
class Bench:
    """What all ways work on."""

    work: Work
    encoder: Encoder
    floats: list[torch.Tensor]  # (1, 3, H, W) each, on the device

    def chunks(self) -> dict[int, Any]:
        return read_pending(self.work)


def make_posts(folder: Path, count: int, side: int) -> list[Post]:
    """Posts whose images lie in a folder."""
    drawings, posts = sorted(DRAWINGS.iterdir()), []
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        drawing = drawings[number % len(drawings)]
        make_image(drawing, number, GRAIN, (2 * side, 2 * side)).save(path, quality=QUALITY)
        tags = " ".join(f"tag_{number}_{each}" for each in range(25))
        posts.append(Post(key=path.stem, source="bench", tags_general=tags, image=ImagePlace(path), origin=path.name))
    return posts


def plan(folder: Path, posts: list[Post], per_shard: int) -> Work:
    """A preparation as ``prepare`` begins it."""
    work = Work(folder / "shards")
    make_folders(work)
    plan_chunks(work, None, survey_inputs(posts, FiltersConfig(), "|||", work.inputs), per_shard)
    return work


def to_floats(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W), on the host, as version 0.2.0 did it."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def prepare_as_before(bench: Bench) -> list[ShardFile]:
    """One image after the other, chunk by chunk; waits for each image's latents, and for its shard's end."""
    shards = []
    for number, pending in bench.chunks().items():
        writer, made = ShardWriter(bench.work.set, number), list[Row]()
        for post, image in look_ahead(bench.encoder, [pending]):
            assert isinstance(image, Decoded)
            vae = bench.encoder.vae
            pixels = torch.stack([to_floats(image.pixels)]).to(vae.device, vae.dtype)
            latents = encoding.encode_raw_latents(vae, pixels).half()
            copy, arrived = encoding.send_to_host(latents)
            if arrived is not None:
                arrived.synchronize()
            made.append(writer.add(post | place_image(image), copy.numpy()[0]))
        chunk = Chunk(bench.work, number, bench.encoder)
        chunk.writer, chunk.latents = writer, [{**row, "several_frames": None} for row in made]
        shards += chunk.finish().shards
    return shards


def prepare_now(bench: Bench) -> list[ShardFile]:
    """As ``encode_share`` calls it."""
    chunks = bench.chunks()
    outcomes = look_ahead(bench.encoder, chunks.values())
    shards: list[ShardFile] = []
    for number, pending in chunks.items():
        posts = islice(outcomes, len(pending))
        shards += encode_chunk(Chunk(bench.work, number, bench.encoder), posts, lambda *_: None).shards
    return shards


def encode_alone(bench: Bench, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    """Nothing but the VAE; the last latents, on the host."""
    bench.encoder.vae.to(memory_format=layout)
    for pixels in bench.floats:
        latents = encoding.encode_raw_latents(bench.encoder.vae, pixels).half()
    copy, arrived = encoding.send_to_host(latents)
    if arrived is not None:
        arrived.synchronize()
    bench.encoder.vae.to(memory_format=torch.contiguous_format)
    return copy


class StandIn:
    """A device that takes a time for each image, one after the other, and hands out zeros; beside the host."""

    def __init__(self, milliseconds: float) -> None:
        self.seconds, self.queue = milliseconds / 1e3, ThreadPoolExecutor(1)
        self.last: Any = None

    def encode(self, _: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        self.last = self.queue.submit(time.sleep, self.seconds * len(pixels))
        return torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)

    def send_to_host(self, values: torch.Tensor) -> tuple[torch.Tensor, Any]:
        arrived = threading.Event()
        self.last.add_done_callback(lambda _: arrived.set())
        return values, type("Event", (), {"synchronize": staticmethod(arrived.wait)})


def list_ways(stand_in: bool) -> dict[str, Callable[[Bench], object]]:
    ways: dict[str, Callable[[Bench], object]] = {
        "the VAE alone": encode_alone, "as version 0.2.0 prepared": prepare_as_before, "ours": prepare_now,
    }  # fmt: skip
    if not stand_in:
        ways["the VAE alone, weights in channels_last"] = lambda bench: encode_alone(bench, torch.channels_last)
    return ways


def check_bits(bench: Bench) -> None:
    """Fails unless our tars are those of version 0.2.0's way."""
    before, now = prepare_as_before(bench), prepare_now(bench)
    if before != now:
        raise SystemExit("other bytes than version 0.2.0's way gives")
    same = torch.equal(encode_alone(bench), encode_alone(bench, torch.channels_last))
    print(f"{len(now)} tars as version 0.2.0's; channels_last weights give {'the same' if same else 'other'} bits")


def measure(bench: Bench, rounds: int, stand_in: bool) -> Iterable[str]:
    """The table's lines."""
    spent: dict[str, list[tuple[float, float]]] = {}  # (clock, CPU), ms an image
    for _ in range(rounds):
        for name, way in list_ways(stand_in).items():
            clock, cpu = time.perf_counter(), time.process_time()
            way(bench)
            both = time.perf_counter() - clock, time.process_time() - cpu
            spent.setdefault(name, []).append((both[0] * 1e3 / len(bench.floats), both[1] * 1e3 / len(bench.floats)))
    alone = spent["the VAE alone"]
    yield "| | clock, ms an image | speed, VAE alone = 1 | CPU, ms an image | speed |\n|---|---|---|---|---|"
    for name, own in spent.items():
        columns = []
        for kind in (0, 1):
            ratio = statistics.median(a[kind] / b[kind] for a, b in zip(alone, own, strict=True))
            columns += [f"{statistics.median(each[kind] for each in own):.1f}", f"{ratio:.3f}"]
        yield f"| {name} | {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="A preparation beside the VAE alone.")
    parser.add_argument("vae")
    for name, number in (("images", 8), ("side", 256), ("per-shard", 4), ("rounds", 5), ("processes", 1),
                         ("threads", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--stand-in", type=float, help="milliseconds an image")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    weights = read_vae_alone(ModelConfig("none", vae=words.vae))
    vae = build_vae(weights.config, weights.state, DTYPES[words.dtype]).to(choose_device())
    buckets = BucketsConfig(words.side, words.side, words.side, 64)
    with tempfile.TemporaryDirectory() as name, decoders(words.processes) as pool:
        work = plan(Path(name), make_posts(Path(name), words.images, words.side), words.per_shard)
        encoder = Encoder(vae, pool, buckets, None, 1)
        images = [image for _, image in look_ahead(encoder, read_pending(work).values()) if isinstance(image, Decoded)]
        floats = [pixels_to_tensor([image.pixels], vae.device) for image in images]
        bench = Bench(work, encoder, floats)
        if words.stand_in is None:
            check_bits(bench)
        else:
            device = StandIn(words.stand_in)
            setattr(encoding, "encode_raw_latents", device.encode)  # noqa: B010
            setattr(encoding, "send_to_host", device.send_to_host)  # noqa: B010
        for line in measure(bench, words.rounds, words.stand_in is not None):
            print(line, flush=True)


if __name__ == "__main__":
    main()

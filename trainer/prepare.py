"""Posts -> buckets, pixels, raw latents -> shards. What fails one image at a time is set aside and reported.

Work happens in ``<shards>.unfinished`` and gets its name when it is complete; a run that was killed goes on behind its
last complete shard. Images are encoded one by one, because a batch changes the last bits of its members: latents are
a function of the image alone, whatever the sharding and the interruptions.
"""

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from trainer import __version__
from trainer.buckets import Fit, Size, fit_image
from trainer.data.images import (
    PIXEL_SETTINGS,
    BadImage,
    pixels_to_tensor,
    read_bytes,
    read_header,
    read_pixels,
    stat_image,
)
from trainer.data.shards import (
    MANIFEST_NAME,
    NOTES_NAME,
    QUARANTINE_NAME,
    Row,
    ShardWriter,
    open_index,
    write_index,
)
from trainer.data.sources import Reject, iterate_sources, name_sources
from trainer.data.unfinished import Progress, Work, add_progress, commit, open_work, refuse_others, work_folder
from trainer.errors import UserError
from trainer.files import sha256_json, sync_folder, write_text
from trainer.models.base import VaeWeights, find_base, read_vae
from trainer.models.sdxl import DTYPES
from trainer.models.vae import build_vae, encode_raw_latents
from trainer.post import Post
from trainer.schema import BucketsConfig, Config, DataConfig


@dataclass(frozen=True)
class Inputs:
    """All that the sources bring, before any image is opened."""

    total: int  # posts and rejects
    sha256: str  # over the posts in order, and the sizes of their files


@dataclass(frozen=True)
class Summary:
    """What ``prepare`` did, for people."""

    folder: Path
    samples: int
    shards: int
    set_aside: dict[str, int]  # by reason
    notes: dict[str, int]
    reused: int  # inputs done by an earlier run; all of them when there was nothing to do

    def __str__(self) -> str:
        lines = [f"{self.samples} samples in {self.shards} shards: {self.folder}"]
        lines += [f"  set aside, {reason}: {count}" for reason, count in self.set_aside.items()]
        lines += [f"  noted, {reason}: {count}" for reason, count in self.notes.items()]
        if self.reused:
            total = self.samples + sum(self.set_aside.values())
            nothing = ", nothing to do" if self.reused == total else ""
            lines.append(f"  {self.reused} of {total} inputs were done before{nothing}")
        lines += [f"  see {self.folder / QUARANTINE_NAME}"] if self.set_aside else []
        lines += [f"  see {self.folder / NOTES_NAME}"] if self.notes else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Decoded:
    """One image on its way into the VAE."""

    post: Post
    size: Size
    fit: Fit
    pixels: np.ndarray  # uint8 (H, W, 3)
    content_hash: str


def prepare(config: Config, progress: bool = True) -> Summary:
    """Make ``data.shards`` from the sources of posts, or go on where an earlier run was killed.

    A complete set with the same settings and posts is left as it is.

    Raises:
        UserError: on a key that occurs twice, too many images set aside, or a set made with other settings.
    """
    weights = read_vae(config.model.vae, find_base(config.model.pretrained, config.model.revision))
    settings = describe_latents(config, weights)
    inputs = survey_inputs(config.data, progress)
    folder = Path(config.data.shards)
    if (folder / MANIFEST_NAME).exists():
        return check_complete(folder, settings, inputs)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"data.shards: {folder} is not empty and holds no complete set; name another or empty it")
    sharding = {"samples_per_shard": config.data.samples_per_shard}
    with open_work(folder, {"latents": settings, "inputs": vars(inputs), "data": sharding}) as work:
        reused = work.done.seen
        encode_inputs(work, config, weights, inputs, progress)
        return finish(work, folder, settings, inputs, reused)


def describe_latents(config: Config, weights: VaeWeights) -> dict[str, Any]:
    """The manifest's section that says what made the latents."""
    return {
        "vae_sha256": weights.sha256,
        "vae_dtype": config.precision.vae,
        "scaling_factor": weights.config["scaling_factor"],
        "shift_factor": weights.config.get("shift_factor"),
        "buckets": asdict(config.buckets),
        "pixels": PIXEL_SETTINGS,
        "code_version": __version__,
    }


def survey_inputs(data: DataConfig, progress: bool) -> Inputs:
    """Go through all posts once, without opening an image: count them, and find keys that occur twice.

    Raises:
        UserError: naming both places of such a key.
    """
    origins: dict[str, str] = {}
    digests: list[str] = []
    for item in tqdm(iterate_sources(data), unit="post", desc="read posts", disable=not progress):
        if isinstance(item, Reject):
            digests.append(sha256_json([item.key, item.reason]))
            continue
        if item.key in origins:
            raise UserError(
                f"the key {item.key} occurs twice: {origins[item.key]} and {item.origin}; remove one of the posts"
            )
        origins[item.key] = item.origin
        what = asdict(item) | {"image": size_of(item)}
        del what["origin"]
        digests.append(sha256_json(what))
    if not digests:
        raise UserError(f"no posts in {', '.join(source.path for _, source in name_sources(data))}")
    return Inputs(len(digests), sha256_json(digests))


def size_of(post: Post) -> int | None:
    """The size of the post's image in bytes; None where it is not there any more."""
    try:
        return stat_image(post.image)[0]
    except BadImage:
        return None


def check_complete(folder: Path, settings: dict[str, Any], inputs: Inputs) -> Summary:
    """The summary of a complete set, if it is the one that these settings and posts make."""
    manifest = open_index(folder).manifest
    refuse_others(f"data.shards: {folder}", manifest, {"latents": settings, "inputs": vars(inputs)})
    leftover = work_folder(folder)
    if leftover.exists() and not (leftover / "set").exists():  # killed between the rename and this
        shutil.rmtree(leftover)
    counts = manifest["counts"]
    return Summary(
        folder, counts["samples"], len(manifest["shards"]), counts["set_aside"], counts["notes"], inputs.total
    )


def encode_inputs(work: Work, config: Config, weights: VaeWeights, inputs: Inputs, progress: bool) -> None:
    """Encode everything that the work folder does not have yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision.tf32
    vae = build_vae(weights.config, weights.state, DTYPES[config.precision.vae]).to(device)
    since = Progress(seen=work.done.seen)
    writer: ShardWriter | None = None
    rest = islice(iterate_sources(config.data), work.done.seen, None)
    meter = tqdm(total=inputs.total, initial=work.done.seen, unit="image", desc="prepare", disable=not progress)
    with meter:
        for item in decode_ahead(rest, config.buckets):
            result = item if isinstance(item, Reject) else encode(vae, item)
            since.seen += 1
            meter.update()
            if isinstance(result, Reject):
                # a file name need not be Unicode, and details quote it
                detail = result.detail.encode(errors="backslashreplace").decode()
                since.rejected.append(asdict(result) | {"detail": detail})
                check_bad_fraction(work, since, config, inputs)
                continue
            assert isinstance(item, Decoded)
            since.notes += note_sizes(item)
            writer = writer or ShardWriter(work.set, len(work.shards))
            writer.add(make_row(item), result)
            if len(writer.rows) == config.data.samples_per_shard or since.seen == inputs.total:
                commit(work, writer, since)
                writer, since = None, Progress(seen=since.seen)
    if writer is not None:  # the last inputs were set aside
        commit(work, writer, since)
    else:
        add_progress(work, since)


def decode_ahead(items: Iterable[Post | Reject], buckets: BucketsConfig) -> Iterator[Decoded | Reject]:
    """Open images in threads, a few ahead of the VAE, and yield them in their order."""
    threads = min(16, len(os.sched_getaffinity(0)))
    waiting: deque[Future[Decoded | Reject]] = deque()
    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read_sample, item, buckets))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_sample(item: Post | Reject, buckets: BucketsConfig) -> Decoded | Reject:
    """One image's bucket and pixels, or why it is set aside."""
    if isinstance(item, Reject):
        return item
    try:
        data = read_bytes(item.image)
        size = read_header(data)
        fit = fit_image(size, **asdict(buckets))
        return Decoded(item, size, fit, read_pixels(data, fit), hashlib.sha256(data).hexdigest())
    except BadImage as error:
        return Reject(item.key, item.origin, error.reason, error.detail)
    except UserError as error:
        return Reject(item.key, item.origin, "too_small", str(error))


def encode(vae: AutoencoderKL, image: Decoded) -> np.ndarray | Reject:
    """Raw latents as stored, fp16 (4, H/8, W/8)."""
    raw_latents = encode_raw_latents(vae, pixels_to_tensor(image.pixels)[None])[0].half().cpu().numpy()
    if not np.isfinite(raw_latents).all():
        detail = "the VAE gave NaN or infinity; SDXL's own overflows in fp16: set precision.vae to fp32"
        return Reject(image.post.key, image.post.origin, "non_finite_latents", detail)
    return raw_latents


def note_sizes(image: Decoded) -> list[dict[str, Any]]:
    """A note where the post states another size than the file has."""
    stated = (image.post.stated_width, image.post.stated_height)
    if all(side in (None, real) for side, real in zip(stated, image.size, strict=True)):
        return []
    where = {"key": image.post.key, "origin": image.post.origin}
    return [{**where, "note": "stated_size", "stated": list(stated), "file": list(image.size)}]


def make_row(image: Decoded) -> Row:
    """The index's columns, but for where the sample will lie."""
    post, fit = image.post, image.fit
    return asdict(post) | {
        "content_hash": image.content_hash,
        "bucket_width": fit.bucket[0],
        "bucket_height": fit.bucket[1],
        "original_width": image.size[0],
        "original_height": image.size[1],
        "crop_left": fit.left,
        "crop_top": fit.top,
        "extra": json.dumps(post.extra, ensure_ascii=False) if post.extra else None,
    }


def check_bad_fraction(work: Work, since: Progress, config: Config, inputs: Inputs) -> None:
    """Stop as soon as more is set aside than data.max_bad_fraction of all inputs allows."""
    if len(work.done.rejected) + len(since.rejected) <= config.data.max_bad_fraction * inputs.total:
        return
    path, rejected = work.folder / QUARANTINE_NAME, work.done.rejected + since.rejected
    write_jsonl(path, rejected)
    raise UserError(
        f"{len(rejected)} of {inputs.total} inputs are set aside after {since.seen}, above data.max_bad_fraction "
        f"{config.data.max_bad_fraction}: {tell(count_by(rejected, 'reason'))}. {path} names each. Raise the "
        f"fraction to go on behind what is encoded, or mend the inputs and delete {work.folder} to start afresh"
    )


def finish(work: Work, folder: Path, settings: dict[str, Any], inputs: Inputs, reused: int) -> Summary:
    """Merge the shards' rows into the index and put the whole under its name."""
    if not work.shards:
        raise UserError(f"all {inputs.total} inputs are set aside: {tell(count_by(work.done.rejected, 'reason'))}")
    write_jsonl(work.set / QUARANTINE_NAME, work.done.rejected)
    write_jsonl(work.set / NOTES_NAME, work.done.notes)
    table = pa.concat_tables(work.tables)
    set_aside, notes = count_by(work.done.rejected, "reason"), count_by(work.done.notes, "note")
    counts = {"inputs": inputs.total, "samples": table.num_rows, "set_aside": set_aside, "notes": notes}
    write_index(work.set, table, work.shards, settings, inputs=vars(inputs), counts=counts)
    work.set.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(work.folder)
    return Summary(folder, table.num_rows, len(work.shards), set_aside, notes, reused)


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def count_by(lines: list[dict[str, Any]], name: str) -> dict[str, int]:
    """How often each value of a field occurs, the most frequent first."""
    return dict(Counter(line[name] for line in lines).most_common())


def tell(counts: dict[str, int]) -> str:
    """Counts in one line."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())

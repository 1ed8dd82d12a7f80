"""What a page tells beyond the index: what a run makes of it, step by step, and a few samples to look at.

A model is only needed for thumbnails and lengths; where it cannot be found, that is said and left out.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from trainer.config.schema import Config
from trainer.core.distributed import choose_device
from trainer.core.errors import UserError
from trainer.data.buckets import Fit, Size
from trainer.data.draws import draw_sample_caption
from trainer.data.images import BadImage, read_bytes, read_pixels
from trainer.data.index import Index, read_raw_latents
from trainer.data.plan import Plan, Unit
from trainer.data.post import Post
from trainer.data.shards import Row
from trainer.data.sources import iterate_sources
from trainer.data.tokens import EOS_TOKEN, TextTokenizer, load_tokenizer
from trainer.model.base import find_base, find_tokenizers, read_config, read_vae
from trainer.model.latents import read_latent_scale, scale_latents
from trainer.model.sdxl import DTYPES
from trainer.model.vae import build_vae, decode_latents
from trainer.report.survey import Counts, Duplicates, Fits, RuleCounts, TagCounts

THUMBNAIL_SIDE = 320  # pixels, the longer one
PASSES = 3  # captions shown of each sample


@dataclass(frozen=True)
class RunFacts:
    """What steps 0 .. ``steps`` - 1 see."""

    steps: int
    epochs: float  # 9.5: nine, and half of the tenth one's units
    steps_per_epoch: float  # the mean: epochs differ by a few units, and need not end with a step
    views: np.ndarray  # int64 (n,), how often each row of the index is seen
    units: np.ndarray  # int64 (buckets,)
    repeating: np.ndarray  # int64 (buckets,), units that hold an image more than once


@dataclass(frozen=True)
class Models:
    """What could be found of the model, and what could not."""

    vae: AutoencoderKL | None
    tokenizer: TextTokenizer | None
    missing: tuple[str, ...]  # told on the page


@dataclass(frozen=True)
class Sample:
    """One sample to look at; pictures are JPEG files."""

    row: Row
    captions: list[str]  # as drawn in passes 0, 1, ...
    factor: float  # of the resize
    cropped: float  # share of the resized pixels
    decoded: bytes | None
    decoded_size: Size  # of the thumbnail
    original: bytes | None
    original_size: Size  # of the thumbnail
    crop: tuple[float, float, float, float]  # left, top, width, height in the thumbnail's pixels
    why_not: str  # where there is no original


@dataclass(frozen=True)
class Report:
    """All numbers of a page."""

    config: Config
    index: Index
    plan: Plan
    run: RunFacts
    fits: Fits
    sources: Counts  # images of each
    tags: dict[str, TagCounts]  # by category
    rules: RuleCounts
    lengths: np.ndarray | None  # int64, content tokens of some or all captions
    duplicates: Duplicates
    samples: list[Sample]
    missing: tuple[str, ...]  # what could not be told, and why

    @property
    def set_aside(self) -> dict[str, int]:
        return self.index.manifest.get("counts", {}).get("set_aside", {})

    @property
    def remarks(self) -> dict[str, dict[str, int]]:
        """What sources said of inputs that were not set aside, by source and kind."""
        return self.index.manifest.get("counts", {}).get("by_source", {})


def walk_run(plan: Plan, steps: int) -> RunFacts:
    """Follow the plan through a run: whole epochs by their counts, of the last one each unit."""
    end = steps * plan.units_per_step
    last = plan.find_epoch(end - 1)
    units = plan.units_until(last - 1).copy()
    views, repeating = plan.views(last - 1), count_repeating(plan, last - 1)
    start = int(units.sum())
    buckets, rows = (part[: end - start] for part in plan.epoch_rows(last))
    views += np.bincount(rows.ravel(), minlength=len(views))
    units += np.bincount(buckets, minlength=len(units))
    repeating += count_twice(plan, buckets, rows)
    all_units = int(plan.units_until(last).sum())
    return RunFacts(steps, plan.epochs_until(steps), all_units / last / plan.units_per_step, views, units, repeating)


def count_repeating(plan: Plan, epochs: int) -> np.ndarray:
    """Units of whole epochs that hold an image more than once, int64 (buckets,).

    Every unit of a bucket that has fewer images than a unit. In another bucket only a unit that lies across the end
    of a pass can: what the end of one order holds, the beginning of the next may hold again. Where sources repeat
    their images, any unit can.
    """
    size, repeating = plan.unit_size, plan.units_until(epochs).copy()
    if plan.has_repeats:
        repeating[:] = 0
        for epoch in range(1, epochs + 1):
            repeating += count_twice(plan, *plan.epoch_rows(epoch))
        return repeating
    for bucket, images in enumerate(plan.images.tolist()):
        if images < size:
            continue
        units = int(repeating[bucket])
        ends = range(images, units * size, images)
        across = [Unit(epochs, bucket, end // size) for end in ends if end % size]
        repeating[bucket] = sum(len({row for row, _ in plan.unit_samples(unit)}) < size for unit in across)
    return repeating


def count_twice(plan: Plan, buckets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Units that hold an image more than once, by bucket: int64 (buckets,); units as ``Plan.epoch_rows`` gives them."""
    ordered = np.sort(rows, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    return np.bincount(buckets[twice], minlength=len(plan.buckets))


def find_models(config: Config, vae_sha256: str) -> Models:
    """The VAE that made the latents and the first tokenizer, as far as they can be found.

    On a GPU the VAE has the config's dtype, on the CPU fp32.
    """
    try:
        base = find_base(config.model.pretrained, config.model.revision, parts=("vae",))
    except UserError as error:
        return Models(None, None, (f"no thumbnails of latents and no caption lengths: {error}",))
    vae, tokenizer, missing = None, None, []
    try:
        weights = read_vae(config.model.vae, base, config.model.vae_revision)
        if weights.sha256 != vae_sha256:
            raise UserError("the latents were made by another VAE than the one that this config names")
        device = choose_device()
        dtype = DTYPES[config.precision.vae] if device.type == "cuda" else torch.float32
        vae = build_vae(weights.config, weights.state, dtype).to(device)
    except UserError as error:
        missing.append(f"no thumbnails of latents: {error}")
    try:
        folder = find_tokenizers(base, config.model.tokenizer)[0]
        tokenizer = load_tokenizer(folder, read_config(base, "text_encoder")["vocab_size"], EOS_TOKEN)
    except UserError as error:
        missing.append(f"no caption lengths: {error}")
    return Models(vae, tokenizer, tuple(missing))


def show_samples(
    index: Index, config: Config, fits: Fits, numbers: Sequence[int], vae: AutoencoderKL | None, progress: bool
) -> list[Sample]:
    """Some rows of the index as pictures and captions."""
    rows = [index.row(number) for number in numbers]
    posts, why_not = find_images(config, {row["key"] for row in rows}, progress)
    samples = []
    for number, row in zip(tqdm(numbers, "draw samples", disable=not progress), rows, strict=True):
        captions = [draw_sample_caption(row, pass_, config.run.seed, config.captions) for pass_ in range(PASSES)]
        size = thumbnail_size((row["bucket_width"], row["bucket_height"]))
        decoded = draw_latents(vae, read_raw_latents(index, number), size) if vae is not None else None
        original_size = thumbnail_size((row["original_width"], row["original_height"]))
        original, reason = None, why_not
        if (post := posts.get(row["key"])) is not None:
            original, reason = draw_original(post, row["content_hash"], original_size)
        cropped, factor = (float(values[number]) for values in (fits.cropped, fits.factors))
        crop = place_crop(row, factor, original_size)
        samples.append(Sample(row, captions, factor, cropped, decoded, size, original, original_size, crop, reason))
    return samples


def place_crop(row: Row, factor: float, size: Size) -> tuple[float, float, float, float]:
    """What is kept of the original, in pixels of its thumbnail."""
    scale = size[0] / row["original_width"] / factor, size[1] / row["original_height"] / factor
    left, top, width, height = (row[name] for name in ("crop_left", "crop_top", "bucket_width", "bucket_height"))
    return left * scale[0], top * scale[1], width * scale[0], height * scale[1]


def find_images(config: Config, keys: set[str], progress: bool) -> tuple[dict[str, Post], str]:
    """Key -> post, where the config's sources still have it; and why the others have no image."""
    found: dict[str, Post] = {}
    try:
        for item in tqdm(iterate_sources(config.data), "find images", unit="post", disable=not progress):
            if isinstance(item, Post) and item.key in keys:
                found[item.key] = item
                if len(found) == len(keys):
                    break
    except UserError as error:
        return found, str(error)
    return found, "its image is not among the sources of posts any more"


def draw_original(post: Post, content_hash: str, size: Size) -> tuple[bytes | None, str]:
    """The whole image at a thumbnail's size, if it still is the one that was encoded; else why not."""
    try:
        data = read_bytes(post.image)
        if hashlib.sha256(data).hexdigest() != content_hash:
            return None, f"{post.origin}: the image is not the one any more that was encoded"
        return to_jpeg(read_pixels(data, Fit(size, size, 0, 0))), ""
    except BadImage as error:
        return None, str(error)


def draw_latents(vae: AutoencoderKL, raw_latents: np.ndarray, size: Size) -> bytes:
    """What the VAE makes of stored latents (4, H/8, W/8), at a thumbnail's size."""
    latents = scale_latents(torch.from_numpy(raw_latents).float(), read_latent_scale(vae.config))
    pixels = decode_latents(vae, latents[None])[0].permute(1, 2, 0)  # (H, W, 3)
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return to_jpeg(np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BOX)))


def thumbnail_size(size: Size) -> Size:
    """The same shape with ``THUMBNAIL_SIDE`` as its longer side; smaller images keep theirs."""
    scale = min(1.0, THUMBNAIL_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def to_jpeg(pixels: np.ndarray) -> bytes:
    """RGB uint8 (H, W, 3) as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()

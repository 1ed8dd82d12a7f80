"""All numbers of a page: what a set holds and what a run makes of it, ready for the template and the terminal.

A model is only needed for thumbnails and lengths; where it cannot be found, that is said and left out.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from trainer.config.schema import Config
from trainer.core.distributed import choose_device
from trainer.core.errors import UserError
from trainer.data.index import Index
from trainer.data.plan import Plan
from trainer.data.tokens import CONTENT_LENGTH, EOS_TOKEN, TextTokenizer, load_tokenizer
from trainer.model.base import find_base, find_tokenizers, read_config, read_vae
from trainer.model.sdxl import DTYPES
from trainer.model.vae import build_vae
from trainer.report.caption_survey import KindCounts
from trainer.report.examples import Example
from trainer.report.survey import Counts, Duplicates, Fits, RuleCounts, TagCounts
from trainer.report.views import ViewCounts

FINISHED = "finished captions"  # a category of tags beside the index's
MAX_COLUMNS = 60  # of the histogram
MAX_VIEW_ROWS = 24
# named by their upper edges
CROP_RANGES = {0.0: "nothing", 0.01: "up to 1%", 0.02: "1 to 2%", 0.05: "2 to 5%", 0.1: "5 to 10%",
               0.2: "10 to 20%", np.inf: "more than 20%"}  # fmt: skip
FACTOR_RANGES = {0.25: "shrunk to 0.25 or less", 0.5: "shrunk to 0.25 .. 0.5", 0.75: "shrunk to 0.5 .. 0.75",
                 np.nextafter(1, 0): "shrunk to 0.75 .. 1", 1.0: "unchanged", 1.25: "enlarged by up to 1.25",
                 1.5: "enlarged by 1.25 .. 1.5", 2.0: "enlarged by 1.5 .. 2", 4.0: "enlarged by 2 .. 4",
                 np.inf: "enlarged by more than 4"}  # fmt: skip
SHOWN_CHUNKS = 3  # at least, in the table of lengths


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
class BucketFacts:
    """One bucket in a run."""

    width: int
    height: int
    images: int
    views: str  # the fewest and the most of an image
    units: int
    repeating: int  # units that hold an image more than once


@dataclass(frozen=True)
class LengthFacts:
    """Content tokens of some or all captions, of which training keeps ``limit``."""

    tokens: np.ndarray  # int64 (captions,)
    limit: int
    truncated: int  # captions that lose their end
    chunks: Counts  # captions by the chunks that they fill
    step: int  # tokens of a column of the histogram
    columns: list[int]  # captions of 1 .. step, step + 1 .. 2 step, ... tokens; the last column holds all above
    chunk_ends: list[float]  # where chunks end within the histogram, in tokens
    cut: Counts = field(default_factory=list)  # part -> captions that lose something of it


@dataclass(frozen=True)
class Report:
    """All numbers of a page."""

    config: Config
    index: Index
    plan: Plan
    run: RunFacts
    weights: dict[str, Any] | None  # as they are recorded; None without rules
    views: dict[str, list[ViewCounts]]  # by artist, character, rating, year
    buckets: list[BucketFacts]  # the fullest first
    fits: Fits
    sources: Counts  # images of each
    tags: dict[str, TagCounts]  # by category
    rules: RuleCounts
    kinds: KindCounts | None  # None: each sample has one caption
    mapped: Counts  # tags that tables change, by what they do
    frequent: list[str]  # tags that captions.frequent_tag_dropout may leave out
    lengths: LengthFacts | None
    duplicates: Duplicates
    examples: list[Example]
    missing: list[str]  # what could not be found out, and why
    counts: dict[str, Any]  # of preparation, the manifest's


def describe_buckets(index: Index, plan: Plan, run: RunFacts) -> list[BucketFacts]:
    """Buckets, the fullest first."""
    facts = []
    for place in np.argsort(-plan.images, kind="stable").tolist():
        width, height = plan.buckets[place]
        views = view_range(run.views[(index.bucket_sizes == (width, height)).all(axis=1)])
        counts = (int(values[place]) for values in (run.units, run.repeating))
        facts.append(BucketFacts(width, height, int(plan.images[place]), views, *counts))
    return facts


def count_lengths(tokens: np.ndarray, limit: int, cut: Counts | None = None) -> LengthFacts:
    """What is shown of the lengths of captions."""
    ranges = name_token_ranges(max(SHOWN_CHUNKS, limit // CONTENT_LENGTH))
    names = {edge: f"{name} (truncated)" if edge > limit else name for edge, name in ranges.items()}
    longest = int(tokens.max())
    step = next(step for step in (5, 15, 25) if step == 25 or longest < 40 * step)
    shown = min(MAX_COLUMNS, -(-max(longest, limit, 1) // step))
    columns = np.bincount(np.minimum(np.maximum(tokens - 1, 0) // step, shown - 1), minlength=shown).tolist()
    ends = [edge for edge in ranges if edge <= step * shown]
    truncated = int((tokens > limit).sum())
    return LengthFacts(tokens, limit, truncated, count_in_ranges(tokens, names), step, columns, ends, cut or [])


def name_token_ranges(chunks: int) -> dict[float, str]:
    """Numbers of tokens by the chunks that they fill, by their upper edges."""
    edges = [CONTENT_LENGTH * chunk for chunk in range(1, chunks + 1)]
    names = {edge: f"{edge - CONTENT_LENGTH + 1} to {edge}" for edge in edges}
    return names | {edges[0]: f"up to {edges[0]}", np.inf: f"more than {edges[-1]}"}


def count_views(views: np.ndarray) -> Counts:
    """How often images are seen; neighbouring numbers are joined where there are many."""
    low, high = int(views.min()), int(views.max())
    width = -(-(high - low + 1) // MAX_VIEW_ROWS)
    counts = np.bincount((views - low) // width).tolist()
    starts = range(low, high + 1, width)
    labels = [f"{start} times" if width == 1 else f"{start} to {start + width - 1} times" for start in starts]
    return [(label, count) for label, count in zip(labels, counts, strict=True) if count]


def view_range(views: np.ndarray) -> str:
    """The fewest and the most views of some images."""
    low, high = int(views.min()), int(views.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def count_in_ranges(values: np.ndarray, ranges: dict[float, str]) -> Counts:
    """How many values lie in each range: at most its edge, and above the edge before; the last edge is infinite."""
    places = np.searchsorted(np.array(list(ranges)), values, side="left")
    return list(zip(ranges.values(), np.bincount(places, minlength=len(ranges)).tolist(), strict=True))


def trim_counts(counts: Counts) -> Counts:
    """Counts without the empty ones at both ends."""
    filled = [place for place, (_, count) in enumerate(counts) if count]
    return counts[filled[0] : filled[-1] + 1]


def walk_run(plan: Plan, steps: int) -> RunFacts:
    """Follow the plan through a run, an epoch at a time."""
    end = steps * plan.units_per_step
    last, all_units = plan.find_epoch(end - 1), 0
    views = np.zeros(int(plan.images.sum()), dtype=np.int64)
    units, repeating = np.zeros((2, len(plan.buckets)), dtype=np.int64)
    for epoch in range(1, last + 1):
        buckets, rows = (part[: end - all_units] for part in plan.epoch_rows(epoch))
        ordered = np.sort(rows, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)  # such units hold an image more than once
        views += np.bincount(rows.ravel(), minlength=len(views))
        units += np.bincount(buckets, minlength=len(units))
        repeating += np.bincount(buckets[twice], minlength=len(units))
        all_units = int(plan.units_until(epoch).sum())
    return RunFacts(steps, plan.epochs_until(steps), all_units / last / plan.units_per_step, views, units, repeating)


def find_models(config: Config, vae_sha256: str) -> tuple[AutoencoderKL | None, TextTokenizer | None, list[str]]:
    """The VAE that made the latents and the first tokenizer, as far as they can be found; and what is missing, and why.

    On a GPU the VAE has the config's dtype, on the CPU fp32.
    """
    try:
        base = find_base(config.model.pretrained, config.model.revision, parts=("vae",))
    except UserError as error:
        return None, None, [f"no thumbnails of latents and no caption lengths: {error}"]
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
    return vae, tokenizer, missing

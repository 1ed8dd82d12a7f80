"""All numbers of a page: what a set holds and what a run makes of it, ready for the template and the terminal.

A model is only needed for thumbnails and lengths; where it cannot be found, that is said and left out.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from trainer.config.schema import Config
from trainer.core.distributed import choose_device
from trainer.core.errors import UserError
from trainer.data.index import Index
from trainer.data.plan import Plan
from trainer.data.tokens import EOS_TOKEN, TextTokenizer, load_tokenizer
from trainer.model.base import find_base, find_tokenizers, read_config, read_vae
from trainer.model.sdxl import DTYPES
from trainer.model.vae import build_vae
from trainer.report.examples import Example
from trainer.report.survey import Counts, Duplicates, Fits, RuleCounts, TagCounts

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
TOKEN_RANGES = {75: "up to 75", 150: "76 to 150", 225: "151 to 225", np.inf: "more than 225"}  # one, two, three chunks


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

    @property
    def truncated(self) -> int:
        """Captions that lose their end."""
        return int((self.tokens > self.limit).sum())

    @property
    def percentiles(self) -> list[float]:
        """The most tokens of half of the captions, and of 95%."""
        return np.percentile(self.tokens, [50, 95]).tolist()

    @property
    def empty(self) -> int:
        """Captions without a token."""
        return int((self.tokens == 0).sum())

    @property
    def chunks(self) -> Counts:
        """Captions by the chunks that they fill."""
        names = {edge: f"{name} (truncated)" if edge > self.limit else name for edge, name in TOKEN_RANGES.items()}
        return count_in_ranges(self.tokens, names)

    @property
    def step(self) -> int:
        """Tokens of a column of the histogram."""
        return next(step for step in (5, 15, 25) if step == 25 or self.tokens.max() < 40 * step)

    @property
    def columns(self) -> list[int]:
        """The histogram: captions of 1 .. step, step + 1 .. 2 step, ... tokens; the last column holds all above."""
        shown = min(MAX_COLUMNS, -(-max(int(self.tokens.max()), self.limit, 1) // self.step))
        places = np.minimum(np.maximum(self.tokens - 1, 0) // self.step, shown - 1)
        return np.bincount(places, minlength=shown).tolist()

    @property
    def chunk_ends(self) -> list[float]:
        """Where chunks end within the histogram, in tokens."""
        return [edge for edge in TOKEN_RANGES if edge <= self.step * len(self.columns)]


@dataclass(frozen=True)
class Models:
    """What could be found of the model, and what could not."""

    vae: AutoencoderKL | None
    tokenizer: TextTokenizer | None
    missing: tuple[str, ...]  # as the page states it


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
    lengths: LengthFacts | None
    duplicates: Duplicates
    examples: list[Example]
    missing: tuple[str, ...]  # what could not be found out, and why

    @property
    def views(self) -> str:
        """The fewest and the most views of an image."""
        return view_range(self.run.views)

    @property
    def counts(self) -> dict[str, Any]:
        """What preparation counted."""
        return self.index.manifest.get("counts", {})

    @property
    def set_aside(self) -> dict[str, int]:
        """Inputs that were set aside, by reason."""
        return self.counts.get("set_aside", {})

    @property
    def remarks(self) -> dict[str, dict[str, int]]:
        """What sources said of inputs that were not set aside, by source and kind."""
        return self.counts.get("by_source", {})

    @cached_property
    def buckets(self) -> list[BucketFacts]:
        """Buckets, the fullest first."""
        sizes, run, facts = self.index.bucket_sizes, self.run, []
        codes = (sizes[:, 0].astype(np.int64) << 20) | sizes[:, 1]
        for place in np.argsort(-self.plan.images, kind="stable").tolist():
            width, height = self.plan.buckets[place]
            views = view_range(run.views[codes == (width << 20 | height)])
            counts = (int(values[place]) for values in (run.units, run.repeating))
            facts.append(BucketFacts(width, height, int(self.plan.images[place]), views, *counts))
        return facts

    @property
    def views_table(self) -> Counts:
        """How often images are seen; neighbouring numbers are joined where there are many."""
        views = self.run.views
        low, high = int(views.min()), int(views.max())
        width = -(-(high - low + 1) // MAX_VIEW_ROWS)
        counts = np.bincount((views - low) // width).tolist()
        starts = range(low, high + 1, width)
        labels = [f"{start} times" if width == 1 else f"{start} to {start + width - 1} times" for start in starts]
        return [(label, count) for label, count in zip(labels, counts, strict=True) if count]

    @property
    def crops(self) -> Counts:
        """Images by the share of their pixels that is cropped away."""
        return trim_counts(count_in_ranges(self.fits.cropped, CROP_RANGES))

    @property
    def factors(self) -> Counts:
        """Images by the factor of their resize."""
        return trim_counts(count_in_ranges(self.fits.factors, FACTOR_RANGES))


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

"""What two trials have in common, and where they first differ: samples, captions, losses, weights, optimizer state."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.core.console import format_duration
from trainer.model.checkpoint import list_checkpoints
from trainer.model.restore import open_weights
from trainer.train.trials import SeenStep, TrialResult

LOSS_TOLERANCE = 0.01  # of a step's loss: what other orders of summation may make of it, in bf16 too
HEADER = ("trial", "samples", "captions", "losses", "weights", "optimizer state", "time")


@dataclass(frozen=True)
class Comparison:
    """How a trial compares with the straight one; each is None where nothing differs."""

    samples: str | None  # the first step and sample that differ
    captions: str | None
    first_loss: str | None
    loss_apart: float  # largest relative difference of a step's loss
    weights: bool  # whether the files have the same bytes
    optimizer: bool
    weights_apart: float  # difference of the weights, as a share of what the last steps moved them

    @property
    def same_bits(self) -> bool:
        """Whether all is the same to the last bit."""
        return self.same_inputs and self.first_loss is None and self.weights and self.optimizer

    @property
    def same_inputs(self) -> bool:
        """Whether the steps saw the same."""
        return self.samples is None and self.captions is None

    @property
    def first(self) -> str:
        """Where they first differ, for people."""
        if self.samples or self.captions or self.first_loss:
            return self.samples or self.captions or self.first_loss or ""
        return "in the last checkpoint: " + " and ".join(self.differing)

    @property
    def differing(self) -> Iterator[str]:
        """What of the checkpoint differs."""
        if not self.weights:
            yield "weights"
        if not self.optimizer:
            yield "optimizer state"


def compare_trials(straight: TrialResult, other: TrialResult) -> Comparison:
    """Step by step, and the last checkpoints."""
    pairs = [(step, straight.steps[step], other.steps[step]) for step in sorted(straight.steps)]
    weights, optimizer = (same_files(straight.files, other.files, kind) for kind in ("model", "optimizer"))
    return Comparison(
        samples=next((text for pair in pairs if (text := differ(*pair, "keys"))), None),
        captions=next((text for pair in pairs if (text := differ(*pair, "captions"))), None),
        first_loss=next((text for pair in pairs if (text := differ(*pair, "losses"))), None),
        loss_apart=max(relative(one.loss, two.loss) for _, one, two in pairs),
        weights=weights,
        optimizer=optimizer,
        weights_apart=0.0 if weights else measure_apart(straight, other.checkpoint),
    )


def differ(step: int, one: SeenStep, two: SeenStep, what: str) -> str | None:
    """The first sample of a step in which two trials differ."""
    values, others = getattr(one, what), getattr(two, what)
    if values == others:
        return None
    if len(values) != len(others):
        return f"step {step}: {len(values)} {what}, and {len(others)}"
    place = next(i for i, (a, b) in enumerate(zip(values, others, strict=True)) if a != b)
    return f"step {step}, sample {place} ({one.keys[place]}): {what} {values[place]!r} and {others[place]!r}"


def relative(one: float, two: float) -> float:
    """How far two losses are apart; infinite where one is no number."""
    if one == two:
        return 0.0
    apart = abs(one - two) / max(abs(one), abs(two))
    return apart if math.isfinite(apart) else math.inf


def same_files(one: dict[str, str], two: dict[str, str], kind: str) -> bool:
    """Whether the files of the ``model``, or of the ``optimizer``, have the same bytes."""
    first, second = ({name: sha for name, sha in files.items() if name.startswith(kind)} for files in (one, two))
    return first == second


def measure_apart(straight: TrialResult, other: Path) -> float:
    """The norm of the difference of the weights, by that of what the straight run's last steps changed."""
    before, *_, last = list_checkpoints(straight.checkpoint.parent)
    moved = apart = 0.0
    earlier, weights, others = open_weights(before), open_weights(last), open_weights(other)
    for name in weights:
        value = weights[name].double()
        moved += squared(value - earlier[name].double())
        apart += squared(value - others[name].double())
    return math.sqrt(apart / moved) if moved else math.inf


def squared(tensor: Tensor) -> float:
    """The square of a tensor's norm."""
    return float(tensor.square().sum())


def find_fault(result: TrialResult, comparison: Comparison, deterministic: bool) -> str | None:
    """What is not as it is promised; None where all is."""
    shows = result.trial.shows
    if not comparison.same_inputs:
        return f"{shows}: other samples or captions, first at {comparison.samples or comparison.captions}"
    if result.trial.exact and deterministic and not comparison.same_bits:
        return f"{shows}: not the same bits, first at {comparison.first}"
    if comparison.loss_apart > LOSS_TOLERANCE:
        return (
            f"{shows}: a step's loss is {comparison.loss_apart:.2%} apart, and {LOSS_TOLERANCE:.0%} is what other "
            "orders of summation may make"
        )
    return None


def table_row(result: TrialResult, comparison: Comparison | None) -> tuple[str, ...]:
    """A line of the table, see HEADER; the straight trial is compared with nothing."""
    seconds = format_duration(result.seconds)
    if comparison is None:
        return (result.trial.shows, "", "", "", "", "", seconds)
    loss = "same bits" if comparison.first_loss is None else f"{comparison.loss_apart:.2g} apart"
    weights = "same bits" if comparison.weights else f"{comparison.weights_apart:.2g} of a move"
    optimizer = "same bits" if comparison.optimizer else "other bits"
    words = ["same" if text is None else "differ" for text in (comparison.samples, comparison.captions)]
    return (result.trial.shows, *words, loss, weights, optimizer, seconds)

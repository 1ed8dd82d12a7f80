"""What a step left behind, read by the host one step later: progress bar, metrics, trackers, and the two stops.

It stops for a non-finite loss, naming the samples, and for loss scaling that finds no scale.
"""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.lineage import count_samples
from trainer.train.metrics import MetricsFile, tracker_settings
from trainer.train.optim import lr_factor
from trainer.train.step import StepResult

OTHER_SETTINGS = (  # a resume would come to the same step with the same numbers
    "To continue at a lower rate or in bf16, begin another run with checkpoint.fork naming this one"
)
PARTS = ("unet", "text_encoder_1", "text_encoder_2")


class Progress:
    """The readers of a run's steps; writes on the main process only, but ``read`` is called on all."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        path: Path,
        *,
        attempt: int,
        tracker_run_id: str,
        first: int,
        last: int,
        skipped: dict[str, int],
        fork: dict[str, Any] | None,
        flops_per_sample: float | None,
        peak_flops: float | None,
    ):
        self.config, self.accelerator, self.last = config, accelerator, last
        self.skipped = dict(skipped)  # {"all": ..., "in_a_row": ...} updates that loss scaling withheld
        self.fork = fork  # the run that this one branched off
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.window_start, self.window_steps = time.perf_counter(), 0
        self.file = MetricsFile(path / "metrics.jsonl", attempt) if accelerator.is_main_process else None
        self.bar = tqdm(
            total=last, initial=first, desc=config.run.name, unit="step", disable=not accelerator.is_main_process
        )
        if config.logging.trackers:
            settings = tracker_settings(list(config.logging.trackers), tracker_run_id, config.run.name, path)
            accelerator.init_trackers(config.logging.project, flatten(config.written), settings)

    def read(self, result: StepResult) -> bool:
        """Read one step's numbers from the device; whether some rank was asked to stop.

        Raises:
            UserError: on every rank, when the loss or the gradients are not finite.
        """
        if bool(result.bad):
            self.refuse(result)
        self.count_skips(result)
        self.window_steps += 1
        made, loss = result.step + 1, float(result.loss)
        speed = self.config.data.global_batch_size * self.window_steps / (result.launched - self.window_start)
        shown = {"loss": f"{loss:.4f}", "images/s": f"{speed:.2f}"}
        if result.loss_scale is not None:
            shown |= {"scale": f"{result.loss_scale:g}", "skipped": str(self.skipped["all"])}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if made % self.config.logging.every_steps == 0 or made == self.last:
            self.write(result, made, loss, speed)
            self.window_start, self.window_steps = result.launched, 0
        return bool(result.stop)

    def write(self, result: StepResult, made: int, loss: float, speed: float) -> None:
        """One line of metrics, to the file and to the trackers."""
        factor = lr_factor(result.step, self.last, self.config.schedule)
        mfu = None
        if self.flops_per_sample and self.peak_flops:
            mfu = speed * self.flops_per_sample / (self.peak_flops * self.accelerator.num_processes)
        values: dict[str, float | None] = {
            "train/loss": loss,
            "train/grad_norm": float(result.grad_norm),
            **{f"lr/{part}": getattr(self.config.optim, f"{part}_lr") * factor for part in PARTS},
            "perf/images_per_second": speed,
            "perf/mfu": mfu,
            "progress/samples_seen": count_samples(made, self.config.data.global_batch_size, self.fork),
        }
        if result.loss_scale is not None:
            values |= {"train/loss_scale": result.loss_scale, "train/skipped_steps": self.skipped["all"]}
        if self.file is not None:
            self.file.write(made, values)
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=made)

    def count_skips(self, result: StepResult) -> None:
        """Count the updates that loss scaling withheld; too many in a row mean that no scale works."""
        self.skipped["all"] += result.skipped
        self.skipped["in_a_row"] = self.skipped["in_a_row"] + 1 if result.skipped else 0
        if self.skipped["in_a_row"] > self.config.precision.max_skipped_steps:
            raise UserError(
                f"step {result.step}: loss scaling has skipped {self.skipped['in_a_row']} steps in a row, the scale is "
                f"{result.loss_scale:g}: the gradients overflow at any scale. {OTHER_SETTINGS}"
            )

    def refuse(self, result: StepResult) -> None:
        """Stop, naming step and samples; the update was withheld on the device."""
        pairs = zip(result.keys, result.losses.tolist(), strict=True)
        named = gather_object([key for key, loss in pairs if not math.isfinite(loss)])
        what = f"the loss of {', '.join(named)} is" if named else "all losses are finite, but the gradients are"
        raise UserError(
            f"step {result.step}: {what} not finite. The update was withheld and nothing was saved after it. "
            f"scripts/explain_step.py --config ... --step {result.step} lists its samples. {OTHER_SETTINGS}"
        )

    def show_samples(self, grid: Image.Image, step: int) -> None:
        """Give a grid of samples to the trackers."""
        images = np.asarray(grid)[None]  # (1, H, W, 3)
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": images}, step=step, **options)

    def close(self) -> None:
        """End the bar and the trackers."""
        self.bar.close()
        self.accelerator.end_training()


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested config -> dotted keys and plain values, as the trackers want them; lists become text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat

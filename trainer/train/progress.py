"""The numbers of a step, which reach the host one step later: meter, metrics, trackers, and the two stops.

It stops for a non-finite loss, naming the samples, and for loss scaling that finds no scale.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image

from trainer.core.console import log
from trainer.core.disk import is_disk_trouble, say_trouble
from trainer.core.distributed import keep_group
from trainer.core.errors import UserError, shorten
from trainer.core.layout import CHECKPOINTS_FOLDER, METRICS_FILE
from trainer.core.progress import Meter, format_count
from trainer.model.checkpoint import list_checkpoints
from trainer.model.lineage import count_samples
from trainer.model.sdxl import COMPONENTS
from trainer.train.bad_samples import BadSamples
from trainer.train.black_box import BlackBox
from trainer.train.launch import RunInputs
from trainer.train.metrics import STEP_METRIC, MetricsFile, Window, memory_gb, tracker_settings
from trainer.train.optim import lr_factor
from trainer.train.run import run_path
from trainer.train.step import StepResult

MAX_STEPS = 100  # of those that were not finite, the first ones by number
MAX_TAG = 80  # characters of a prompt in a tag
OTHER_SETTINGS = (  # a resume would come to the same step with the same numbers
    "To continue at a lower rate or in bf16, start another run with checkpoint.fork set to this one"
)


class Progress:
    """The readers of a run's steps; writes on the main process only, but ``read`` is called on all."""

    def __init__(
        self,
        inputs: RunInputs,
        attempt: int,
        tracker_run_id: str,
        *,
        black_box: BlackBox,
        flops_per_sample: float | None,
        peak_flops: float | None,
    ):
        self.inputs, self.config, self.accelerator = inputs, inputs.config, inputs.accelerator
        skipped = inputs.resumed.state["skipped_steps"] if inputs.resumed else {"all": 0, "in_a_row": 0}
        self.skipped = dict(skipped)  # {"all": ..., "in_a_row": ...} updates that loss scaling withheld
        before = inputs.resumed.state.get("nonfinite_steps") if inputs.resumed else None
        # updates that were withheld because loss or gradients were not finite, and at which steps
        self.nonfinite: dict[str, Any] = {"all": 0, "in_a_row": 0, "steps": []} | (before or {})
        self.bad_samples = BadSamples(inputs)
        self.unwritten = 0  # lines of metrics in a row
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.black_box, self.begun = black_box, time.perf_counter()
        self.attempt, self.window = attempt, Window(self.begun)
        config, accelerator, path = self.config, self.accelerator, run_path(self.config)
        self.file = MetricsFile(path / METRICS_FILE, attempt) if accelerator.is_main_process else None
        self.meter = Meter(config.run.name, inputs.last, "step", inputs.first)
        if config.logging.trackers:
            self.start_trackers(tracker_settings(
                config.logging.trackers, tracker_run_id, config.run.name, path, inputs.first
            ))  # fmt: skip

    def start_trackers(self, settings: dict[str, Any]) -> None:
        """Begin, or continue, the trackers' runs, and give them the config; TensorBoard takes plain values only."""
        values, accelerator = self.config.written, self.accelerator
        accelerator.init_trackers(self.config.logging.project, init_kwargs=settings)
        for tracker in accelerator.trackers:
            tracker.store_init_configuration(values if tracker.name == "wandb" else flatten_values(values))
            if tracker.name == "wandb" and accelerator.is_main_process:
                tracker.tracker.define_metric("*", step_metric=STEP_METRIC)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the meter, the file and the trackers, also where the run ends in an error."""
        self.meter.close(said=kind is not None)  # at its end the run says more
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.file.close()
        if kind is None:
            keep_group()
            self.accelerator.end_training()
            return
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            with contextlib.suppress(Exception):  # the run's own error is the one to be read
                if tracker.name == "wandb":
                    tracker.tracker.finish(exit_code=1)  # else it is shown as a run that came to its end
                else:
                    tracker.finish()

    def read(self, result: StepResult) -> bool:
        """Take one step's numbers; whether loss and gradients were finite.

        Raises:
            UserError: on every rank, when they are not, or the loss is above what is allowed.
        """
        self.black_box.note(result)
        self.count_nonfinite(result)
        self.check_loss(result)
        self.count_skips(result)
        self.window.add(None if result.bad else result.loss)
        made, speed = result.step + 1, self.window.steps_per_second(result.launched)
        images = speed * self.config.data.global_batch_size
        shown = f"loss {float(result.loss):.4f}, {images:.2f} images/s"
        if result.loss_scale is not None:
            shown += f", scale {result.loss_scale:g}, {self.skipped['all']:,} skipped"
        self.meter.update(1, shown)
        if made % self.config.logging.every_steps == 0 or made == self.inputs.last:
            self.bad_samples.gather(made)
            self.record(self.measure(result, made, images), made)
            self.window = self.window.next(result.launched)
        return not result.bad

    def measure(self, result: StepResult, made: int, speed: float) -> dict[str, float | None]:
        """The metrics of a step; ``speed`` in images a second."""
        factor = lr_factor(result.step, self.inputs.last, self.config.schedule)
        mfu = None
        if self.flops_per_sample and self.peak_flops:
            mfu = speed * self.flops_per_sample / (self.peak_flops * self.accelerator.num_processes)
        values: dict[str, float | None] = {
            "train/loss": self.window.mean_loss(),
            "train/loss_last": float(result.loss),
            "train/grad_norm": float(result.grad_norm),
            **({"data/substituted": self.bad_samples.count} if self.bad_samples.count else {}),
            **({"train/nonfinite_steps": self.nonfinite["all"]} if self.nonfinite["all"] else {}),
            **{f"lr/{part}": getattr(self.config.optim, f"{part}_lr") * factor for part in COMPONENTS},
            "perf/images_per_second": speed,
            "perf/mfu": mfu,
            "perf/memory_gb": memory_gb(self.accelerator.device),
            "perf/checkpoint_seconds": self.window.seconds_of("checkpoint", result.launched),
            "perf/sample_seconds": self.window.seconds_of("sample", result.launched),
            "progress/samples_seen": count_samples(made, self.config.data.global_batch_size, self.inputs.fork),
            "progress/epoch": self.inputs.data.plan.epochs_until(made),
        }
        if result.loss_scale is not None:
            values |= {"train/loss_scale": result.loss_scale, "train/skipped_steps": self.skipped["all"]}
        return values

    def record(self, values: dict[str, float | None], made: int) -> None:
        """Write metrics after ``made`` steps to the file and to the trackers; a step may have several lines."""
        # JSON has no Infinity, which is the gradient's norm where loss scaling skips a step
        values = {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}
        self.write(made, values)
        known = {name: value for name, value in values.items() if value is not None}
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":  # it drops what comes with a step that it has seen, as after a resume
                tracker.log({**known, STEP_METRIC: made, "attempt": self.attempt})
            else:
                tracker.log(known, step=made)

    def write(self, made: int, values: dict[str, float | None]) -> None:
        """A line of the log; a disk's trouble is said once, and the lines that it lost when there are lines again."""
        if self.file is None:
            return
        try:
            self.file.write(made, values)
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            if not self.unwritten:
                log.warning("warning: %s; training goes on without lines of metrics", say_trouble(error))
            self.unwritten += 1
            return
        if self.unwritten:
            log.warning("warning: metrics are written again; %s of them are lost", format_count(self.unwritten, "line"))
        self.unwritten = 0

    @property
    def seconds(self) -> float:
        """Since this attempt began."""
        return time.perf_counter() - self.begun

    def timed(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around what is done between steps: "checkpoint" or "sample"."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # the rest of the step itself is the step's
        return self.window.timed(what)

    def count_skips(self, result: StepResult) -> None:
        """Count the updates that loss scaling withheld; too many in a row mean that no scale works."""
        self.skipped["all"] += result.skipped
        self.skipped["in_a_row"] = self.skipped["in_a_row"] + 1 if result.skipped else 0
        if self.skipped["in_a_row"] > self.config.precision.max_skipped_steps:
            raise UserError(
                f"step {result.step}: loss scaling has skipped {self.skipped['in_a_row']} steps in a row, the scale is "
                f"{result.loss_scale:g}: the gradients overflow at any scale. {OTHER_SETTINGS}"
            )

    def count_nonfinite(self, result: StepResult) -> None:
        """Stop at a step that is not finite, or count it, naming its samples; the update was withheld on the device."""
        found, config = self.nonfinite, self.config.run
        if not result.bad:
            found["in_a_row"] = 0
            return
        pairs = zip(result.keys, result.losses.tolist(), strict=True)
        named = gather_object([key for key, loss in pairs if not math.isfinite(loss)])
        what = f"the loss of {', '.join(named)} is" if named else "all losses are finite, but the gradients are"
        found["all"], found["in_a_row"] = found["all"] + 1, found["in_a_row"] + 1
        found["steps"] = [*found["steps"], result.step][:MAX_STEPS]
        said = f"step {result.step}: {what} not finite. The update was withheld"
        most = config.max_nonfinite_in_a_row
        if config.on_nonfinite == "skip" and found["in_a_row"] <= most:
            log.warning("warning: %s, and training goes on: %s in a row, at most %s are skipped", said,
                        found["in_a_row"], most)  # fmt: skip
            return
        row = f", as were {most} before it in a row" if config.on_nonfinite == "skip" else ""
        raise UserError(
            f"{said}{row} and nothing was saved after it. "
            f"scripts/explain_step.py --config ... --step {result.step} lists its samples. {OTHER_SETTINGS}"
        )

    def check_loss(self, result: StepResult) -> None:
        """Stop a run whose weights are destroyed, though finite, while an older checkpoint is still there."""
        most = self.config.run.stop_if_loss_above
        if most is None or result.bad or float(result.loss) <= most:
            return
        found = [path.name for path in list_checkpoints(run_path(self.config) / CHECKPOINTS_FOLDER)]
        there = f"Checkpoints are there of {', '.join(found)}" if found else "There is no checkpoint yet"
        raise UserError(
            f"step {result.step}: its loss is {float(result.loss):.4g}, above run.stop_if_loss_above {most:g}, and "
            f"nothing was saved after it. {there}: the newest may hold what was destroyed; move it away to resume from "
            f"the one before. {OTHER_SETTINGS}"
        )

    def show_samples(self, images: Sequence[Image.Image], prompts: Sequence[str], step: int) -> None:
        """Give the samples to the trackers, each with its prompt. Called on the main process."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                import wandb

                pictures = [wandb.Image(image, caption=text) for image, text in zip(images, prompts, strict=True)]
                tracker.log({"samples": pictures, STEP_METRIC: step, "attempt": self.attempt})
                continue
            for number, (image, text) in enumerate(zip(images, prompts, strict=True), start=1):
                # a tag is all that stands above a picture
                tag = f"samples/{number} {shorten(text, MAX_TAG)}"
                tracker.tracker.add_image(tag, np.asarray(image), step, dataformats="HWC")
                tracker.tracker.add_text(f"samples/{number}", text, step)


def flatten_values(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested config -> dotted keys and plain values; lists become text."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten_values(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat

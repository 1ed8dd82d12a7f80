"""What a checkpoint says of the run that made it: settings, facts, counters, lineage; all but the tensors."""

from typing import Any

from trainer.core.distributed import describe_device
from trainer.model.lineage import build_lineage
from trainer.train.launch import RunInputs
from trainer.train.progress import Progress
from trainer.train.run import Attempt
from trainer.train.save import scaler_state


def build_train_state(inputs: RunInputs, attempt: Attempt, progress: Progress, made: int) -> dict[str, Any]:
    """What ``checkpoint.json`` holds after ``made`` steps, beside the files."""
    config, accelerator = inputs.config, inputs.accelerator
    return {
        "run": config.run.name,
        "stage": config.run.stage,
        "step": made,
        "attempt": attempt.number,
        "epoch": inputs.data.plan.step_units(made - 1)[-1].epoch,
        "seed": config.run.seed,
        "global_batch_size": config.data.global_batch_size,
        "bucket_batch_size": config.data.bucket_batch_size,
        "micro_batch_size": config.data.micro_batch_size,
        "num_processes": accelerator.num_processes,
        **inputs.facts,
        "config": config.written,
        "fixed": inputs.fixed,
        "loss_scaler": scaler_state(accelerator.scaler),
        "skipped_steps": dict(progress.skipped),
        "nonfinite_steps": {**progress.nonfinite, "steps": list(progress.nonfinite["steps"])},
        **({"substituted": recorded} if (recorded := progress.bad_samples.recorded) else {}),
        "tracker_run_id": attempt.tracker_run_id,
        **({"fork": inputs.fork} if inputs.fork else {}),
        "lineage": build_lineage(
            config, inputs.facts, made, fork=inputs.fork, software=inputs.software,
            nonfinite_steps=progress.nonfinite["all"], substituted=progress.bad_samples.count,
            **sum_work(inputs, attempt, progress.seconds),
        ),
    }  # fmt: skip


def sum_work(inputs: RunInputs, attempt: Attempt, seconds: float) -> dict[str, Any]:
    """When the run began, its hours and hardware: those of the checkpoint that it goes on from, and this attempt's.

    So lost steps do not count, and neither do pauses between attempts. Seconds are those of a clock that nobody sets.
    """
    hardware = f"{inputs.accelerator.num_processes} x {describe_device(inputs.accelerator.device)}"
    resumed = inputs.resumed
    before = {} if resumed is None or resumed.begins_fork else resumed.state["lineage"]
    return {
        "started_at": before.get("started_at") or attempt.started_at,
        "hours": round((before.get("hours") or 0.0) + seconds / 3600, 3),
        "hardware": tuple(dict.fromkeys([*before.get("hardware", ()), hardware])),
    }

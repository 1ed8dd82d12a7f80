"""What may change between the run that wrote a checkpoint and the one that resumes it."""

from pathlib import Path
from typing import Any

from trainer.core.errors import UserError

# What may change between the run that wrote a checkpoint and the one that resumes it: nothing of the samples,
# the model or the optimizer depends on these (attention and compile: the same batches, not the same bits).
CHANGEABLE_SECTIONS = {"memory", "checkpoint", "logging", "sampling", "publish"}
CHANGEABLE_KEYS = {
    "data.micro_batch_size",
    "data.num_workers",
    "data.prefetch_factor",
    "model.attention",
    "model.compile",
    "run.num_processes",
}
LENGTH_KEYS = {"schedule.epochs", "schedule.max_steps"}  # under a constant rate only


def fixed_values(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of all that must stay the same across a resume."""
    flat = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
    constant = flat["schedule.lr"] == "constant"
    return {
        key: value
        for key, value in flat.items()
        if key.partition(".")[0] not in CHANGEABLE_SECTIONS
        and key not in CHANGEABLE_KEYS
        and not (constant and key in LENGTH_KEYS)
    }


def check_resumable(checkpoint: Path, train_state: dict[str, Any], written: dict[str, Any], digest: str) -> None:
    """Refuse to resume under another config.

    ``written`` is the config as the user wrote it; ``digest`` is the SHA-256 of its resolved fixed values, which
    tells a changed environment variable without storing it.

    Raises:
        UserError: naming every changed key with both values.
    """
    before, now = fixed_values(train_state["config"]), fixed_values(written)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in changed)
        raise UserError(
            f"{checkpoint} was made with another config, and going on would not continue that run:\n{lines}\n"
            "Put these back, or choose another run.name"
        )
    if train_state["config_digest"] != digest:
        raise UserError(f"{checkpoint}: an environment variable in the config has another value than in that run")


def restore_scaler(scaler: Any, state: dict[str, Any] | None) -> None:
    """Put the loss scaler's numbers back."""
    if scaler is not None and state is not None:
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
        )

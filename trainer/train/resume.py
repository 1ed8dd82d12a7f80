"""From which checkpoint a run resumes, and what must be as it was: config, data, base, VAE and tokenizers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.fixed import find_interpolated, fixed_values
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, read_train_state, verify_checkpoint
from trainer.train.launch import Inputs
from trainer.train.run import run_path

# what a run reads is compared by hashes, so that where it lies is free
GUARDED = (
    ("data set (index fingerprint)", ("index_fingerprint",)),
    ("base model (SHA-256)", ("base", "sha256")),
    ("VAE (SHA-256)", ("vae_sha256",)),
    ("pair of tokenizers (SHA-256)", ("tokenizers_sha256",)),
)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes from."""

    folder: Path
    step: int
    state: dict[str, Any]


def find_resumed(inputs: Inputs) -> Resumed | None:
    """The checkpoint that ``checkpoint.resume`` names, checked against this config and these data; None to begin.

    Raises:
        UserError: when resuming would not continue that run, or would overwrite another.
    """
    choice, path = inputs.config.checkpoint.resume, run_path(inputs.config)
    newest = find_newest(path)
    if choice == "never" and newest is not None:
        raise UserError(f"{path} has checkpoints and checkpoint.resume is never; choose another run.name")
    chosen = newest if choice in ("auto", "never") else Path(choice)
    if chosen is None:
        return None
    state = read_train_state(chosen)
    if newest is not None and read_train_state(newest)["step"] > state["step"]:
        raise UserError(f"{path} has newer checkpoints than {chosen}; move them away, or choose another run.name")
    check_config(chosen, state, inputs.fixed)
    check_inputs(chosen, state, inputs.facts)
    if inputs.accelerator.is_main_process:
        verify_checkpoint(chosen)
    inputs.accelerator.wait_for_everyone()
    return Resumed(chosen, state["step"], state)


def check_config(checkpoint: Path, state: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Refuse another config; ``fixed`` is what ``describe_fixed`` says of the present one.

    A checkpoint of version 0.2.0 lists no fixed values: they are those of its config.

    Raises:
        UserError: naming every changed key with both values.
    """
    recorded = state.get("fixed", {"values": {}, "digest": fixed["digest"]})
    before, now = fixed_values(state["config"]) | recorded["values"], fixed["values"]
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        lines = "\n".join(f"  {key}: {before.get(key)!r} in the checkpoint, {now[key]!r} now" for key in changed)
        raise UserError(
            f"{checkpoint} was made with another config, and resuming would not continue that run:\n{lines}\n"
            "Put these back, or choose another run.name"
        )
    if recorded["digest"] != fixed["digest"]:
        raise UserError(
            f"{checkpoint}: an environment variable, or another key that the config refers to, has another value now "
            f"than in that run ({', '.join(find_interpolated(now))}). Put it back, or choose another run.name"
        )


def check_inputs(checkpoint: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse other data, another base, VAE or tokenizers; what an older checkpoint does not record is not compared.

    Raises:
        UserError: naming what is another one, with both hashes.
    """
    for what, path in GUARDED:
        before, now = pick(state, path), pick(facts, path)
        if before is not None and before != now:
            raise UserError(
                f"{checkpoint} was made with another {what}: {before} there, {now} now. "
                "Put the old one back, or choose another run.name"
            )


def pick(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The value under a path of keys; None where there is none."""
    for key in path:
        values = values.get(key, {})
    return values or None


def restore_scaler(scaler: Any, state: dict[str, Any] | None) -> None:
    """Put the loss scaler's numbers back."""
    if scaler is not None and state is not None:
        scaler.load_state_dict(
            {**scaler.state_dict(), "scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
        )

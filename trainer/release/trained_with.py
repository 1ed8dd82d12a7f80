"""Whether what an export is made of is still what its checkpoint was trained with: VAE, the base's word, the config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.base import Base, VaeWeights, read_predictions
from trainer.model.diffusion import Prediction
from trainer.model.latents import find_other_numbers


def check_vae(checkpoint: Path, state: Mapping[str, Any], vae: VaeWeights, named: str) -> None:
    """Refuse another VAE than the one that made the latents; ``named`` is what messages call it.

    Raises:
        UserError: when its weights or its numbers are others; version 0.2 did not record the numbers.
    """
    if vae.sha256 != state["vae_sha256"]:
        raise UserError(
            f"the VAE of {named} is not the one that made the latents of {checkpoint}: "
            f"SHA-256 {vae.sha256}, not {state['vae_sha256']}. Set model.vae to that one"
        )
    if differing := find_other_numbers(state.get("vae_numbers", {}), vae.scale):
        raise UserError(
            f"the VAE of {named} has other numbers in its config than when {checkpoint} was trained: {differing}. "
            "Put its config.json back"
        )


def check_base_prediction(base: Base, named: Mapping[str, Any]) -> None:
    """Compare what the base says that it predicts with what it said in training.

    A folder's hash is of its weights, and not of its scheduler's config. Version 0.2 did not record it.

    Raises:
        UserError: naming both values.
    """
    if (before := named.get("prediction")) is None:
        return
    then, now = Prediction(**before), next(iter(read_predictions(base).values()))
    if then != now:
        raise UserError(
            f"{base.reference} says that it predicts {now}, and said {then} when this checkpoint was trained from it: "
            "put its scheduler's config back"
        )


def check_diffusion(checkpoint: Path, state: Mapping[str, Any], config: Config) -> None:
    """Refuse to write into an export that the model predicts something else than it was trained to.

    Raises:
        UserError: where the run's config.yaml was changed after the checkpoint was written.
    """
    then, now = state["config"]["diffusion"], config.written["diffusion"]
    for name in ("prediction_type", "zero_terminal_snr"):
        if then.get(name) != now.get(name):
            raise UserError(
                f"{checkpoint} was trained with diffusion.{name} {then.get(name)}, and the run's config.yaml says "
                f"{now.get(name)}: put it back"
            )

"""What a model predicts, and the loss: noise schedule, noise, target, weighting. Noising and loss are in fp32.

DDPM with SDXL's scaled-linear schedule: recipe, section 6. What files say of a prediction is read and written here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, assert_never, get_args

import torch
from torch import Tensor

from trainer.config.schema import NUM_TIMESTEPS, DiffusionConfig, PredictionType
from trainer.core.errors import UserError

SCHEDULE: dict[str, Any] = {  # SDXL's, as a scheduler's config names it
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": NUM_TIMESTEPS,
    "trained_betas": None,
}  # fmt: skip
# diffusers' schedulers that have this schedule; the class of another is somebody's own, or predicts something else
SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
        "UniPCMultistep",
    )
}  # fmt: skip
ZTSNR_MARKER = "ztsnr"  # an empty tensor by which single files say that their schedule ends in pure noise
MODELSPEC_KEY = "modelspec.prediction_type"
SILENT = "without a word on it"  # where an SDXL file says nothing of what it predicts


class Spelling(NamedTuple):
    """How files and cards say that a model predicts something."""

    modelspec: tuple[str, ...]  # ModelSpec's word, and others that are found in its place
    marker: str | None  # the empty tensor of single files
    card: str


def spell(kind: PredictionType) -> Spelling:
    """The words for a prediction; a file without any of them predicts epsilon."""
    match kind:
        case "epsilon":
            return Spelling(("epsilon", "eps"), None, "the noise (epsilon)")
        case "v_prediction":
            return Spelling(("v", "v_prediction", "v-prediction", "vpred"), "v_pred", "v")
        case _:
            assert_never(kind)


PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
KINDS_BY_MARKER = {marker: kind for kind in PREDICTION_TYPES if (marker := spell(kind).marker)}
MARKERS = (*KINDS_BY_MARKER, ZTSNR_MARKER)
KINDS_BY_MODELSPEC = {word: kind for kind in PREDICTION_TYPES for word in spell(kind).modelspec}


@dataclass(frozen=True)
class Prediction:
    """What a model predicts, and from which noise schedule."""

    prediction_type: PredictionType = "epsilon"
    zero_terminal_snr: bool | None = False  # None where what was read does not say

    def __str__(self) -> str:
        return self.prediction_type + (" with zero terminal SNR" if self.zero_terminal_snr else "")

    def agrees(self, other: "Prediction") -> bool:
        """Whether both may be said of one model."""
        known = None not in (self.zero_terminal_snr, other.zero_terminal_snr)
        same = self.zero_terminal_snr == other.zero_terminal_snr or not known
        return self.prediction_type == other.prediction_type and same


def trained_prediction(config: DiffusionConfig) -> Prediction:
    """What a model trained under this config predicts."""
    return Prediction(config.prediction_type, config.zero_terminal_snr)


def scheduler_prediction(scheduler: Mapping[str, Any]) -> Prediction:
    """What the config of a diffusers scheduler says.

    Raises:
        UserError: for another noise schedule than SDXL's, or a prediction of which nothing is known here.
    """
    kind = str(scheduler.get("_class_name", "EulerDiscreteScheduler"))
    said = scheduler.get("prediction_type", "epsilon")
    if kind.startswith(("EDM", "FlowMatch")):
        what = "EDM" if kind.startswith("EDM") else "flow matching"
        raise UserError(f"its scheduler is {kind}: {what} predicts neither epsilon nor v of SDXL's schedule")
    if kind not in SCHEDULERS:
        raise UserError(f"its scheduler is {kind}, which diffusers has not for SDXL's schedule: EulerDiscreteScheduler "
                        "is SDXL's")  # fmt: skip
    if said not in PREDICTION_TYPES:
        known = " and ".join(PREDICTION_TYPES)
        raise UserError(f"its scheduler says prediction_type {said!r}: only {known} are known here")
    for name, own in SCHEDULE.items():
        if (value := scheduler.get(name, own)) != own:
            raise UserError(f"its scheduler says {name} {value}, SDXL's noise schedule has {own}")
    return Prediction(said, bool(scheduler.get("rescale_betas_zero_snr", False)))


def file_predictions(names: Collection[str], metadata: Mapping[str, str]) -> dict[str, Prediction]:
    """What a single file says, by where it says it, the strongest first: its marker tensors, ModelSpec's word.

    Raises:
        UserError: for a word of ModelSpec's that is neither epsilon nor v.
    """
    said: dict[str, Prediction] = {}
    if markers := [name for name in MARKERS if name in names]:
        kind = KINDS_BY_MARKER.get(markers[0], "epsilon")
        said[f"by {' and '.join(markers)}"] = Prediction(kind, ZTSNR_MARKER in names)
    if word := metadata.get(MODELSPEC_KEY):
        if word.lower() not in KINDS_BY_MODELSPEC:
            known = " and ".join(spell(kind).modelspec[0] for kind in PREDICTION_TYPES)
            raise UserError(f"its {MODELSPEC_KEY} is {word!r}: only {known} are known here")
        said[f"by {MODELSPEC_KEY}"] = Prediction(KINDS_BY_MODELSPEC[word.lower()], None)
    return said


def write_scheduler(scheduler: Mapping[str, Any], prediction: Prediction) -> dict[str, Any]:
    """A scheduler's config that says what the model predicts."""
    said = {**scheduler, "prediction_type": prediction.prediction_type}
    if prediction.zero_terminal_snr:  # sampling must begin at the last timestep (Lin et al. 2023)
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif said.get("rescale_betas_zero_snr"):
        said["rescale_betas_zero_snr"] = False
    return said


def marker_names(prediction: Prediction) -> list[str]:
    """The marker tensors by which other programs know what a single file predicts; none for epsilon."""
    own = spell(prediction.prediction_type).marker
    return [*([own] if own else []), *([ZTSNR_MARKER] if prediction.zero_terminal_snr else [])]


def check_prediction(reference: str, said: Mapping[str, Prediction], config: DiffusionConfig) -> Prediction:
    """Compare what a base says of itself with what is to be trained; returns what the base predicts.

    A base that predicts something else is trained only where ``convert_prediction`` says that this is meant.

    Raises:
        UserError: naming both values.
    """
    wanted = trained_prediction(config)
    others = {where: prediction for where, prediction in said.items() if not prediction.agrees(wanted)}
    if others and not config.convert_prediction:
        stated = "; ".join(f"{prediction} {where}" for where, prediction in said.items())
        raise UserError(
            f"diffusion: this config trains {wanted}, and the base {reference} predicts something else: {stated}. Set "
            "diffusion.prediction_type and diffusion.zero_terminal_snr to what the base predicts; or, to teach it "
            "another prediction, which takes far more steps, set diffusion.convert_prediction=true"
        )
    if config.convert_prediction and not others:
        raise UserError(f"diffusion.convert_prediction has no effect: {reference} predicts {wanted} already; remove it")
    return next(iter(said.values()))


def alphas_cumprod(zero_terminal_snr: bool = False) -> Tensor:
    """Cumulative alphas, fp32 (1000,), computed in fp32 as diffusers does: 0.99915 first, 0.0046601 last.

    ``zero_terminal_snr`` shifts and scales their roots so that the last is 0 and the first stays
    (Lin et al. 2023, arXiv 2305.08891, algorithm 1).
    """
    first_beta, last_beta = SCHEDULE["beta_start"], SCHEDULE["beta_end"]
    betas = torch.linspace(first_beta**0.5, last_beta**0.5, NUM_TIMESTEPS, dtype=torch.float32) ** 2
    cumulative = torch.cumprod(1.0 - betas, dim=0)
    if not zero_terminal_snr:
        return cumulative
    roots = cumulative.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2


def signal_to_noise(cumulative: Tensor) -> Tensor:
    """SNR of each timestep, alpha / (1 - alpha), fp32 (1000,)."""
    return cumulative / (1.0 - cumulative)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, cumulative: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z + sqrt(1 - a_t) noise, all fp32 (B, 4, H/8, W/8); timesteps (B,)."""
    alpha = cumulative[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise


def make_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, cumulative: Tensor, config: DiffusionConfig
) -> Tensor:
    """What the model is to predict, fp32 (B, 4, H/8, W/8): the noise, or the velocity (arXiv 2202.00512)."""
    match config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            alpha = cumulative[timesteps].view(-1, 1, 1, 1)
            return alpha.sqrt() * noise - (1.0 - alpha).sqrt() * latents
        case _:
            assert_never(config.prediction_type)


def loss_weights(timesteps: Tensor, cumulative: Tensor, config: DiffusionConfig) -> Tensor | None:
    """Min-SNR weights, fp32 (B,), or None without ``min_snr_gamma`` (Hang et al. 2023, arXiv 2303.09556)."""
    if config.min_snr_gamma is None:
        return None
    snr = signal_to_noise(cumulative)[timesteps]
    clipped = snr.clamp(max=config.min_snr_gamma)
    match config.prediction_type:
        case "epsilon":
            return clipped / snr
        case "v_prediction":
            return clipped / (snr + 1.0)
        case _:
            assert_never(config.prediction_type)


def sample_losses(model_pred: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared error of each sample over C, H, W, weighted; fp32 (B,)."""
    losses = (model_pred.float() - target).square().mean(dim=(1, 2, 3))
    return losses if weights is None else losses * weights

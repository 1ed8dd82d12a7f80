"""A whole training step beside one that is written with diffusers and transformers alone.

The step is the trainer's own, from the command's function to the files of its checkpoint. The other one reads the same
shard with the standard library and follows what diffusers' training script for SDXL does: the pipeline's tokenizers,
encoders and ``encode_prompt``, ``DDPMScheduler`` for noise, target and SNR, PyTorch's ``mse_loss``. Only what is drawn
(captions, timesteps, the normal numbers of the noise) is taken from here.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from torch import Tensor

from support.checkpoints import OPTIMIZER
from trainer.config.schema import Config
from trainer.core.rng import rng
from trainer.data.caption_draws import draw_sample_caption
from trainer.data.index import open_index
from trainer.data.loader import draw_sample_timestep
from trainer.data.plan import build_plan
from trainer.data.template import ready_rules
from trainer.train.loop import train

MakeConfig = Callable[..., Config]
V_PREDICTION = "diffusion.prediction_type=v_prediction"
ZERO_SNR = "diffusion.zero_terminal_snr=true"
CASES = {
    "epsilon": [],
    "noise offset": ["diffusion.noise_offset=0.0357"],
    "min-SNR": ["diffusion.min_snr_gamma=5.0"],
    "v": [V_PREDICTION],
    "v, min-SNR": [V_PREDICTION, "diffusion.min_snr_gamma=5.0"],
    "v, zero terminal SNR": [V_PREDICTION, ZERO_SNR],
    "v, zero terminal SNR, at the end": [V_PREDICTION, ZERO_SNR, "diffusion.min_timestep=997"],
}
SAMPLES = 4
SETTINGS = [
    f"data.global_batch_size={SAMPLES}", f"data.bucket_batch_size={SAMPLES}", f"data.micro_batch_size={SAMPLES}",
    "model.train_text_encoder_1=true", "model.train_text_encoder_2=true", "optim.text_encoder_1_lr=1e-3",
    "optim.text_encoder_2_lr=1e-3", "optim.max_grad_norm=1e9", "schedule.max_steps=1",
]  # fmt: skip


def copy_base(base: Path, folder: Path, words: list[str]) -> Path:
    """The base, whose scheduler says that it predicts what the case trains."""
    shutil.copytree(base, folder)
    file = folder / "scheduler/scheduler_config.json"
    says = json.loads(file.read_text()) | {
        "prediction_type": "v_prediction" if V_PREDICTION in words else "epsilon",
        "rescale_betas_zero_snr": ZERO_SNR in words,
    }
    file.write_text(json.dumps(says))
    return folder


def step_of_the_trainer(config: Config) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the run's only step: after one step Adam's first moment is (1 - beta_1) times them."""
    train(config)
    folder = Path(config.run.output_dir) / config.run.name
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert config.optim.betas is not None
    share, moment = 1 - config.optim.betas[0], ".exp_avg"
    state = load_file(checkpoint / OPTIMIZER)
    return line["train/loss"], {
        name.removesuffix(moment): tensor / share for name, tensor in state.items() if name.endswith(moment)
    }


def step_of_diffusers(config: Config) -> tuple[float, dict[str, Tensor]]:
    """The same with the libraries alone: loss, and the gradient of each parameter that has one."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(config.model.pretrained)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=config.diffusion.prediction_type, rescale_betas_zero_snr=config.diffusion.zero_terminal_snr,
    )  # fmt: skip
    samples = read_samples(config)
    raw_latents, noise = (torch.stack([sample[name] for sample in samples]) for name in ("raw_latents", "noise"))
    timesteps = torch.tensor([sample["timestep"] for sample in samples])
    latents = raw_latents * pipeline.vae.config.scaling_factor
    embeds, _, pooled, _ = pipeline.encode_prompt(
        [sample["caption"] for sample in samples], device="cpu", do_classifier_free_guidance=False
    )
    time_ids = torch.tensor([sample["time_ids"] for sample in samples], dtype=torch.float32)
    prediction = pipeline.unet(
        scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample  # fmt: skip
    velocity = config.diffusion.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    losses = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if (gamma := config.diffusion.min_snr_gamma) is not None:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
    loss = losses.mean()
    loss.backward()
    parts = {"unet": pipeline.unet, "text_encoder_1": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    return loss.item(), {
        f"{part}.{name}": parameter.grad
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def read_samples(config: Config) -> list[dict[str, Any]]:
    """The samples of step 0: what lies in the shard and the index, and what is drawn for them."""
    index = open_index(config.data.shards)
    rows, seed = index.table.to_pylist(), config.run.seed
    samples = []
    for planned in build_plan(index, seed, config.data).step_samples(0):
        row = rows[planned.row]
        with tarfile.open(Path(config.data.shards) / row["shard"]) as shard:
            member = shard.extractfile(f"{row['key']}.npy")
            assert member is not None
            raw_latents = np.load(io.BytesIO(member.read()), allow_pickle=False).astype(np.float32)
        generator = rng("noise", seed, planned.pass_, row["key"])
        noise = generator.standard_normal(raw_latents.shape, dtype=np.float32)
        channels = generator.standard_normal((4, 1, 1), dtype=np.float32)
        samples.append(
            {
                "raw_latents": torch.from_numpy(raw_latents),
                "noise": torch.from_numpy(noise) + config.diffusion.noise_offset * torch.from_numpy(channels),
                "timestep": draw_sample_timestep(row["key"], planned.pass_, seed, config.diffusion),
                "caption": draw_sample_caption(row, planned.pass_, seed, ready_rules(config.captions)),
                "time_ids": size_conditions(row),
            }
        )
    return samples


def size_conditions(row: Mapping[str, Any]) -> list[int]:
    """As diffusers' script: the original size, the crop's corner, the size trained at; rows before columns."""
    original, corner = ((row["original_height"], row["original_width"]), (row["crop_top"], row["crop_left"]))
    return [*original, *corner, row["bucket_height"], row["bucket_width"]]


def without_level(name: str) -> str:
    """Transformers 4 and checkpoints have one more level in the first encoder than transformers 5."""
    return name.replace(".text_model.", ".")


@pytest.mark.parametrize("case", CASES)
def test_loss_and_all_gradients_are_those_of_diffusers(
    make_config: MakeConfig, tiny_base: Path, tmp_path: Path, case: str
) -> None:
    base = copy_base(tiny_base, tmp_path / "base", CASES[case])
    config = make_config(*SETTINGS, *CASES[case], f"model.pretrained={base}")
    loss, gradients = step_of_the_trainer(config)
    expected_loss, expected = step_of_diffusers(config)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    ours = {without_level(name): gradient for name, gradient in gradients.items()}
    theirs = {without_level(name): gradient for name, gradient in expected.items()}
    assert ours.keys() == theirs.keys() and len(ours) == len(gradients) > 500
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    # a bias of attention's keys has no gradient but rounding: what is far smaller than the whole is measured by that
    errors = {
        name: (ours[name] - gradient).norm() / (gradient.norm() + 1e-4 * whole) for name, gradient in theirs.items()
    }
    assert max(errors.values()) < 1e-5, max(errors, key=lambda name: errors[name])

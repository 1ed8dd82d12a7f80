"""What a run asks of its base and VAE before its first step, and what its checkpoints record of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.checkpoints import accept_file
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model import base as base_module
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.train.loop import train

MakeConfig = Callable[..., Config]
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
V_WORDS = ["diffusion.prediction_type=v_prediction", "diffusion.zero_terminal_snr=true"]
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "the VAE": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def newest_state(config: Config) -> dict[str, Any]:
    newest = find_newest(Path(config.run.output_dir) / config.run.name)
    assert newest is not None
    return read_train_state(newest)


def test_a_v_prediction_base_is_not_trained_as_epsilon(
    make_config: MakeConfig, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(copy / "scheduler" / "scheduler_config.json", **V)
    with monkeypatch.context() as patch:  # before anything is loaded
        patch.setattr(base_module, "read_state", None)
        with pytest.raises(UserError, match=r"trains epsilon, and the base .* v_prediction with zero terminal SNR by"):
            train(make_config(f"model.pretrained={copy}", "schedule.max_steps=1"))
    as_it_is = make_config(f"model.pretrained={copy}", "schedule.max_steps=1", *V_WORDS)
    train(as_it_is)
    state = newest_state(as_it_is)
    said = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    assert state["base"]["prediction"] == state["lineage"]["base"]["prediction"] == said


def test_an_epsilon_base_becomes_another_only_where_it_is_meant(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"trains v_prediction with zero terminal SNR, and the base .* epsilon by"):
        train(make_config(*V_WORDS, "schedule.max_steps=1"))
    meant = make_config(*V_WORDS, "schedule.max_steps=1", "diffusion.convert_prediction=true")
    train(meant)
    assert newest_state(meant)["base"]["prediction"] == {"prediction_type": "epsilon", "zero_terminal_snr": False}


def test_a_run_does_not_resume_from_a_base_that_says_something_else_now(make_config: MakeConfig, copy: Path) -> None:
    """A folder's hash is of its weights: its scheduler's config is not among them."""
    train(make_config(f"model.pretrained={copy}", "schedule.max_steps=1"))
    change(copy / "scheduler" / "scheduler_config.json", **V)
    words = [f"model.pretrained={copy}", "schedule.max_steps=2"]
    with pytest.raises(UserError, match="trains epsilon, and the base"):
        train(make_config(*words))
    with pytest.raises(UserError, match="another prediction type of the base"):
        train(make_config(*words, "diffusion.convert_prediction=true"))


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_base_that_is_not_finite_is_named_before_any_sample(
    make_config: MakeConfig, copy: Path, part: str, value: float, word: str
) -> None:
    path = copy / WEIGHTS[part]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    words = [f"model.pretrained={copy}", "schedule.max_steps=1"]
    if part == "the VAE":
        words = [f"model.vae={copy / 'vae'}", "schedule.max_steps=1"]
    with pytest.raises(UserError, match=rf"{part}: {name} holds {word} \(1 of its"):
        train(make_config(*words))


def test_values_that_fp16_cannot_hold_are_named(make_config: MakeConfig, copy: Path) -> None:
    path = copy / WEIGHTS["text_encoder"]
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    name = next(name for name in sorted(tensors) if name.endswith("final_layer_norm.bias"))
    tensors[name] = tensors[name] + 70_000
    save_file(tensors, path, {"format": "pt"})
    words = ["precision.compute=bf16", "precision.frozen=fp16"]
    with pytest.raises(UserError, match=rf"in fp16: {name} holds infinity .*precision\.frozen"):
        train(make_config(f"model.pretrained={copy}", "schedule.max_steps=1", *words))


@pytest.mark.parametrize(("file", "part"), [("model", "unet."), ("optimizer", "unet.")])
def test_a_restored_checkpoint_that_is_not_finite_is_named(make_config: MakeConfig, file: str, part: str) -> None:
    config = make_config("schedule.max_steps=1")
    train(config)
    checkpoint = find_newest(Path(config.run.output_dir) / config.run.name)
    assert checkpoint is not None
    path = checkpoint / f"{file}-00001.safetensors"
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.startswith(part) and tensors[name].numel() > 1)
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata)
    accept_file(path)
    with pytest.raises(UserError, match=rf"{checkpoint.name}.*: {name} holds NaN .*the one before"):
        train(make_config("schedule.max_steps=2"))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"scaling_factor": 0.13025}, r"scaling_factor .* there, 0\.13025 now"),
        ({"shift_factor": 0.25}, r"shift_factor None there, 0\.25 now"),
        ({"latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}, r"latents_mean None there.*latents_std None there"),
    ],
)
def test_latents_are_not_trained_with_other_numbers_than_the_sets(
    make_config: MakeConfig, copy: Path, numbers: dict[str, Any], said: str
) -> None:
    change(copy / "vae" / "config.json", **numbers)
    with pytest.raises(UserError, match=f"the same weights but other numbers in its config: {said}"):
        train(make_config(f"model.pretrained={copy}", "schedule.max_steps=1"))


def test_checkpoints_record_the_vaes_numbers(make_config: MakeConfig, tiny_base: Path) -> None:
    config = make_config("schedule.max_steps=1")
    train(config)
    own = json.loads((tiny_base / "vae" / "config.json").read_text())["scaling_factor"]
    assert newest_state(config)["vae_numbers"] == {"scaling_factor": own, "shift_factor": None}


def test_an_fp8_base_is_noted(make_config: MakeConfig, copy: Path, notes: Callable[[], str]) -> None:
    path = copy / WEIGHTS["unet"]
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    train(make_config(f"model.pretrained={copy}", "schedule.max_steps=1"))
    assert "are stored in fp8" in notes()

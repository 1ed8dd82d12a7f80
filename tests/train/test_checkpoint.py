"""Checkpoints: bit by bit, whole or not at all, never a pickle, never over another."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from trainer.config.schema import OptimConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.model import checkpoint
from trainer.model.checkpoint import restore_checkpoint, verify_checkpoint
from trainer.train import resume, save
from trainer.train.optim import build_optimizer
from trainer.train.save import save_checkpoint

OPTIMIZERS = {
    "adamw": OptimConfig(unet_lr=1e-2, text_encoder_1_lr=1e-3),
    "adamw8bit": OptimConfig(name="adamw8bit", unet_lr=1e-2, text_encoder_1_lr=1e-3),
    "adafactor": OptimConfig(name="adafactor", unet_lr=1e-2, text_encoder_1_lr=1e-3, betas=None, eps=None),
}


class Parts(nn.Module):
    """The parts' names, with a matrix large enough for 8-bit state and a bias that is not."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.unet = nn.Linear(96, 96)
        self.text_encoder_1 = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text_encoder_1(torch.tanh(self.unet(x)))


def train_steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def small_checkpoint(folder: Path, step: int, **state: Any) -> Path:
    model = Parts(0)
    optimizer = build_optimizer(model, OPTIMIZERS["adamw"])
    train_steps(model, optimizer, 0, 1)
    return save_checkpoint(folder, model, optimizer, {"step": step, **state})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_a_checkpoint_gives_the_bits_of_going_on(tmp_path: Path, name: str) -> None:
    model = Parts(0)
    optimizer = build_optimizer(model, OPTIMIZERS[name])
    train_steps(model, optimizer, 0, 3)
    saved = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    train_steps(model, optimizer, 3, 6)
    straight = save_checkpoint(tmp_path, model, optimizer, {"step": 6})

    other = Parts(1)
    other_optimizer = build_optimizer(other, OPTIMIZERS[name])
    verify_checkpoint(saved)
    restore_checkpoint(saved, other, other_optimizer)
    train_steps(other, other_optimizer, 3, 6)
    resumed = save_checkpoint(tmp_path / "resumed", other, other_optimizer, {"step": 6})
    for file in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE):
        assert sha256_file(straight / file) == sha256_file(resumed / file)


def test_tensors_that_an_optimizer_shares_are_stored_once(tmp_path: Path) -> None:
    model = Parts(0)
    optimizer = build_optimizer(model, OPTIMIZERS["adamw8bit"])
    train_steps(model, optimizer, 0, 1)
    weights = {id(optimizer.state[p]["qmap1"]) for p in (model.unet.weight, model.text_encoder_1.weight)}
    assert len(weights) == 1
    saved = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    with safe_open(saved / checkpoint.OPTIMIZER_FILE, "pt") as file:
        names = list(file.keys())
    assert len([name for name in names if name.startswith("shared.")]) == 2  # qmap1 and qmap2
    assert not [name for name in names if "qmap" in name]
    restore_checkpoint(saved, model, optimizer)
    assert optimizer.state[model.unet.weight]["qmap1"] is optimizer.state[model.text_encoder_1.weight]["qmap1"]


def test_a_checkpoint_is_three_files_and_no_pickle(tmp_path: Path) -> None:
    saved = small_checkpoint(tmp_path, 7)
    assert saved.name == "step-00000007"
    assert sorted(file.name for file in saved.iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "train_state.json",
    ]  # fmt: skip
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == [
            "text_encoder_1.text_model.bias", "text_encoder_1.text_model.weight", "unet.bias", "unet.weight",
        ]  # fmt: skip
    with safe_open(saved / "optimizer.safetensors", "pt") as file:
        assert {"unet.weight.exp_avg", "unet.weight.exp_avg_sq", "unet.weight.step"} <= set(file.keys())


@pytest.mark.parametrize("file", [checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE])
def test_one_flipped_bit_is_noticed(tmp_path: Path, file: str) -> None:
    saved = small_checkpoint(tmp_path, 1)
    verify_checkpoint(saved)
    content = bytearray((saved / file).read_bytes())
    content[-3] ^= 1
    (saved / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        verify_checkpoint(saved)
    (saved / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        verify_checkpoint(saved)


def test_nothing_is_overwritten_and_unfinished_work_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved = small_checkpoint(checkpoints, 5)
    with pytest.raises(UserError, match="exists already"):
        small_checkpoint(checkpoints, 5)
    (checkpoints / ".tmp-step-00000009-abcd").mkdir()
    (checkpoints / "step-00000010").mkdir()  # no train_state.json: not ours, or not whole
    assert checkpoint.find_newest(tmp_path) == saved
    small_checkpoint(checkpoints, 6)
    assert not list(checkpoints.glob(".tmp-*"))
    assert (checkpoints / "step-00000010").exists()


def test_a_save_that_fails_leaves_the_newest_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved = small_checkpoint(checkpoints, 1)

    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(save, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        small_checkpoint(checkpoints, 2)
    assert checkpoint.list_checkpoints(checkpoints) == [saved]
    verify_checkpoint(saved)


def test_retention_keeps_the_last_few_and_the_milestones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        small_checkpoint(tmp_path, step)
    save.retain_checkpoints(tmp_path, keep_last=2, keep_every_steps=20)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000020", "step-00000040", "step-00000050",
    ]  # fmt: skip
    save.retain_checkpoints(tmp_path, keep_last=1, keep_every_steps=None)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000050"]


def test_a_checkpoint_set_aside_is_not_picked_up_again(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    older = small_checkpoint(checkpoints, 1)
    small_checkpoint(checkpoints, 2).rename(checkpoints / "step-00000002.bad")
    assert checkpoint.find_newest(tmp_path) == older
    small_checkpoint(checkpoints, 3)
    save.retain_checkpoints(checkpoints, keep_last=1, keep_every_steps=None)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002.bad", "step-00000003"]


def test_another_format_and_a_torn_state_are_refused(tmp_path: Path) -> None:
    saved = small_checkpoint(tmp_path, 1)
    state = json.loads((saved / "train_state.json").read_text())
    (saved / "train_state.json").write_text(json.dumps({**state, "format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_train_state(saved)
    (saved / "train_state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.read_train_state(saved)


def test_the_loss_scaler_comes_back() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for value in (1.0, float("inf"), 1.0):
        scaler.scale(weight * value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    state = save.scaler_state(scaler)
    assert state == {"scale": 512.0, "growth_tracker": 1}
    other = torch.amp.GradScaler("cpu")
    resume.restore_scaler(other, json.loads(json.dumps(state)))
    assert other.state_dict() == scaler.state_dict()
    assert save.scaler_state(None) is None

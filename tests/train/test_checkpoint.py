"""Checkpoints: bit by bit, whole or not at all, never a pickle, never over another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from support.checkpoints import MODEL, OPTIMIZER, change_record, flip_bit, save_checkpoint
from support.paths import REPOSITORY
from trainer.config.schema import OptimConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.model import checkpoint
from trainer.model.checkpoint import DamagedCheckpoint, read_train_state, seal, verify_checkpoint
from trainer.model.restore import open_weights, restore_checkpoint
from trainer.model.sdxl import trained_parameters
from trainer.model.weights_file import write_tensors
from trainer.train import resume, save
from trainer.train.optim import build_optimizer

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
    for file in (MODEL, OPTIMIZER):
        assert sha256_file(straight / file) == sha256_file(resumed / file)


def test_tensors_that_an_optimizer_shares_are_stored_once(tmp_path: Path) -> None:
    model = Parts(0)
    optimizer = build_optimizer(model, OPTIMIZERS["adamw8bit"])
    train_steps(model, optimizer, 0, 1)
    weights = {id(optimizer.state[p]["qmap1"]) for p in (model.unet.weight, model.text_encoder_1.weight)}
    assert len(weights) == 1
    saved = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    with safe_open(saved / OPTIMIZER, "pt") as file:
        names = list(file.keys())
    assert len([name for name in names if name.startswith("shared.")]) == 2  # qmap1 and qmap2
    assert not [name for name in names if "qmap" in name]
    restore_checkpoint(saved, model, optimizer)
    assert optimizer.state[model.unet.weight]["qmap1"] is optimizer.state[model.text_encoder_1.weight]["qmap1"]


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    saved = small_checkpoint(tmp_path, 7)
    assert saved.name == "step-00000007"
    assert sorted(file.name for file in saved.iterdir()) == [
        "checkpoint.json", "model-00001.safetensors", "optimizer-00001.safetensors",
    ]  # fmt: skip
    with safe_open(saved / MODEL, "pt") as file:
        assert sorted(file.keys()) == [
            "text_encoder_1.text_model.bias", "text_encoder_1.text_model.weight", "unet.bias", "unet.weight",
        ]  # fmt: skip
    with safe_open(saved / OPTIMIZER, "pt") as file:
        assert {"unet.weight.exp_avg", "unet.weight.exp_avg_sq", "unet.weight.step"} <= set(file.keys())


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_one_flipped_bit_is_noticed(tmp_path: Path, file: str) -> None:
    saved = small_checkpoint(tmp_path, 1)
    verify_checkpoint(saved)
    flip_bit(saved / file, -3)
    with pytest.raises(UserError, match=f"{file} is damaged"):
        verify_checkpoint(saved)
    (saved / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        verify_checkpoint(saved)


def flips(size: int, number: int) -> list[tuple[int, int]]:
    """So many bits of a file, spread over all of it, as (byte, bit)."""
    rng = np.random.default_rng(0)
    return [(int(rng.integers(size)), int(rng.integers(8))) for _ in range(number)]


def test_no_flipped_bit_of_the_record_is_accepted(tmp_path: Path) -> None:
    """All of a small one's bits: digits, spaces, names, hashes, the digest itself."""
    saved = small_checkpoint(tmp_path, 8, lineage={"hours": 1e-7, "name": "ä 1E5"}, config={"x": [1.5, None, True]})
    content, refused = (saved / "checkpoint.json").read_bytes(), 0
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(DamagedCheckpoint):
                checkpoint.unseal(saved / "checkpoint.json", bytes(flipped))
            refused += 1
    assert refused == 8 * len(content) > 3000
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint\.json is damaged: it is not what its digest says"):
        (saved / "checkpoint.json").write_bytes(content + b"\n")
        read_train_state(saved)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_no_flipped_bit_of_the_tensors_is_accepted(tmp_path: Path, file: str) -> None:
    saved = small_checkpoint(tmp_path, 8)
    for place, bit in flips((saved / file).stat().st_size, 30):
        flip_bit(saved / file, place, bit)
        with pytest.raises(DamagedCheckpoint, match=file):
            verify_checkpoint(saved)
        flip_bit(saved / file, place, bit)
    verify_checkpoint(saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {}}, "it lists the files without model-00001"), ({"files": None}, "without model-00001"),
        ({"files": {MODEL: {"sha256": "", "size": 1}}}, "without optimizer-00001"),
        ({"files": {MODEL: {}, OPTIMIZER: {}, "../x": {}, "y": {}}}, "without model-00002.* and with "),
        ({"step": 9}, "says step 9, named step-00000008"), ({"name": "step-00000009"}, "named step-00000009"),
        ({"step": "8"}, "says step 8"), ({"step": None}, "says step None"),
    ],
)  # fmt: skip
def test_a_record_that_disagrees_with_its_folder_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    saved = small_checkpoint(tmp_path, 8)
    change_record(saved, **changes)
    with pytest.raises(DamagedCheckpoint, match=said):
        read_train_state(saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"files": {}}, "without model.safetensors"), ({"step": 9}, "says step 9"), ({"step": None}, "says step None")],
)
def test_a_checkpoint_of_version_0_2_0_lists_its_files_and_its_step(tmp_path: Path, changes: Any, said: str) -> None:
    old = Path(
        shutil.copytree(
            REPOSITORY / "tests/data/v0_2_0/runs/tiny/checkpoints/step-00000003", tmp_path / "step-00000003"
        )
    )
    verify_checkpoint(old)
    change_record(old, **changes)
    with pytest.raises(DamagedCheckpoint, match=said):
        read_train_state(old)


def test_a_record_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    saved, other = small_checkpoint(tmp_path, 8), small_checkpoint(tmp_path, 9)
    (saved / "checkpoint.json").write_bytes((other / "checkpoint.json").read_bytes())
    with pytest.raises(DamagedCheckpoint, match="another checkpoint's: it says step 9, named step-00000009"):
        verify_checkpoint(saved)
    assert read_train_state(other.rename(tmp_path / "kept"))["step"] == 9  # under a name of one's own it is whole
    content = json.loads((tmp_path / "kept/checkpoint.json").read_text())
    del content["files"], content["digest"]
    (tmp_path / "kept/checkpoint.json").write_bytes(seal(content))
    with pytest.raises(DamagedCheckpoint, match="it lists the files without model-00001"):
        read_train_state(tmp_path / "kept")


def test_files_cut_off_are_seen_without_reading_them(tmp_path: Path) -> None:
    saved = small_checkpoint(tmp_path, 8)
    with (saved / MODEL).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DamagedCheckpoint, match=r"model-00001\.safetensors is damaged: it has 100 bytes, not "):
        checkpoint.check_sizes(saved, read_train_state(saved))


def test_a_text_that_somebody_changed_is_sealed_anew(tmp_path: Path) -> None:
    saved = small_checkpoint(tmp_path, 8, note="mine")
    file = saved / "checkpoint.json"
    file.write_text(file.read_text().replace("mine", "ours"))
    with pytest.raises(DamagedCheckpoint):
        read_train_state(saved)
    checkpoint.seal_again(saved)
    assert read_train_state(saved)["note"] == "ours"
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be sealed"):
        checkpoint.seal_again(saved)


def test_tensors_are_divided_by_names_and_shapes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "PIECE_BYTES", 4 * 96 * 96 + 4 * 96)  # the first layer
    model = Parts(0)
    names = [list(piece) for piece in save.divide(trained_parameters(model))]
    assert names == [
        ["unet.weight", "unet.bias"],
        ["text_encoder_1.text_model.weight", "text_encoder_1.text_model.bias"],
    ]
    monkeypatch.setattr(save, "PIECE_BYTES", 1)  # whatever is larger has a file of its own
    assert [len(piece) for piece in save.divide(trained_parameters(model))] == [1] * 4
    optimizer = build_optimizer(model, OPTIMIZERS["adamw8bit"])
    train_steps(model, optimizer, 0, 2)
    saved = save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    assert sorted(read_train_state(saved)["files"]) == [f"{kind}-0000{n}.safetensors" for kind in ("model", "optimizer")
                                                        for n in (1, 2, 3, 4)]  # fmt: skip
    other = Parts(1)
    other_optimizer = build_optimizer(other, OPTIMIZERS["adamw8bit"])
    restore_checkpoint(saved, other, other_optimizer)
    weights = open_weights(saved)
    assert all(torch.equal(weights[name], value) for name, value in trained_parameters(model).items())
    again = save_checkpoint(tmp_path / "again", other, other_optimizer, {"step": 2})
    assert read_train_state(again)["files"] == read_train_state(saved)["files"]


def test_files_are_what_the_library_reads(tmp_path: Path) -> None:
    """Of every dtype, scalars and empty tensors too; and what is written is hashed as it is written."""
    tensors = {
        "a": torch.randn(3, 5), "b": torch.tensor(7.0), "c": torch.zeros(0, 4), "d": torch.arange(6).to(torch.uint8),
        "e": torch.randn(2, 3).bfloat16(), "f": torch.randn(4, 4).t(), "g": torch.tensor([1, -2], dtype=torch.int64),
        "h": torch.randn(3).half(), "i": torch.tensor([True, False]), "j": torch.randn(2, dtype=torch.float64),
        "k": torch.tensor([-3], dtype=torch.int16), "l": torch.tensor([5], dtype=torch.int32),
        "m": torch.tensor([-1], dtype=torch.int8),
    }  # fmt: skip
    digest, size = write_tensors(tmp_path / "x.safetensors", tensors, {"state": "y"})
    assert (digest, size) == (sha256_file(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").stat().st_size)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"state": "y"}


def test_a_folder_in_the_way_that_is_not_whole_is_set_aside(tmp_path: Path, notes: Callable[[], str]) -> None:
    for number in (1, 2):
        (tmp_path / "step-00000008").mkdir()
        (tmp_path / "step-00000008" / "mine").write_text(str(number))
        saved = small_checkpoint(tmp_path, 8)
        verify_checkpoint(saved)
        assert "is in the way of one" in notes()
        saved.rename(tmp_path / f"kept-{number}")
    assert (tmp_path / "step-00000008.incomplete/mine").read_text() == "1"
    assert (tmp_path / "step-00000008.incomplete-2/mine").read_text() == "2"
    (tmp_path / "step-00000008").write_text("a file")
    verify_checkpoint(small_checkpoint(tmp_path, 8))
    assert (tmp_path / "step-00000008.incomplete-3").read_text() == "a file"


def test_nothing_is_overwritten_and_unfinished_work_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved = small_checkpoint(checkpoints, 5)
    with pytest.raises(UserError, match="exists already"):
        small_checkpoint(checkpoints, 5)
    (checkpoints / ".tmp-step-00000009-abcd").mkdir()
    (checkpoints / "step-00000010").mkdir()  # no checkpoint.json: not ours, or not whole
    assert checkpoint.find_newest(tmp_path) == saved
    small_checkpoint(checkpoints, 6)
    assert not list(checkpoints.glob(".tmp-*"))
    assert (checkpoints / "step-00000010").exists()


def test_a_save_that_fails_leaves_the_newest_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "checkpoints"
    saved = small_checkpoint(checkpoints, 1)

    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(save, "write_bytes", full_disk)
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
    change_record(saved, format_version=99)
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_train_state(saved)
    (saved / "checkpoint.json").write_text('{"step": 1')
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

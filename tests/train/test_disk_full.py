"""Checkpoints on a full disk: a message, no orphan, the former ones untouched; and a warning before the first step."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.checkpoints import save_checkpoint
from trainer.config.schema import Config, OptimConfig
from trainer.core.errors import UserError
from trainer.core.layout import checkpoint_name
from trainer.model.checkpoint import list_checkpoints, measure_checkpoint, step_of, verify_checkpoint
from trainer.train import save
from trainer.train.loop import train
from trainer.train.metrics import MetricsFile
from trainer.train.optim import build_optimizer
from trainer.train.save import (
    OVERHEAD,
    count_more_checkpoints,
    estimate_size,
    retain_checkpoints,
)

OPTIMIZERS = {
    "adamw": OptimConfig(unet_lr=1e-2),
    "adamw8bit": OptimConfig(name="adamw8bit", unet_lr=1e-2),
    "adafactor": OptimConfig(name="adafactor", unet_lr=1e-2, betas=None, eps=None),
}


class Parts(nn.Module):
    """Matrices and convolutions, large and small, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Sequential(nn.Conv2d(8, 96, 3), nn.Flatten(), nn.Linear(96 * 4, 400))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unet(x)


def stepped(name: str = "adamw") -> tuple[nn.Module, Any]:
    model = Parts()
    optimizer = build_optimizer(model, OPTIMIZERS[name])
    model(torch.ones(1, 8, 4, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_a_save_onto_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()
    before = save_checkpoint(tmp_path, model, optimizer, {"step": 1})

    def fill_up(path: Path, *_: Any) -> None:
        path.write_bytes(b"half of the weights")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "write_tensors", fill_up)
    with pytest.raises(UserError, match=r"step-00000002 could not be written: the disk is full\. It needs 3\.9 MB"):
        save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify_checkpoint(before)


def test_a_save_that_cannot_fit_writes_nothing_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()
    set_free(monkeypatch, 1_000_000)
    monkeypatch.setattr(save, "write_tensors", lambda *_, **__: pytest.fail("it was written"))
    with pytest.raises(UserError, match=r"It needs 3\.9 MB, 1\.0 MB are free in"):
        save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    assert list(tmp_path.iterdir()) == []


def test_any_error_leaves_no_orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = stepped()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_size_before_the_first_step_is_that_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    model, optimizer = stepped(name)
    real = measure_checkpoint(save_checkpoint(tmp_path, model, optimizer, {"step": 1}))
    assert estimate_size(model, name) - OVERHEAD == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize(
    ("existing", "every", "last", "keep_last", "keep_every"),
    [([], 2, 6, 2, None), ([], 10, 95, 3, 20), ([10, 20], 10, 60, 2, None), ([10, 20, 30, 40], 10, 60, 1, 20),
     ([10, 20, 30, 40, 50, 60], 10, 70, 1, None), ([], 10, 10, 5, None), ([20, 40], 10, 47, 1, 40)],
)  # fmt: skip
def test_the_checkpoints_that_will_lie_there_at_once_are_counted(
    tmp_path: Path, existing: list[int], every: int, last: int, keep_last: int, keep_every: int | None
) -> None:
    def make(step: int) -> None:
        (tmp_path / checkpoint_name(step)).mkdir()
        (tmp_path / checkpoint_name(step) / "train_state.json").write_text("{}")

    for step in existing:
        make(step)
    first = max(existing, default=0)
    coming = sorted({*range(first + every - first % every, last + 1, every), last})
    most = 0
    for step in coming:
        make(step)
        most = max(most, len(list_checkpoints(tmp_path)))
        retain_checkpoints(tmp_path, keep_last, keep_every)
    assert step_of(list_checkpoints(tmp_path)[-1]) == last
    assert count_more_checkpoints(existing, coming, keep_last, keep_every) == most - len(existing)


def test_a_run_warns_before_its_first_step(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    words = ["schedule.max_steps=6", "checkpoint.every_steps=2"]
    train(make_config("schedule.max_steps=2", "run.name=measured"))
    size = measure_checkpoint(Path(make_config().run.output_dir) / "measured/checkpoints/step-00000002")
    set_free(monkeypatch, 3 * size + 3 * OVERHEAD)
    train(make_config(*words, "run.name=fits"))
    assert "more checkpoints will lie" not in notes()
    set_free(monkeypatch, 3 * size - 1)
    train(make_config(*words, "run.name=tight"))
    assert "warning: 3 more checkpoints will lie in" in notes()


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written: the disk is full"):
        MetricsFile(tmp_path / "metrics.jsonl", 1).write(1, {"train/loss": 1.0})

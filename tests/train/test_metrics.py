"""Metrics: the file, the trackers' settings, FLOPs; and the stop when loss scaling finds no scale."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.metrics import read_metrics
from trainer.config.schema import Config, LoggingConfig
from trainer.core.errors import UserError
from trainer.data.plan import Plan
from trainer.model.base import Base, find_base
from trainer.sample.sampling import make_grid
from trainer.train import metrics
from trainer.train.beginning import Resumed
from trainer.train.launch import build_accelerator
from trainer.train.metrics import MetricsFile, find_peak_flops, tracker_settings, training_flops
from trainer.train.progress import Progress, flatten_values
from trainer.train.step import StepResult


def test_a_step_may_have_several_lines_of_one_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 1)
    first.write(4, {"train/loss": 1.0})
    first.write(4, {"other/loss": 2.0})
    first.file.close()
    line = read_metrics(path)[4]
    assert (line["train/loss"], line["other/loss"]) == (1.0, 2.0)
    second = MetricsFile(path, 2)
    second.write(4, {"train/loss": 3.0})
    second.file.close()
    line = read_metrics(path)[4]
    assert line["train/loss"] == 3.0 and "other/loss" not in line


def test_the_last_attempt_wins_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 1)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": float(step)})
    first.file.close()
    with path.open("a") as file:
        file.write('{"step": 4, "att')  # killed within a line
    second = MetricsFile(path, 2)
    second.write(3, {"train/loss": 30.0, "perf/mfu": None})
    second.file.close()
    lines = read_metrics(path)
    assert {step: line["train/loss"] for step, line in lines.items()} == {1: 1.0, 2: 2.0, 3: 30.0}
    assert lines[3]["attempt"] == 2 and lines[3]["perf/mfu"] is None
    assert all(json.loads(text) for text in path.read_text().splitlines() if '"att' not in text or text.endswith("}"))


def test_wandb_is_offline_unless_a_key_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = tracker_settings(["wandb", "tensorboard"], "abc", "run", tmp_path, 4)
    assert settings["wandb"] | {"id": "abc", "resume": "allow", "mode": "offline"} == settings["wandb"]
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert "mode" not in tracker_settings(["wandb"], "abc", "run", tmp_path, 0)["wandb"]
    assert settings["tensorboard"] == {"purge_step": 5}  # four steps are made: the fifth is the first to come


def test_flops_of_full_size_sdxl(tmp_path: Path) -> None:
    """About 6 TFLOP of convolutions and linear layers (3 T multiply-adds, as often quoted) a forward at 1024 x 1024.

    Attention adds 0.75: 4 n^2 d for 10 layers of n = 4096, d = 640 and 60 of n = 1024, d = 1280. Text is the rest.
    """
    file = tmp_path / "empty.safetensors"

    save_file({}, file)  # a single file without configs of its own is SDXL
    base = Base("sdxl", file, None)
    unet_only = {"unet": True, "text_encoder_1": False, "text_encoder_2": False}
    stage2 = training_flops(base, 1024, 1024, 3, unet_only)
    stage1 = training_flops(base, 1024, 1024, 3, dict.fromkeys(unet_only, True))
    assert 3 * 6.6e12 < stage2 < 3 * 7.3e12
    assert stage2 < stage1 < 1.1 * stage2


def test_flops_of_encoders_alone_count_the_way_through_the_unet(tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    parts = {"unet": False, "text_encoder_1": True, "text_encoder_2": True}
    encoders = training_flops(base, 64, 64, 1, parts)
    everything = training_flops(base, 64, 64, 1, parts | {"unet": True})
    assert everything / 2 < encoders < everything


@pytest.mark.parametrize(
    "name",
    ["NVIDIA RTX A1000", "NVIDIA RTX A1000 6GB Laptop GPU", "NVIDIA A10", "NVIDIA A100X", "NVIDIA GeForce RTX 4090 D",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H20", "NVIDIA L40",
     "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "GRID A100D-40C", "NVIDIA GH200 96GB HBM3"],
)  # fmt: skip
def test_a_name_that_holds_anothers_has_no_peak(name: str) -> None:
    assert find_peak_flops(name, "bf16") is None


def test_peaks_are_only_given_where_they_hold() -> None:
    assert find_peak_flops("A100-SXM4-40GB", "fp16") == 312e12  # as older drivers call it
    assert find_peak_flops("NVIDIA A100 80GB PCIe", "fp16") == 312e12
    assert find_peak_flops("NVIDIA GeForce RTX 4090", "fp16") == 165e12
    assert find_peak_flops("NVIDIA H200", "bf16") == 989e12
    assert find_peak_flops("NVIDIA A100-SXM4-80GB", "fp16") == 312e12
    assert find_peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert find_peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert find_peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert find_peak_flops("cpu", "bf16") is None


PLAN = Plan(np.array([[64, 64]] * 8), seed=1, bucket_batch_size=4, global_batch_size=4)


def result(step: int, skipped: bool, **changes: Any) -> StepResult:
    one = torch.tensor(1.0)
    fields: dict[str, Any] = {
        "step": step, "loss": one, "grad_norm": one, "bad": False,
        "losses": one[None], "keys": ["k"], "loss_scale": 2.0, "skipped": skipped, "launched": float(step),
    }  # fmt: skip
    return StepResult(**fields | changes)


@pytest.fixture
def progress(make_config: Callable[..., Config], tmp_path: Path) -> Progress:
    config = make_config(
        f"run.output_dir={tmp_path.parent}", f"run.name={tmp_path.name}", "precision.max_skipped_steps=3",
        "logging.every_steps=1",
    )  # fmt: skip
    resumed = Resumed(tmp_path, {"step": 0, "skipped_steps": {"all": 10, "in_a_row": 1}}, None)
    inputs = SimpleNamespace(
        config=config, accelerator=build_accelerator(config), resumed=resumed,
        data=SimpleNamespace(plan=PLAN, substitutes=None), first=0, last=99, fork=None,
    )  # fmt: skip
    black_box = SimpleNamespace(note=lambda result: None)
    return Progress(inputs, 1, "", black_box=black_box, flops_per_sample=2.0, peak_flops=8.0)  # type: ignore[arg-type]


def test_skips_are_counted_shown_and_stop_the_run_when_there_are_too_many(progress: Progress, tmp_path: Path) -> None:
    progress.read(result(0, True))
    progress.read(result(1, False))
    assert progress.skipped == {"all": 11, "in_a_row": 0}
    for step in (2, 3, 4):
        progress.read(result(step, True))
    assert read_metrics(tmp_path / "metrics.jsonl")[5]["train/skipped_steps"] == 14
    with pytest.raises(UserError, match=r"step 5: loss scaling has skipped 4 steps in a row, the scale is 2"):
        progress.read(result(5, True))


def test_speed_and_utilisation(progress: Progress, tmp_path: Path) -> None:
    progress.window.start = 0.0
    progress.read(result(0, False, launched=2.0))
    line = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert line["perf/images_per_second"] == 2.0  # 4 images in 2 seconds
    assert line["perf/mfu"] == 0.5  # 2 images/s x 2 FLOP of 8 FLOP/s


def test_a_skipped_steps_infinite_norm_is_null(progress: Progress, tmp_path: Path) -> None:
    progress.read(result(0, True, grad_norm=torch.tensor(math.inf)))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["train/grad_norm"] is None
    with pytest.raises(ValueError, match="JSON"):  # whatever else should come there
        MetricsFile(tmp_path / "others.jsonl", 1).write(1, {"train/loss": math.nan})


def test_the_loss_is_the_mean_over_the_window(progress: Progress, tmp_path: Path) -> None:
    progress.config = dataclasses.replace(progress.config, logging=LoggingConfig(every_steps=3))
    for step, loss in enumerate((1.0, 2.0, 6.0, 4.0, 4.0, 1.0)):
        progress.read(result(step, False, loss=torch.tensor(loss)))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert {step: (line["train/loss"], line["train/loss_last"]) for step, line in lines.items()} == {
        3: (3.0, 6.0), 6: (3.0, 1.0),
    }  # fmt: skip
    # 8 images in a bucket of units of 4: a step is half an epoch
    assert lines[3]["progress/epoch"] == 1.5 and lines[6]["progress/epoch"] == 3.0
    assert lines[3]["perf/memory_gb"] > 0.01  # of this process


def test_speed_leaves_out_what_is_done_between_steps(
    progress: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes a second; a checkpoint of 5 and samples of 3 lie between steps 0 and 1, samples between 1 and 2.

    Step 1 is read after step 2 was launched, as it is where nothing is saved.
    """
    clock = [1.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    progress.window.start = 0.0
    progress.read(result(0, False, launched=1.0))
    for what, seconds in (("checkpoint", 5.0), ("sample", 3.0)):
        with progress.timed(what):
            clock[0] += seconds
    clock[0] = 10.0
    with progress.timed("sample"):
        clock[0] += 2.0
    progress.read(result(1, False, launched=10.0))
    progress.read(result(2, False, launched=13.0))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [lines[step]["perf/images_per_second"] for step in (1, 2, 3)] == [4.0, 4.0, 4.0]
    assert [lines[step]["perf/mfu"] for step in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert [lines[step]["perf/checkpoint_seconds"] for step in (1, 2, 3)] == [None, 5.0, None]
    assert [lines[step]["perf/sample_seconds"] for step in (1, 2, 3)] == [None, 3.0, 2.0]


def test_finite_losses_with_broken_gradients_say_so(progress: Progress) -> None:
    with pytest.raises(UserError, match="step 7: all losses are finite, but the gradients are not finite"):
        progress.read(result(7, False, bad=True))


def test_flattened_configs_are_plain() -> None:
    assert flatten_values({"a": {"b": 1, "c": [1, 2], "d": None}}) == {"a.b": 1, "a.c": "[1, 2]", "a.d": "None"}


def test_a_grid_has_room_for_every_image() -> None:
    images = [
        Image.new("RGB", (32, 64), "red"),
        Image.new("RGB", (64, 32), "blue"),
        Image.new("RGB", (64, 64), "green"),
    ]
    grid = make_grid(images, ["a", "b " * 80, "c"], columns=2)
    colours = {colour for _, colour in grid.getcolors(maxcolors=10**6) or []}
    assert {(255, 0, 0), (0, 0, 255), (0, 128, 0)} <= colours
    assert grid.width >= 2 * 64 and grid.height >= 2 * 64

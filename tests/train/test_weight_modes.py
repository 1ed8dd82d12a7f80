"""Runs with 16-bit weights: checkpoints hold fp32, resume is exact, a fork changes modes, samples and exports work."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from support.checkpoints import MODEL, OPTIMIZER
from support.metrics import read_metrics
from support.paths import REPOSITORY
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.lineage_rows import list_stages, stage_rows
from trainer.release.export import export
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
BF16 = ["precision.compute=bf16", "precision.frozen=bf16"]
MODES = {
    "master": [*BF16, "precision.weights=master"],
    "master-bf16": [*BF16, "precision.weights=master", "precision.gradients=bf16"],
    "stochastic": [*BF16, "precision.weights=stochastic", "precision.gradients=bf16"],
}
EVERY = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]


def go(config: Config) -> Path:
    """Train; the newest checkpoint."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the modes of a test differ in what Accelerate casts
    train(config)
    newest = find_newest(run_path(config))
    assert newest is not None
    return newest


def model_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / MODEL)


def files_of(checkpoint: Path) -> dict[str, Any]:
    files: dict[str, Any] = read_train_state(checkpoint)["files"]
    return files


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_bits_of_one_that_went_on(make_config: MakeConfig, mode: str) -> None:
    straight = go(make_config(*MODES[mode], *EVERY, "run.name=straight", "schedule.max_steps=3"))
    go(make_config(*MODES[mode], *EVERY, "run.name=resumed", "schedule.max_steps=2"))
    resumed = go(make_config(*MODES[mode], *EVERY, "run.name=resumed", "schedule.max_steps=3"))
    assert files_of(resumed) == files_of(straight)
    tensors = model_of(straight)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    narrow = all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
    assert narrow is (mode == "stochastic")  # masters are more than their weights
    states = load_file(straight / OPTIMIZER)
    assert {tensor.dtype for tensor in states.values()} == {torch.float32}


def test_a_mode_changes_by_a_fork_only(make_config: MakeConfig) -> None:
    """Which converts: fp32 weights go over exactly where the new mode can hold them."""
    parent = go(make_config(*BF16, *EVERY, "run.name=parent", "schedule.max_steps=2"))
    for mode in ("master", "stochastic"):
        with pytest.raises(UserError, match=f"precision.weights: 'autocast' in the checkpoint, '{mode}' now"):
            go(make_config(*MODES[mode], *EVERY, "run.name=parent", "schedule.max_steps=3"))
    with pytest.raises(UserError, match=r"precision\.gradients: 'fp32' in the checkpoint, 'bf16' now"):
        go(make_config(*MODES["master"], *EVERY, "run.name=first", "schedule.max_steps=1"))
        go(make_config(*MODES["master-bf16"], *EVERY, "run.name=first", "schedule.max_steps=2"))
    farthest: dict[str, float] = {}
    for mode in ("master", "stochastic"):  # a rate of almost nothing shows what the weights began with
        words = [*MODES[mode], f"run.name={mode}", f"checkpoint.fork={parent}", "schedule.max_steps=3"]
        fork = go(make_config(*words, "optim.unet_lr=1e-30", "optim.weight_decay=0"))
        before, after = model_of(parent), model_of(fork)
        farthest[mode] = max(
            float(((after[name] - before[name]).abs() - before[name].abs() * 2**-8).max()) for name in before
        )
        differing = sum(not torch.equal(after[name], before[name]) for name in before)
        assert differing == 0 if mode == "master" else differing > 10
        row = stage_rows(list_stages(read_train_state(fork)["lineage"])[-1])["arithmetic"]
        assert (
            row
            == {
                "master": "bf16, trained weights in 16 bits with fp32 masters",
                "stochastic": "bf16, trained weights in 16 bits, rounded stochastically",
            }[mode]
        )
    assert farthest["stochastic"] <= 0  # the nearest bf16
    master = run_path(make_config("run.name=master"))
    back = go(make_config(*BF16, "run.name=back", f"checkpoint.fork={master}", "schedule.max_steps=4"))
    assert read_train_state(back)["step"] == 4


def test_samples_and_exports(make_config: MakeConfig) -> None:
    words = ["sampling.every_steps=1", "sampling.prompts=[a girl]", "sampling.num_inference_steps=1"]
    for mode in ("master", "stochastic"):
        checkpoint = go(make_config(*MODES[mode], *words, f"run.name={mode}", "schedule.max_steps=1"))
        run = checkpoint.parent.parent
        assert list((run / "samples").glob("*.png"))
        AcceleratorState._reset_state(reset_partial_state=True)
        written = export(run, dtype="fp32")
        tensors = load_file(next(path for path in written if path.suffix == ".safetensors"))
        name = "model.diffusion_model.input_blocks.0.0.weight"
        assert torch.equal(tensors[name], model_of(checkpoint)["unet.conv_in.weight"])


def test_encoders_and_other_optimizers_train_too(make_config: MakeConfig) -> None:
    encoders = [f"model.train_text_encoder_{n}=true" for n in (1, 2)] + [
        f"optim.text_encoder_{n}_lr=1e-3" for n in (1, 2)
    ]
    before = go(make_config(*MODES["master"], *encoders, *EVERY, "run.name=all", "schedule.max_steps=1"))
    after = go(make_config(*MODES["master"], *encoders, *EVERY, "run.name=all", "schedule.max_steps=2"))
    one, two = model_of(before), model_of(after)
    matrices = [name for name in one if one[name].ndim > 1 and "token_embedding" not in name]
    assert all(not torch.equal(one[name], two[name]) for name in matrices)
    adafactor = ["optim.name=adafactor", "optim.betas=null", "optim.eps=null", "memory.policy=full"]
    checkpoint = go(make_config(*MODES["stochastic"], *adafactor, "run.name=factored", "schedule.max_steps=2"))
    assert read_train_state(checkpoint)["step"] == 2


def launch(folder: Path, *words: str) -> Path:
    """Two processes on the CPU, as torchrun starts them; the newest checkpoint."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "tests/support/launch_driver.py", *words, f"run.output_dir={folder}"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    newest = find_newest(folder / "two")
    assert newest is not None
    return newest


@pytest.mark.slow
def test_two_processes_train_on_the_same_samples(
    tiny_settings: list[str], tmp_path: Path, make_config: MakeConfig
) -> None:
    words = [*MODES["stochastic"], "data.micro_batch_size=1", "run.name=two", "schedule.max_steps=3"]
    go(make_config(*words))
    launch(tmp_path / "together", *tiny_settings, *words)
    alone, together = (
        read_metrics(folder / "two" / "metrics.jsonl") for folder in (tmp_path / "runs", tmp_path / "together")
    )
    for number in (1, 2, 3):  # and the weights have moved alike
        assert together[number]["train/loss"] == pytest.approx(alone[number]["train/loss"], rel=2e-3)
        assert together[number]["train/grad_norm"] == pytest.approx(alone[number]["train/grad_norm"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_resume_with_the_same_bits(tiny_settings: list[str], tmp_path: Path, mode: str) -> None:
    words = [*tiny_settings, *MODES[mode], "data.micro_batch_size=1", "run.name=two", *EVERY]
    straight = launch(tmp_path / "straight", *words, "schedule.max_steps=3")
    launch(tmp_path / "resumed", *words, "schedule.max_steps=2")
    resumed = launch(tmp_path / "resumed", *words, "schedule.max_steps=3")
    assert files_of(resumed) == files_of(straight)

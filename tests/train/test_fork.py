"""A fork: another run's weights, optimizer state and step, under other rates, another schedule, other data."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.metrics import read_metrics
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.lineage import count_samples
from trainer.model.lineage_rows import format_tree, list_stages, stage_rows
from trainer.model.run_records import read_run
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
EVERY = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]


def state_of(config: Config) -> dict[str, Any]:
    newest = find_newest(run_path(config))
    assert newest is not None
    return read_train_state(newest)


@pytest.fixture
def parent(make_config: MakeConfig) -> Config:
    config = make_config(*EVERY, "run.name=parent", "schedule.max_steps=3")
    train(config)
    return config


def test_a_fork_that_changes_nothing_has_the_bits_of_its_parent(make_config: MakeConfig, parent: Config) -> None:
    origin = run_path(parent) / "checkpoints/step-00000002"
    fork = make_config(*EVERY, "run.name=fork", "schedule.max_steps=3", f"checkpoint.fork={origin}")
    train(fork)
    assert state_of(fork)["files"] == state_of(parent)["files"]
    assert [entry["first_step"] for entry in read_run(run_path(fork))["attempts"]] == [2]
    assert read_run(run_path(fork))["tracker_run_id"] != read_run(run_path(parent))["tracker_run_id"]


def test_rates_schedule_data_and_captions_may_change(make_config: MakeConfig, parent: Config) -> None:
    fork = make_config(
        *EVERY, "run.name=fork", f"checkpoint.fork={run_path(parent)}", "optim.unet_lr=1e-4", "optim.weight_decay=0",
        "schedule.lr=cosine", "schedule.max_steps=5", "data.global_batch_size=8", "captions.tag_dropout=0.5",
    )  # fmt: skip
    train(fork)
    state = state_of(fork)
    assert state["step"] == 5 and state["fork"]["run"] == "parent" and state["fork"]["step"] == 3
    assert state["lineage"]["samples_seen"] == 3 * 4 + 2 * 8
    lines = read_metrics(run_path(fork) / "metrics.jsonl")
    assert {step: line["progress/samples_seen"] for step, line in lines.items()} == {4: 20, 5: 28}
    assert lines[4]["lr/unet"] == pytest.approx(1e-4 * (1 + math.cos(math.pi * 3 / 5)) / 2)
    tree = format_tree(state["lineage"])
    assert "forked from a run that had seen 12 samples:\n    parent, stage test, 3 steps\n" in tree
    assert stage_rows(list_stages(state["lineage"])[-1])["run"] == "fork, forked from parent at step 3"


def test_later_starts_resume_the_forks_own_newest(make_config: MakeConfig, parent: Config, tmp_path: Path) -> None:
    words = [*EVERY, "run.name=fork", f"checkpoint.fork={run_path(parent)}"]
    train(make_config(*words, "schedule.max_steps=4"))
    train(make_config(*words, "schedule.max_steps=5"))
    config = make_config(*words)
    assert [entry["first_step"] for entry in read_run(run_path(config))["attempts"]] == [3, 4]
    state = state_of(config)
    assert state["step"] == 5 and state["lineage"]["samples_seen"] == 20 and state["fork"]["step"] == 3
    gone = [*EVERY, "run.name=fork", f"checkpoint.fork={tmp_path / 'gone'}"]  # what it branched off is not needed now
    train(make_config(*gone, "schedule.max_steps=6"))
    assert [entry["first_step"] for entry in read_run(run_path(config))["attempts"]] == [3, 4, 5]


def test_what_a_fork_cannot_change_is_refused(make_config: MakeConfig, parent: Config) -> None:
    cases = [
        (["run.name=a", "diffusion.noise_offset=0.1"], "diffusion.noise_offset: 0.0 in the checkpoint, 0.1 now"),
        (["run.name=a", "optim.name=adafactor", "optim.betas=null", "optim.eps=null"], "optim.name: 'adamw' in the"),
        (["run.name=a", "model.train_text_encoder_1=true", "optim.text_encoder_1_lr=1e-3"], "train_text_encoder_1"),
        (["run.name=a", "schedule.max_steps=3"], "has made 3 steps, where this run begins, but it ends after"),
        (["run.name=parent", f"run.output_dir={run_path(parent) / 'other'}"], "this one needs another name"),
    ]  # fmt: skip
    for words, message in cases:
        with pytest.raises(UserError, match=r"checkpoint\.fork") as error:
            train(make_config("schedule.max_steps=5", f"checkpoint.fork={run_path(parent)}", *words))
        assert message in str(error.value)


def test_a_fork_of_nothing_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.fork: .* is neither a checkpoint nor a run"):
        train(make_config(f"checkpoint.fork={tmp_path}"))


def test_samples_are_counted_over_forks_of_forks() -> None:
    first = {"samples_seen": 100, "step": 10}
    second = {"samples_seen": count_samples(15, 4, first), "step": 15}
    assert second["samples_seen"] == 120 and count_samples(20, 8, second) == 160

"""Trackers across resumes and errors: no step is shown twice or dropped, and every run is brought to an end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.train import loop
from trainer.train.loop import train

MakeConfig = Callable[..., Config]
WORDS = ["schedule.max_steps=6", "checkpoint.every_steps=3", "sampling.every_steps=1", "sampling.prompts=[a cat]",
         "sampling.num_inference_steps=1"]  # fmt: skip


class FakeRun:
    """What of a wandb run is used; like the real one it drops what comes with a step below one that it has seen."""

    def __init__(self) -> None:
        self.defined: list[tuple[str, str | None]] = []
        self.history: list[dict[str, Any]] = []
        self.at = 0
        self.ended: list[int | None] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if step is not None and step < self.at:
            return
        self.at = self.at + 1 if step is None else step
        self.history.append(values)

    def finish(self, exit_code: int | None = None) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def wandb_run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """One run for all attempts, as its id makes it on the server."""
    import wandb

    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "config", type("Settings", (), {"update": lambda *_, **__: None})())
    return run


def die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """End the work at a step as a kill would."""
    step_once = loop.step_once

    def die(run: Any, batches: Any, number: int, stop: bool) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return step_once(run, batches, number, stop)

    patch.setattr(loop, "step_once", die)


def train_killed_and_resumed(config: Config) -> Path:
    """Killed after the line of step 4; the checkpoint is of step 3, so that step 4 comes twice."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    return Path(config.run.output_dir) / "run"


def test_wandb_gets_every_step_that_a_resume_repeats(make_config: MakeConfig, wandb_run: FakeRun) -> None:
    train_killed_and_resumed(make_config(*WORDS, "logging.trackers=[wandb]"))
    assert wandb_run.defined == [("*", "step")] * 2  # our step is the axis of everything
    lines = [(line["step"], line["attempt"]) for line in wandb_run.history if "train/loss" in line]
    assert lines == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 2), (6, 2)]
    images = [place for place, line in enumerate(wandb_run.history) if "samples" in line]
    assert [wandb_run.history[place - 1]["step"] for place in images] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert wandb_run.ended == [1, None]  # the first attempt failed, the second came to its end


def test_tensorboard_shows_each_step_once(make_config: MakeConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_killed_and_resumed(make_config(*WORDS, "logging.trackers=[tensorboard]", "logging.project=p"))
    written = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert written == [1, 2, 3, 4, 4, 5, 6]
    events = EventAccumulator(str(folder / "trackers" / "p"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("samples")] == [1, 2, 3, 4, 5, 6]


def test_an_error_ends_the_trackers_too(
    make_config: MakeConfig, wandb_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any, made: int) -> None:
        raise UserError("the disk is full")

    def fail_too(exit_code: int | None = None) -> None:
        wandb_run.ended.append(exit_code)
        raise OSError("no space left for the tracker either")

    monkeypatch.setattr(loop, "save", fail)
    monkeypatch.setattr(wandb_run, "finish", fail_too)
    with pytest.raises(UserError, match="the disk is full"):
        train(make_config("schedule.max_steps=1", "logging.trackers=[wandb]"))
    assert wandb_run.ended == [1]

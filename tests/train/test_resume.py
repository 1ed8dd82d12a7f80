"""Resume at any step gives the bits of the run that was never stopped, walked past in one process."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import change_record
from support.metrics import read_metrics
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import read_train_state
from trainer.train import loop
from trainer.train.loop import train

STEPS = 8  # of 2 units; an epoch of the 24 drawings has 6 or 7 steps, so its border is in between
STAGES = {
    "1": [
        "model.train_text_encoder_1=true", "model.train_text_encoder_2=true",
        "optim.text_encoder_1_lr=1e-3", "optim.text_encoder_2_lr=1e-3",
        "captions.max_token_length=150",  # the empty second chunk is shared by all captions
    ],
    "2": ["diffusion.noise_offset=0.0357"],
    "weighted": [
        "data.weights=[{factor: 1.7, tag: food}, {factor: 0.4, tag: mammal}, {factor: 0, tag: menu}]",
        "diffusion.timestep_sampling=stratified", "captions.mix={tags: 0.6, natural: 0.4}", "captions.tag_dropout=0.2",
    ],
}  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """PyTorch's own default is a thread for each core: one thread alone hid kernels that add in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def hashes(config: Config, step: int) -> dict[str, Any]:
    folder = Path(config.run.output_dir) / config.run.name / "checkpoints" / f"step-{step:08d}"
    return read_train_state(folder)["files"]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the process's work as a kill would, after a step's checkpoint."""
    save = loop.save

    def save_and_die(run: loop.Run, made: int, ending: bool) -> None:
        save(run, made, ending)
        if made == step:
            run.saver.settle()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", save_and_die)


def run_until(config: Config, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.mark.parametrize(
    ("stage", "workers"),
    [("1", 2), ("2", 0), ("weighted", 2), *(pytest.param(*each, marks=pytest.mark.slow)
                                            for each in (("1", 0), ("2", 2), ("weighted", 0)))],
)  # fmt: skip
def test_a_run_resumed_twice_has_the_bits_of_one_never_stopped(
    make_config: Callable[..., Config], stage: str, workers: int, threads: int
) -> None:
    words = [*STAGES[stage], f"schedule.max_steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.keep_last=99",
             f"data.loader_threads={workers}"]  # fmt: skip
    straight = make_config(*words, "run.name=straight")
    train(straight)
    resumed = make_config(*words, "run.name=resumed")
    epochs = []
    for stop in (3, 7):  # in the middle of the first epoch, and beyond its border
        run_until(resumed, stop)
        folder = Path(resumed.run.output_dir) / "resumed" / "checkpoints" / f"step-{stop:08d}"
        epochs.append(read_train_state(folder)["epoch"])
    train(resumed)
    assert epochs == [1, 2]
    for step in range(1, STEPS + 1):
        assert hashes(straight, step) == hashes(resumed, step), f"step {step}"
    losses = [
        {step: (line["train/loss"], line["train/grad_norm"]) for step, line in read_metrics(path).items()}
        for path in (Path(straight.run.output_dir) / name / "metrics.jsonl" for name in ("straight", "resumed"))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_a_kill_between_checkpoints_repeats_the_steps_after_the_last(
    make_config: Callable[..., Config], threads: int
) -> None:
    words = ["schedule.max_steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=99"]
    straight = make_config(*words, "run.name=straight")
    train(straight)
    killed = make_config(*words, "run.name=killed")
    with pytest.MonkeyPatch.context() as patch:
        step_once = loop.step_once

        def die(run: loop.Run, batches: object, step: int) -> object:
            if step == 5:
                run.saver.settle()
                raise KeyboardInterrupt
            return step_once(run, batches, step)  # type: ignore[arg-type]

        patch.setattr(loop, "step_once", die)
        with pytest.raises(KeyboardInterrupt):
            train(killed)
    train(killed)
    assert hashes(straight, 6) == hashes(killed, 6)
    folder = Path(killed.run.output_dir) / "killed"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines if line["step"] == 5] == [(2, 5)]
    assert [entry["first_step"] for entry in json.loads((folder / "run.json").read_text())["attempts"]] == [0, 4]


@pytest.mark.parametrize("stage", ["2", "weighted"])
def test_micro_batches_and_workers_may_change_on_the_way(make_config: Callable[..., Config], stage: str) -> None:
    words = [*STAGES[stage], "schedule.max_steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=99"]
    straight = make_config(*words, "run.name=straight")
    train(straight)
    changed = make_config(*words, "run.name=changed")
    run_until(changed, 2)
    train(make_config(*words, "run.name=changed", "data.micro_batch_size=1", "data.loader_threads=1",
                      "memory.policy=full"))  # fmt: skip
    path = Path(straight.run.output_dir)
    before, after = (read_metrics(path / name / "metrics.jsonl")[4] for name in ("straight", "changed"))
    assert after["train/loss"] == pytest.approx(before["train/loss"], rel=1e-4)  # the same samples, other sums


def test_weights_are_recorded_and_compared(make_config: Callable[..., Config], notes: Callable[[], str]) -> None:
    rules = "data.weights=[{factor: 3, tag: food}, {factor: 2, tag: nowhere}, {factor: 0, tag: menu}]"
    run = make_config(rules, "schedule.max_steps=1")
    train(run)
    said = notes()
    assert "weights: an epoch sees 32 samples of 24 images, 2 of them never seen (weight 0)" in said
    assert "data.weights.1 holds for no image" in said
    folder = Path(run.run.output_dir) / "run" / "checkpoints" / "step-00000001"
    record = read_train_state(folder)["weights"]
    assert [rule["images"] for rule in record["rules"]] == [7, 0, 2]
    assert json.loads((folder.parents[1] / "run.json").read_text())["weights"] == record
    with pytest.raises(UserError, match=r"data\.weights: .* in the checkpoint"):
        train(make_config("schedule.max_steps=2"))
    fork = make_config("run.name=fork", "schedule.max_steps=2", f"checkpoint.fork={folder.parents[1]}")
    train(fork)  # other data are what forks are for
    change_record(folder, weights=record | {"sha256": "0"})
    with pytest.raises(UserError, match=r"another set of weights .*: 0 there"):
        train(make_config(rules, "schedule.max_steps=2"))


def test_a_longer_run_begins_as_the_shorter_one(make_config: Callable[..., Config]) -> None:
    words = ["checkpoint.every_steps=2", "checkpoint.keep_last=99"]
    longer = make_config(*words, "run.name=longer", "schedule.max_steps=4")
    train(longer)
    extended = make_config(*words, "run.name=extended", "schedule.max_steps=2")
    train(extended)
    train(make_config(*words, "run.name=extended", "schedule.max_steps=4"))
    assert hashes(longer, 4) == hashes(extended, 4)


def test_no_random_state_is_used(make_config: Callable[..., Config]) -> None:
    words = ["schedule.max_steps=2", "sampling.every_steps=1", "sampling.prompts=[a]", "sampling.num_inference_steps=2"]
    runs = [make_config(*words, f"run.name={name}") for name in ("first", "second")]
    for number, config in enumerate(runs):
        torch.manual_seed(number)
        torch.rand(17)
        train(config)
    assert hashes(runs[0], 2) == hashes(runs[1], 2)

"""P7: no checkpoint holds values that are not finite, and a run that goes wrong leaves the last good one."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from support.metrics import read_metrics
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, list_checkpoints, read_train_state
from trainer.model.lineage_rows import list_stages, stage_rows
from trainer.model.restore import open_weights
from trainer.train import loop, step
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
Count = Callable[[str, bool], None]
EVERY = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]
ADAFACTOR = ["optim.name=adafactor", "optim.betas=null", "optim.eps=null"]
MASTER = ["precision.compute=bf16", "precision.frozen=bf16", "precision.weights=master"]


def checkpoints(config: Config) -> list[str]:
    return [path.name for path in list_checkpoints(run_path(config) / "checkpoints")]


@pytest.mark.parametrize("words", [[], ADAFACTOR, MASTER], ids=["adamw", "adafactor", "master"])
def test_weights_that_overflow_in_the_update_are_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, count_try: Count, words: list[str]
) -> None:
    """Loss and gradients of that step are finite, so that no gate sees it."""
    config = make_config(*words, *EVERY, "schedule.max_steps=4", "optim.weight_decay=0")
    rates = loop.set_learning_rates

    def overflow(optimizer: Any, factor: float) -> Any:
        overflow.calls += 1  # type: ignore[attr-defined]
        return rates(optimizer, 1e38 / 1e-3 * 1e38 if overflow.calls == 3 else factor)  # type: ignore[attr-defined]

    overflow.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "set_learning_rates", overflow)
    with pytest.raises(
        UserError, match=r"step 2: after its update unet\..* not finite.* nothing of it is saved"
    ) as caught:
        train(config)
    newest = find_newest(run_path(config))
    assert newest is not None and f"The newest checkpoint is {newest}" in str(caught.value)
    held = checkpoints(config) == ["step-00000001", "step-00000002"]
    count_try("weights that overflow in the update are not saved", held)
    assert held and all(tensor.isfinite().all() for tensor in open_weights(newest).values())


@pytest.mark.parametrize("words", [[], ADAFACTOR, MASTER], ids=["adamw", "adafactor", "master"])
def test_an_absurd_rate_leaves_nothing_that_is_not_finite(
    make_config: MakeConfig, count_try: Count, words: list[str]
) -> None:
    config = make_config(*words, *EVERY, "schedule.max_steps=4", "optim.unet_lr=1e38")
    with pytest.raises(UserError, match="not finite"):
        train(config)
    held = all(
        tensor.isfinite().all()
        for path in list_checkpoints(run_path(config) / "checkpoints")
        for tensor in open_weights(path).values()
    )
    count_try("a rate of 1e38 leaves no checkpoint that is not finite", held)
    assert held


def test_an_optimizer_state_that_is_not_finite_is_not_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*EVERY)
    step_once = loop.step_once

    def spoil(run: Any, batches: Any, number: int) -> Any:
        pending = step_once(run, batches, number)
        if number == 1:
            next(iter(run.optimizer.state.values()))["exp_avg"].view(-1)[0] = math.inf
        return pending

    monkeypatch.setattr(loop, "step_once", spoil)
    with pytest.raises(UserError, match=r"step 1: after its update unet\..*\.exp_avg hold values that are not finite"):
        train(config)
    assert checkpoints(config) == ["step-00000001"]


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Steps whose first sample's loss is not finite, whatever else is so."""
    bad: set[int] = set()
    losses, step_once, now = step.batch_losses, loop.step_once, [0]

    def spoilt(model: Any, batch: Any, objective: Any) -> torch.Tensor:
        found = losses(model, batch, objective)
        return found * (math.inf if now[0] in bad else 1.0)

    def counted(run: Any, batches: Any, number: int) -> Any:
        now[0] = number
        return step_once(run, batches, number)

    monkeypatch.setattr(step, "batch_losses", spoilt)
    monkeypatch.setattr(loop, "step_once", counted)
    yield bad


def test_a_step_that_is_not_finite_stops_the_run(make_config: MakeConfig, bad_steps: set[int]) -> None:
    bad_steps.add(2)
    config = make_config(*EVERY, "checkpoint.keep_last=1")
    with pytest.raises(UserError, match=r"step 2: the loss of .* is not finite\. The update was withheld and nothing"):
        train(config)
    assert checkpoints(config)[-1] == "step-00000002"


@pytest.mark.parametrize("words", [[], ADAFACTOR, MASTER], ids=["adamw", "adafactor", "master"])
def test_a_skipped_step_counts_as_a_step_and_is_recorded(
    make_config: MakeConfig, bad_steps: set[int], notes: Callable[[], str], words: list[str]
) -> None:
    bad_steps.update({1, 3})
    config = make_config(*words, *EVERY, "run.on_nonfinite=skip", "schedule.max_steps=5")
    train(config)
    said, folder = notes(), run_path(config) / "checkpoints"
    assert "warning: step 1: the loss of " in said and "1 in a row, at most 10 are skipped" in said
    state = read_train_state(folder / "step-00000005")
    assert state["nonfinite_steps"] == {"all": 2, "in_a_row": 0, "steps": [1, 3]}
    assert state["lineage"]["nonfinite_steps"] == 2
    row = stage_rows(list_stages(state["lineage"])[-1])["steps withheld"]
    assert row == "2, whose loss or gradients were not finite"
    weights = [dict(open_weights(folder / f"step-0000000{number}")) for number in (1, 2, 3)]
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in itertools.pairwise(weights)]
    assert same == [True, False]  # the update of step 1 was withheld, that of step 2 was not
    lines = read_metrics(run_path(config) / "metrics.jsonl")
    assert lines[2]["train/loss"] is None and math.isfinite(lines[3]["train/loss"])
    assert lines[5]["train/nonfinite_steps"] == 2


def test_a_resume_counts_on_and_a_run_without_any_says_nothing(make_config: MakeConfig, bad_steps: set[int]) -> None:
    config = make_config(*EVERY, "run.on_nonfinite=skip", "schedule.max_steps=1")
    train(config)
    assert "nonfinite_steps" not in read_train_state(run_path(config) / "checkpoints/step-00000001")["lineage"]
    bad_steps.update({1, 2, 3})
    train(make_config(*EVERY, "run.on_nonfinite=skip", "schedule.max_steps=3"))
    with pytest.raises(UserError, match=r"step 3: .* withheld, as were 2 before it in a row"):
        train(make_config(*EVERY, "run.on_nonfinite=skip", "run.max_nonfinite_in_a_row=2", "schedule.max_steps=9"))


def test_several_in_a_row_stop_and_no_checkpoint_before_them_is_removed(
    make_config: MakeConfig, bad_steps: set[int]
) -> None:
    bad_steps.update(range(2, 99))
    words = ["run.on_nonfinite=skip", "run.max_nonfinite_in_a_row=4", "schedule.max_steps=50"]
    config = make_config("checkpoint.every_steps=1", "checkpoint.keep_last=1", *words)
    with pytest.raises(UserError, match=r"step 6: .* withheld, as were 4 before it in a row and nothing was saved"):
        train(config)
    # the weights of step 2 have not made a good step yet, those of step 1 have
    assert checkpoints(config) == [f"step-0000000{number}" for number in range(1, 7)]


@pytest.mark.parametrize("words", [[], MASTER], ids=["autocast", "master"])
def test_a_destroyed_run_is_stopped_while_the_checkpoint_before_it_is_there(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, count_try: Count, words: list[str]
) -> None:
    """A rate of 1e3: all values are finite, and the next step's loss is not what it was."""
    keep = ["checkpoint.every_steps=1", "checkpoint.keep_last=1"]
    rates = loop.set_learning_rates

    def destroy(optimizer: Any, factor: float) -> Any:
        destroy.calls += 1  # type: ignore[attr-defined]
        return rates(optimizer, 1e3 if destroy.calls == 4 else factor)  # type: ignore[attr-defined]

    destroy.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "set_learning_rates", destroy)
    config = make_config(*words, *keep, "run.stop_if_loss_above=4", "schedule.max_steps=50")
    with pytest.raises(
        UserError, match=r"step 4: its loss is .*, above run\.stop_if_loss_above 4, and nothing was saved"
    ):
        train(config)
    held = checkpoints(config) == ["step-00000003", "step-00000004"]
    count_try("the last checkpoint before an anomaly is there", held)
    assert held
    bad = Path(run_path(config) / "checkpoints/step-00000004")
    bad.rename(bad.with_name("destroyed"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(loop, "set_learning_rates", rates)
    train(make_config(*words, *keep, "run.stop_if_loss_above=4", "schedule.max_steps=6"))
    assert checkpoints(config) == ["step-00000006"]

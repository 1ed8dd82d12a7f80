"""P11: old checkpoints go when a newer one is whole and its weights have made a good step; never before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import Config
from trainer.model.checkpoint import list_checkpoints, verify_checkpoint
from trainer.train import loop, save, saver
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
Count = Callable[[str, bool], None]


def names(config: Config) -> list[str]:
    return [path.name for path in list_checkpoints(run_path(config) / "checkpoints")]


@pytest.mark.parametrize(("last", "milestones"), [(1, None), (2, None), (1, 2), (3, 4)])
def test_what_is_kept(make_config: MakeConfig, last: int, milestones: int | None) -> None:
    words = [] if milestones is None else [f"checkpoint.keep_every_steps={milestones}"]
    config = make_config("schedule.max_steps=6", "checkpoint.every_steps=1", f"checkpoint.keep_last={last}", *words)
    train(config)
    kept = {step for step in range(1, 7) if step > 6 - last or (milestones and step % milestones == 0)}
    assert names(config) == [f"step-{step:08d}" for step in sorted(kept)]
    for path in list_checkpoints(run_path(config) / "checkpoints"):
        verify_checkpoint(path)


def test_one_more_than_are_kept_at_most_and_none_goes_before_the_next_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, count_try: Count
) -> None:
    config = make_config("schedule.max_steps=8", "checkpoint.every_steps=2", "checkpoint.keep_last=1")
    seen: dict[int, list[str]] = {}
    step_once = loop.step_once

    def watched(run: Any, batches: Any, number: int) -> Any:
        if run.saver.writing is not None:
            run.saver.writing.exception(60)
        seen[number] = names(config)  # before this step, the first of the newest one's weights where number is even
        return step_once(run, batches, number)

    monkeypatch.setattr(loop, "step_once", watched)
    train(config)
    for number, there in seen.items():
        newest = (number // 2) * 2  # before step 5 the weights of the newest one, 4, have made a step at the most
        count_try("an old checkpoint goes only when the newest one's weights made a good step",
                  number % 2 == 1 or newest < 4 or len(there) == 2)  # fmt: skip
    assert max(map(len, seen.values())) == 2
    assert seen[4] == ["step-00000002", "step-00000004"] and names(config) == ["step-00000008"]


def test_a_stop_keeps_one_more_which_goes_after_the_first_step_of_the_resume(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("schedule.max_steps=9", "checkpoint.every_steps=2", "checkpoint.keep_last=1")
    step_once = loop.step_once

    def signalled(run: Any, batches: Any, number: int) -> Any:
        run.stops.signal = 15 if number == 4 else None
        return step_once(run, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step_once", signalled)
        train(config)
    assert names(config) == ["step-00000004", "step-00000005"]
    train(make_config("schedule.max_steps=6", "checkpoint.every_steps=9", "checkpoint.keep_last=1"))
    assert names(config) == ["step-00000006"]


def test_a_save_that_fails_removes_nothing(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("schedule.max_steps=2", "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    train(config)

    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(saver, "write_checkpoint", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        train(make_config("schedule.max_steps=9", "checkpoint.every_steps=1", "checkpoint.keep_last=1"))
    assert names(config) == ["step-00000002"]


def test_folders_of_other_names_are_never_removed(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000002", "step-00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    for name in ("step-00000001.damaged", "step-00000002.incomplete", "step-00000001-mine", "step-1", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text("{}")
    (tmp_path / "step-00000000").mkdir()  # not whole: perhaps somebody's
    save.retain_checkpoints(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine", "step-00000000", "step-00000001-mine", "step-00000001.damaged", "step-00000002.incomplete",
        "step-00000003", "step-1",
    ]  # fmt: skip

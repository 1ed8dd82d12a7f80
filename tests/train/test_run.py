"""Hours and hardware, which checkpoints carry on; run.json, damaged or not; and the log, of which nothing depends."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.checkpoints import change_record
from support.metrics import read_metrics
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.run_records import read_run
from trainer.train import metrics
from trainer.train.beginning import Resumed
from trainer.train.loop import train
from trainer.train.run import Attempt, locate_from_run, run_path
from trainer.train.state import sum_work

MakeConfig = Callable[..., Config]
BEGAN, AGAIN = "1970-01-01T00:00:00+00:00", "1970-01-02T00:00:00+00:00"


def work(resumed: Resumed | None, seconds: float) -> dict[str, Any]:
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    inputs = SimpleNamespace(resumed=resumed, accelerator=accelerator)
    return sum_work(inputs, Attempt(3, "", AGAIN), seconds)  # type: ignore[arg-type]


def test_work_goes_on_from_that_of_the_checkpoint() -> None:
    """Lost steps and pauses do not count: they are in no checkpoint that a run goes on from."""
    before = {"started_at": BEGAN, "hours": 1.5, "hardware": ["1 x A100"]}
    resumed = Resumed(Path("x"), {"step": 20, "lineage": before}, None)
    expected = {"started_at": BEGAN, "hours": 3.5, "hardware": ("1 x A100", "2 x cpu")}
    assert work(resumed, 7200.0) == expected
    again = Resumed(Path("x"), {"step": 40, "lineage": expected | {"hardware": list(expected["hardware"])}}, None)
    assert work(again, 3600.0)["hardware"] == ("1 x A100", "2 x cpu")


def test_a_new_run_and_a_fork_begin_with_nothing() -> None:
    alone = {"started_at": AGAIN, "hours": 1.0, "hardware": ("2 x cpu",)}
    assert work(None, 3600.0) == alone
    before = {"started_at": BEGAN, "hours": 1.5, "hardware": ["1 x A100"]}
    assert work(Resumed(Path("x"), {"step": 20, "lineage": before}, {"step": 20}), 3600.0) == alone
    unknown = {"started_at": None, "hours": None, "hardware": []}  # of version 0.2.0, without a log
    assert work(Resumed(Path("x"), {"step": 20, "lineage": unknown}, None), 3600.0) == alone


def test_a_checkpoint_carries_them(make_config: Callable[..., Config]) -> None:
    config = make_config("schedule.max_steps=2")
    train(config)
    newest = find_newest(Path(config.run.output_dir) / config.run.name)
    assert newest is not None
    lineage = read_train_state(newest)["lineage"]
    assert lineage["hardware"] == ["1 x cpu"] and lineage["hours"] >= 0 and lineage["started_at"].endswith("+00:00")


def test_a_clock_that_is_set_back_takes_no_hours_away(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    train(make_config("schedule.max_steps=1"))
    newest = find_newest(run_path(make_config()))
    assert newest is not None
    lineage = read_train_state(newest)["lineage"]
    change_record(newest, lineage=lineage | {"hours": 2.0})
    monkeypatch.setattr(metrics.time, "time", lambda: 1e9)  # years ago
    train(make_config("schedule.max_steps=2"))
    after = read_train_state(find_newest(run_path(make_config())))["lineage"]  # type: ignore[arg-type]
    assert after["hours"] >= 2.0 and after["started_at"] == lineage["started_at"]
    attempts = read_run(run_path(make_config()))["attempts"]
    assert [entry["saved_step"] for entry in attempts] == [1, 2] and all(entry["seconds"] > 0 for entry in attempts)


@pytest.mark.parametrize("log", [b"\x00\xff not a log\n" * 1000, b"[" * 100_000, b'{"step": 1, "attempt": 9', None])
def test_training_needs_no_log(make_config: MakeConfig, log: bytes | None) -> None:
    train(make_config("schedule.max_steps=2"))
    file = run_path(make_config()) / "metrics.jsonl"
    file.unlink()
    if log is not None:
        file.write_bytes(log)
    train(make_config("schedule.max_steps=4", "checkpoint.every_steps=1"))
    assert sorted(read_metrics(file)) == [3, 4]
    assert read_run(file.parent)["attempts"][-1]["attempt"] == 2


def test_a_save_reads_nothing_of_the_log(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = Path.open

    def counted(self: Path, *words: Any, **options: Any) -> Any:
        mode = words[0] if words else options.get("mode", "r")
        if self.name == "metrics.jsonl" and "r" in mode:
            opened.append(mode)
        return original(self, *words, **options)

    monkeypatch.setattr("trainer.train.live_page.LivePage.write", lambda *_: None)  # which reads what was added
    train(make_config("schedule.max_steps=2"))
    monkeypatch.setattr(Path, "open", counted)
    train(make_config("schedule.max_steps=6", "checkpoint.every_steps=1"))
    assert len(opened) <= 1  # its last byte, once


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"attempts": 3}', '{"attempts": [{"attempt": "x"}]}', "[" * 100_000, "\x00",
     '{"attempts": [{"attempt": 1, "first_step": 0, "started_at": "soon"}]}'],
)  # fmt: skip
def test_a_damaged_run_json_is_noticed(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        read_run(tmp_path)
    assert locate_from_run(tmp_path, "nowhere/base") == "nowhere/base"


def test_a_damaged_run_json_is_set_aside(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    train(make_config("schedule.max_steps=1"))
    train(make_config("schedule.max_steps=2"))
    folder = run_path(make_config())
    tracker = read_train_state(folder / "checkpoints/step-00000002")["tracker_run_id"]
    (folder / "run.json").write_text("{")
    notes()
    train(make_config("schedule.max_steps=3"))
    assert "run.json is damaged: " in notes()
    assert (folder / "run.json.damaged").read_text() == "{"
    found = read_run(folder)
    # its lines count as newer than those of the attempts before
    assert [entry["attempt"] for entry in found["attempts"]] == [3] and found["tracker_run_id"] == tracker
    assert {step: line["attempt"] for step, line in read_metrics(folder / "metrics.jsonl").items()} == {
        1: 1,
        2: 2,
        3: 3,
    }

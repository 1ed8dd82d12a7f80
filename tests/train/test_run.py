"""Hours and hardware, from what a run wrote down; what is not recorded is not invented."""

import json
from collections.abc import Callable
from pathlib import Path

from trainer.config.schema import Config
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.train.loop import train
from trainer.train.run import RunWork, read_work

GPU = "NVIDIA A100-SXM4-80GB"


def write_records(folder: Path, attempts: list[dict], lines: list[tuple[int, int, float]]) -> None:
    (folder / "run.json").write_text(json.dumps({"attempts": attempts}))
    texts = [json.dumps({"step": step, "attempt": attempt, "time": time}) for step, attempt, time in lines]
    (folder / "metrics.jsonl").write_text("\n".join(texts) + "\n")


def attempt(number: int, first_step: int, started_at: str, processes: int = 2, device: str = GPU) -> dict:
    return {
        "attempt": number,
        "first_step": first_step,
        "started_at": started_at,
        "processes": processes,
        "device": device,
    }


def test_lost_steps_and_pauses_do_not_count(tmp_path: Path) -> None:
    """The first attempt dies at step 30 and is resumed from 20 a day later, on another number of GPUs."""
    attempts = [attempt(1, 0, "1970-01-01T00:00:00+00:00"), attempt(2, 20, "1970-01-02T00:00:00+00:00", processes=1)]
    day = 86400.0
    lines = [(10, 1, 1800.0), (20, 1, 3600.0), (30, 1, 5400.0), (30, 2, day + 3600.0), (40, 2, day + 7200.0)]
    write_records(tmp_path, attempts, lines)
    both = RunWork("1970-01-01T00:00:00+00:00", 3.0, (f"2 x {GPU}", f"1 x {GPU}"))
    assert read_work(tmp_path, 40) == both
    # the work behind an earlier checkpoint
    assert read_work(tmp_path, 20) == RunWork("1970-01-01T00:00:00+00:00", 1.0, (f"2 x {GPU}",))


def test_an_attempt_of_which_nothing_is_left_does_not_count(tmp_path: Path) -> None:
    attempts = [attempt(1, 0, "1970-01-01T00:00:00+00:00", device="cpu"), attempt(2, 0, "1970-01-02T00:00:00+00:00")]
    write_records(tmp_path, attempts, [(10, 1, 1800.0), (10, 2, 86400.0 + 1800.0)])
    assert read_work(tmp_path, 10) == RunWork("1970-01-02T00:00:00+00:00", 0.5, (f"2 x {GPU}",))


def test_without_records_nothing_is_said(tmp_path: Path) -> None:
    assert read_work(tmp_path, 10) == RunWork()
    write_records(tmp_path, [attempt(1, 0, "1970-01-01T00:00:00+00:00")], [])
    assert read_work(tmp_path, 10) == RunWork()


def test_a_checkpoint_carries_them(make_config: Callable[..., Config]) -> None:
    config = make_config("schedule.max_steps=2")
    train(config)
    newest = find_newest(Path(config.run.output_dir) / config.run.name)
    assert newest is not None
    lineage = read_train_state(newest)["lineage"]
    assert lineage["hardware"] == ["1 x cpu"] and lineage["hours"] >= 0 and lineage["started_at"].endswith("+00:00")


def test_lines_at_other_steps_do_not_bring_lost_steps_back(tmp_path: Path) -> None:
    """The first attempt wrote a line every 5 steps, the second, from 10, every 10."""
    attempts = [attempt(1, 0, "1970-01-01T00:00:00+00:00"), attempt(2, 10, "1970-01-02T00:00:00+00:00")]
    lines = [(5, 1, 1800.0), (10, 1, 3600.0), (15, 1, 7200.0), (20, 2, 86400.0 + 3600.0)]
    write_records(tmp_path, attempts, lines)
    assert read_work(tmp_path, 20).hours == 2.0

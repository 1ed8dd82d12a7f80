"""The black box: the last steps of each attempt are on the disk whatever ends it, and nothing of it stops a run."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.ranks import train_ranks
from support.scripts import run_script
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.layout import attempt_name
from trainer.data.index import open_index
from trainer.model.step_records import read_black_box
from trainer.report.explain import explain_step
from trainer.train import black_box, loop, step
from trainer.train.black_box import BlackBox
from trainer.train.loop import train
from trainer.train.step import StepResult

MakeConfig = Callable[..., Config]


def folder_of(config: Config) -> Path:
    return Path(config.run.output_dir) / config.run.name


def test_keys_captions_and_losses_of_each_rank(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("data.global_batch_size=4", "data.micro_batch_size=1", "captions.tag_dropout=0.5")
    assert train_ranks([config, config], tmp_path / "ended") == ["", ""]
    records = read_black_box(folder_of(config))
    assert [(record.step, record.rank, record.world) for record in records] == [
        (s, r, 2) for s in range(4) for r in (0, 1)
    ]
    index = open_index(config.data.shards)
    for number in range(4):
        lines = list(explain_step(config, index, number))
        own = records[2 * number : 2 * number + 2]
        # micro-step m of rank r takes the step's micro-batch 2 m + r
        together = [(own[place % 2].keys[place // 2], own[place % 2].captions[place // 2]) for place in range(4)]
        assert together == [(line["key"], line["caption"]) for line in lines]
        losses = [loss for record in own for loss in record.losses or []]
        assert len(losses) == 4 and all(record.batches == [1, 1] for record in own)
        assert own[0].loss == own[1].loss == pytest.approx(sum(losses) / 4, rel=1e-6)
        assert own[0].grad_norm == own[1].grad_norm and not own[0].withheld
        assert min(own[0].waited, own[0].seconds or 0) >= 0


def test_losses_are_exact(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = loop.Progress.read

    def read(self: loop.Progress, result: StepResult) -> None:
        seen.append(result.losses.clone())
        original(self, result)

    monkeypatch.setattr(loop.Progress, "read", read)
    config = make_config()
    train(config)
    assert [record.losses for record in read_black_box(folder_of(config))] == [losses.tolist() for losses in seen]


def test_a_step_that_ends_the_run_is_there(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    original = step.batch_losses
    count = iter(range(10**6))
    monkeypatch.setattr(step, "batch_losses", lambda *given: original(*given) * (math.nan if next(count) == 5 else 1))
    config = make_config("schedule.max_steps=9")
    with pytest.raises(UserError, match="step 2"):
        train(config)
    records = read_black_box(folder_of(config))
    assert [record.step for record in records] == [0, 1, 2, 3]
    assert records[2].withheld and math.isnan(records[2].loss or 0)
    assert [math.isnan(loss) for loss in records[2].losses or []] == [False, False, True, True]
    assert records[3].keys and records[3].loss is None  # it was under way
    assert "scripts/explain_step.py --black-box" in notes()

    run = run_script("scripts/explain_step.py", "--black-box", folder_of(config), "--step", 2)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["key"] for line in lines] == records[2].keys and [line["loss"] for line in lines][2:] == ["nan", "nan"]
    assert [line["caption"] for line in lines] == records[2].captions and lines[0]["step_loss"] == "nan"


def batch(number: int) -> SimpleNamespace:
    return SimpleNamespace(keys=[f"k{number}"], captions=[f"a caption {number}"])


def result(number: int) -> StepResult:
    return StepResult(
        number, torch.tensor(0.5), torch.tensor(math.inf), False, torch.tensor([0.1]), [], None, False, 0.0
    )


def run_steps(box: BlackBox, numbers: range) -> None:
    with box:
        for number in numbers:
            box.begin(number, [batch(number)])  # type: ignore[list-item]
            box.note(result(number))
            while box.lines.qsize() > 100:
                threading.Event().wait(0.001)


@pytest.mark.parametrize("steps", [1, 50, 51, 99, 100, 101, 150, 270])
def test_the_last_fifty_steps_stay(tmp_path: Path, steps: int) -> None:
    run_steps(BlackBox(tmp_path, 1, 0, 1), range(steps))
    found = [record.step for record in read_black_box(tmp_path)]
    assert found == list(range(steps - len(found), steps)) and min(steps, 50) <= len(found) < 101
    assert all(record.grad_norm == math.inf for record in read_black_box(tmp_path))


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    run_steps(BlackBox(tmp_path, 2, 0, 1), range(3))
    file = next(tmp_path.glob("black_box/*/rank-00000.jsonl"))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 3, "keys": ["k')
    (file.parent / "rank-00000.older.jsonl").write_bytes(
        b'\xff\xfe\n[[[[\n7\n{"step": 1, "keys": []}\n{"step": 0, "x": 1}\n'
    )
    (file.parent.parent / "attempt-x").mkdir()
    assert [record.step for record in read_black_box(tmp_path)] == [0, 1, 2]


def test_a_box_that_cannot_be_written_stops_nothing(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    config = make_config()
    folder_of(config).mkdir(parents=True)
    (folder_of(config) / "black_box").write_text("in the way")
    train(config)
    assert notes().count("the black box is not written, training goes on") == 1


def test_what_failed_is_kept(tmp_path: Path, notes: Callable[[], str]) -> None:
    attempts = []
    for number in range(1, 11):
        (tmp_path / "black_box" / attempt_name(number)).mkdir(parents=True)
        state = "failed" if number in (2, 4) else "finished" if number != 10 else None
        attempts.append({"attempt": number, "first_step": 0} | ({"outcome": {"state": state}} if state else {}))
    (tmp_path / "run.json").write_text(json.dumps({"attempts": attempts}))
    black_box.tidy_black_boxes(tmp_path)
    kept = sorted(int(path.name[-4:]) for path in (tmp_path / "black_box").iterdir())
    assert kept == [2, 4, 7, 8, 9, 10] and "attempt 10 was killed" in notes()

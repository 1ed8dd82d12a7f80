"""P3. Other processes and micro-batches see the same samples, captions and noise; only the order of sums differs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.launches import LENGTH, STAGES, finish, kill_after, launch
from support.metrics import read_metrics
from support.paths import REPOSITORY
from trainer.config.schema import Config
from trainer.model.step_records import read_black_box
from trainer.train.loop import train
from trainer.train.run import run_path
from trainer.train.trials import join_ranks


def test_micro_batches_and_threads_see_the_same(make_config: Callable[..., Config]) -> None:
    seen = []
    for name, *words in (
        ["straight"],
        ["micro", "data.micro_batch_size=1"],
        ["threads", "data.loader_threads=2", "data.prefetch_factor=1"],
        ["memory", "memory.policy=full", "data.micro_batch_size=1"],
    ):
        config = make_config(f"run.name={name}", "schedule.max_steps=3", *words)
        train(config)
        steps = join_ranks(read_black_box(run_path(config)))
        assert sorted(steps) == [0, 1, 2]
        seen.append(steps)
    for other in seen[1:]:
        for step, found in other.items():
            expected = seen[0][step]
            assert (found.keys, found.captions) == (expected.keys, expected.captions)
            assert found.losses == pytest.approx(expected.losses, rel=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["2", "weighted"])
def test_a_run_of_one_process_goes_on_with_two(tiny_settings: list[str], tmp_path: Path, stage: str) -> None:
    words = [*tiny_settings, *STAGES[stage], f"run.output_dir={tmp_path}", *LENGTH]
    first = launch(1, [*words, "run.name=run"])
    kill_after(first, tmp_path / "run", 3)
    finish(launch(2, [*words, "run.name=run"]))
    finish(launch(1, [*words, "run.name=straight"]))
    before, after = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    for step in range(1, 9):
        assert after[step]["train/loss"] == pytest.approx(before[step]["train/loss"], rel=2e-2), step


@pytest.mark.faults
def test_verify_resume_finds_what_is_promised(tiny_settings: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "scripts/verify_resume.py", "--config", "configs/demo_stage1.yaml", *tiny_settings,
             f"run.output_dir={tmp_path / 'runs'}", "run.name=x", "--json", "--steps", "8"]  # fmt: skip
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {trial["trial"]: trial for trial in json.loads(done.stdout)["trials"]}
    assert trials.keys() == {"resumed", "micro-batch", "processes"} and trials["resumed"]["same_bits"]
    assert all(trial["same_samples"] and trial["same_captions"] for trial in trials.values())
    assert list((tmp_path / "runs").iterdir()) == []

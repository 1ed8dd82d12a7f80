"""P10. As many processes run as were asked for, or none: accelerate launch, for real."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import REPOSITORY

Count = Callable[[str, bool], None]


def launch(words: list[str], launcher: list[str], home: Path, config: str | None) -> subprocess.CompletedProcess[str]:
    if config is not None:
        (home / "accelerate").mkdir(parents=True)
        (home / "accelerate" / "default_config.yaml").write_text(config)
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "tests/support/launch_driver.py", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


HOME = "compute_environment: LOCAL_MACHINE\ndistributed_type: {}\nnum_processes: 2\nnum_machines: 1\nuse_cpu: true\n"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("launcher", "config"),
    [
        (["--cpu", "--num_processes", "2"], None),
        ([], HOME.format("'NO'")),
        ([], HOME.format("MULTI_CPU")),
    ],
    ids=["words", "home-no", "home-multi-cpu"],
)
def test_accelerate_that_starts_fewer_is_refused(
    tiny_settings: list[str], tmp_path: Path, launcher: list[str], config: str | None, count_try: Count
) -> None:
    words = [*tiny_settings, f"run.output_dir={tmp_path / 'runs'}", "run.name=run", "schedule.max_steps=1"]
    done = launch(words, launcher, tmp_path / "home", config)
    refused = done.returncode != 0 and "2 processes were asked for, but 1 run" in done.stderr
    count_try("accelerate launch starts fewer", refused)
    assert refused, done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr and not (tmp_path / "runs" / "run" / "run.json").exists()


@pytest.mark.faults
def test_one_that_was_asked_for_runs(tiny_settings: list[str], tmp_path: Path, count_try: Count) -> None:
    words = [*tiny_settings, f"run.output_dir={tmp_path / 'runs'}", "run.name=run", "schedule.max_steps=1"]
    done = launch(words, ["--cpu", "--num_processes", "1"], tmp_path / "home", HOME.format("'NO'"))
    count_try("accelerate launch starts as many", done.returncode == 0)
    assert done.returncode == 0, done.stderr

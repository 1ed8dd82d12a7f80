"""Real commands on the tiny model, as programs and as people without a terminal read them: nothing of libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.paths import REPOSITORY


def run(folder: Path, script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A command in a folder of the user's; what a developer's environment says of warnings does not count."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, REPOSITORY / script, *map(str, words)], cwd=folder, capture_output=True, text=True,
        check=False, env={**kept, "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip


def test_a_run_is_made_exported_and_drawn_with(tiny_settings: list[str], tmp_path: Path) -> None:
    """In a folder whose name has a space; each command's next one is typed as it stands."""
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "my run.yaml").write_text("run: {name: first}\nschedule: {max_steps: 2}\n")
    words = ["my run.yaml", *tiny_settings, f"run.output_dir={folder / 'runs'}"]

    trained = run(folder, "train.py", *words, "--json")
    assert trained.returncode == 0, trained.stderr
    found = json.loads(trained.stdout)
    assert (found["run"], found["step"], found["last_step"], found["finished"]) == ("first", 2, 2, True)
    assert [Path(path).name for path in found["paths"]] == ["step-00000002"] and Path(found["paths"][0]).is_dir()
    begins = ("first, stage test", "  ", "warning: ", "first: ")  # what is about to happen, and how far it is
    assert [line for line in trained.stderr.splitlines() if not line.startswith(begins)] == []
    assert "24 images in" in trained.stderr and "\r" not in trained.stderr

    (step,) = found["next"]
    assert step["to"] == "export it" and "'" in step["command"]  # the space
    exported = subprocess.run(
        f"{step['command']} --quiet", shell=True, cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (exported.returncode, exported.stderr) == (0, ""), exported.stderr
    paths = [Path(line) for line in exported.stdout.splitlines()]
    assert [path.name for path in paths] == ["first-step-00000002-fp16.safetensors", "first-step-00000002-fp16"]
    assert all(path.exists() for path in paths)

    drawn = run(
        folder, "scripts/sample.py", folder / "runs/first", "--prompt", "a bird", "--steps", 1, "--size", "64x64"
    )
    assert drawn.returncode == 0 and "\r" not in drawn.stderr, drawn.stderr
    assert [
        line for line in drawn.stderr.splitlines() if not line.startswith(("draw with first-step-", "note: "))
    ] == []
    assert "1 image, each with its prompt" in drawn.stdout and "to publish it" in drawn.stdout


def test_a_config_that_is_wrong_is_json_too(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("optm: {}\n")
    for script in ("train.py", "scripts/build_shards.py", "scripts/inspect_shards.py"):
        refused = run(tmp_path, script, "wrong.yaml", "--json")
        assert refused.returncode == 2 and "optm: unknown key" in json.loads(refused.stdout)["error"], script
        assert refused.stderr.startswith("error: ")

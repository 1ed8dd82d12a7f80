"""What every command line can say at once, it says before anything heavy is imported: torch alone takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "pyarrow", "datasets", "huggingface_hub")
COMMANDS = ["train.py", *sorted(f"scripts/{path.name}" for path in (REPOSITORY / "scripts").glob("[!_]*.py"))]
PROGRAM = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", [name for name in {HEAVY} if name in sys.modules])
"""
REFUSED = {  # what each command refuses by looking at its words and configs alone
    "train.py": ["--config", "wrong.yaml"],
    "scripts/build_shards.py": ["--config", "wrong.yaml"],
    "scripts/choose_subset.py": ["--config", "wrong.yaml"],
    "scripts/compare_runs.py": ["alone"],
    "scripts/explain_step.py": ["--config", "wrong.yaml", "--step", "0"],
    "scripts/export.py": ["runs/a", "--dtype", "fp8"],
    "scripts/inspect_shards.py": ["--config", "wrong.yaml"],
    "scripts/lineage.py": [],
    "scripts/make_demo_data.py": ["--drawings", "gone.txt"],
    "scripts/make_tiny_base.py": ["base", "--posts", "gone.jsonl"],
    "scripts/new_run.py": ["my.txt", "--data", "pics", "--model", "base"],
    "scripts/publish.py": ["run", "publish.dtype=fp8"],
    "scripts/sample.py": ["model", "--prompt", "1girl", "--guidance", "0"],
    "scripts/show_demo.py": [],
    "scripts/train_tiny_vae.py": ["vae.safetensors", "--measure-on", "gone"],
    "scripts/verify_resume.py": ["--config", "wrong.yaml"],
    "scripts/verify_shards.py": [],
    "scripts/write_config_reference.py": ["stray"],
}


def run(folder: Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(REPOSITORY / command), *words], cwd=folder, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def test_there_is_a_case_for_each() -> None:
    assert sorted(REFUSED) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    asked = run(tmp_path, command, "--help")
    assert asked.returncode == 0 and asked.stdout.startswith("usage:")
    assert asked.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_can_be_refused_at_once_is_refused_before_anything_heavy_is_imported(tmp_path: Path, command: str) -> None:
    (tmp_path / "wrong.yaml").write_text("optm: {}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("run: {name: a, stage: b}\n")
    refused = run(tmp_path, command, *REFUSED[command])
    assert refused.returncode == 2 and ("error: " in refused.stderr), refused
    assert refused.stdout == "imported: []\n"

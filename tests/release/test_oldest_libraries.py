"""With the oldest diffusers, transformers and accelerate that pyproject.toml allows the trainer does the same.

They lie in a virtual environment of their own, above everything else that is installed here, PyTorch above all.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from support.paths import REPOSITORY
from support.posts_on_disk import hashes
from trainer.model.run_records import read_run

OVERLAY = REPOSITORY / "build" / "compatibility" / "oldest"  # kept between runs; 210 MB
LIBRARIES = ("diffusers", "transformers", "accelerate")
VERSIONS = f"import importlib.metadata as m; print(*(m.version(name) for name in {LIBRARIES}))"

pytestmark = pytest.mark.slow


def read_oldest() -> dict[str, str]:
    """The lower bound of each of the libraries, a minor version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [re.match(r"(\w+)>=([\d.]+)", line) for line in project["dependencies"]]
    return {bound[1]: bound[2] for bound in bounds if bound and bound[1] in LIBRARIES}


@pytest.fixture(scope="module")
def oldest() -> Path:
    """The Python of the environment, made if it is not there with these versions."""
    pins = [f"{name}=={version}.*" for name, version in read_oldest().items()]
    assert len(pins) == len(LIBRARIES)
    python, mark = OVERLAY / "bin" / "python", OVERLAY / "installed.txt"
    made_of = [*pins, sys.executable]
    if not mark.is_file() or mark.read_text().splitlines() != made_of:
        run(Path(sys.executable), "-m", "venv", "--clear", str(OVERLAY))
        (packages,) = OVERLAY.glob("lib/python*/site-packages")
        (packages / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run(python, "-m", "pip", "install", "--quiet", *pins)
        mark.write_text("\n".join(made_of) + "\n")
    return python


def run(python: Path, *words: str) -> str:
    """What a program prints, with the trainer of this repository and without the network."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"}
    if "pip" not in words:
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [str(python), *words], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-3000:]}"
    return done.stdout


def do_all(python: Path, settings: list[str], folder: Path) -> dict[str, str]:
    """Prepare, train, resume, export and sample; the SHA-256 of the shards and of the last checkpoint's tensors."""
    folder.mkdir()
    config = folder / "run.yaml"
    words = [*settings, f"data.shards={folder / 'shards'}", f"run.output_dir={folder}", "run.name=run"]
    config.write_text(OmegaConf.to_yaml(OmegaConf.from_dotlist(words)))
    run(python, "scripts/build_shards.py", str(config), "schedule.max_steps=2")
    run(python, "train.py", str(config), "schedule.max_steps=2")
    run(python, "train.py", str(config), "schedule.max_steps=4")
    made = folder / "run"
    assert [entry["first_step"] for entry in read_run(made)["attempts"]] == [0, 2]
    run(python, "scripts/export.py", str(made))
    run(python, "scripts/sample.py", str(made), "--prompt", "1girl", "--size", "64x64", "--steps", "4")
    assert list(made.rglob("samples/*.png"))
    compared = hashes(folder / "shards") | hashes(made / "checkpoints" / "step-00000004")
    return {name: value for name, value in compared.items() if name.endswith((".tar", ".safetensors"))}


def test_the_oldest_libraries_do_the_same(oldest: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    versions = run(oldest, "-c", VERSIONS).split()
    assert [version.split(".")[:2] for version in versions] == [each.split(".") for each in read_oldest().values()]
    today = do_all(Path(sys.executable), tiny_settings, tmp_path / "today")
    assert do_all(oldest, tiny_settings, tmp_path / "oldest") == today

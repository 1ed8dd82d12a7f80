"""make setup: which Python it takes, what it says where there is none, and what is left after it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY

# a Python as far as the set-up asks: its version, whether it has ensurepip, a virtual environment, and pip
STUB = """#!/bin/sh
case "$*" in
*version_info*) echo {version} ;;
*ensurepip*) exit {broken} ;;
"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
"-m pip --version") ;;
"-m pip install"*) echo "$*" >> pip.log; case "$*" in {fails}) exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make setup reads, in a folder whose name has spaces."""
    folder = tmp_path / "a folder" / "of mine"
    (folder / "scripts").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "scripts/make_venv.sh"):
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / "bin").mkdir()
    return folder


def make_stub(path: Path, version: str, ensurepip: bool = True, fails: str = "nothing") -> Path:
    path.write_text(STUB.format(version=version, broken=int(not ensurepip), fails=fails))
    path.chmod(0o755)
    return path


def make_setup(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``make setup`` that sees no Python but those of the folder ``bin``."""
    tools = checkout / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("sh", "make", "mkdir", "cp", "rm", "touch"):
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
    environment["PATH"] = f"{checkout / 'bin'}:{tools}"
    command = ["make", "setup", "CUDA=", *words]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def installed(checkout: Path) -> bool:
    return (checkout / ".venv" / "installed").exists()


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        (["3.11", "3.12", "3.13"], "3.13"),
        (["3.11", "3.12"], "3.12"),
        (["3.10", "3.11", "3.14"], "3.11"),
    ],
)
def test_the_newest_python_that_starts_is_taken(checkout: Path, versions: list[str], taken: str) -> None:
    for version in versions:
        make_stub(checkout / "bin" / f"python{version}", version)
    if "3.13" not in versions:  # as pyenv's commands are, of a version that is not chosen
        broken = checkout / "bin" / "python3.13"
        broken.write_text("#!/bin/sh\nexit 127\n")
        broken.chmod(0o755)
    done = make_setup(checkout)
    assert (done.returncode, installed(checkout)) == (0, True)
    assert f"making .venv with python{taken} (Python {taken})" in done.stdout
    assert (checkout / "pip.log").read_text().splitlines()[0].endswith("torch==2.13.0")


def test_one_without_a_version_in_its_name_will_do(checkout: Path) -> None:
    make_stub(checkout / "bin" / "python3", "3.12")
    assert "making .venv with python3 (Python 3.12)" in make_setup(checkout).stdout


def test_a_python_that_is_named_is_taken(checkout: Path) -> None:
    make_stub(checkout / "bin" / "python3.13", "3.13")
    named = make_stub(checkout / "my python", "3.11")
    assert f"making .venv with {named} (Python 3.11)" in make_setup(checkout, f"PYTHON={named}").stdout
    shutil.rmtree(checkout / ".venv")
    newer = make_stub(checkout / "newer", "3.14")
    assert "newer than what this was tested with" in make_setup(checkout, f"PYTHON={newer}").stdout
    shutil.rmtree(checkout / ".venv")
    for wrong in (make_stub(checkout / "old", "3.10"), checkout / "missing"):
        done = make_setup(checkout, f"PYTHON={wrong}")
        assert done.returncode == 2 and f"PYTHON={wrong} is not a Python of 3.11 or newer" in done.stderr
        assert not (checkout / ".venv").exists()


def test_where_there_is_none_it_says_what_to_install(checkout: Path) -> None:
    make_stub(checkout / "bin" / "python3", "3.10")
    done = make_setup(checkout)
    assert done.returncode == 2 and not (checkout / ".venv").exists()
    assert "There is no Python 3.13, 3.12 or 3.11 here" in done.stderr
    assert "sudo apt-get install python3 python3-venv" in done.stderr and "make setup PYTHON=" in done.stderr


def test_a_python_without_venv_is_passed_over_or_named(checkout: Path) -> None:
    make_stub(checkout / "bin" / "python3.12", "3.12", ensurepip=False)
    done = make_setup(checkout)
    assert done.returncode == 2 and not (checkout / ".venv").exists()
    assert "python3.12 cannot make a virtual environment" in done.stderr
    assert "sudo apt-get install python3.12-venv" in done.stderr
    make_stub(checkout / "bin" / "python3.11", "3.11")
    assert "making .venv with python3.11" in make_setup(checkout).stdout


def test_a_venv_that_is_here_is_kept(checkout: Path) -> None:
    python = make_stub(checkout / "bin" / "python3.11", "3.11")
    make_setup(checkout)
    make_stub(checkout / "bin" / "python3.13", "3.13")
    os.utime(checkout / "constraints.txt", (2**32, 2**32))
    done = make_setup(checkout)
    assert "using the .venv that is here, of Python 3.11" in done.stdout and "note" not in done.stdout
    assert "note: for one of python3.13 delete .venv first" in make_setup(checkout, "PYTHON=python3.13").stdout
    assert (checkout / ".venv" / "bin" / "python").read_text() == python.read_text()


@pytest.mark.parametrize("fails", ["*torch*", "*editable*"])
def test_half_an_installation_does_not_count(checkout: Path, fails: str) -> None:
    make_stub(checkout / "bin" / "python3.12", "3.12", fails=fails)
    done = make_setup(checkout)
    assert (done.returncode, installed(checkout)) == (2, False)
    shutil.rmtree(checkout / ".venv" / "bin")  # and one that was interrupted while it was made
    make_stub(checkout / "bin" / "python3.12", "3.12")
    assert make_setup(checkout).returncode == 0 and installed(checkout)
    assert "Nothing to be done" in make_setup(checkout).stdout


def test_what_an_nvidia_gpu_needs_is_installed_where_there_is_one(checkout: Path) -> None:
    make_stub(checkout / "bin" / "python3.12", "3.12", fails="*xformers*")
    done = make_setup(checkout, "CUDA=yes")
    assert done.returncode == 0 and installed(checkout)
    assert "note: xformers could not be installed; all else works without it" in done.stdout
    assert [line.split()[-1] for line in (checkout / "pip.log").read_text().splitlines()] == [
        "torch==2.13.0", ".", "bitsandbytes", "xformers",
    ]  # fmt: skip


def test_another_operating_system_is_answered_in_words() -> None:
    program = "import sys; sys.platform = 'win32'; import trainer"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "the trainer runs on Linux; on Windows in WSL2\n"

"""The next command to type, as it works from here: quoted for the shell, with the Python and scripts that run now."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import trainer


def command(script: str, *words: str | Path) -> str:
    """A command line with one of the repository's scripts, such as ``scripts/export.py``."""
    return shlex.join([find_python(), find_script(script), *map(str, words)])


def config_words(files: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The words by which a command was given its config, for the next one."""
    known = all(file.endswith((".yaml", ".yml")) for file in files)
    return [*([] if known else ["--config"]), *files, *overrides]


def training_command(words: Sequence[str], processes: int = 1, on_cpu: bool = False) -> str:
    """A command line that trains with so many processes."""
    return launch_command("train.py", words, processes, on_cpu)


def launch_command(script: str, words: Sequence[str], processes: int, on_cpu: bool) -> str:
    """A command line with a script in so many processes. (accelerate launch starts one of several on the CPU.)"""
    if processes == 1:
        asked = "ACCELERATE_USE_CPU=true " if on_cpu and "ACCELERATE_USE_CPU" in os.environ else ""
        return asked + command(script, *words)
    launcher = ["torchrun", "--nproc_per_node"] if on_cpu else ["accelerate", "launch", "--num_processes"]
    line = shlex.join([*launcher, str(processes), find_script(script), *words])
    return f"ACCELERATE_USE_CPU=true {line}" if on_cpu else line


def find_python() -> str:
    """``python`` where that is the one that runs now, else its path."""
    found, here = shutil.which("python"), Path(sys.executable)
    if found is not None and Path(found).parent == here.parent:  # links of virtual environments are not followed
        return "python"
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)


def find_script(script: str) -> str:
    """A script's path from here."""
    root = Path(trainer.__file__).parent.parent
    path = root / script
    if Path(script).exists() and Path(script).samefile(path):
        return script
    return os.path.relpath(path) if Path.cwd().is_relative_to(root) else str(path)

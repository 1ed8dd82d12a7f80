"""How many processes a launch was asked for, and whether so many run: accelerate launch may start one, silently.

On the CPU it always does, and on GPUs where its own config file says so. What it was asked for stands in its command
line and in that file; where neither can be read, ``run.num_processes`` says it.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainer.core.commands import launch_command
from trainer.core.distributed import uses_cpu
from trainer.core.errors import UserError
from trainer.core.processes import Launcher, find_launcher

CONFIG_OPTION, COUNT_OPTION = "config_file", "num_processes"  # accelerate launch's
WRITTEN = ("default_config.yaml", "default_config.json")  # by accelerate config


def check_asked(processes: int, stated: int | None, script: str = "train.py") -> None:
    """Compare the number of processes that run with each number that was asked for; ``stated`` is run.num_processes.

    Raises:
        UserError: with the command that starts as many as were asked for.
    """
    for asked, where in find_asked(stated, find_launcher()):
        if asked != processes:
            line = launch_command(script, sys.argv[1:], asked, uses_cpu())
            multi = "" if uses_cpu() else " (with --multi_gpu where accelerate config has written a file)"
            raise UserError(
                f"{asked} processes were asked for, but {processes} run ({where} asks; on the CPU accelerate launch "
                f"starts one). Start {line}{multi}; or ask for {processes}"
            )


def find_asked(stated: int | None, launcher: Launcher | None) -> Iterator[tuple[int, str]]:
    """The numbers of processes that somebody asked for, each with who did."""
    if stated is not None:
        yield stated, "run.num_processes"
    if world := os.environ.get("WORLD_SIZE"):
        yield int(world), "WORLD_SIZE"
    if launcher is None or launcher.name != "accelerate launch":
        return
    if (text := find_option(launcher.words, COUNT_OPTION)) is not None:
        if text.isdecimal():
            yield int(text), f"accelerate launch --{COUNT_OPTION} {text}"
    elif "--cpu" not in launcher.words:  # with it the file is not read
        file = find_option(launcher.words, CONFIG_OPTION)
        path = Path(file).expanduser() if file else find_launch_config()
        if path is not None and (count := read_count(path)) > 0:
            yield count, f"{path}"


def find_option(words: tuple[str, ...], name: str) -> str | None:
    """The value of an option of accelerate launch, which takes hyphens and underscores alike."""
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            return value if equals else next(iter(words[place + 1 :]), None)
    return None


def find_launch_config() -> Path | None:
    """What accelerate config wrote for this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    folder = Path(os.environ.get("HF_HOME") or cache).expanduser() / "accelerate"
    return next((folder / name for name in WRITTEN if (folder / name).is_file()), None)


def read_count(path: Path) -> int:
    """The number of processes in a config file of Accelerate's; 0 where it says none, or is not readable."""
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError):
        return 0
    count = values.get(COUNT_OPTION) if isinstance(values, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else 0

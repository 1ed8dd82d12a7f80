"""What goes wrong inside a process of a fork server, or of a launcher: each is set up before the run begins."""

import time
from pathlib import Path
from typing import Any

from trainer.data import substitutes
from trainer.train import samples, step


def stall_data(after: int) -> None:
    """So many samples are read, and then none: a file system that hangs."""
    read, count = substitutes.read_latents_into, iter(range(10**9))

    def read_or_stall(*arguments: Any) -> None:
        if next(count) >= after:
            time.sleep(3600)
        read(*arguments)

    substitutes.read_latents_into = read_or_stall


def sleep_in_step(after: int, seconds: float = 3600.0) -> None:
    """So many losses are computed, and then this rank sleeps."""
    original, count = step.batch_losses, iter(range(10**9))

    def compute_or_sleep(*arguments: Any) -> Any:
        if next(count) >= after:
            time.sleep(seconds)
        return original(*arguments)

    step.batch_losses = compute_or_sleep


def note_samples(file: str) -> None:
    """A file comes when samples are drawn."""
    original = samples.draw_image

    def note_and_draw(*arguments: Any, **more: Any) -> Any:
        Path(file).touch()
        return original(*arguments, **more)

    samples.draw_image = note_and_draw

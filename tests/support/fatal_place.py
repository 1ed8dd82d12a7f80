"""Paths of images that end the process which opens them. In a module of its own, because that process imports it."""

import os
import pathlib
import signal


class ExitingPath(type(pathlib.Path())):  # type: ignore[misc]
    """Opening it ends the process without a word."""

    def __fspath__(self) -> str:
        os._exit(1)


class KilledPath(type(pathlib.Path())):  # type: ignore[misc]
    """Opening it kills the process, as the kernel does where memory runs out."""

    def __fspath__(self) -> str:
        signal.raise_signal(signal.SIGKILL)
        raise AssertionError

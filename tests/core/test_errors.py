"""How a command ends: a user's problem in one message, a reader that has gone without a word."""

import os
import subprocess
import sys

import pytest

from support.paths import REPOSITORY

PREAMBLE = "import os, sys; from trainer.core.errors import UserError, run_command\n"


def run_with_closed(stream: str, program: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """A program whose stdout or stderr is a pipe that nobody reads any more; the other one is captured."""
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    try:
        return subprocess.run(
            [sys.executable, "-c", PREAMBLE + program], cwd=REPOSITORY, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, **streams,
        )  # fmt: skip
    finally:
        os.close(writing)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("program", "codes"),
    [
        ("run_command(lambda: [print('x' * 100) for _ in range(10_000)])", {141}),
        ("run_command(lambda: print('short'))", {0, 141}),  # buffered, it is seen only when all is done
        ("import argparse; run_command(lambda: argparse.ArgumentParser().parse_args(['--help']))", {0}),
    ],
    ids=["long", "short", "help"],
)
def test_a_reader_that_has_gone_ends_a_command_quietly(program: str, codes: set[int], unbuffered: str) -> None:
    run = run_with_closed("stdout", program, unbuffered)
    assert (run.stderr, run.returncode in codes) == ("", True), run


def test_a_users_problem_is_told_though_nobody_reads_the_output() -> None:
    program = "def main():\n  print('short')\n  raise UserError('mend this')\nrun_command(main)"
    run = run_with_closed("stdout", program)
    assert (run.stderr, run.returncode) == ("error: mend this\n", 2)
    run = run_with_closed("stderr", program)
    assert (run.stdout, run.returncode) == ("short\n", 2)


def test_another_pipe_that_breaks_is_an_error_like_any_other() -> None:
    program = "def main():\n  raise BrokenPipeError('of a worker')\nrun_command(main)"
    run = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program], cwd=REPOSITORY, text=True, check=False, capture_output=True
    )
    assert run.returncode == 1 and run.stderr.endswith("BrokenPipeError: of a worker\n")

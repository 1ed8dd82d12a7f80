"""The repository's scripts as users start them, in a fork of this process, which has imported everything already.

What a script's own imports do, and what depends on the environment at that time, needs a real start instead.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from support.paths import REPOSITORY


def run_script(
    script: str, *words: object, folder: Path = REPOSITORY, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``python script words`` in a folder: its exit code and what it wrote."""
    line = [script, *map(str, words)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            os._exit(become(line, folder, variables))
        _, status = os.waitpid(child, 0)
        said = [file.seek(0) or file.read() for file in (out, errors)]
    return subprocess.CompletedProcess(line, os.waitstatus_to_exitcode(status), *said)


def become(line: list[str], folder: Path, variables: dict[str, str]) -> int:
    """In the child: run the script to its end."""
    os.setsid()
    os.chdir(folder)
    os.environ |= variables
    path = REPOSITORY / line[0]
    sys.argv, sys.path[0] = [str(path) if folder != REPOSITORY else line[0], *line[1:]], str(path.parent)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)  # a fork has none of its parent's
    AcceleratorState._reset_state(reset_partial_state=True)
    code: object = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)

"""How long a save keeps training waiting, and how long it takes: this code and that of version 0.2.0, in turn.

``python benchmarks/saving.py FOLDER --old WORKTREE`` with the folder on the disk to measure; the old code is that of
a worktree (``git worktree add WORKTREE f02ee99``), run in a process of its own on a model of the same tensors. A save
is called as the loop calls it; meanwhile nothing is trained, so that the CPU's cores are the saver's alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

STEP = 1000
OLD = """
import sys, time
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import saving
from trainer.checkpoint import save_checkpoint
from pathlib import Path
model, optimizer = saving.build(int(sys.argv[3]))
for line in sys.stdin:
    begun = time.perf_counter()
    save_checkpoint(Path(line.strip()), model, optimizer, {"step": saving.STEP, "config": {}})
    print(time.perf_counter() - begun, flush=True)
"""


class Model(nn.Module):
    """Matrices of the UNet's kind of size under its name."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        width = 1280
        layers = max(1, round(millions * 1e6 / (8 * width * width)))
        self.unet = nn.ModuleList(nn.Linear(width, 8 * width, bias=False) for _ in range(layers))


def build(millions: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of about so many million parameters in fp32, and AdamW's state of it."""
    model = Model(millions)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def start_old(worktree: Path, millions: int) -> "subprocess.Popen[str]":
    """The old code, which saves into each folder that it is given a line of."""
    words = [sys.executable, "-c", OLD, str(worktree), str(Path(__file__).parent), str(millions)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def measure_old(process: "subprocess.Popen[str]", folder: Path) -> tuple[float, float]:
    """Seconds that training waits, and that a save takes: the same."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{folder}\n")
    process.stdin.flush()
    took = float(process.stdout.readline())
    return took, took


def measure_new(saver: Any, folder: Path, ending: bool) -> tuple[float, float]:
    """The same of this code; at the end of a run it waits."""
    saver.folder = folder
    begun = time.perf_counter()
    saver.save({"step": STEP, "config": {}}, ending)
    pause = time.perf_counter() - begun
    saver.settle()
    return pause, time.perf_counter() - begun


def build_saver(folder: Path, millions: int) -> Any:
    """This code, as a run has it from its beginning to its end."""
    from trainer.config.schema import CheckpointConfig
    from trainer.train.pace import Pace
    from trainer.train.saver import Saver

    return Saver(folder, *build(millions), CheckpointConfig(), Pace())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--old", type=Path, required=True, help="a worktree of version 0.2.0")
    parser.add_argument("--millions", type=int, default=300, help="parameters")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    old = start_old(arguments.old.resolve(), arguments.millions)
    saver = build_saver(arguments.folder, arguments.millions)
    ways = {
        "version 0.2.0": lambda folder: measure_old(old, folder),
        "beside training": lambda folder: measure_new(saver, folder, False),
        "at the end, or where memory lacks room": lambda folder: measure_new(saver, folder, True),
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(1 + arguments.rounds):  # the first is told apart: it takes memory
        for way, save in ways.items():
            folder = arguments.folder / f"saving-{number}"
            took = save(folder)
            shutil.rmtree(folder)
            if number:
                found[way].append(took)
            else:
                print(f"first, {way}: {took[0]:.2f} s, {took[1]:.2f} s", file=sys.stderr)
    old.terminate()
    count = sum(value.numel() for value in saver.model.parameters()) / 1e6
    print(f"{count:.0f} million parameters, AdamW: {12e-3 * count:.1f} GB, medians of {arguments.rounds} rounds\n")
    print("| save | training waits, s | written after, s | waits, of version 0.2.0's | written, of it |")
    print("|---|---|---|---|---|")
    for way, times in found.items():
        pauses, totals = ([pair[place] for pair in times] for place in (0, 1))
        ratios = [
            sorted(one[place] / other[place] for one, other in zip(times, found["version 0.2.0"], strict=True))
            for place in (0, 1)
        ]
        middle = len(times) // 2
        print(f"| {way} | {sorted(pauses)[middle]:.2f} | {sorted(totals)[middle]:.2f} | {ratios[0][middle]:.2f} | "
              f"{ratios[1][middle]:.2f} |")  # fmt: skip
    print(json.dumps(found), file=sys.stderr)


if __name__ == "__main__":
    main()

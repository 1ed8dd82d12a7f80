"""Both stages at full size on the CPU, with random weights: prepared, trained, killed, resumed and exported.

``make full-size`` (2 idle cores, 20 GB of free memory, 45 GB of disk), or ``python benchmarks/full_size.py
--base FOLDER``. Each stage makes two steps and a checkpoint, two more, and is killed while it writes the next one; the
resumed run makes those two again, and must find the same losses and norms to the last digit. What is printed is a
table of what each part took. The first thing that is not as it should be ends it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from random_sdxl import make_random_sdxl

from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.core.layout import CHECKPOINTS_FOLDER, METRICS_FILE
from trainer.model.base import find_base, read_predictions
from trainer.model.checkpoint import find_newest, measure_checkpoint, step_of
from trainer.model.lineage import read_lineage
from trainer.release.artefacts import check_export

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES, BATCH = 4, 2
MORE = 2  # steps that are made before the kill, lost by it, and made again
GB = 1e9
POLL_SECONDS = 0.02
SAME = ("train/loss", "train/grad_norm")  # of a step that is made again


@dataclass(frozen=True)
class Size:
    """What differs at full size and in the small run that tests this script."""

    side: int  # of a square bucket, in pixels
    saved: int  # steps between checkpoints
    planned: int  # steps of the attempt that is killed


FULL, TINY = Size(256, 2, 4), Size(128, 10, 1000)


@dataclass(frozen=True)
class Phase:
    """What one command took."""

    name: str
    seconds: float
    private: float  # bytes, the peak of memory that no file stands behind, of the process and its children
    note: str = ""


class Failed(Exception):
    """Something is not as it should be."""


def run_phase(name: str, words: list[str], kill_when: Callable[[], bool] | None = None) -> Phase:
    """Run a script of ours to its end, or kill it when it is time."""
    print(f"# {name}: {' '.join(words)}", file=sys.stderr, flush=True)
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),  # what is freed goes back at once, see docs/traps.md
    }
    begun, private, killed = time.monotonic(), 0, False
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=sys.stderr)
    while process.poll() is None:
        private = max(private, private_bytes(process.pid))
        if kill_when is not None and kill_when():
            process.send_signal(signal.SIGSTOP)  # what is looked at again must not go on meanwhile
            killed = kill_when()
            process.send_signal(signal.SIGKILL if killed else signal.SIGCONT)
        time.sleep(POLL_SECONDS)
    if (process.returncode != -signal.SIGKILL) if kill_when else process.returncode:
        raise Failed(f"{name} ended with {process.returncode}" + ("" if killed else ", and was not killed by us"))
    return Phase(name, time.monotonic() - begun, private)


def private_bytes(pid: int) -> int:
    """Resident memory of a process and its children without the pages of files; 0 for one that is gone."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return 0
    own = sum(int(status.get(key, "0 kB").split()[0]) for key in ("RssAnon", "RssShmem"))
    return own * 1024 + sum(private_bytes(int(child)) for child in children)


# --- the two stages


def write_config(work: Path, stage: int, base: Path, size: Size) -> Path:
    """The stage's shipped config with what makes it small: steps, images and sizes, but not the model."""
    shipped = ("stage1_feature_alignment", "stage2_refine_unet")[stage - 1]
    posts = work / "posts.jsonl"
    lines = (REPOSITORY / "demo/stage1.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    posts.write_text("".join(lines[:IMAGES]), encoding="utf-8")
    rates = {} if stage == 1 else {"text_encoder_1_lr": 0.0, "text_encoder_2_lr": 0.0}
    side = size.side
    changes: dict[str, Any] = {
        "extends": str(REPOSITORY / f"configs/{shipped}.yaml"),
        "run": {"name": f"stage{stage}", "output_dir": str(work / "runs")},
        "model": {"pretrained": str(base), "revision": None, "vae": None, "vae_revision": None},
        "data": {
            "posts": [str(posts)], "images": str(REPOSITORY / "demo/images"), "shards": str(work / "shards"),
            "global_batch_size": BATCH, "bucket_batch_size": 1, "micro_batch_size": 1, "loader_threads": 1,
            "decode_processes": 1,
        },
        "buckets": {"base_resolution": side, "min_side": side // 2, "max_side": 2 * side, "step": side // 4},
        "optim": {"name": "adafactor", "betas": None, "eps": None, "weight_decay": 0.0, **rates},
        "precision": {
            "compute": "bf16", "weights": "stochastic", "gradients": "bf16", "frozen": "bf16", "vae": "fp32",
        },
        "memory": {"policy": "selective"},
        "schedule": {"epochs": None, "max_steps": size.planned},
        "checkpoint": {"every_steps": size.saved, "keep_last": 1, "keep_every_steps": None},
        "logging": {"every_steps": 1, "trackers": []},
        "sampling": {"every_steps": None, "prompts": []},
    }  # fmt: skip
    path = work / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(changes, sort_keys=False), encoding="utf-8")
    return path


def run_stage(work: Path, stage: int, base: Path, size: Size) -> Iterator[Phase]:
    """Train, kill, resume and export, and check what must be so; the export's folder lies in the run's then."""
    config, run = write_config(work, stage, base, size), work / "runs" / f"stage{stage}"
    if stage == 1:
        yield run_phase(f"prepare {IMAGES} images", ["scripts/build_shards.py", str(config)])
    begun = time.time()
    killed = run_phase(f"stage {stage}, until killed", ["train.py", str(config)], lambda: has_more(run))
    yield noted(killed, describe_attempt(run, 1, begun))
    found = newest_checkpoint(run)
    bytes_each, begun = measure_checkpoint(found), time.time()
    words = ["train.py", str(config), f"schedule.max_steps={step_of(found) + MORE}"]
    resumed = run_phase(f"stage {stage}, resumed: {MORE} steps", words)
    said = f"{describe_attempt(run, 2, begun)}; a checkpoint has {bytes_each / GB:.2f} GB; {compare_steps(run)}"
    yield noted(resumed, said)
    exported = run_phase(f"stage {stage}, export", ["scripts/export.py", str(run)])
    yield noted(exported, check_exports(run))


def has_more(run: Path) -> bool:
    """Whether enough steps are made after the newest checkpoint; at full size the next one is being written then."""
    found = find_newest(run)
    return found is not None and newest_step(run) >= step_of(found) + MORE


def newest_checkpoint(run: Path) -> Path:
    """A run's newest whole checkpoint."""
    if (found := find_newest(run)) is None:
        raise Failed(f"{run} has no checkpoint")
    return found


def newest_step(run: Path) -> int:
    """The last step that is written down; 0 before the first."""
    lines = read_lines(run)
    return lines[-1]["step"] if lines else 0


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run / METRICS_FILE
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def describe_attempt(run: Path, attempt: int, begun: float) -> str:
    """Seconds until the first step was made, and of each."""
    lines = [line for line in read_lines(run) if line["attempt"] == attempt]
    steps = [BATCH / line["perf/images_per_second"] for line in lines]
    launch = lines[0]["time"] - begun - sum(steps[:2])  # a step's line is written when the next one is made
    return f"about {max(0.0, launch):.0f} s until training; {', '.join(f'{step:.1f}' for step in steps)} s/step"


def compare_steps(run: Path) -> str:
    """Refuse a resumed run whose steps are not those that were made before the kill."""
    lines = {(line["attempt"], line["step"]): [line[key] for key in SAME] for line in read_lines(run)}
    again = sorted(step for attempt, step in lines if attempt == 2)
    for step in again:
        if lines[1, step] != lines[2, step]:
            raise Failed(f"{run.name}, step {step}: {lines[1, step]} before the kill, {lines[2, step]} after")
    return f"loss and norm of steps {again[0]} to {again[-1]} as before the kill"


def check_exports(run: Path) -> str:
    """The product's own check of what lies there, and that it opens as a model."""
    paths = sorted(path for path in (run / "export").iterdir() if path.is_dir() or path.suffix == ".safetensors")
    lineage = read_lineage(paths[0])
    if lineage is None:
        raise Failed(f"{paths[0]} has no lineage")
    check_export(paths, lineage, "this should not be")
    for path in paths:
        read_predictions(find_base(str(path)))
    sizes = [sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) for path in paths]
    return ", ".join(f"{path.name}: {size / GB:.2f} GB" for path, size in zip(paths, sizes, strict=True)) + "; whole"


def noted(phase: Phase, note: str) -> Phase:
    return Phase(phase.name, phase.seconds, phase.private, note)


def export_folder(run: Path) -> Path:
    """The export as a diffusers folder."""
    return next(path for path in (run / "export").iterdir() if path.is_dir())


# --- a run that is never stopped, where it costs little


def run_straight(work: Path, base: Path, size: Size) -> Phase:
    """Stage 1 again without a kill: the last checkpoint is to have the same bytes."""
    run, config = work / "runs" / "stage1", write_config(work, 1, base, size)
    ours = newest_checkpoint(run)
    words = ["train.py", str(config), "run.name=straight", f"schedule.max_steps={step_of(ours)}"]
    phase = run_phase("stage 1, never stopped", words)
    theirs = newest_checkpoint(run.with_name("straight"))
    if hash_tensors_of(ours) != hash_tensors_of(theirs):
        raise Failed(f"{ours} and {theirs} hold other weights or states")
    return noted(phase, "the last checkpoint has the bytes of the resumed run's")


def hash_tensors_of(checkpoint: Path) -> dict[str, str]:
    """SHA-256 by name of a checkpoint's files of tensors."""
    return {path.name: sha256_file(path) for path in checkpoint.glob("*.safetensors")}


# --- the whole


def measure_all(work: Path, base: Path | None, size: Size) -> Iterator[Phase]:
    """All phases, in order; what the next one does not need is deleted as soon as it can be."""
    if base is None:
        begun, base = time.monotonic(), work / "base"
        make_random_sdxl(base)
        yield Phase("random weights", time.monotonic() - begun, 0)
    yield from run_stage(work, 1, base, size)
    if size == TINY:
        yield run_straight(work, base, size)
    run = work / "runs" / "stage1"
    refined = export_folder(run)
    shutil.rmtree(run / CHECKPOINTS_FOLDER)
    next((run / "export").glob("*.safetensors")).unlink()
    yield from run_stage(work, 2, refined, size)


@contextmanager
def working_folder(given: Path | None) -> Iterator[Path]:
    """A folder for everything, which is deleted at the end unless it is the user's."""
    if given is not None:
        given.mkdir(parents=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="full_size") as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a diffusers folder; default: one with random weights is made")
    parser.add_argument("--tiny", action="store_true", help="with a small --base: buckets of 128, and a straight run")
    parser.add_argument("--work", type=Path, help="a new folder for what is made, which is not deleted at the end")
    words = parser.parse_args()
    phases, base = [], words.base and words.base.resolve()
    print("| part | time | private memory | |\n|---|---|---|---|", flush=True)
    with working_folder(words.work) as work:
        for phase in measure_all(work, base, TINY if words.tiny else FULL):
            phases.append(phase)
            print_row(phase)
    print_row(Phase("all", sum(phase.seconds for phase in phases), max(phase.private for phase in phases)))


def print_row(phase: Phase) -> None:
    memory = f"{phase.private / GB:.1f} GB" if phase.private else ""
    print(f"| {phase.name} | {phase.seconds:.0f} s | {memory} | {phase.note} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (Failed, UserError) as error:
        sys.exit(f"full_size.py: {error}")

"""metrics.jsonl always; trackers through Accelerate; throughput and model FLOPs utilisation."""

import errno
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.core.disk import disk_space
from trainer.model.base import Base, read_config
from trainer.model.sdxl import COMPONENTS, SDXL, build_empty

# Dense fp16 / bf16 peak with fp32 accumulation, FLOP/s, from the makers' data sheets, by the whole of a device's name.
# What is not listed has no figure: a laptop's or a partition's name holds that of a card that is faster.
PEAK_FLOPS = {
    r"A[18]00-SXM4-(40|80)GB|A100-PCIE-(40|80)GB|A100 80GB PCIe|A800 (40|80)GB (PCIe|Active)": 312e12,
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H100 80GB HBM3|H800|H200|GH200 480GB": 989e12,
    r"L40S": 362e12,
    r"GeForce RTX 4090": 165e12,
    r"GeForce RTX 3090": 71e12,
    r"RTX A6000": 155e12,
}
STEP_METRIC = "step"  # wandb's own step must grow, so ours is a metric of its own there, and the axis of all others


class MetricsFile:
    """Append-only JSON lines, each with step and attempt: where a step occurs twice, the last attempt wins."""

    def __init__(self, path: Path, attempt: int):
        self.path, self.attempt = path, attempt
        self.torn = ends_torn(path)  # a killed process, or a full disk, left half a line
        self.file = path.open("ab", buffering=0)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """One line, out of the process's hands when this returns.

        Raises:
            FullDisk: and other errors of the disk; the line is lost, and others can be written later.
        """
        line = {"step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        text = b"\n" * self.torn + json.dumps(line, allow_nan=False).encode() + b"\n"
        with disk_space(self.path.parent, str(self.path)):
            written = self.file.write(text) or 0
            self.torn = written < len(text) and (written > 0 or self.torn)
            if written < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def ends_torn(path: Path) -> bool:
    """Whether a log's last line has no end; of the log nothing else is read."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def tracker_settings(trackers: Sequence[str], run_id: str, name: str, folder: Path, first: int) -> dict[str, Any]:
    """What Accelerate's ``init_trackers`` gets for each tracker of a run that has made ``first`` steps.

    One wandb run is continued across resumes. TensorBoard hides what an earlier attempt wrote of the steps to come.
    """
    settings: dict[str, Any] = {}
    if "wandb" in trackers:
        key = os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
        mode = {} if key or "WANDB_MODE" in os.environ else {"mode": "offline"}  # without a key it would ask
        settings["wandb"] = {"id": run_id, "name": name, "resume": "allow", "dir": str(folder), **mode}
    if "tensorboard" in trackers:
        settings["tensorboard"] = {"purge_step": first + 1}
    return settings


@dataclass(frozen=True)
class Aside:
    """Something that is done between two steps."""

    what: str
    begun: float  # seconds
    took: float


class Window:
    """What the steps since the last line of metrics, or since the beginning of this attempt, took and gave.

    A step is read when the next one is under way, so that what was done between them comes here before it: what had
    not begun when the step was launched is no part of its time.
    """

    def __init__(self, start: float, asides: Sequence[Aside] = ()) -> None:
        self.start, self.steps, self.asides = start, 0, list(asides)
        self.loss: Tensor | None = None  # the sum, fp32
        self.losses = 0  # how many

    def add(self, loss: Tensor | None) -> None:
        """One more step; None for a loss that is not finite."""
        self.steps += 1
        if loss is None:
            return
        self.losses += 1
        self.loss = loss if self.loss is None else self.loss + loss

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count what is done inside as no time of the steps."""
        begun = time.perf_counter()
        yield
        self.asides.append(Aside(what, begun, time.perf_counter() - begun))

    def mean_loss(self) -> float | None:
        """Over the window's steps whose loss was finite; None without any."""
        return None if self.loss is None else float(self.loss) / self.losses

    def seconds_of(self, what: str, until: float) -> float | None:
        """How long that took, in all; None where it was not done."""
        took = [aside.took for aside in self.asides if aside.what == what and aside.begun < until]
        return sum(took) if took else None

    def steps_per_second(self, until: float) -> float:
        """Without what was done between them."""
        return self.steps / (until - self.start - sum(aside.took for aside in self.asides if aside.begun < until))

    def next(self, until: float) -> "Window":
        """The window of the steps that were launched later."""
        return Window(until, [aside for aside in self.asides if aside.begun >= until])


def memory_gb(device: torch.device) -> float | None:
    """A GPU's peak of allocated memory since the last call; the process's resident memory on the CPU, on Linux."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    statm = Path("/proc/self/statm")  # in pages, resident ones second
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9 if statm.exists() else None


def training_flops(base: Base, height: int, width: int, chunks: int, trained: dict[str, bool]) -> float:
    """FLOPs of one sample's training step at a size in pixels, by counting a forward on the meta device.

    Backward counts twice the forward; a frozen text encoder has none. Recomputed activations do not count
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    model = SDXL(
        **{part: build_empty(part, read_config(base, folder)).to("meta") for part, folder in COMPONENTS.items()}
    )
    inputs = {
        "noisy_latents": torch.empty(1, 4, height // 8, width // 8, device="meta"),
        "timesteps": torch.empty(1, device="meta"),
        "input_ids_1": torch.empty(chunks, 77, dtype=torch.int64, device="meta"),
        "input_ids_2": torch.empty(chunks, 77, dtype=torch.int64, device="meta"),
        "chunk_map": torch.empty(1, chunks, dtype=torch.int64, device="meta"),
        "time_ids": torch.empty(1, 6, device="meta"),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counts = counter.get_flop_counts()
    by_part = {part: sum(counts.get(f"SDXL.{part}", {}).values()) for part in COMPONENTS}
    # gradients flow through a frozen UNet to a trained encoder, but no weight gradients are made: once more, not twice
    backward = {part: 2.0 if trained[part] else 0.0 for part in COMPONENTS}
    if not trained["unet"]:
        backward["unet"] = 1.0
    return float(sum(count * (1.0 + backward[part]) for part, count in by_part.items()))


def find_peak_flops(device_name: str, compute: str) -> float | None:
    """The device's peak in 16-bit arithmetic; None where it is not known or the run does not use it."""
    if compute == "fp32":
        return None
    name = re.sub(r"^NVIDIA ", "", device_name)
    return next((peak for whole, peak in PEAK_FLOPS.items() if re.fullmatch(whole, name)), None)

"""metrics.jsonl always; trackers through Accelerate; throughput and model FLOPs utilisation."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.model.base import Base, read_config
from trainer.model.sdxl import COMPONENTS, SDXL, build_empty

# dense fp16 / bf16 peak, FLOP/s, from the makers' data sheets
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
}


class MetricsFile:
    """Append-only JSON lines, each with step and attempt: where a step occurs twice, the last attempt wins."""

    def __init__(self, path: Path, attempt: int):
        self.attempt = attempt
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        self.file = path.open("a", encoding="utf-8")
        if torn:  # a killed process left half a line
            self.file.write("\n")

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """One line, out of the process's hands when this returns."""
        line = {"step": step, "attempt": self.attempt, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Step -> its line of the last attempt; torn lines are passed over."""
    lines: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["step"] not in lines or line["attempt"] >= lines[line["step"]]["attempt"]:
            lines[line["step"]] = line
    return lines


def tracker_settings(trackers: list[str], run_id: str, name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What Accelerate's ``init_trackers`` gets for each tracker: one wandb run, continued across resumes."""
    settings: dict[str, dict[str, Any]] = {}
    if "wandb" in trackers:
        key = os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
        mode = {} if key or "WANDB_MODE" in os.environ else {"mode": "offline"}  # without a key it would ask
        settings["wandb"] = {"id": run_id, "name": name, "resume": "allow", "dir": str(folder), **mode}
    return settings


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
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)

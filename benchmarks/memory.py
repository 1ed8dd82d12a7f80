"""What a training step at full size holds and computes, by stage, policy and micro-batch: counted, not measured.

Everything is counted on the meta device, in a few minutes on any machine: weights, gradients and the optimizer's state,
the activations that lie between forward and backward, the most at any time, and FLOPs. What a GPU holds beside that
(the CUDA context, workspaces, holes between segments) is not in it: see trainer/train/memory.py.
"""

import argparse
import json
import tempfile
from pathlib import Path

from trainer.config.schema import MemoryConfig, MemoryPolicy, ModelConfig, PrecisionConfig
from trainer.model.base import Base, read_sdxl_config
from trainer.model.sdxl import COMPONENTS, DTYPES, outline_sdxl
from trainer.train.memory import Shape, count_step, estimate
from trainer.train.policy import FASTEST_FIRST, FITS

STAGES = {
    1: ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True),
    2: ModelConfig(pretrained=""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=3, help="of 75 tokens, all of them different")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24, 48], help="in a micro-batch")
    parser.add_argument("--compute", choices=DTYPES, default="fp16")
    parser.add_argument("--weights", choices=["autocast", "master", "stochastic"], default="autocast")
    parser.add_argument("--gradients", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--optimizer", choices=["adamw", "adamw8bit", "adafactor"], default="adamw")
    arguments = parser.parse_args()
    print(
        f"{arguments.width} x {arguments.height}, {arguments.chunks} chunks, {arguments.compute}, weights "
        f"{arguments.weights}, gradients {arguments.gradients}, {arguments.optimizer}. GB; "
        f"fits: what of 80 GB and of 141 GB ({FITS:.0%} of them)\n"
    )
    print("| stage | policy | micro-batch | static | saved | peak beside static | total | fits | TFLOP a sample |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = write_configs(Path(folder))
        for stage in STAGES:
            for policy in FASTEST_FIRST:
                for samples in arguments.samples:
                    print(count_row(base, stage, policy, samples, arguments), flush=True)


def count_row(base: Base, stage: int, policy: MemoryPolicy, samples: int, arguments: argparse.Namespace) -> str:
    """One row of the table."""
    precision = PrecisionConfig(
        arguments.compute, weights=arguments.weights, gradients=arguments.gradients, frozen=arguments.compute
    )
    model = outline_sdxl(base, STAGES[stage], precision, MemoryConfig(policy))
    shape = Shape(samples, arguments.width, arguments.height, arguments.chunks)
    counted = count_step(model, shape, precision)
    needs = estimate(model, arguments.optimizer, precision, counted.peak)
    fits = ", ".join(str(size) for size in (80, 141) if needs.total <= FITS * size * 1e9) or "no"
    gigabytes = (needs.total - needs.activations, counted.saved, counted.peak, needs.total)
    numbers = " | ".join(f"{value / 1e9:.1f}" for value in gigabytes)
    return f"| {stage} | {policy} | {samples} | {numbers} | {fits} | {counted.flops / samples / 1e12:.1f} |"


def write_configs(folder: Path) -> Base:
    """SDXL's own configs, without a single weight."""
    for component in COMPONENTS.values():
        (folder / component).mkdir()
        (folder / component / "config.json").write_text(json.dumps(read_sdxl_config(component)))
    return Base("SDXL", folder, None)


if __name__ == "__main__":
    main()

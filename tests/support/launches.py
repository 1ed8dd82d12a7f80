"""Real launches of a training with torchrun and gloo, which are killed for real."""

import os
import subprocess
import sys
import time
from pathlib import Path

from support.paths import REPOSITORY
from trainer.core.processes import kill_family

# the 24 drawings in units of 6 make 5 steps in the first epoch: its border lies within the run
LENGTH = ["schedule.max_steps=8", "checkpoint.every_steps=1", "checkpoint.keep_last=99", "data.loader_threads=1",
          "data.global_batch_size=6", "data.bucket_batch_size=6", "data.micro_batch_size=1"]  # fmt: skip
STAGES = {
    "1": [
        "model.train_text_encoder_1=true", "model.train_text_encoder_2=true",
        "optim.text_encoder_1_lr=1e-3", "optim.text_encoder_2_lr=1e-3",
    ],
    "2": [
        "diffusion.noise_offset=0.0357", "captions.frequent_tag_dropout=0.5", "captions.frequent_tag_share=0.1",
        "captions.template=[{tags: copyright, dropout: 0.3, fixed: true}, {tags: artist, tag_dropout: 0.3}, "
        "{tags: general, max_tags: 1}, {tag: year, fixed: true}, {text: drawn}]",
    ],
    "weighted": [
        "diffusion.timestep_sampling=stratified", "data.weights=[{factor: 1.7, tag: food}, {factor: 0, tag: menu}]",
        "captions.mix={tags: 0.6, natural: 0.4}", "captions.tag_dropout=0.2",
    ],
}  # fmt: skip


def launch(processes: int, words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
         "tests/support/launch_driver.py", *words],
        cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output
    return output


def kill_after(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Kill the launcher and all its processes at once, as soon as a step's checkpoint is there."""
    deadline = time.monotonic() + 400
    while not (folder / "checkpoints" / f"step-{step:08d}").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    kill_family(process)
    process.communicate()

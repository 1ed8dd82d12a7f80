"""Posts and drawings on disk, a small random VAE, and the preparation of both: what the tests of preparing share."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from support.paths import REPOSITORY
from trainer.config.schema import BucketsConfig, Config, DataConfig, ModelConfig, PrecisionConfig, RunConfig
from trainer.core.files import sha256_file
from trainer.data.shards import SCHEMA, Row
from trainer.prepare.prepare import Summary, prepare

BUCKETS = {"base_resolution": 64, "min_side": 32, "max_side": 128, "step": 32, "upscale": True}


def make_vae(seed: int) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip


def make_base(folder: Path) -> Path:
    """A diffusers folder of which preparation reads the VAE only; the other parts are empty."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"), ("text_encoder_2", "model")):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        save_file({}, folder / part / f"{stem}.safetensors")
    make_vae(0).save_pretrained(folder / "vae")
    return folder


def draw(path: Path, number: int, size: tuple[int, int] | None = None) -> None:
    """A picture of its own, in one of several shapes."""
    width, height = size or [(90, 60), (60, 90), (70, 70), (200, 50)][number % 4]
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(path)


def make_posts(folder: Path, count: int) -> None:
    """``count`` good posts with images, in no order of keys."""
    (folder / "images").mkdir(parents=True)
    with (folder / "posts.jsonl").open("w") as file:
        for number in range(count):
            post_id = (number * 7) % count + 1
            draw(folder / "images" / f"{post_id}.png", post_id)
            width, height = [(90, 60), (60, 90), (70, 70), (200, 50)][post_id % 4]
            post = {"id": post_id, "score": number, "tag_string_general": f"1girl tag_{post_id}", "rating": "g",
                    "image_width": width, "image_height": height, "created_at": "2020-01-01"}  # fmt: skip
            file.write(json.dumps(post) + "\n")


def make_config(base: Path, folder: Path, **data: Any) -> Config:
    fields = {
        "posts": [str(folder / "posts.jsonl")],
        "images": str(folder / "images"),
        "samples_per_shard": 5,
        "decode_processes": 1,
    }
    return Config(
        run=RunConfig("test", "1"),
        model=ModelConfig(str(base)),
        data=DataConfig(**{"shards": str(folder / "shards"), **fields, **data}),
        buckets=BucketsConfig(**BUCKETS),
        precision=PrecisionConfig(compute="fp32", frozen="fp32", vae="fp32"),
    )


def run(config: Config) -> Summary:
    return prepare(config)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def to_floats(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1], in version 0.2.0's words."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1.0


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def copy_of(config: Config, target: Path) -> Config:
    """The same posts and images elsewhere, without shards."""
    source = Path(str(config.data.images)).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("shards*"))
    return make_config(Path(config.model.pretrained), target)


def write_yaml(config: Config, path: Path) -> Path:
    """The config as a file, for processes of their own."""
    data = {name: getattr(config.data, name) for name in ("posts", "images", "shards", "samples_per_shard")}
    path.write_text(yaml.safe_dump({
        "run": {"name": "test", "stage": "1"}, "model": {"pretrained": config.model.pretrained},
        "data": data | {"decode_processes": config.data.decode_processes},
        "buckets": BUCKETS, "optim": {"unet_lr": 1e-5}, "schedule": {"max_steps": 1},
        "precision": {"compute": "fp32", "frozen": "fp32", "vae": "fp32"},
    }))  # fmt: skip
    return path


def start_script(config: Path, *words: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """scripts/build_shards.py in a process of its own, or in those that ``launcher`` starts."""
    script = [
        *(launcher or [sys.executable]),
        str(REPOSITORY / "scripts" / "build_shards.py"),
        "--config",
        str(config),
        *words,
    ]
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        script, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
    )


def rows_to_table(rows: list[Row]) -> pa.Table:
    """Rows as the index has them: an Arrow table of its columns, in order of the keys."""
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=SCHEMA)

"""A run's folder with one checkpoint, as training leaves it, without a training: what exporting and publishing read."""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from support.checkpoints import MODEL, OPTIMIZER, describe_file
from trainer.config.load import load_config
from trainer.model.base import find_base, hash_base, read_state, read_vae
from trainer.model.checkpoint import seal
from trainer.model.lineage import build_lineage
from trainer.model.sdxl import COMPONENTS

Parts = dict[str, dict[str, torch.Tensor]]


def moved_weights(pretrained: Path, seed: int = 7) -> Parts:
    """The base's UNet and text encoders after a training that moved every tensor."""
    base, generator = find_base(str(pretrained)), torch.Generator().manual_seed(seed)
    return {
        part: {
            name: tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in read_state(base, component).items()
        }
        for part, component in COMPONENTS.items()
    }


def make_run(folder: Path, pretrained: Path, trained: Parts, *words: str, step: int = 20) -> Path:
    """A run's folder with one checkpoint, as training leaves it."""
    lines = [
        f"run.name={folder.name}", "run.stage=feature_alignment", f"run.output_dir={folder.parent}",
        f"model.pretrained={pretrained}", "data.shards=shards", "schedule.max_steps=100", "optim.unet_lr=1e-3",
        "model.train_text_encoder_1=true", "model.train_text_encoder_2=true", "optim.text_encoder_1_lr=1e-3",
        "optim.text_encoder_2_lr=1e-3", "precision.compute=fp32", "precision.frozen=fp32",
        "publish.dtype=fp32", "publish.author=A. N. Other",
    ]  # fmt: skip
    config = load_config([], [*lines, *words])
    base = find_base(str(pretrained))
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    tensors = {f"{part}.{name}": tensor for part, state in trained.items() for name, tensor in state.items()}
    save_file(tensors, checkpoint / MODEL)
    save_file({"x": torch.zeros(1)}, checkpoint / OPTIMIZER)
    facts = {
        "base": {"reference": str(pretrained), "revision": None, "sha256": hash_base(base)},
        "vae_sha256": read_vae(config.model.vae, base).sha256,
        "index_fingerprint": "ab12",
        "images": 100,
    }
    state = facts | {
        "format_version": 2,
        "name": checkpoint.name,
        "run": folder.name,
        "stage": "feature_alignment",
        "step": step,
        "config": config.written,
        "lineage": build_lineage(config, facts, step),
        "files": {name: describe_file(checkpoint / name) for name in (MODEL, OPTIMIZER)},
    }
    (checkpoint / "checkpoint.json").write_bytes(seal(state))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config.written))
    return folder

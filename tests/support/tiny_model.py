"""A random SDXL of a few kilobytes, to prove what does not depend on size or training."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.data.loader import Batch
from trainer.model.single_file import NAME_PREFIXES

CLIP = {
    "max_position_embeddings": 77,
    "num_attention_heads": 2,
    "vocab_size": 600,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "model_type": "clip_text_model",
    "num_hidden_layers": 3,
}
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [16, 32, 32, 48],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2, 1, 3],
        "attention_head_dim": [2, 4, 4, 4],
        "cross_attention_dim": 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "norm_num_groups": 8,
        "sample_size": 8,
        "use_linear_projection": True,
    },
    "text_encoder": CLIP | {
        "architectures": ["CLIPTextModel"],
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
    },
    "text_encoder_2": CLIP | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "projection_dim": 24,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.2,
        "force_upcast": False,
    },
}  # fmt: skip
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model", "text_encoder_2": "model"}  # fmt: skip
Parts = dict[str, dict[str, torch.Tensor]]


def build_module(component: str, config: dict[str, Any]) -> torch.nn.Module:
    """The library's own module of a component, with random weights."""
    if component == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    if component == "text_encoder_2":
        return CLIPTextModelWithProjection(CLIPTextConfig(**config))
    return (UNet2DConditionModel if component == "unet" else AutoencoderKL).from_config(config)


def classic_state(component: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors under the names that transformers 4 and diffusers save."""
    state = module.state_dict()
    if component == "text_encoder" and not any(name.startswith("text_model.") for name in state):
        return {f"text_model.{name}": tensor for name, tensor in state.items()}
    return state


def build_parts(configs: dict[str, dict[str, Any]]) -> Parts:
    """All components as the libraries build them, under classic names."""
    return {
        component: classic_state(component, build_module(component, config)) for component, config in configs.items()
    }


def random_parts(seed: int) -> Parts:
    """Tiny components with every tensor random, biases and norms too, small enough to sample from."""
    generator = torch.Generator().manual_seed(seed)
    return {
        component: {
            name: tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in part.items()
        }
        for component, part in build_parts(TINY).items()
    }


def write_folder(folder: Path, parts: Parts, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder in the classic layout."""
    for component, part in parts.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(TINY[component]))
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in part.items()}
        save_file(tensors, folder / component / f"{STEMS[component]}.safetensors", {"format": "pt"})
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "EulerDiscreteScheduler"}
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {name: ["diffusers", classes[name]] for name in classes}
    index |= {name: ["transformers", encoders[name]] for name in encoders}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
        "_class_name": classes["scheduler"],
    }
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name in ("tokenizer", "tokenizer_2"):  # found, never read
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text("{}")
        (folder / name / "merges.txt").write_text("")
    return folder


def read_assets() -> dict[str, dict[str, Any]]:
    """The configs of full-size SDXL's components."""
    folder = resources.files("trainer.model") / "assets" / "sdxl"
    return {component: json.loads((folder / component / "config.json").read_text()) for component in NAME_PREFIXES}


def make_batch(seed: int, timestep: int) -> Batch:
    """A sample of 64 x 64 pixels for one of these models."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 599, (1, 77), generator=generator)
    return Batch(
        keys=[f"key{seed}"],
        raw_latents=torch.randn(1, 4, 8, 8, generator=generator).half(),
        noise=torch.randn(1, 4, 8, 8, generator=generator),
        timesteps=torch.tensor([timestep]),
        input_ids_1=ids,
        input_ids_2=ids,
        chunk_map=torch.zeros(1, 1, dtype=torch.int64),
        time_ids=torch.full((1, 6), 64.0),
    )

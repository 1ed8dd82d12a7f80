"""What a wrong file or folder is, is said before anything else; an fp8 base that loads is noted."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.tiny_model import TINY, random_parts, write_folder
from trainer.core.errors import UserError
from trainer.model.base import find_base, note_weights, read_state
from trainer.model.single_file import NAME_PREFIXES, to_single_file

PARTS = random_parts(seed=4)
WHOLE = to_single_file(PARTS, TINY)
UNET = {name: tensor for name, tensor in WHOLE.items() if name.startswith(NAME_PREFIXES["unet"])}
VAE = {name: tensor for name, tensor in WHOLE.items() if name.startswith(NAME_PREFIXES["vae"])}
ENCODERS = {name: tensor for name, tensor in WHOLE.items() if name.startswith("conditioner.")}
NAMES = {  # a few names that each format always has
    "lora": ["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"],
    "peft": ["unet.down_blocks.0.attn.to_q.lora_A.weight", "unet.down_blocks.0.attn.to_q.lora_B.weight"],
    "lokr": ["lora_unet_mid_block.lokr_w1", "lora_unet_mid_block.lokr_w2"],
    "controlnet": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "inversion": ["clip_l", "clip_g"],
    "flux": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "flux_comfy": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "text_encoders.t5xxl.x"],
    "sd3": ["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"],
    "sd1": ["cond_stage_model.transformer.text_model.x", "model.diffusion_model.input_blocks.0.0.weight"],
    "sd2": ["cond_stage_model.model.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
    "refiner": ["conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.input_blocks.0.0.weight"],
    "lumina": ["model.diffusion_model.cap_embedder.0.weight", "text_encoders.gemma2_2b.x"],
    "diffusers_unet": ["down_blocks.0.resnets.0.conv1.weight", "up_blocks.0.resnets.0.conv1.weight"],
    "diffusers_vae": ["decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.conv_in.weight"],
    "encoder": ["text_model.embeddings.token_embedding.weight"],
    "checkpoint": ["unet.conv_in.weight", "text_encoder_1.text_model.final_layer_norm.weight"],
}
SAID = {
    "lora": "is a LoRA", "peft": "is a LoRA", "lokr": "is a LoRA", "controlnet": "is a ControlNet",
    "adapter": "is an image adapter", "inversion": "is a textual inversion", "flux": "is a Flux model",
    "flux_comfy": "is a Flux model", "sd3": "is a Stable Diffusion 3 model", "sd1": "is a Stable Diffusion 1 model",
    "sd2": "is a Stable Diffusion 2 model", "refiner": "is SDXL's refiner", "lumina": "of another architecture",
    "diffusers_unet": "is a UNet without text encoders", "diffusers_vae": "is a VAE alone",
    "encoder": "text encoders alone", "checkpoint": "file of a training checkpoint.*export",
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_other_models_are_told_by_their_tensors_names(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "base.safetensors"
    save_file({name: torch.zeros(1) for name in NAMES[kind]}, path)
    with pytest.raises(UserError, match=f"base.safetensors .*{SAID[kind]}"):
        find_base(str(path))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (UNET, "is a UNet without text encoders"),
        (UNET | VAE, "is a UNet without text encoders"),
        (VAE, r"is a VAE alone, which model\.vae can name"),
        (ENCODERS, "text encoders alone"),
        (WHOLE | {"scaled_fp8": torch.zeros(1)}, "scaled fp8"),
        (WHOLE | {"model.diffusion_model.out.2.scale_weight": torch.ones(())}, "scaled fp8"),
        (WHOLE | {"model.diffusion_model.out.2.weight.absmax": torch.ones(1)}, "quantised"),
        (WHOLE | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "is an EDM model"),
        (WHOLE | {"edm_vpred.sigma_max": torch.ones(1)}, "is an EDM model"),
        (WHOLE | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, "an inpainting model"),
        ({}, "holds no tensors"),
    ],
)
def test_models_that_are_almost_one_are_told_too(tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    path = tmp_path / "base.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=said):
        find_base(str(path))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6938078334\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, r"Git LFS pointer, which stands for a file of 6,938,078,334 bytes: run git lfs pull"),
        (b"<!DOCTYPE html><html>" + b" " * 2000, "is a web page"),
        (b"\n<html><head>", "is a web page"),
        (b'{"error": "Invalid username or password."}', "JSON text.*Invalid username"),
        (b"", r"is empty \(0 bytes\)"),
        (b"abc", "too few"),
        (pickle.dumps({"state_dict": 1}), "is a pickled checkpoint"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "is a pickled checkpoint"),
        (b"PK\x03\x04" + bytes(26) + b"model.safetensors", "is a compressed archive"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "is a GGUF file"),
    ],
)
def test_files_that_are_no_weights_are_told_by_their_bytes(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        find_base(str(path))


def test_half_a_download_says_how_much_is_there(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file(WHOLE, path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for end, said in (
        (len(content) - 1, f"has {len(content) - 1:,} of its {len(content):,} bytes: the download was cut off"),
        (length // 2, "ends within its header: the download was cut off"),
    ):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=said):
            find_base(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "base", PARTS)


def test_a_pointer_within_a_folder_is_told(folder: Path) -> None:
    """A repository that was cloned without Git LFS."""
    (folder / "text_encoder_2" / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"text_encoder_2/model\.safetensors .*Git LFS pointer"):
        find_base(str(folder))


def test_folders_of_other_models_are_told(folder: Path, tmp_path: Path) -> None:
    index, unet = folder / "model_index.json", folder / "unet" / "config.json"
    unet.write_text(json.dumps(TINY["unet"] | {"in_channels": 9}))
    with pytest.raises(UserError, match="an inpainting model: its UNet takes 9 channels"):
        find_base(str(folder))
    unet.write_text(json.dumps(TINY["unet"] | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(UserError, match="quantised UNet"):
        find_base(str(folder))
    unet.write_text(json.dumps(TINY["unet"]))
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match="is SDXL's refiner"):
        find_base(str(folder))
    shutil.rmtree(folder / "unet")
    (folder / "transformer").mkdir()
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="is a FluxPipeline, with a transformer in place of a UNet"):
        find_base(str(folder))


def test_folders_that_are_none_say_what_lies_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one part of a model: name the folder around it"):
        find_base(str(folder / "unet"))
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": torch.zeros(1)}, other / "model_v1.safetensors")
    with pytest.raises(UserError, match=r"it holds model_v1\.safetensors: name one of these files"):
        find_base(str(other))
    save_file({"x": torch.zeros(1)}, other / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="it holds a LoRA"):
        find_base(str(other))


def test_an_fp8_base_loads_and_is_noted(folder: Path, tmp_path: Path) -> None:
    assert note_weights(find_base(str(folder))) is None
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in PARTS["unet"].items()}
    save_file(eight, folder / "unet" / "diffusion_pytorch_model.safetensors")
    base = find_base(str(folder))
    assert "tensors of unet/diffusion_pytorch_model.safetensors are stored in fp8" in str(note_weights(base))
    state = read_state(base, "unet")
    assert all(torch.equal(tensor.float(), eight[name].float()) for name, tensor in state.items())
    path = tmp_path / "base.safetensors"
    save_file(WHOLE | {name: tensor.to(torch.float8_e4m3fn) for name, tensor in UNET.items()}, path)
    noted = str(note_weights(find_base(str(path))))
    assert f"{len(UNET)} of {len(WHOLE)} tensors of the file are stored in fp8" in noted


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    """Quantised without a word in any config: they would be read as very large weights."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(PARTS["unet"] | {"conv_in.weight": torch.ones(16, 4, 3, 3, dtype=torch.int8)}, path)
    with pytest.raises(UserError, match=r"unet: conv_in\.weight holds int8 numbers: the weights are quantised"):
        read_state(find_base(str(folder)), "unet")

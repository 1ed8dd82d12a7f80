"""Hashes of tensors, and whether this machine's libraries compute the same last bits as the one that recorded some.

Kernels differ between processors and versions of PyTorch, so that a run that was recorded elsewhere is the same bit by
bit only where they agree. The libraries alone are asked, without the trainer: what differs here is not our doing.
"""

import hashlib
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection


def hash_tensors(path: Path) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of a .safetensors file, whatever its header says."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def probe_arithmetic(base: Path) -> str:
    """SHA-256 of two AdamW steps of a base's UNet and second text encoder, in diffusers layout, on fixed inputs."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32, local_files_only=True)
    encoder = CLIPTextModelWithProjection.from_pretrained(
        base / "text_encoder_2", torch_dtype=torch.float32, local_files_only=True
    )
    parameters = [*unet.parameters(), *encoder.parameters()]
    for parameter in parameters:
        parameter.data = parameter.data.clone()  # what is mapped from a file lies at odd addresses, which changes bits
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    width = unet.config.cross_attention_dim - encoder.config.hidden_size
    pixels = (torch.arange(2 * 4 * 8 * 8).reshape(2, 4, 8, 8) * 37 % 101).float() / 50 - 1
    ids = torch.arange(2 * 77).reshape(2, 77) * 7 % encoder.config.vocab_size
    for _ in range(2):
        output = encoder(ids, output_hidden_states=True)
        hidden = torch.nn.functional.pad(output.hidden_states[-2], (width, 0))
        added = {"text_embeds": output.text_embeds, "time_ids": torch.full((2, 6), 64.0)}
        predicted = unet(pixels, torch.tensor([10, 900]), hidden, added_cond_kwargs=added).sample
        (predicted - pixels).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()

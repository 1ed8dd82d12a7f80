"""Fixed prompts and seeds -> images, with no effect on the training's numbers.

Diffusers' own pipeline and Euler ancestral sampler draw the images from our prompt embeddings, so that prompts of
more than 75 tokens are encoded as in training. All randomness comes from generators of its own.
"""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont

from trainer.config.schema import SamplingConfig
from trainer.core.rng import philox_key, rng
from trainer.data.tokens import TextTokenizer, tokenize_captions
from trainer.model.diffusion import SCHEDULE, Prediction, write_scheduler
from trainer.model.sdxl import SDXL, encode_prompts
from trainer.model.vae import decode_latents, pixels_to_image
from trainer.sample.pictures import GridLayout


@dataclass(frozen=True)
class LoadedModel:
    """A model that can draw, and what its images say about it."""

    sdxl: SDXL
    pipeline: StableDiffusionXLPipeline
    tokenizers: tuple[TextTokenizer, TextTokenizer]
    max_token_length: int
    compute: torch.dtype
    facts: dict[str, Any] = field(default_factory=dict)


def training_size(sampling: SamplingConfig, base_resolution: int) -> tuple[int, int]:
    """(width, height) of the images that are drawn while training."""
    return sampling.width or base_resolution, sampling.height or base_resolution


def build_pipeline(model: SDXL, vae: Any, prediction: Prediction) -> StableDiffusionXLPipeline:
    """Diffusers' pipeline without text encoders: it is given our prompt embeddings.

    Its sampler is Euler ancestral with SDXL's noise schedule, spaced as the published scheduler config has it.
    """
    published = {**SCHEDULE, "timestep_spacing": "leading", "steps_offset": 1}
    scheduler = EulerAncestralDiscreteScheduler(**write_scheduler(published, prediction))
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model.unet,
        scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)  # see draw_image's advance
    return pipeline


@torch.no_grad()
def draw_image(
    model: LoadedModel,
    prompt: str,
    sampling: SamplingConfig,
    *,
    size: tuple[int, int],
    seed: tuple[int, int],
    advance: Callable[[], object] = lambda: None,
) -> Image.Image:
    """One image of (width, height) ``size``, a function of model, prompt, settings and the two numbers of ``seed``.

    Of ``sampling`` only the negative prompt, the steps and the guidance; ``advance`` is called after each step.
    """

    def count(_pipeline: Any, _step: int, _timestep: Any, changed: dict[str, Any]) -> dict[str, Any]:
        advance()
        return changed

    device = next(model.sdxl.parameters()).device
    with (
        evaluating(model.sdxl),
        torch.autocast(device.type, dtype=model.compute, enabled=model.compute != torch.float32),
    ):
        embeds, pooled = encode_texts(model, [prompt, sampling.negative_prompt])
        shape = (1, 4, size[1] // 8, size[0] // 8)
        noise = torch.from_numpy(rng("sample", *seed).standard_normal(shape, dtype=np.float32))
        latents = model.pipeline(
            prompt_embeds=embeds[:1], pooled_prompt_embeds=pooled[:1],
            negative_prompt_embeds=embeds[1:], negative_pooled_prompt_embeds=pooled[1:],
            num_inference_steps=sampling.num_inference_steps, guidance_scale=sampling.guidance_scale,
            width=size[0], height=size[1], output_type="latent",
            latents=noise.to(device),
            generator=torch.Generator().manual_seed(philox_key("sampler", *seed) & 0x7FFFFFFF),
            callback_on_step_end=count,
        ).images  # fmt: skip
    # outside autocast: SDXL's own VAE overflows in fp16
    return pixels_to_image(decode_latents(model.pipeline.vae, latents.float())[0])


def encode_texts(model: LoadedModel, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (B, 2 + 75 chunks, 2048) and pooled ones (B, 1280) of texts, encoded as in training."""
    chunks = tokenize_captions(texts, model.tokenizers, model.max_token_length)
    arrays = (chunks.input_ids_1, chunks.input_ids_2, chunks.chunk_map)
    encoders, device = (model.sdxl.text_encoder_1, model.sdxl.text_encoder_2), next(model.sdxl.parameters()).device
    return encode_prompts(*encoders, *(torch.from_numpy(array).to(device) for array in arrays))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def make_grid(images: list[Image.Image], labels: list[str], columns: int) -> Image.Image:
    """Images in rows of ``columns``, each with its label below, shortened to three lines, larger below large images."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    layout = GridLayout((width, height), len(images), columns)
    grid = Image.new("RGB", layout.size, "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(layout.letters)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = layout.place(number)
        grid.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        lines = textwrap.wrap(label, max(8, width * 10 // (6 * layout.letters)), max_lines=3, placeholder="...")
        draw.multiline_text((left, top + height + 2), "\n".join(lines), fill="black", spacing=1, font=font)
    return grid

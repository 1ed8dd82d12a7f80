"""How scripts/train_tiny_vae.py trains: losses, views of drawings, and the file that it writes."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.core.errors import UserError

log = logging.getLogger("train_tiny_vae")

# Full-resolution layers cost most and store nothing, so the widths grow late; the deep levels stay at 64 to
# keep the fp16 file below 2 MB.
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 128,
    "force_upcast": False,
}
# A diffusion model's samples are never exactly on the encoder's manifold: the decoder learns with this much
# noise on latents of unit scale, so that such samples decode cleanly.
LATENT_NOISE = 0.1
# (height, width): the demo's area of 128 x 128 pixels, mostly square, in its more common buckets.
SIZES = [(128, 128)] * 4 + [(160, 96), (96, 160), (192, 64), (64, 192)]
EARLY_SIZES = [(96, 96), (64, 64)]  # small views learn edges and colours at a fraction of the price
EARLY_FRACTION = 0.5
GUIDED_FRACTION = 0.4
BATCH_AREA = 4 * 128 * 128  # px of a step, half of it early on: on a CPU many small steps learn faster
PEAK_LR = 1.5e-3
DECODER_LR = 1.0e-3  # of the decoder alone
FAVOUR = 10.0  # a favoured drawing is drawn so many times as often as another
MAX_FILE_BYTES = 2_000_000
MAX_PIXELS = 30_000_000  # some of the package's PNGs have 600 million, seconds each to decode


def read_drawing(path: Path, short_side: int) -> Image.Image | None:
    """RGB drawing on white, its short side `short_side` px; None if it is huge, or Pillow cannot read it."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                return None
            rgba = file.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        log.info("left out %s: %s", path, error)
        return None
    image = Image.new("RGBA", rgba.size, "white")
    image.alpha_composite(rgba)
    scale = short_side / min(image.size)
    if max(image.size) * scale > 3 * short_side:  # rulers and borders: nearly all white once cropped
        return None
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    filter_ = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, filter_)


def find_drawings(folder: Path) -> list[Path]:
    """All PNG files below `folder`, sorted, without flags and symlinks (Debian's package links duplicates)."""
    return [p for p in sorted(folder.rglob("*.png")) if not p.is_symlink() and "flag" not in str(p)]


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """The whole drawing, as large as fits, centred on white."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    canvas = Image.new("RGB", (width, height), "white")
    filter_ = Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS
    canvas.paste(image.resize(size, filter_), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


def draw_view(image: Image.Image, size: tuple[int, int], whole: bool, rng: np.random.Generator) -> np.ndarray:
    """One training view, uint8 (height, width, 3): the drawing or a random crop; flipped, colours swapped."""
    height, width = size
    if whole or image.height < height or image.width < width:
        view = letterbox(image, height, width)
    else:
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        view = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(view)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    # Clip art is short of some hues; swapped channels make every colour as common as its neighbours.
    if rng.random() < 0.15:
        pixels = pixels[:, :, rng.permutation(3)]
    return pixels


def to_tensor(views: list[np.ndarray]) -> Tensor:
    """uint8 views -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 127.5 - 1


def colour_weights(images: list[Image.Image]) -> np.ndarray:
    """Probability of each drawing, higher for colourful ones: most of the package is black on white."""
    small = [np.asarray(image.resize((32, 32))).astype(np.int16) for image in images]
    colourful = np.array([float(np.mean(np.ptp(pixels, axis=2) > 50)) for pixels in small])
    weights = 0.1 + np.minimum(colourful, 0.5)
    return weights / weights.sum()


def draw_batch(images: list[Image.Image], weights: np.ndarray, progress: float, rng: np.random.Generator) -> Tensor:
    """(B, 3, H, W) in [-1, 1]: small views early on, then the demo's sizes; whole drawings and crops."""
    early = progress < EARLY_FRACTION
    sizes = EARLY_SIZES if early else SIZES
    height, width = sizes[int(rng.integers(len(sizes)))]
    area = BATCH_AREA // 2 if early else BATCH_AREA
    count = area // (height * width)
    chosen = rng.choice(len(images), size=count, p=weights)
    share_whole = 0.4 if early else 0.6
    whole = rng.random(count) < share_whole
    views = [draw_view(images[i], (height, width), bool(w), rng) for i, w in zip(chosen, whole, strict=True)]
    return to_tensor(views)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Charbonnier of pixels, of their gradients (edges carry a drawing) and of colour, over three scales."""
    loss = output.new_zeros(())
    for scale in (1, 2, 4):
        a = F.avg_pool2d(output, scale) if scale > 1 else output
        b = F.avg_pool2d(target, scale) if scale > 1 else target
        error = a - b
        edges = [error.diff(dim=2), error.diff(dim=3)]
        # RGB errors see mostly lightness; colour differences make hue count as much.
        chroma = error[:, :2] - error[:, 1:]
        loss = loss + (error.square() + 1e-4).sqrt().mean() + 0.5 * error.square().mean()
        loss = loss + 0.5 * sum((e.square() + 1e-4).sqrt().mean() for e in edges)
        loss = loss + 0.5 * (chroma.square() + 1e-4).sqrt().mean()
    return loss


def latent_penalty(mean: Tensor, logvar: Tensor) -> Tensor:
    """Hold each channel of the batch's latents at mean 0, variance 1, and the posterior's at LATENT_NOISE."""
    channel_mean = mean.mean(dim=(0, 2, 3))
    channel_var = mean.var(dim=(0, 2, 3))
    moments = channel_mean.square().mean() + (channel_var + 1e-4).log().square().mean()
    # Off-diagonal correlation: four channels that say the same thing would store less.
    flat = (mean - channel_mean[None, :, None, None]).transpose(0, 1).flatten(1)
    flat = flat / (flat.std(dim=1, keepdim=True) + 1e-4)
    correlation = flat @ flat.T / flat.shape[1] - torch.eye(len(flat))
    posterior = (logvar - 2 * math.log(LATENT_NOISE)).square().mean()
    return 0.02 * moments + 0.02 * correlation.square().mean() + 1e-3 * posterior


def colour_target(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> lightness and two colour differences of 8 x 8 blocks: (B, 3, H/8, W/8).

    Shifted and scaled to about mean 0 and variance 1 over clip art.
    """
    red, green, blue = F.avg_pool2d(pixels, 8).unbind(dim=1)
    lightness = (0.3 * red + 0.59 * green + 0.11 * blue - 0.45) / 0.65
    return torch.stack([lightness, (red - green - 0.1) / 0.5, (0.5 * (red + green) - blue - 0.2) / 0.5], dim=1)


def guide_weight(progress: float) -> float:
    """Weight of the colour guide: full at the start, zero from GUIDED_FRACTION of the budget on."""
    return 0.5 * max(0.0, 1 - progress / GUIDED_FRACTION)


def boost_colour(conv: torch.nn.Conv2d) -> None:
    """Rotate a first layer's random weights from RGB to lightness and colour differences, these enlarged.

    In RGB the three inputs are nearly one, and a network sees grey for its first thousands of steps.
    """
    rotation = torch.tensor([[0.3, 0.59, 0.11], [2.0, -2.0, 0.0], [1.0, 1.0, -2.0]])
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("ochw,cr->orhw", conv.weight, rotation))


def cosine_lr(progress: float, step: int) -> float:
    """Factor on PEAK_LR: 100 steps of warm-up, then cosine to zero at the end of the time budget."""
    return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def half_copy(vae: AutoencoderKL) -> AutoencoderKL:
    """A model with the weights as they are shipped: rounded to fp16, computed in fp32."""
    copy = AutoencoderKL(**VAE_CONFIG)
    copy.load_state_dict({k: v.half().float() for k, v in vae.state_dict().items()})
    return copy.eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, views: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) in [-1, 1] -> posterior means (N, 4, H/8, W/8) and reconstructions clamped to [-1, 1]."""
    latents = [vae.encode(x).latent_dist.mode() for x in views.split(16)]
    outputs = [vae.decode(z).sample.clamp(-1, 1) for z in latents]
    return torch.cat(latents), torch.cat(outputs)


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """dB for each image, peak 2 for values in [-1, 1]."""
    return 10 * torch.log10(4 / (output - target).square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


def read_measure_views(folder: Path) -> Tensor:
    """The drawings of `folder`, whole, at 128 x 128 px on white: (N, 3, 128, 128)."""
    images = [read_drawing(p, 256) for p in sorted(folder.glob("*.png"))]
    views = [np.asarray(letterbox(i, 128, 128)) for i in images if i is not None]
    if not views:
        raise UserError(f"no readable PNG in {folder}; run scripts/make_demo_data.py first")
    return to_tensor(views)


def write_grid(path: Path, views: Tensor, outputs: Tensor, columns: int = 12) -> None:
    """Originals above their reconstructions, row by row."""
    rows = []
    for start in range(0, len(views) - len(views) % columns, columns):
        for part in (views, outputs):
            rows.append(torch.cat(list(part[start : start + columns]), dim=2))  # noqa: PERF401
    pixels = ((torch.cat(rows, dim=1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(path)


def save_vae(vae: AutoencoderKL, out: Path, views: Tensor, grid: Path | None, trained: dict[str, str]) -> None:
    """Measure on `views`, replace `out` whole: fp16 weights, config and scaling factor in the metadata."""
    shipped = half_copy(vae)
    latents, outputs = reconstruct(shipped, views)
    drift = (outputs - reconstruct(vae.eval(), views)[1]).abs().max().item()
    vae.train()
    quality = psnr(outputs, views)
    channels = latents.transpose(0, 1).flatten(1)
    scaling_factor = 1 / channels.std().item()
    log.info(
        "PSNR mean %.2f dB, worst %.2f; latent means %s, stds %s; scaling_factor %.5f;"
        " fp16 rounding moves a pixel by at most %.4f",
        quality.mean(),
        quality.min(),
        [round(m, 3) for m in channels.mean(dim=1).tolist()],
        [round(s, 3) for s in channels.std(dim=1).tolist()],
        scaling_factor,
        drift,
    )
    metadata = {"config": json.dumps(VAE_CONFIG), "scaling_factor": f"{scaling_factor:.5f}", **trained}
    weights = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    part = out.with_name(out.name + ".part")
    save_file(weights, part, metadata=metadata)
    if part.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{part} has more than {MAX_FILE_BYTES} bytes")
    part.chmod(0o644)  # safetensors writes 0600
    part.replace(out)
    if grid is not None:
        write_grid(grid, views, outputs)


def favour_weights(paths: list[Path], favoured: set[str]) -> np.ndarray:
    """Probability of each drawing, FAVOUR times as high for those whose file is named."""
    weights = np.array([FAVOUR if path.name in favoured else 1.0 for path in paths])
    return weights / weights.sum()


def train_steps(
    vae: AutoencoderKL, images: list[Image.Image], weights: np.ndarray, seconds: float, seed: int
) -> Iterator[tuple[int, float]]:
    """Train for `seconds` of wall-clock time what is not frozen; yields (step, loss) after each step."""
    rng = np.random.default_rng(seed)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    whole = len(trained) == len(list(vae.parameters()))
    peak = PEAK_LR if whole else DECODER_LR
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    start = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine_lr(progress, step)
        batch = draw_batch(images, weights, progress if whole else 1.0, rng)
        posterior = vae.encode(batch).latent_dist
        latents = posterior.mean + LATENT_NOISE * torch.randn_like(posterior.mean)
        loss = reconstruction_loss(vae.decode(latents).sample, batch)
        total = loss + latent_penalty(posterior.mean, posterior.logvar)
        # Three latents begin as the colours of their blocks: the shortest way to colour, and the smoothest latents.
        total = total + guide_weight(progress) * F.mse_loss(posterior.mean[:, :3], colour_target(batch))
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        yield step, loss.item()


def train(args: argparse.Namespace) -> None:
    """Train and save every `--save-every` minutes and at the end."""
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    views = read_measure_views(args.measure_on)
    with ThreadPoolExecutor(2) as pool:
        found = find_drawings(args.drawings)
        read = zip(found, pool.map(partial(read_drawing, short_side=args.short_side), found), strict=True)
        drawings = {path: image for path, image in read if image is not None}
    images = list(drawings.values())
    if not images:
        raise UserError(f"no PNG in {args.drawings}; install Debian's openclipart-png")
    vae = AutoencoderKL(**VAE_CONFIG)
    boost_colour(vae.encoder.conv_in)
    if args.init is not None:
        vae.load_state_dict({k: v.float() for k, v in load_file(args.init).items()})
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    weights = colour_weights(images)
    if args.favour is not None:
        posts = [json.loads(line) for line in args.favour.read_text(encoding="utf-8").splitlines()]
        weights = favour_weights(list(drawings), {post["file"] for post in posts})
    log.info("%d drawings, %d parameters", len(images), sum(p.numel() for p in vae.parameters() if p.requires_grad))
    start = last_save = last_log = time.monotonic()
    step, average = 0, 0.0
    for step, loss in train_steps(vae, images, weights, args.minutes * 60, args.seed):
        average = loss if step == 1 else 0.98 * average + 0.02 * loss
        now = time.monotonic()
        if now - last_log > 30:
            last_log, left = now, args.minutes - (now - start) / 60
            rate = step / (now - start)
            log.info("step %d, loss %.4f, %.2f steps/s, %.1f min left", step, average, rate, left)
        if now - last_save > args.save_every * 60 and now - start < (args.minutes - 2) * 60:
            last_save = now
            save_vae(vae, args.out, views, args.grid, {"steps": str(step), "final": "false"})
    save_vae(vae, args.out, views, args.grid, {"steps": str(step), "final": "true"})


def remeasure(args: argparse.Namespace) -> None:
    """Write the scaling factor of `--measure-on`'s drawings into existing weights."""
    with safe_open(args.out, "pt") as file:
        metadata = dict(file.metadata())
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict({k: v.float() for k, v in load_file(args.out).items()})
    save_vae(vae, args.out, read_measure_views(args.measure_on), args.grid, metadata | {"scaling_factor": ""})

"""A few samples to look at: the original with its crop, what the latents hold, and the caption as passes see it."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.files import sha256_bytes
from trainer.core.progress import metered
from trainer.data.buckets import Fit, Size
from trainer.data.caption_draws import draw_sample_caption
from trainer.data.images import BadImage, read_bytes, read_pixels
from trainer.data.index import Index, read_raw_latents
from trainer.data.post import Post
from trainer.data.shards import Row
from trainer.data.sources import iterate_sources
from trainer.data.template import CaptionRules
from trainer.model.latents import read_latent_scale, scale_latents
from trainer.model.vae import decode_latents, pixels_to_image
from trainer.report.survey import Fits

THUMBNAIL_SIDE = 320  # pixels, the longer one
PASSES = 3  # captions shown of each sample


@dataclass(frozen=True)
class Thumbnail:
    """A JPEG file as a URL, and its size."""

    url: str
    size: Size


@dataclass(frozen=True)
class Example:
    """One sample to look at."""

    row: Row
    captions: list[str]  # as drawn in passes 0, 1, ...
    factor: float  # of the resize
    cropped: float  # share of the resized pixels
    decoded: Thumbnail | None
    original: Thumbnail | None
    why_not: str  # where there is no original

    @property
    def crop(self) -> tuple[float, float, float, float]:
        """What is kept of the original: left, top, width, height as shares of its width and height."""
        width, height = (self.row[f"original_{side}"] * self.factor for side in ("width", "height"))
        return (
            self.row["crop_left"] / width, self.row["crop_top"] / height,
            self.row["bucket_width"] / width, self.row["bucket_height"] / height,
        )  # fmt: skip


def draw_examples(
    index: Index,
    config: Config,
    rules: CaptionRules,
    fits: Fits,
    numbers: Sequence[int],
    vae: AutoencoderKL | None,
) -> list[Example]:
    """Some rows of the index as pictures and captions."""
    rows = [index.row(number) for number in numbers]
    posts, reason = find_images(config, {row["key"] for row in rows})
    examples = []
    for number, row in zip(metered(numbers, "draw samples", "sample", len(numbers)), rows, strict=True):
        captions = [draw_sample_caption(row, pass_, config.run.seed, rules) for pass_ in range(PASSES)]
        decoded = draw_latents(vae, read_raw_latents(index, number)) if vae is not None else None
        original, why_not = draw_original(posts[row["key"]], row) if row["key"] in posts else (None, reason)
        factor, cropped = float(fits.factors[number]), float(fits.cropped[number])
        examples.append(Example(row, captions, factor, cropped, decoded, original, why_not))
    return examples


def find_images(config: Config, keys: set[str]) -> tuple[dict[str, Post], str]:
    """Key -> post, where the config's sources still have it; and why the others have no image."""
    found: dict[str, Post] = {}
    try:
        for item in metered(iterate_sources(config.data), "find images", "post"):
            if isinstance(item, Post) and item.key in keys:
                found[item.key] = item
                if len(found) == len(keys):
                    break
    except UserError as error:
        return found, str(error)
    return found, "its image is not among the sources of posts any more"


def draw_original(post: Post, row: Row) -> tuple[Thumbnail | None, str]:
    """The whole image as a thumbnail, if it still is the one that was encoded; else why not."""
    size = thumbnail_size((row["original_width"], row["original_height"]))
    try:
        data = read_bytes(post.image)
        if sha256_bytes(data) != row["content_hash"]:
            return None, f"{post.origin}: the image is not the one any more that was encoded"
        return make_thumbnail(Image.fromarray(read_pixels(data, Fit(size, size, 0, 0)))), ""
    except BadImage as error:
        return None, str(error)


def draw_latents(vae: AutoencoderKL, raw_latents: np.ndarray) -> Thumbnail:
    """What the VAE makes of stored latents (4, H/8, W/8), as a thumbnail."""
    latents = scale_latents(torch.from_numpy(raw_latents).float(), read_latent_scale(vae.config))
    image = pixels_to_image(decode_latents(vae, latents[None])[0])
    return make_thumbnail(image.resize(thumbnail_size(image.size), Image.Resampling.BOX))


def thumbnail_size(size: Size) -> Size:
    """The same shape with ``THUMBNAIL_SIDE`` as its longer side; smaller images keep theirs."""
    scale = min(1.0, THUMBNAIL_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def make_thumbnail(image: Image.Image) -> Thumbnail:
    """An RGB image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", image.size)

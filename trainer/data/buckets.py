"""The bucket list, the nearest bucket, and the geometry of resize and crop. Sides are (width, height)."""

import math
from dataclasses import dataclass
from functools import lru_cache

from trainer.core.errors import UserError

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Fit:
    """How one image gets into its bucket: resize to ``resized``, then crop ``bucket`` at (left, top)."""

    bucket: Size
    resized: Size
    left: int
    top: int


@lru_cache
def list_buckets(base_resolution: int, min_side: int, max_side: int, step: int) -> tuple[Size, ...]:
    """All buckets of about ``base_resolution`` squared pixels, sorted by (width, height).

    Recipe, section 3: for each width the largest height in steps that keeps the area, both ways round.
    1024, 512, 2048, 64 give 33.
    """
    area = base_resolution * base_resolution
    sizes = {(base_resolution, base_resolution)}
    for width in range(min_side, max_side + 1, step):
        height = min(area // width // step * step, max_side)
        if height >= min_side:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose width / height is nearest to the image's, the first of equals; its own size if that is one."""
    if size in buckets:
        return size
    aspect = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def fit_to_bucket(size: Size, bucket: Size) -> Fit:
    """Scale to cover the bucket, then crop the centre; in float64 exactly as the recipe's section 3 writes it."""
    (width, height), (bucket_width, bucket_height) = size, bucket
    wider = width / height > bucket_width / bucket_height
    scale = bucket_height / height if wider else bucket_width / width
    resized = (math.floor(width * scale + 0.5), math.floor(height * scale + 0.5))
    return Fit(bucket, resized, (resized[0] - bucket_width) // 2, (resized[1] - bucket_height) // 2)


def fit_image(size: Size, *, base_resolution: int, min_side: int, max_side: int, step: int, upscale: bool) -> Fit:
    """The bucket, resize and crop of an image of ``size``.

    With ``upscale`` off an image smaller than its bucket keeps its pixels: its bucket is its own sides
    floored to the step.

    Raises:
        UserError: with ``upscale`` off, when a side falls below ``min_side``; the caller sets the image aside.
    """
    bucket = nearest_bucket(size, list_buckets(base_resolution, min_side, max_side, step))
    if upscale or (size[0] >= bucket[0] and size[1] >= bucket[1]):
        return fit_to_bucket(size, bucket)
    own = (min(size[0], max_side) // step * step, min(size[1], max_side) // step * step)
    if min(own) < min_side:
        raise UserError(f"{size[0]}x{size[1]} is smaller than buckets.min_side {min_side} and buckets.upscale is off")
    return Fit(own, size, (size[0] - own[0]) // 2, (size[1] - own[1]) // 2)

"""The recipe's section 3: the 33 buckets, the crops, and what must hold for any size."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.core.errors import UserError
from trainer.data.buckets import fit_image, list_buckets, nearest_bucket

RECIPE = {"base_resolution": 1024, "min_side": 512, "max_side": 2048, "step": 64}
PORTRAIT = {
    960: [1088], 896: [1152], 832: [1216], 768: [1280, 1344], 704: [1408, 1472], 640: [1536, 1600],
    576: [1664, 1728, 1792], 512: [1856, 1920, 1984, 2048],
}  # fmt: skip
sides = st.integers(1, 6000)


def recipe_buckets() -> tuple[tuple[int, int], ...]:
    return list_buckets(**RECIPE)


def test_exactly_the_33() -> None:
    portrait = {(width, height) for width, heights in PORTRAIT.items() for height in heights}
    expected = {(1024, 1024)} | portrait | {(height, width) for width, height in portrait}
    assert len(expected) == 33
    assert recipe_buckets() == tuple(sorted(expected))


def test_every_size_on_the_card_is_a_bucket() -> None:
    card = "1024x1024 1152x896 896x1152 1216x832 832x1216 1344x768 768x1344 1536x640 640x1536"
    assert {tuple(map(int, size.split("x"))) for size in card.split()} <= set(recipe_buckets())


@pytest.mark.parametrize(
    ("size", "bucket", "crop"),
    [
        ((1000, 1500), (832, 1216), (0, 16)),
        ((1500, 1000), (1216, 832), (16, 0)),
        ((2480, 3508), (832, 1216), (14, 0)),
        ((1920, 1080), (1344, 768), (10, 0)),
        ((800, 600), (1152, 896), (21, 0)),
        ((1000, 5000), (512, 2048), (0, 256)),
    ],
)
def test_the_recipes_crops(size: tuple[int, int], bucket: tuple[int, int], crop: tuple[int, int]) -> None:
    fit = fit_image(size, **RECIPE, upscale=True)
    assert (fit.bucket, (fit.left, fit.top)) == (bucket, crop)


@given(sides, sides)
@example(1, 6000)
@example(1024, 1024)
def test_any_size_covers_the_nearest_bucket(width: int, height: int) -> None:
    fit = fit_image((width, height), **RECIPE, upscale=True)
    nearest = min(abs(w / h - width / height) for w, h in recipe_buckets())
    assert abs(fit.bucket[0] / fit.bucket[1] - width / height) == nearest
    check_crop(fit.resized, fit.bucket, (fit.left, fit.top))
    # one side fits exactly, so that nothing is cropped but what the shape demands
    assert fit.resized[0] == fit.bucket[0] or fit.resized[1] == fit.bucket[1]


@given(sides, sides)
@example(512, 512)
@example(1000, 511)
@example(3000, 600)
def test_without_upscaling_nothing_grows(width: int, height: int) -> None:
    bucket = nearest_bucket((width, height), recipe_buckets())
    smaller = width < bucket[0] or height < bucket[1]
    if smaller and min(width, height) < 512:
        with pytest.raises(UserError, match="min_side"):
            fit_image((width, height), **RECIPE, upscale=False)
        return
    fit = fit_image((width, height), **RECIPE, upscale=False)
    check_crop(fit.resized, fit.bucket, (fit.left, fit.top))
    assert fit.resized[0] <= width and fit.resized[1] <= height
    if smaller:
        assert fit.resized == (width, height)
        assert fit.bucket == (min(width, 2048) // 64 * 64, min(height, 2048) // 64 * 64)
    else:
        assert fit == fit_image((width, height), **RECIPE, upscale=True)


def check_crop(resized: tuple[int, int], bucket: tuple[int, int], corner: tuple[int, int]) -> None:
    """The crop lies inside the resized image and in its centre."""
    for side, kept, start in zip(resized, bucket, corner, strict=True):
        assert start >= 0 and start + kept <= side
        assert side - kept - 2 * start in (0, 1)


@pytest.mark.parametrize("size", [(512, 2048), (1024, 1024), (1088, 960)])
def test_a_size_that_is_a_bucket_is_left_alone(size: tuple[int, int]) -> None:
    for upscale in (True, False):
        fit = fit_image(size, **RECIPE, upscale=upscale)
        assert (fit.bucket, fit.resized, fit.left, fit.top) == (size, size, 0, 0)


def test_other_settings() -> None:
    assert list_buckets(128, 128, 128, 32) == ((128, 128),)
    buckets = list_buckets(256, 128, 512, 64)
    assert (256, 256) in buckets and (128, 512) in buckets
    assert all(w * h <= 256 * 256 and w % 64 == h % 64 == 0 for w, h in buckets)

"""Files to pixels: every mode and format, orientation, transparency on white, and files that are not to be trusted."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from trainer.data.buckets import Fit, Size
from trainer.data.images import BadImage, has_frames, read_bytes, read_image_header, read_pixels
from trainer.data.post import ImagePlace

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def read_file(path: Path) -> bytes:
    return read_bytes(ImagePlace(path))


def whole(width: int, height: int) -> Fit:
    """No resize, no crop."""
    return Fit((width, height), (width, height), 0, 0)


def quarters() -> Image.Image:
    """32 x 16: red, green above; blue, white below."""
    image = Image.new("RGB", (32, 16), WHITE)
    for colour, corner in ((RED, (0, 0)), (GREEN, (16, 0)), (BLUE, (0, 8))):
        image.paste(colour, (*corner, corner[0] + 16, corner[1] + 8))
    return image


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours near the four corners, row by row."""
    return [tuple(int(c) for c in pixels[y, x]) for y in (2, -3) for x in (2, -3)]


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.png", {}), ("a.bmp", {}), ("a.gif", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"quality": 100}),
     ("a.tiff", {}), ("a.avif", {"quality": 100, "subsampling": "4:4:4"})],
)  # fmt: skip
def test_formats(tmp_path: Path, name: str, options: dict) -> None:
    path = save(tmp_path / name, quarters(), **options)
    assert read_image_header(read_file(path)) == (32, 16)
    pixels = read_pixels(read_file(path), whole(32, 16))
    assert (pixels.shape, pixels.dtype) == ((16, 32, 3), np.uint8)
    expected = np.array([RED, GREEN, BLUE, WHITE], dtype=int)
    assert np.abs(np.array(corners(pixels)) - expected).max() <= (8 if name.endswith(("jpg", "avif")) else 0)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("png", "RGB"), ("png", "L"), ("png", "P"), ("bmp", "RGB"), ("gif", "P"), ("webp", "RGB"), ("jpg", "RGB"),
     ("jpg", "CMYK")],
)  # fmt: skip
@pytest.mark.parametrize("resized", [(50, 40), (150, 120), (100, 80)])
def test_the_bits_of_plain_pillow(tmp_path: Path, suffix: str, mode: str, resized: Size) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(noise).convert(mode))
    method = Image.Resampling.BOX if resized[0] < 100 else Image.Resampling.LANCZOS
    with Image.open(path) as opened:
        expected = opened.convert("RGB").resize(resized, method).crop((3, 5, 35, 37))
    pixels = read_pixels(read_file(path), Fit((32, 32), resized, 3, 5))
    assert np.array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "tiff", "avif"])
@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),  # mirrored
        (3, [WHITE, BLUE, GREEN, RED]),  # upside down
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),  # a quarter turn clockwise
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
        (9, [RED, GREEN, BLUE, WHITE]),  # no such orientation
    ],
)
def test_orientation(tmp_path: Path, suffix: str, orientation: int, shown: list) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}, "avif": {"quality": 100}}
    path = save(tmp_path / f"a.{suffix}", quarters(), exif=exif, **options.get(suffix, {}))
    size = (16, 32) if orientation in (5, 6, 7, 8) else (32, 16)
    assert read_image_header(read_file(path)) == size
    seen = np.array(corners(read_pixels(read_file(path), whole(*size))))
    assert np.abs(seen - np.array(shown)).max() <= 8


def test_a_tiff_whose_orientation_is_in_its_xmp(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tiff", quarters(), tiffinfo={700: b'<x tiff:Orientation="6"/>'})
    assert read_image_header(read_file(path)) == (16, 32)
    assert corners(read_pixels(read_file(path), whole(16, 32))) == [BLUE, RED, WHITE, GREEN]


def test_exif_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", quarters())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])
    assert read_image_header(read_file(path)) == (16, 32)
    assert corners(read_pixels(read_file(path), whole(16, 32))) == [GREEN, WHITE, RED, BLUE]


def transparent(mode: str) -> Image.Image:
    """Left half opaque black, right half transparent over black, where a dropped alpha would show."""
    image = Image.new("RGBA", (32, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 16))
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"), [("RGBA", "a.png"), ("LA", "a.png"), ("RGBA", "a.webp"), ("RGBA", "a.gif"), ("PA", "a.png")]
)
def test_transparency_becomes_white(tmp_path: Path, mode: str, name: str) -> None:
    if mode == "PA":  # a palette whose entries carry alpha
        image = Image.new("P", (32, 16), 1)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(0, (0, 0, 16, 16))
        path = save(tmp_path / name, image, transparency=b"\xff\x00")
    else:
        path = save(tmp_path / name, transparent(mode), **({"lossless": True} if name.endswith("webp") else {}))
    assert corners(read_pixels(read_file(path), whole(32, 16))) == [BLACK, WHITE, BLACK, WHITE]


@pytest.mark.parametrize(("mode", "colour", "key"), [("RGB", (0, 0, 0), (0, 0, 0)), ("L", 0, 0), ("I;16", 0, 0)])
def test_one_transparent_colour_becomes_white(tmp_path: Path, mode: str, colour: object, key: object) -> None:
    path = save(tmp_path / "a.png", Image.new(mode, (32, 16), colour), transparency=key)
    assert corners(read_pixels(read_file(path), whole(32, 16))) == [WHITE] * 4


def test_half_transparent_is_blended(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.new("RGBA", (8, 8), (0, 0, 255, 128)))
    assert corners(read_pixels(read_file(path), whole(8, 8)))[0] == (127, 127, 255)


def test_white_comes_before_resizing(tmp_path: Path) -> None:
    # black pixels of alpha 0 beside black ones: resized first, their mean would not be 127
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 1, 2))
    pixels = read_pixels(read_file(save(tmp_path / "a.png", image)), Fit((1, 1), (1, 1), 0, 0))
    assert tuple(pixels[0, 0]) in [(127, 127, 127), (128, 128, 128)]


def test_deep_and_odd_modes(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16))
    assert corners(read_pixels(read_file(save(tmp_path / "deep.png", deep)), whole(8, 8)))[0] == (100, 100, 100)
    bits = save(tmp_path / "bits.png", Image.new("1", (8, 8), 1))
    assert corners(read_pixels(read_file(bits), whole(8, 8)))[0] == WHITE
    cmyk = save(tmp_path / "cmyk.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100)
    red, green, blue = corners(read_pixels(read_file(cmyk), whole(16, 16)))[0]
    assert red < 10 and green > 245 and blue > 245


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff", "avif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    options = {"webp": {"lossless": True}, "avif": {"quality": 100}}.get(suffix, {})
    path = save(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    seen = np.array(corners(read_pixels(read_file(path), whole(16, 16))))
    assert np.abs(seen - np.array(RED)).max() <= 2 and has_frames(read_file(path))
    assert not has_frames(read_file(save(tmp_path / f"b.{suffix}", frames[0], **options)))


def test_box_when_shrinking_lanczos_when_enlarging(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(noise))
    shrunk = read_pixels(read_file(path), Fit((32, 24), (32, 32), 0, 4))
    means = noise.reshape(32, 2, 32, 2, 3).mean((1, 3))[4:28]  # the area filter at a factor of 2
    assert shrunk.shape == (24, 32, 3) and np.abs(shrunk - means).max() <= 1
    grown = read_pixels(read_file(path), Fit((96, 96), (100, 100), 2, 2))
    lanczos = np.asarray(Image.fromarray(noise).resize((100, 100), Image.Resampling.LANCZOS))[2:98, 2:98]
    assert np.array_equal(grown, lanczos)


def test_headers_are_read_without_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.effect_noise((600, 400), 50))
    path.write_bytes(path.read_bytes()[:1000])
    assert read_image_header(read_file(path)) == (600, 400)
    with pytest.raises(BadImage) as caught:
        read_pixels(read_file(path), whole(600, 400))
    assert caught.value.reason == "undecodable"


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and brings almost nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty"),
        ("text.png", b"this is no image at all", "not_an_image"),
        ("page.jpg", b"<html><body>404</body></html>", "not_an_image"),
        ("half.png", b"\x89PNG\r\n\x1a\n", "not_an_image"),
        ("warned.png", png_of(10_000, 10_000), "bomb"),
        ("refused.png", png_of(60_000, 60_000), "bomb"),
        ("tiff.png", b"II*\x00\x08\x00\x00\x00" + bytes(200), "not_an_image"),
        ("psd.jpg", b"8BPS" + bytes(200), "not_an_image"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_image_header, lambda data: read_pixels(data, whole(8, 8))):
        with pytest.raises(BadImage) as caught:
            read(read_file(tmp_path / name))
        assert caught.value.reason == reason and caught.value.detail


def test_missing_folders_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("none.png", "missing"), ("pipe.png", "not_an_image"), (".", "not_an_image")):
        with pytest.raises(BadImage) as caught:
            read_image_header(read_file(tmp_path / name))
        assert caught.value.reason == reason


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for suffix in ("ico", "pdf", "ppm", "tga"):
        quarters().save(tmp_path / "image", format=suffix)
        with pytest.raises(BadImage, match="not_an_image"):
            read_image_header(read_file(tmp_path / "image"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "avif"])
def test_damaged_bytes_give_an_image_or_a_bad_image(tmp_path: Path, suffix: str) -> None:
    good = save(tmp_path / f"a.{suffix}", quarters()).read_bytes()
    random = np.random.default_rng(1)
    for trial in range(60):
        content = bytearray(good[: random.integers(1, len(good) + 1)])
        for _ in range(trial % 4):
            content[random.integers(len(content))] = random.integers(256)
        path = tmp_path / f"b.{suffix}"
        path.write_bytes(content)
        try:
            width, height = read_image_header(read_file(path))
            if width * height < 1_000_000:
                assert read_pixels(read_file(path), whole(width, height)).shape == (height, width, 3)
            assert has_frames(read_file(path)) in (True, False)
        except BadImage as error:
            assert error.reason in {"not_an_image", "undecodable", "bomb"}

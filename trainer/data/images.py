"""Image files -> oriented size, read from the header; -> RGB pixels of a bucket. Files are not trusted.

What is wrong with one image is a BadImage, which the caller sets aside; nothing is ever written.
"""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from trainer.buckets import Fit, Size

# everything that decides pixels, besides the bucket: part of what names a set of latents
PIXEL_SETTINGS: dict[str, Any] = {
    "orientation": "exif",
    "transparency": "on white",
    "shrink": "box",
    "enlarge": "lanczos",
    "crop": "center",
    "range": [-1, 1],
}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # a gif or an animated webp gives its first frame
MAX_PIXELS = 89_478_485  # Pillow's own limit, where it merely warns
TRANSPOSES = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)


class BadImage(Exception):
    """One image that cannot be used: a short reason to count by, and the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_header(path: Path) -> Size:
    """(width, height) after EXIF orientation, without decoding.

    Raises:
        BadImage: missing, empty, not_an_image or bomb.
    """
    with open_image(path) as image:
        return image.size[::-1] if read_orientation(image, path) in SWAPS_SIDES else image.size


def read_pixels(path: Path, fit: Fit) -> np.ndarray:
    """The bucket's pixels, RGB uint8 (H, W, 3): oriented, on white, resized to cover, centre cropped.

    Pillow's BOX where the image shrinks and LANCZOS where it grows (recipe, section 3). ``fit`` must come from
    ``read_header``'s size of the same file.

    Raises:
        BadImage: as ``read_header``, and undecodable where the data ends early or makes no sense.
    """
    with open_image(path) as image:
        orientation = read_orientation(image, path)  # before load, as in read_header, so that both agree
        with naming_errors("undecodable"):
            image.load()
        rgb = to_rgb(image)
    if (method := TRANSPOSES.get(orientation)) is not None:  # a mirrored image's method is 0
        rgb = rgb.transpose(method)
    if rgb.size != fit.resized:
        shrinks = fit.resized[0] < rgb.width or fit.resized[1] < rgb.height
        rgb = rgb.resize(fit.resized, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    width, height = fit.bucket
    return np.asarray(rgb.crop((fit.left, fit.top, fit.left + width, fit.top + height)))  # (H, W, 3)


def pixels_to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1.0


@contextmanager
def naming_errors(reason: str) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise over hostile bytes into a BadImage of this reason."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    # decoders raise whatever comes to hand: OSError, SyntaxError, struct.error, KeyError, IndexError, EOFError
    except Exception as error:
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image with its header read, of an allowed format and size."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadImage("missing", error.strerror or str(error)) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise BadImage("not_an_image", "not a regular file")
    if status.st_size == 0:
        raise BadImage("empty", "0 bytes")
    try:
        with naming_errors("not_an_image"):
            image = Image.open(path, formats=FORMATS)
    except BadImage as error:
        if isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise BadImage("bomb", str(error.__cause__)) from error
        raise
    with image:
        # Pillow only warns up to twice this size, and its warnings filter is not safe in threads
        if image.width * image.height > MAX_PIXELS:
            raise BadImage("bomb", f"{image.width}x{image.height} is above {MAX_PIXELS} pixels")
        yield image


def read_orientation(image: Image.Image, path: Path) -> int:
    """The EXIF (or XMP) orientation, 1 where there is none; read without decoding."""
    if image.format == "PNG" and "exif" not in image.info and (late := find_late_exif(path)):
        image.info["exif"] = b"Exif\x00\x00" + late
    try:
        # PngImageFile's own getexif decodes the image first, hence the base class's
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1  # damaged metadata around a good image: nothing is known about its orientation
    return orientation if orientation in TRANSPOSES else 1


def find_late_exif(path: Path) -> bytes | None:
    """A PNG's eXIf chunk wherever it lies: it may follow the pixels, where reading the header does not get."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return file.read(length)
            file.seek(length + 4, 1)
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits: 16-bit greys scaled rather than clipped, transparency composited on white before any resizing."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def grey_to_rgb(image: Image.Image) -> Image.Image:
    """Greys of 16 bits (a png's, as Pillow opens them) as RGB; one value may be declared transparent."""
    values = np.asarray(image).astype(np.float64)
    greys = np.floor(np.clip(values, 0, 65535) / 257 + 0.5).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        greys[values == transparent] = 255
    return Image.fromarray(greys).convert("RGB")

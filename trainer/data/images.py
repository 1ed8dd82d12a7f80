"""Images -> bytes, read once; bytes -> oriented size, from the header; -> RGB pixels of a bucket. None is trusted.

What is wrong with one image is a BadImage, which the caller sets aside; nothing is ever written.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, UnidentifiedImageError

from trainer.core.files import open_regular
from trainer.data.buckets import Fit, Size
from trainer.data.formats import load_formats, suggest_plug_in
from trainer.data.jxl_header import CODESTREAM, CONTAINER, read_jxl_size
from trainer.data.png_chunks import find_exif, leave_out_text
from trainer.data.post import ImagePlace

# everything that decides pixels, besides the bucket: part of what names a set of latents
PIXEL_SETTINGS: dict[str, Any] = {
    "orientation": "exif",
    "transparency": "on white",
    "shrink": "box",
    "enlarge": "lanczos",
    "crop": "center",
    "range": [-1, 1],
}
MAX_PIXELS = 89_478_485  # Pillow's own limit, where it merely warns
MAX_SCANS = 500  # of a JPEG: encoders make some ten
MAX_BYTES = 2**30  # above what MAX_PIXELS take up uncompressed in 16 bits and four channels
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


def read_bytes(place: ImagePlace) -> bytes:
    """All bytes of an image, wherever it lies.

    Raises:
        BadImage: missing, empty, not_an_image where it is no regular file, too_large, or unreadable.
    """
    if place.row is None:
        data = read_stretch(place.path, place.offset or 0, place.length)
    else:
        data = read_cell(place.path, place.row, place.column)
    if not data:
        raise BadImage("empty", "0 bytes")
    return data


def stat_image(place: ImagePlace) -> tuple[int, int]:
    """(size in bytes, time of the last change in ns) without reading the image; a table's cell has size 0.

    Raises:
        BadImage: missing.
    """
    try:
        status = place.path.stat()
    except (OSError, ValueError) as error:
        raise BadImage("missing", f"{place.path}: {error}") from error
    whole = status.st_size if place.row is None else 0
    return whole if place.length is None else place.length, status.st_mtime_ns


def read_stretch(path: Path, offset: int, length: int | None) -> bytes:
    """``length`` bytes of a file from ``offset`` on; None reads to its end."""
    with naming_files(path):
        if (file := open_regular(path)) is None:
            raise BadImage("not_an_image", f"{path} is not a regular file")
        with file:
            size = os.fstat(file.fileno()).st_size
            wanted = size if length is None else length
            if wanted > MAX_BYTES:
                raise BadImage("too_large", f"{wanted} bytes are above {MAX_BYTES}")
            if offset + wanted > size:
                raise BadImage("unreadable", f"{path} ends before byte {offset + wanted}")
            file.seek(offset)
            return file.read(wanted)


@contextmanager
def naming_files(path: Path) -> Iterator[None]:
    """Turn what opening or reading a file raises into a BadImage: missing or unreadable."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImage("missing", f"{path}: {error.strerror}") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise BadImage("unreadable", f"{path}: {error}") from error


def read_cell(path: Path, row: int, name: str | None) -> bytes:
    """The bytes of an image in a table: a cell of bytes, or the ``bytes`` of a struct."""
    with naming_files(path), naming_errors("unreadable"):  # pyarrow raises its own errors over damaged files
        column = open_arrow(path).column(name)
        if not 0 <= row < len(column):
            raise BadImage("missing", f"{path} has {len(column)} rows, not row {row}")
        (chunk,) = column.slice(row, 1).chunks
        values = (chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk).slice(0, 1)
        values.validate(full=True)  # offsets of a damaged file would lead anywhere
        if not chunk.is_valid()[0].as_py() or not values.is_valid()[0].as_py():
            return b""
        content = values[0].as_buffer()
        if content.size > MAX_BYTES:
            raise BadImage("too_large", f"{content.size} bytes are above {MAX_BYTES}")
        return content.to_pybytes()


def open_arrow(path: Path) -> pa.Table:
    """A memory-mapped Arrow file in the stream format, kept open until it changes.

    Raises:
        OSError, pa.ArrowException: when it is missing, no regular file or damaged.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
    return map_arrow(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def map_arrow(path: Path, _mtime_ns: int, _size: int) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(os.fspath(path))).read_all()


def read_image_header(data: bytes) -> Size:
    """(width, height) after EXIF orientation, without decoding.

    Raises:
        BadImage: empty, not_an_image or bomb.
    """
    with open_image(data) as image:
        return image.size[::-1] if read_orientation(image, data) in SWAPS_SIDES else image.size


def has_frames(data: bytes) -> bool:
    """Whether an image has several frames or pages, of which ``read_pixels`` gives the first."""
    with open_image(data) as image:
        try:
            return bool(getattr(image, "is_animated", False))
        except Exception:
            return False  # damage after a good first frame


def read_pixels(data: bytes, fit: Fit) -> np.ndarray:
    """The bucket's pixels, RGB uint8 (H, W, 3): oriented, on white, resized to cover, centre cropped.

    Pillow's BOX where the image shrinks and LANCZOS where it grows (recipe, section 3). ``fit`` must come from
    ``read_image_header``'s size of the same bytes.

    Raises:
        BadImage: as ``read_image_header``; bomb for a JPEG of too many scans; undecodable where the data ends early or
            makes no sense; too_narrow where covering the bucket would make a giant of it.
    """
    if fit.resized[0] * fit.resized[1] > MAX_PIXELS:
        raise BadImage("too_narrow", f"resized it would have {fit.resized[0]}x{fit.resized[1]} pixels")
    with open_image(data) as image:
        # each scan is a pass over all pixels
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
            raise BadImage("bomb", f"a JPEG of more than {MAX_SCANS} scans")
        orientation = read_orientation(image, data)  # before load, as in read_image_header, so that both agree
        with naming_errors("undecodable"):  # palettes and the like are read as late as in the conversion
            image.load()
            rgb = to_rgb(image)
    # a mirrored image's method is 0; a TIFF is transposed by Pillow when it is loaded
    if (method := TRANSPOSES.get(orientation)) is not None and image.format != "TIFF":
        rgb = rgb.transpose(method)
    if rgb.size != fit.resized:
        shrinks = fit.resized[0] < rgb.width or fit.resized[1] < rgb.height
        rgb = rgb.resize(fit.resized, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    width, height = fit.bucket
    return np.asarray(rgb.crop((fit.left, fit.top, fit.left + width, fit.top + height)))  # (H, W, 3)


@contextmanager
def naming_errors(reason: str) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise over hostile bytes into a BadImage of this reason."""
    try:
        yield
    except (BadImage, FileNotFoundError, MemoryError):
        raise
    # decoders raise whatever comes to hand: OSError, SyntaxError, struct.error, KeyError, IndexError, EOFError
    except Exception as error:
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """The image with its header read, of an allowed format and size."""
    if not data:
        raise BadImage("empty", "0 bytes")
    if (size := read_jxl_size(data)) is not None:  # whose plug-in decodes before Pillow looks at the size
        refuse_bomb(size)
    elif data.startswith((CODESTREAM, CONTAINER)):
        raise BadImage("not_an_image", "a JPEG XL file that does not state its size at its beginning")
    try:
        with naming_errors("not_an_image"):
            image = Image.open(io.BytesIO(leave_out_text(data)), formats=load_formats())
    except BadImage as error:
        if isinstance(error.__cause__, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise BadImage("bomb", str(error.__cause__)) from error
        if isinstance(error.__cause__, UnidentifiedImageError):  # Pillow's words hold an address, another one each time
            known = ", ".join(load_formats())
            raise BadImage("not_an_image", f"the content is none of {known}{suggest_plug_in(data)}") from error
        raise
    with image:
        # Pillow only warns up to twice this size, and its warnings filter is not safe in threads
        refuse_bomb(image.size)
        yield image


def refuse_bomb(size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImage("bomb", f"{size[0]}x{size[1]} is above {MAX_PIXELS} pixels")


def read_orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF (or XMP) orientation, 1 where there is none; read without decoding."""
    if image.format == "PNG" and "exif" not in image.info and (late := find_exif(data)):
        image.info["exif"] = b"Exif\x00\x00" + late
    if image.format == "TIFF" and ExifTags.Base.Orientation in image.tag_v2:  # type: ignore[attr-defined]
        return 1  # its size is the oriented one already
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # the codestream's own orientation, which its decoder applies, is the only one that counts
    try:
        # PngImageFile's own getexif decodes the image first, hence the base class's
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1  # damaged metadata around a good image: nothing is known about its orientation
    return orientation if orientation in TRANSPOSES else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits: 16-bit greys scaled rather than clipped, transparency composited on white before any resizing."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return grey_to_rgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


def grey_to_rgb(image: Image.Image) -> Image.Image:
    """Greys of 16 bits (a png's, as Pillow opens them) as RGB; one value may be declared transparent.

    A TIFF's of 12 or 32 bits and those with a point do not say what is white.
    """
    bits = image.tag_v2.get(258, (1,)) if image.format == "TIFF" else (16,)  # type: ignore[attr-defined]
    if image.mode == "F" or tuple(bits) != (16,):
        raise BadImage("undecodable", f"greys that are not of 8 or 16 bits (mode {image.mode}): save them as 16 bits")
    values = np.asarray(image).astype(np.float64)
    greys = np.floor(np.clip(values, 0, 65535) / 257 + 0.5).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        greys[values == transparent] = 255
    return Image.fromarray(greys).convert("RGB")

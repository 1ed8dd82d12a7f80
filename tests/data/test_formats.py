"""Formats beyond the plain ones: PNGs around large texts, deep TIFFs, and formats that a plug-in brings."""

import io
import struct
import sys
import zlib
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from trainer.data import formats
from trainer.data.buckets import Fit
from trainer.data.images import BadImage, has_frames, read_image_header, read_pixels
from trainer.data.jxl_header import read_jxl_size
from trainer.data.png_chunks import MAX_TEXT, leave_out_text

BIG = b"a workflow of another program " * (3 * MAX_TEXT // 30)  # a few kB when compressed
WORDS = b"XML:com.adobe.xmp\0"


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def picture() -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), pixels


TEXTS = {
    "zTXt": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(BIG)),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(BIG)),
    "iCCP": chunk(b"iCCP", b"camera\0\0" + zlib.compress(BIG)),
    "many": chunk(b"tEXt", b"a\0" + b"x" * MAX_TEXT) * 65,
    "xmp": chunk(b"iTXt", WORDS + b"\1\0\0\0" + zlib.compress(BIG)),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "no zlib": chunk(b"iCCP", b"camera\0\0" + b"no zlib"),
}


@pytest.mark.parametrize("name", sorted(TEXTS))
@pytest.mark.parametrize("behind", [False, True])
def test_a_large_text_does_not_cost_the_picture(name: str, behind: bool) -> None:
    data, pixels = picture()
    at = len(data) - 12 if behind else 33  # before IEND, or behind IHDR
    data = data[:at] + TEXTS[name] + data[at:]
    assert read_image_header(data) == (32, 16)
    assert np.array_equal(read_pixels(data, Fit((32, 16), (32, 16), 0, 0)), pixels)


def test_a_small_text_may_still_say_the_orientation() -> None:
    data, _ = picture()
    xmp = chunk(b"iTXt", WORDS + b'\0\0\0\0<x tiff:Orientation="6"/>')
    assert read_image_header(data[:33] + TEXTS["zTXt"] + xmp + data[33:]) == (16, 32)
    exif = Image.Exif()
    exif[274] = 8
    raw = b"\nexif\n" + b"%8d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode()
    assert read_image_header(data[:33] + chunk(b"tEXt", b"Raw profile type exif\0" + raw) + data[33:]) == (16, 32)


def test_a_bomb_behind_a_large_text_stays_one() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + TEXTS["zTXt"] + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadImage) as caught:
        read_image_header(data)
    assert caught.value.reason == "bomb"


def test_what_holds_no_such_text_is_the_same_bytes() -> None:
    data, _ = picture()
    assert leave_out_text(data) is data
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a prompt")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG", pnginfo=info)
    assert leave_out_text(buffer.getvalue()) == data
    assert leave_out_text(b"GIF89a" + TEXTS["zTXt"]) == b"GIF89a" + TEXTS["zTXt"]


@pytest.mark.parametrize(("mode", "kind"), [("F", np.float32), ("I", np.int32)])
def test_deep_greys_of_a_tiff_do_not_turn_black_without_a_word(mode: str, kind: type) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((8, 8), dtype=kind)).save(buffer, "TIFF")
    with pytest.raises(BadImage, match="not of 8 or 16 bits"):
        read_pixels(buffer.getvalue(), Fit((8, 8), (8, 8), 0, 0))
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(buffer, "TIFF")
    assert read_pixels(buffer.getvalue(), Fit((8, 8), (8, 8), 0, 0))[0, 0].tolist() == [100, 100, 100]


def jxl_codestream(width: int, height: int) -> bytes:
    """The beginning of a JPEG XL file of this size: no small form, no ratio, sides of 30 bits."""
    fields = [(0, 1), (3, 2), (height - 1, 30), (0, 3), (3, 2), (width - 1, 30)]
    bits, at = 0, 0
    for value, count in fields:
        bits, at = bits | value << at, at + count
    return b"\xff\x0a" + bits.to_bytes(20, "little")


def test_the_size_that_a_jpeg_xl_states() -> None:
    bare = jxl_codestream(70_000, 3)
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "
    part = struct.pack(">I", len(bare) + 12) + b"jxlp\0\0\0\0" + bare
    assert read_jxl_size(bare) == read_jxl_size(boxes + part) == (70_000, 3)
    assert read_jxl_size(b"\xff\x0a" + bytes([1 | 2 << 1 | 1 << 6]) + bytes(10)) == (24, 24)  # small, ratio 1:1
    for data in (b"", b"\xff\x0a", boxes, boxes + b"\0" * 40, boxes[:20], b"\x89PNG\r\n\x1a\n"):
        assert read_jxl_size(data) is None
    with pytest.raises(BadImage, match="bomb"):  # before any decoder sees it
        read_image_header(jxl_codestream(60_000, 60_000))


class Fake(Image.Image):
    """What a plug-in opens: oriented by its decoder, whatever its EXIF says."""

    format = "JXL"

    def __init__(self) -> None:
        super().__init__()
        drawn = Image.new("RGB", (32, 16), (1, 2, 3))
        self.im, self._mode, self._size = drawn.im, drawn.mode, drawn.size
        exif = Image.Exif()
        exif[274] = 6
        self.info = {"exif": exif.tobytes()}


def test_a_plug_in_that_is_installed_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jxl_codestream(32, 16)
    assert "jxl" not in formats.image_extensions()
    with pytest.raises(BadImage, match="JPEG XL: pip install pillow-jxl-plugin"):
        read_image_header(data)
    with pytest.raises(BadImage, match="HEIC: pip install pillow-heif"):
        read_image_header(b"\0\0\0\x18ftypheic" + bytes(40))
    monkeypatch.setattr(formats, "find_spec", lambda name: name == "pillow_jxl" or None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", ModuleType("pillow_jxl"))
    monkeypatch.setitem(Image.OPEN, "JXL", (lambda file, name: Fake(), lambda start: start.startswith(b"\xff\x0a")))
    for cached in (formats.image_extensions, formats.load_formats):
        cached.cache_clear()
    try:
        assert formats.is_image_name("sub/A.JXL") and not formats.is_image_name("a.heic")
        assert read_image_header(data) == (32, 16) and not has_frames(data)
    finally:
        for cached in (formats.image_extensions, formats.load_formats):
            cached.cache_clear()

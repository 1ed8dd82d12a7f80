"""PNG files chunk by chunk: texts and colour profiles are left out, an eXIf chunk is found anywhere.

Pillow refuses a whole image whose text or profile is large once inflated, though no pixel depends on either. A text is
kept only where it may say the image's orientation.
"""

import io
from collections.abc import Iterator

from PIL.PngImagePlugin import PngStream

SIGNATURE = b"\x89PNG\r\n\x1a\n"
AROUND = 12  # bytes of a chunk beside its content: length, type, checksum
NO_PIXELS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
ORIENTING = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # keywords of texts in which Pillow looks for orientation
MAX_TEXT = 2**20  # characters of the kept texts together: Pillow's own limit for one


def iterate_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk with all its parts, up to IEND or where the file stops making sense."""
    start = len(SIGNATURE)
    while len(head := data[start : start + 8]) == 8 and head[4:] != b"IEND":
        end = start + AROUND + int.from_bytes(head[:4], "big")
        yield head[4:], start, end
        start = end


def find_exif(data: bytes) -> bytes | None:
    """The content of the eXIf chunk, which may follow the pixels: reading the header does not get there."""
    return next((data[start + 8 : end - 4] for name, start, end in iterate_chunks(data) if name == b"eXIf"), None)


def leave_out_text(data: bytes) -> bytes:
    """The same image without texts and profiles that decide no pixel; other files than PNGs as they are."""
    if not data.startswith(SIGNATURE):
        return data
    parts, kept_to, left = [], 0, MAX_TEXT
    for name, start, end in iterate_chunks(data):
        if name not in NO_PIXELS:
            continue
        if name != b"iCCP" and any(data.startswith(word + b"\0", start + 8) for word in ORIENTING):
            size = inflated_size(name, data[start + 8 : end - 4])
            if size <= left:
                left -= size
                continue
        parts.append(data[kept_to:start])
        kept_to = end
    return b"".join([*parts, data[kept_to:]]) if parts else data


def inflated_size(name: bytes, content: bytes) -> int:
    """Characters of a text as Pillow reads it; more than MAX_TEXT where it would refuse the image for it."""
    stream = PngStream(io.BytesIO(content))
    try:
        getattr(stream, f"chunk_{name.decode()}")(0, len(content))
    except (ValueError, SyntaxError):  # too large once inflated; compressed in an unknown way
        return MAX_TEXT + 1
    return stream.text_memory

"""The size that a JPEG XL file states, read without decoding (ISO/IEC 18181-1, SizeHeader; 18181-2, the container)."""

from trainer.data.buckets import Size

CODESTREAM = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}  # width to height
LENGTHS = (9, 13, 18, 30)  # bits of a side, by the two bits before it
MAX_BOXES = 64  # before the picture's: more is no file that someone wrote


def read_jxl_size(data: bytes) -> Size | None:
    """(width, height) as the file stores it; None where it is no JPEG XL or states no size."""
    start = find_codestream(data)
    if start is None or len(data) < start + 2 + 10:
        return None
    bits, at = int.from_bytes(data[start + 2 : start + 12], "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return (bits >> (at - count)) & ((1 << count) - 1)

    small = take(1)

    def side() -> int:
        return (take(5) + 1) * 8 if small else take(LENGTHS[take(2)]) + 1

    height = side()
    ratio = take(3)
    if not ratio:
        return side(), height
    width, per = RATIOS[ratio]
    return height * width // per, height


def find_codestream(data: bytes) -> int | None:
    """Where the picture begins: at the start, or in a box of the container."""
    if data.startswith(CODESTREAM):
        return 0
    start = 0 if data.startswith(CONTAINER) else len(data)
    for _ in range(MAX_BOXES):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        head = 16 if length == 1 else 8
        inside = start + head + (4 if kind == b"jxlp" else 0)  # a part begins with its number
        if kind in (b"jxlc", b"jxlp") and data.startswith(CODESTREAM, inside):
            return inside
        length = int.from_bytes(data[start + 8 : start + 16], "big") if length == 1 else length
        if length < head:  # 0: the last box
            return None
        start += length
    return None

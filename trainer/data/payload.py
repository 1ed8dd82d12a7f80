"""One sample's latents as a shard holds them, a ``.npy`` file: read straight to where they are wanted."""

import io
import os
import zlib
from functools import lru_cache

import numpy as np

from trainer.errors import UserError


def read_payload_into(
    raw_latents: np.ndarray, file: io.FileIO, *, offset: int, length: int, crc32: int, where: str
) -> None:
    """Fill a contiguous fp16 (4, H/8, W/8) array from the ``.npy`` of that shape at ``offset``.

    Nothing but its bytes is read, and they are not copied again. ``where`` names the sample in errors.

    Raises:
        UserError: when the bytes are not those that were written.
    """
    written = npy_header(raw_latents.shape)
    header = bytearray(len(written))
    try:
        read = os.preadv(file.fileno(), [header, raw_latents.data], offset)
        found = zlib.crc32(raw_latents.data, zlib.crc32(header))
        if (read, header, found) == (length, written, crc32):
            return
        # damaged, or of another shape or layout: read again as whatever it says it is
        payload = os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    if len(payload) != length or zlib.crc32(payload) != crc32:
        raise UserError(f"{where}: the bytes are damaged (CRC-32 differs); restore this shard from a copy")
    latents = np.load(io.BytesIO(payload), allow_pickle=False)
    if latents.shape != raw_latents.shape or latents.dtype != np.float16:
        expected = f"float16 {raw_latents.shape}"
        raise UserError(f"{where}: holds {latents.dtype} {latents.shape}, the index says {expected}")
    raw_latents[...] = latents


@lru_cache(maxsize=256)  # one a bucket
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before the numbers of fp16 latents."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()

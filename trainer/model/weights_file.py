"""A .safetensors file: its header, its tensors, and, where it is none, what it is instead.

What is downloaded is often something else: a Git LFS pointer, a web page, the first half. The library says only that a
header cannot be read.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.core.errors import UserError, shorten
from trainer.core.files import shown_name
from trainer.core.json_text import decode_json
from trainer.core.progress import BYTES, Meter, watch_writing

PICKLED_BYTES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
ARCHIVE_BYTES = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ")
WRITE_BYTES = 1 << 22  # at a time, hashed and written
SUMMED = 2**22  # elements that are looked at at once
DTYPE_NAMES = {  # as the format calls them; what optimizers keep
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PAGE_WORDS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")


class LazyFile(Mapping[str, Tensor]):
    """A .safetensors file whose tensors are read when they are asked for.

    Raises:
        UserError: when it is none, or not whole, saying what it is.
    """

    def __init__(self, path: Path, meter: Meter | None = None) -> None:  # which counts the bytes that are read
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise UserError(f"{path} is not a readable .safetensors file: it is no regular file")
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable .safetensors file: {explain_unreadable(path, error)}") from error
        self.path, self.meter = path, meter
        self.names = dict.fromkeys(self.file.keys())
        self.metadata: dict[str, str] = self.file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        # a copy: the file is mapped, where tensors lie at odd addresses, on which the last bits of products depend
        tensor = self.file.get_tensor(name).clone()
        if self.meter is not None:
            self.meter.update(tensor.nbytes)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; nothing but the header is read."""
        return tuple(self.file.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as the format calls it, such as F16 or F8_E4M3; nothing but the header is read."""
        return self.file.get_slice(name).get_dtype()


class JoinedFiles(Mapping[str, Tensor]):
    """Several .safetensors files as one."""

    def __init__(self, files: Sequence[LazyFile]) -> None:
        self.places = {name: file for file in files for name in file}

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_frame(file: BinaryIO) -> dict[str, Any]:
    """The header of a .safetensors file that is open at its beginning; then it is open where the tensors begin.

    The format: eight bytes of the header's length, the header as JSON, then the tensors. The header maps
    names to dtype, shape and place, and "__metadata__" to texts by key.
    """
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length))


def measure_tensors(path: Path, prefix: str = "") -> int:
    """Bytes of a file's tensors, or of those whose names begin so."""
    with path.open("rb") as file:
        header = read_frame(file)
    places = (entry["data_offsets"] for name, entry in header.items() if name.startswith(prefix) and "dtype" in entry)
    return sum(end - begin for begin, end in places)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file; a meter says how far it is."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    with watch_writing(path.parent, shown_name(path), size):
        save_file(dict(tensors), path, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[str, int]:
    """Write a new .safetensors file, tensor by tensor; its SHA-256 and its size. It is not forced to the disk yet.

    The bytes are hashed as they are written. The order is ours, not the library's, which cannot hash: large elements
    first, so that each tensor lies at a multiple of its element's size.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file, Meter(f"write {shown_name(path)}", 8 + len(header) + end, BYTES) as meter:

        def put(part: bytes | memoryview) -> None:
            file.write(part)
            digest.update(part)
            meter.update(len(part))

        put(struct.pack("<Q", len(header)) + header)
        for _, tensor in ordered:
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            for begin in range(0, len(data), WRITE_BYTES):
                put(data[begin : begin + WRITE_BYTES])
    return digest.hexdigest(), 8 + len(header) + end


def explain_unreadable(path: Path, error: Exception) -> str:
    """What a file is that the library cannot open; the library's own words where that is not known."""
    if isinstance(error, OSError) and not path.is_file():
        return str(error)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1024)
    if not size:
        return "it is empty (0 bytes): download it again"
    if start.startswith(b"version https://git-lfs"):
        named = re.search(rb"\nsize (\d+)", start)
        whole = f" of {int(named[1]):,} bytes" if named else ""
        return f"it is a Git LFS pointer, which stands for a file{whole}: run git lfs pull, or download the file itself"
    if start.lstrip().lower().startswith(PAGE_WORDS):
        return (
            "it is a web page: its download was answered by a page, such as one that asks for a login; download it "
            "again, with the site's token where it wants one"
        )
    if start.lstrip().startswith(b"{"):
        text = shorten(start.decode("utf-8", errors="replace"), 120)
        return f"it is JSON text, such as a server's answer to a failed download: {text}"
    if start.startswith(PICKLED_BYTES) or b"/data.pkl" in start:
        return "it is a pickled checkpoint (.ckpt, .pt), which could run code when opened: convert it first"
    if start.startswith(ARCHIVE_BYTES):
        return "it is a compressed archive: unpack it"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file, whose weights are quantised and cannot be trained: take the .safetensors file"
    return explain_frame(path, size) or str(error)


def explain_frame(path: Path, size: int) -> str | None:
    """Whether a file's length is not the one that its header names; None where that is not so, or there is no header.

    The format: eight bytes of the header's length, the header as JSON, then the tensors.
    """
    with path.open("rb") as file:
        first = file.read(8)
        if len(first) < 8:
            return f"it has {size} bytes, too few for any weights: download it again"
        (length,) = struct.unpack("<Q", first)
        header = file.read(min(length, 100_000_000))
    if not header.lstrip().startswith(b"{"):
        return None
    cut = "the download was cut off; download it again"
    if length + 8 > size:
        return f"it ends within its header: {cut}"
    try:
        tensors = {name: entry for name, entry in decode_json(header).items() if name != "__metadata__"}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    if size < whole:
        return f"it has {size:,} of its {whole:,} bytes: {cut}"
    return (
        f"it has {size:,} bytes, its header names {whole:,}: it is damaged; download it again" if size > whole else None
    )


def check_finite(state: Mapping[str, Tensor], where: str, remedy: str = "take a sound copy of the model") -> None:
    """Refuse weights that no training can mend, before anything is computed with them.

    ``where`` is what messages call the file or the part; ``remedy`` is what they advise.

    Raises:
        UserError: naming the first tensor with NaN or infinity, or with whole numbers, and how many there are.
    """
    whole = [name for name, tensor in state.items() if not tensor.is_floating_point()]
    if whole:
        kind = str(state[whole[0]].dtype).removeprefix("torch.")
        raise UserError(
            f"{where}: {whole[0]}{more(whole)} holds {kind} numbers: the weights are quantised, and cannot be trained; "
            "take the model in fp16, bf16 or fp32"
        )
    if broken := [name for name, tensor in state.items() if not is_finite(tensor)]:
        tensor = state[broken[0]].float()
        bad = int((~tensor.isfinite()).sum())
        kind = "NaN" if tensor.isnan().any() else "infinity"
        raise UserError(
            f"{where}: {broken[0]}{more(broken)} holds {kind} ({bad:,} of its {tensor.numel():,} values are not "
            f"finite): {remedy}"
        )


def check_each(
    tensors: Iterable[tuple[str, Tensor]], where: str, remedy: str = "take a sound copy of the model"
) -> Iterator[tuple[str, Tensor]]:
    """Pass on (name, tensor) one at a time, so that no more than one is held, each only if it is sound.

    Raises:
        UserError: as ``check_finite``, at the first that is not; those after it are read to be counted.
    """
    rest = iter(tensors)
    for name, tensor in rest:
        if not is_sound(tensor):
            check_finite({name: tensor} | {other: value for other, value in rest if not is_sound(value)}, where, remedy)
        yield name, tensor


def is_sound(tensor: Tensor) -> bool:
    """Whether a tensor is of floating point and finite."""
    return tensor.is_floating_point() and is_finite(tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a floating-point tensor are finite."""
    return all(math.isfinite(sum_of(part)) for part in tensor.flatten().split(SUMMED))


def find_broken(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors that are not finite; the device is waited for once, unless some look so.

    One value that is not makes its tensor's sum so. A sum of fp32 may overflow where no value did: those are looked at
    again.
    """
    floats = [(name, tensor.detach()) for name, tensor in tensors if tensor.is_floating_point()]
    sums = [tensor.sum(dtype=torch.float32 if tensor.element_size() < 8 else None) for _, tensor in floats]
    home = sums[0].device if sums else torch.device("cpu")
    finite = torch.stack([value.double().to(home) for value in sums]).isfinite().tolist() if sums else []
    suspects = [pair for pair, good in zip(floats, finite, strict=True) if not good]
    return [name for name, tensor in suspects if not is_finite(tensor)]


def sum_of(values: Tensor) -> float:
    """A sum that finite values of up to fp32 cannot overflow; torch makes an fp64 copy of them for it."""
    wide = values.float() if values.element_size() == 1 else values  # sums of fp8 do not exist
    return float(wide.sum(dtype=torch.float64))


def more(names: list[str]) -> str:
    """How many others there are beside the first of these names."""
    return f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""

"""Files that others read: .safetensors stamped with their own hash, a CLIP tokenizer's files, and sums of files.

Beside what export writes, ``<name>.sha256`` names the files of that export and no others. An export of version 0.2 has
none: its single file is proven by the hash in its own header, its folder by that file.
"""

import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.core.disk import disk_space
from trainer.core.errors import UserError
from trainer.core.files import (
    copy_rest,
    sha256_file,
    sha256_rest,
    sync_file,
    sync_folder,
    temporary_path,
    write_bytes,
    write_text,
)
from trainer.core.json_text import decode_json
from trainer.core.layout import EXPORT_SUMS_SUFFIX, TOKENIZER_SETTINGS
from trainer.data.tokens import read_added_tokens, read_bpe
from trainer.model.base import find_base, has_vae, read_state
from trainer.model.component_configs import check_component
from trainer.model.lineage import Lineage, read_lineage
from trainer.model.sdxl import COMPONENTS
from trainer.model.weights_file import LazyFile, read_frame, save_tensors

TOKENIZER_WORDS = ("vocab.json", "merges.txt")
HASH_KEY = "modelspec.hash_sha256"
NO_HASH = "0x" + "0" * 64


def save_stamped(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A .safetensors file whose header names the SHA-256 of the bytes after it, its metadata in order.

    The library writes metadata in random order; here the same tensors and metadata give the same bytes.
    """
    save_tensors(tensors, path, dict(metadata) | {HASH_KEY: NO_HASH})
    with path.open("r+b") as file:
        header = read_frame(file)
        begin, digest = file.tell(), sha256_rest(file, path)
        framed = frame_header(header, {HASH_KEY: f"0x{digest}"})
        assert len(framed) == begin, "the header became longer"
        file.seek(0)
        file.write(framed)


def hash_files(folder: Path, paths: Iterable[Path] | None = None) -> dict[str, str]:
    """Path relative to a folder -> SHA-256 of every file in it, or of those that ``paths`` in it are or hold."""
    inside = (file for top in paths or [folder] for file in (top, *top.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in inside}


@contextmanager
def put_whole(path: Path, needed: int) -> Iterator[Path]:
    """A temporary name for a file or folder of ``needed`` bytes, which gets its name when it is whole.

    Nothing happens where the same lies there already.

    Raises:
        UserError: where something else lies there, which is left alone, or where it does not fit on the disk.
    """
    temporary = temporary_path(path)
    with disk_space(path.parent, str(path), needed):
        try:
            yield temporary
            if not path.exists():
                for written in (*temporary.rglob("*"), temporary):
                    sync_file(written)  # folders too; what was copied is not on the disk yet
                temporary.rename(path)
                sync_folder(path.parent)
            elif path.is_symlink() or hash_files(path) != hash_files(temporary):
                remedy = "move it away, or use --out DIR"
                raise UserError(f"{path} exists and is not what would be written now; it is left alone: {remedy}")
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def copy_with_metadata(source: Path, target: Path, changes: Mapping[str, str | None]) -> None:
    """A copy of a .safetensors file with other entries in its metadata, where None removes one; the same tensors.

    The bytes are those that :func:`save_stamped` would write.
    """
    with source.open("rb") as file, target.open("xb") as copy:
        copy.write(frame_header(read_frame(file), changes))
        copy_rest(file, source, copy)


def frame_header(header: dict[str, Any], changes: Mapping[str, str | None]) -> bytes:
    """A header with other metadata, in order, as the format frames it: its length, and JSON filled up with spaces."""
    said = {key: value for key, value in (header.get("__metadata__", {}) | changes).items() if value is not None}
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    header = {"__metadata__": dict(sorted(said.items()))} | tensors
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = encoded.ljust(-(-len(encoded) // 8) * 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(padded)) + padded


def check_stamp(path: Path) -> None:
    """Compare a file with the hash in its own header.

    Raises:
        UserError: when it is damaged, or carries none.
    """
    LazyFile(path)  # a truncated header, or fewer bytes than it names
    with path.open("rb") as file:
        said = read_frame(file).get("__metadata__", {}).get(HASH_KEY)
        if said != f"0x{sha256_rest(file, path)}":
            raise UserError(f"{path} is damaged: its tensors are not those whose SHA-256 is in its header")


def write_tokenizer(target: Path, source: Path, name: str) -> None:
    """The four classic files of "tokenizer" or "tokenizer_2", copied from ``source``.

    Where transformers 5 wrote ``tokenizer.json`` alone, the words are taken from it and the settings are SDXL's.
    """
    present = {file for file in (*TOKENIZER_WORDS, *TOKENIZER_SETTINGS) if (source / file).is_file()}
    if present.issuperset(TOKENIZER_WORDS):
        for file in TOKENIZER_WORDS:
            write_bytes(target / file, (source / file).read_bytes())
    else:
        vocab, pairs = read_bpe(source)
        vocab |= read_added_tokens(source)
        in_order = dict(sorted(vocab.items(), key=lambda item: item[1]))
        merges = [" ".join(pair) for pair in pairs]
        write_text(target / "vocab.json", json.dumps(in_order, ensure_ascii=False))
        write_text(target / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    # settings that transformers 5 wrote, without the map, are not ones that transformers 4 understands
    own = source if present.issuperset(TOKENIZER_SETTINGS) else resources.files("trainer.model") / "assets/sdxl" / name
    for file in TOKENIZER_SETTINGS:
        text = (own / file).read_text(encoding="utf-8")
        said = decode_json(text)
        kept = check_component("tokenizer", said, f"{source / file}")
        write_text(target / file, text if kept == said else json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def write_sums(file: Path, hashes: dict[str, str]) -> None:
    """Write a file of sums, whole; nothing happens where it says the same already."""
    text = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    if not file.is_file() or file.read_bytes() != text.encode():
        write_text(file, text)


def read_sums(file: Path) -> dict[str, str]:
    """Path relative to the folder in which it lies -> SHA-256; empty where there is no such file."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def find_changed(said: dict[str, str], found: dict[str, str]) -> str:
    """The first names that are only in one of these, or have another hash; empty where there are none."""
    changed = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
    return ", ".join(changed[:4])


def export_sums(export: Path) -> Path:
    """Where the sums of a single file, or of a folder, that export wrote lie."""
    return export.with_name(export.name.removesuffix(".safetensors") + EXPORT_SUMS_SUFFIX)


def split_sums(paths: Sequence[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """The sums of an export: of these formats of it, which are empty where they do not name all; and of others."""
    said, formats = read_sums(export_sums(paths[0])), {path.name for path in paths}
    own = {name: digest for name, digest in said.items() if name.partition("/")[0] in formats}
    others = {name: digest for name, digest in said.items() if name not in own}
    return own if {name.partition("/")[0] for name in own} == formats else {}, others


def write_export_sums(paths: Sequence[Path]) -> None:
    """Write the sums of what export wrote; a format that was exported before keeps its own."""
    _, others = split_sums(paths)
    write_sums(export_sums(paths[0]), others | hash_files(paths[0].parent, paths))


def check_export(paths: Sequence[Path], lineage: Lineage, remedy: str) -> None:
    """Refuse an export that is damaged, or another checkpoint's; ``remedy`` is what messages advise.

    Raises:
        UserError: naming what differs.
    """
    said, _ = split_sums(paths)
    if said:
        if wrong := find_changed(said, hash_files(paths[0].parent, paths)):
            raise UserError(f"{paths[0].parent} holds a damaged export: {wrong} is not what was exported; {remedy}")
    else:
        prove_by_stamp(paths, remedy)
    for path in paths:
        if read_lineage(path) != lineage:
            raise UserError(f"{path} was made from another checkpoint: {remedy}")


def prove_by_stamp(paths: Sequence[Path], remedy: str) -> None:
    """Prove an export without sums: the single file by its own stamp, a folder's tensors by the single file beside it.

    Raises:
        UserError: when it is damaged, or a folder's single file is not there.
    """
    single = export_sums(paths[0]).with_suffix(".safetensors")
    if not single.is_file():
        raise UserError(f"{paths[0]} has neither sums nor its single file beside it, which could prove it; {remedy}")
    try:
        check_stamp(single)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    for folder in (path for path in paths if path.is_dir()):
        here, stamped = find_base(str(folder)), find_base(str(single))
        for component in (*COMPONENTS.values(), "vae"):
            copied = read_state(here, component) if component != "vae" or has_vae(here) else {}
            if not same_tensors(copied, read_state(stamped, component)):
                raise UserError(f"{folder / component} is damaged: it is not what {single} holds; {remedy}")


def same_tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and values are the same."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )

"""Files named by their SHA-256, as ``sha256sum --check`` reads it: of a published folder, and of each export.

Beside what export writes, ``<name>.sha256`` names the files of that export and no others. An export of version 0.2 has
none: its single file is proven by the hash in its own header, its folder by that file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.core.files import write_text
from trainer.core.layout import EXPORT_SUMS_SUFFIX, SUMS_FILE
from trainer.model.base import find_base, has_vae, read_state
from trainer.model.lineage import Lineage, read_lineage
from trainer.model.sdxl import COMPONENTS
from trainer.release.artefacts import check_stamp, hash_files


def write_sums(file: Path, hashes: dict[str, str]) -> None:
    """Write a file of sums, whole; nothing happens where it says the same already."""
    text = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)


def read_sums(file: Path) -> dict[str, str]:
    """Path relative to the folder in which it lies -> SHA-256; empty where there is no such file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_sums(folder: Path) -> None:
    """Compare a published folder with its SHA256SUMS.

    Raises:
        UserError: when a file is missing, added or changed.
    """
    found = hash_files(folder)
    found.pop(SUMS_FILE, None)
    if wrong := find_changed(read_sums(folder / SUMS_FILE), found):
        raise UserError(f"{folder} is not what its {SUMS_FILE} says: {wrong}; build it again")


def find_changed(said: dict[str, str], found: dict[str, str]) -> str:
    """The first names that are only in one of these, or have another hash; empty where there are none."""
    changed = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
    return ", ".join(changed[:4])


def export_sums(export: Path) -> Path:
    """Where the sums of a single file, or of a folder, that export wrote lie."""
    return export.with_name(export.name.removesuffix(".safetensors") + EXPORT_SUMS_SUFFIX)


def has_sums(paths: Sequence[Path]) -> bool:
    """Whether the sums of an export name these formats of it."""
    return {path.name for path in paths} <= {name.partition("/")[0] for name in read_sums(export_sums(paths[0]))}


def write_export_sums(paths: Sequence[Path]) -> None:
    """Write the sums of what export wrote; a format that was exported before keeps its own."""
    folder, written = paths[0].parent, {path.name for path in paths}
    before = {name: digest for name, digest in read_sums(export_sums(paths[0])).items()
              if name.partition("/")[0] not in written}  # fmt: skip
    write_sums(export_sums(paths[0]), before | hash_files(folder, paths))


def check_export(paths: Sequence[Path], lineage: Lineage, remedy: str) -> None:
    """Refuse an export that is damaged, or another checkpoint's; ``remedy`` is what messages advise.

    Raises:
        UserError: naming what differs.
    """
    if has_sums(paths):
        said, names = read_sums(export_sums(paths[0])), {path.name for path in paths}
        own = {name: digest for name, digest in said.items() if name.partition("/")[0] in names}
        if wrong := find_changed(own, hash_files(paths[0].parent, paths)):
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
    check_stamp(single)
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

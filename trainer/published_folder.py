"""What may lie in a published folder: files of an allow-list, without links, secrets or paths of the user's machine."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from trainer.artefacts import hash_files
from trainer.errors import UserError
from trainer.files import write_text

SUMS_FILE = "SHA256SUMS"
ALLOWED = (
    r"README\.md|LICENSE\.md|LICENSE-base(-\d+)?\.md|CHANGES\.md|SHA256SUMS|lineage\.json|model_index\.json"
    r"|scheduler/scheduler_config\.json|(unet|vae)/(config\.json|diffusion_pytorch_model\.safetensors)"
    r"|text_encoder(_2)?/(config\.json|model\.safetensors)"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer_config\.json|special_tokens_map\.json)"
    r"|configs/\d+-[A-Za-z0-9_][\w.-]*\.yaml|samples/[A-Za-z0-9_][\w.-]*\.png"
)
VOCABULARY = {"vocab.json", "merges.txt"}  # every letter and sign of the language, no sentence of anyone's
SECRETS = {
    "a token": re.compile(
        r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-[\w-]{20,}"
        r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,})"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password or key": re.compile(
        r"(?i)(api[_-]?key|access[_-]?key|secret|passw(or)?d|token)[\"']?\s*[:=]\s*[\"']?[\w/+-]{16,}"
    ),
    "a name and password in an address": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
    "an absolute path": re.compile(
        r"(?<![\w.:/<>~})\]*-])/(?:[\w.@+-]+/)+[\w.@+-]*|\bfile://|(?<![\w~])~[\w-]*/[\w.]|(?<!\w)[A-Za-z]:\\\w|\\\\\w+\\\w"
    ),
}


def check_folder(folder: Path, run: str) -> None:
    """Refuse a folder that holds anything but what is published, before it gets its name and before an upload.

    Raises:
        UserError: naming all files that do not belong there, links, or texts with secrets or paths in them.
    """
    allowed = re.compile(rf"{ALLOWED}|{re.escape(run)}(-fp32)?\.safetensors")
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name} is a link")
        elif path.is_dir():
            continue
        elif not path.is_file() or not allowed.fullmatch(name):
            problems.append(f"{name} is not a file that is published")
        else:
            problems += [f"{name} holds {what}" for what in find_secrets(path)]
    if problems:
        raise UserError(f"{folder} is not fit to be published:\n" + "\n".join(f"  {problem}" for problem in problems))


def find_secrets(path: Path) -> Iterator[str]:
    """What no stranger should read in a file: in its text, in a .safetensors header, in a PNG's text chunks.

    A secret is not repeated; a path is, so that it can be found.
    """
    for text in read_texts(path):
        for what, pattern in SECRETS.items():
            if match := pattern.search(text):
                line = text.count("\n", 0, match.start()) + 1
                shown = f" ({match[0]})" if "path" in what else ""
                yield f"{what}{shown} in line {line}"


def read_texts(path: Path) -> Iterator[str]:
    """Everything in a file that is text."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        for value in metadata.values():
            yield from texts_of(json.loads(value)) if value.startswith(("{", "[")) else [value]
    elif path.suffix == ".png":
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            yield from (str(value) for value in image.info.values() if isinstance(value, str | bytes))
    elif path.suffix == ".json" and path.name not in VOCABULARY:
        yield from texts_of(json.loads(path.read_text(encoding="utf-8")))
    elif path.name not in VOCABULARY:
        yield path.read_text(encoding="utf-8")


def texts_of(value: object) -> Iterator[str]:
    """All ``key: text`` pairs and texts in a JSON value; keys, because "token: ..." tells what a text is."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str):
                yield f"{key}: {item}"
            else:
                yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, str):
        yield value


def write_sums(folder: Path) -> None:
    """SHA256SUMS over all files, as ``sha256sum --check`` reads it."""
    hashes = hash_files(folder)
    write_text(folder / SUMS_FILE, "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)))


def read_sums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 as SHA256SUMS says, compared with the files.

    Raises:
        UserError: when a file is missing, added or changed.
    """
    lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {name: digest for name, digest in hash_files(folder).items() if name != SUMS_FILE}
    if wrong := sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name)):
        raise UserError(f"{folder} is not what its {SUMS_FILE} says: {', '.join(wrong[:4])}; build it again")
    return said

"""manifest.json, which makes a set of shards whole: what it must hold, and the digest by which it proves itself."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError, shorten
from trainer.core.files import sha256_json
from trainer.core.json_text import read_json
from trainer.core.layout import MANIFEST_FILE, SHARD_NAME

SET_FORMAT = 1
DIGEST_KEY = "manifest_sha256"  # of all other keys; sets of older versions lack it
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_SAMPLES = 10**9
MAX_SIZE = 2**50


def seal_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own digest."""
    said = {key: value for key, value in manifest.items() if key != DIGEST_KEY}
    return said | {DIGEST_KEY: sha256_json(said)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete set of shards.

    Raises:
        UserError: where there is none, or it is of another format, is not what was written, or makes no sense.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: make the shards first, with scripts/build_shards.py")
    manifest = read_json(path)
    if (version := manifest.get("format_version")) != SET_FORMAT or isinstance(version, bool):
        raise UserError(f"{path} has format_version {shorten(str(version), 40)}, this program reads {SET_FORMAT}")
    if problem := next(find_manifest_problems(manifest), None):
        raise UserError(f"{path}: {problem}; restore it from a copy, or build the shards again")
    return manifest


def find_manifest_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """What a manifest must hold and does not."""
    if DIGEST_KEY in manifest and manifest != seal_manifest(manifest):
        yield f"it was changed since it was written ({DIGEST_KEY} is not that of the rest)"
    for name in ("fingerprint", "index_sha256", *(["latents_sha256"] if "latents_sha256" in manifest else [])):
        if not is_sha256(manifest.get(name)):
            yield f"{name} must be a SHA-256, not {shorten(repr(manifest.get(name)), 40)}"
    for name in ("latents", *({"counts", "inputs"} & manifest.keys())):
        if not isinstance(manifest.get(name), dict):
            yield f"{name} must be an object"
            return
    if not isinstance(manifest["latents"].get("vae_sha256", ""), str):
        yield "latents.vae_sha256 must be text"
    yield from find_count_problems(manifest)
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not shards:
        yield "shards must be a list of shards"
        return
    yield from filter(None, map(find_shard_entry_problem, shards))
    names = Counter(shard["name"] for shard in shards)
    yield from (f"shards lists {name} twice" for name in sorted(names) if names[name] > 1)


def find_count_problems(manifest: dict[str, Any]) -> Iterator[str]:
    """What pages and summaries read: counts of inputs and samples, and of what became of the others by its kind."""
    counts = manifest.get("counts", {})
    for name, value in counts.items():
        kinds = value.values() if isinstance(value, dict) else [value]
        deeper = [each for kind in kinds for each in (kind.values() if isinstance(kind, dict) else [kind])]
        if not all(is_amount(each, MAX_SAMPLES) for each in deeper):
            yield f"counts.{shorten(name, 40)} must be a number, or numbers by name"
    if "inputs" in manifest and not isinstance(manifest["inputs"].get("sha256"), str):
        yield "inputs.sha256 must be text"


def find_shard_entry_problem(shard: Any) -> str | None:
    """What is wrong with one entry of the list of shards."""
    if not isinstance(shard, dict) or shard.keys() != {"name", "samples", "size", "sha256"}:
        return f"an entry of shards must have name, samples, size and sha256: {shorten(repr(shard), 80)}"
    name = shard["name"]
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        return f"{shorten(repr(name), 80)} is no shard's name"
    if not is_amount(shard["samples"], MAX_SAMPLES) or not is_amount(shard["size"], MAX_SIZE):
        return f"{name} must have a number of samples and a size in bytes"
    return None if is_sha256(shard["sha256"]) else f"{name} must have a SHA-256"


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 in hex."""
    return isinstance(value, str) and SHA256.fullmatch(value) is not None


def is_amount(value: Any, largest: int) -> bool:
    """Whether a value is a whole number from 0 up to ``largest``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest

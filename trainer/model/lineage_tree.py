"""A file's lineage as a tree to read: what made it, what made its base, and so on down to the first base.

Only the file itself is asked. Lineages come from other people's files, so that each value may be missing, and nothing
in them reaches the terminal unescaped.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.core.errors import UserError
from trainer.model.lineage import Lineage, read_lineage

HIGHLIGHTS = (  # label, and the config's fields behind it
    ("rates", ("optim.unet_lr", "optim.text_encoder_1_lr", "optim.text_encoder_2_lr", "schedule.lr")),
    ("batch", ("data.global_batch_size", "data.bucket_batch_size", "data.micro_batch_size")),
    ("optimizer", ("optim.name", "optim.betas", "optim.weight_decay", "optim.max_grad_norm")),
    ("length", ("schedule.epochs", "schedule.max_steps", "schedule.warmup_steps")),
    ("diffusion", ("diffusion.prediction_type", "diffusion.zero_terminal_snr", "diffusion.noise_offset",
                   "diffusion.min_snr_gamma")),
    ("other", ("buckets.base_resolution", "captions.max_token_length", "precision.compute", "run.seed")),
)  # fmt: skip
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")
NOTHING = "nothing recorded before this"
UNKNOWN = "not recorded"


def find_lineage(path: Path) -> Lineage:
    """The lineage of a single file, a diffusers folder or a checkpoint, or of what lies in a published folder.

    Raises:
        UserError: when there is none, when the files in a folder tell different ones, or when it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    lineage = read_lineage(path)
    if lineage is not None:
        return lineage
    found: dict[str, Lineage] = {}
    if path.is_dir():
        inside = sorted(entry for entry in path.iterdir() if entry.is_dir() or entry.suffix == ".safetensors")
        read = {entry.name: read_lineage(entry) for entry in inside if not entry.name.startswith(".")}
        found = {name: lineage for name, lineage in read.items() if lineage is not None}
    if not found:
        raise UserError(
            f"{path} carries no lineage: it was not written by this trainer, or another program wrote it again and "
            "dropped the metadata"
        )
    first, *others = found.values()
    if any(other != first for other in others):
        raise UserError(f"{path} holds files with different lineages; name one of them: {', '.join(found)}")
    return first


def tell_lineage(lineage: Lineage, with_config: bool = False) -> str:
    """The tree as text: each generation below the one that was made from it, indented; whole configs if asked for.

    Raises:
        UserError: where a part of it is not what it should be.
    """
    lines: list[str] = []
    indent = ""
    current: Mapping[str, Any] = lineage
    while True:
        lines += [indent + line for line in tell_generation(current, with_config)]
        before = section(current, "base").get("lineage")
        indent += "  "
        if before is None:
            return "\n".join([*lines, f"{indent}└─ {NOTHING}"]) + "\n"
        current = section(section(current, "base"), "lineage")
        lines.append(f"{indent}└─ that base was made so:")
        indent += "   "


def tell_generation(lineage: Mapping[str, Any], with_config: bool) -> Iterator[str]:
    """One file's own part of the tree, without what came before."""
    yield f"{show(lineage.get('run'))}, stage {show(lineage.get('stage'))}, {count(lineage.get('step'))} steps"
    rows = [
        ("samples seen", count(lineage.get("samples_seen"))),
        ("data", f"{count(lineage.get('images'))} images, index {show(lineage.get('index_fingerprint'))}"),
        ("time", tell_time(lineage)),
        ("hardware", ", ".join(map(show, entries(lineage, "hardware")))),
        ("code", tell_code(section(lineage, "code"))),
        ("libraries", tell_fields(section(lineage, "versions"), LIBRARIES)),
    ]
    config = section(lineage, "config")
    rows += [(name, tell_fields(flat(config), fields)) for name, fields in HIGHLIGHTS]
    base = section(lineage, "base")
    revision = f" at revision {show(base['revision'])}" if base.get("revision") is not None else ""
    if base:  # a fork's origin has the same
        rows += [("base", f"{show(base.get('reference'))}{revision}"), ("base SHA-256", show(base.get("sha256")))]
    fork = section(lineage, "fork")
    if fork:
        seen = f"which had seen {count(fork.get('samples_seen'))} samples"
        rows.append(("forked from", f"{show(fork.get('run'))} at step {count(fork.get('step'))}, {seen}"))
    yield from (f"  {name:<13}{text}" for name, text in rows if text)
    if fork.get("lineage"):
        yield from (f"    {line}" for line in tell_generation(section(fork, "lineage"), with_config))
    if with_config:
        yield "  config"
        dumped = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=False, width=110)
        yield from (f"    {line}" for line in dumped.splitlines())


def tell_time(lineage: Mapping[str, Any]) -> str:
    """When it was made, as far as it says."""
    said = [f"{word} {show(lineage[key])}" for word, key in (("begun", "started_at"), ("saved", "written_at"))
            if lineage.get(key) is not None]  # fmt: skip
    if lineage.get("hours") is not None:
        said.append(f"{show(lineage['hours'])} hours of training")
    return ", ".join(said)


def tell_code(code: Mapping[str, Any]) -> str:
    """The version, and the commit where the code ran from its checkout."""
    dirty = " with changes that were not committed" if code.get("dirty") else ""
    return f"trainer {show(code.get('version'))}, commit {show(code.get('commit'))}{dirty}"


def tell_fields(values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """``name value`` of those that are there, without the section's name."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {show(values[name])}" for name in names if values.get(name) is not None
    )


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a config -> dotted keys."""
    sections = {name: part for name, part in config.items() if isinstance(part, dict)}
    return {f"{name}.{key}": value for name, part in sections.items() for key, value in part.items()}


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part that must be an object; empty where it is missing."""
    part = values.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise UserError(f"the lineage is damaged: its {show(name)} must be a JSON object, and is {show(part)[:60]}")
    return part


def entries(values: Mapping[str, Any], name: str) -> list[Any]:
    """A part that must be a list; empty where it is missing."""
    part = values.get(name) or []
    if not isinstance(part, list):
        raise UserError(f"the lineage is damaged: its {show(name)} must be a JSON list, and is {show(part)[:60]}")
    return part


def count(value: Any) -> str:
    """A number with its thousands apart."""
    return f"{value:,}" if isinstance(value, int) else show(value)


def show(value: Any) -> str:
    """A value on one line, without control characters, which could rewrite the terminal."""
    if value is None:
        return UNKNOWN
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value))

"""What a lineage says, stage by stage, as rows of words: the terminal's tree, the model card and CHANGES.md print them.

Lineages come from other people's files: any value may be missing or of another type, and is "not recorded" then.
Identifiers stand in backticks; the rest is as the file has it, and each printer escapes it in its own way.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.model.lineage import Lineage

NOT_RECORDED = "not recorded"
PART_NAMES = {"unet": "UNet", "text_encoder_1": "text encoder 1", "text_encoder_2": "text encoder 2"}
RECORDED_TYPES: dict[str, type | tuple[type, ...]] = {
    "run": str, "stage": str, "index_fingerprint": str, "started_at": str, "written_at": str,
    "step": int, "samples_seen": int, "images": int, "nonfinite_steps": int,
    "substituted": int, "hours": (int, float),
}  # fmt: skip
SHOWN_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


def list_stages(lineage: Lineage) -> list[Lineage]:
    """The run that made a file and those that made its bases, each completed, the first of them first."""
    stages = [complete_stage(lineage)]
    while (before := stages[0]["base"]["lineage"]) is not None:
        stages.insert(0, complete_stage(before))
    return stages


def complete_stage(lineage: Mapping[str, Any]) -> Lineage:
    """A lineage with all that rows need of its run; None, or empty, where it is not recorded or no such value."""

    def part(name: str) -> dict[str, Any]:
        return value if isinstance(value := lineage.get(name), dict) else {}

    base, fork, hardware = part("base"), part("fork"), lineage.get("hardware")
    before, texts = base.get("lineage"), {key: value for key, value in base.items() if isinstance(value, str)}
    return {
        **lineage,
        **{key: recorded(lineage.get(key), kind) for key, kind in RECORDED_TYPES.items()},
        "caption_fields": read_counts(lineage.get("caption_fields")),
        "fork": fork if isinstance(fork.get("run"), str) and isinstance(fork.get("step"), int) else None,
        "hardware": [str(device) for device in hardware] if isinstance(hardware, list) else [],
        "config": {name: values for name, values in part("config").items() if isinstance(values, dict)},
        "code": {key: part("code").get(key) for key in ("version", "commit", "dirty")},
        "versions": part("versions"),
        "base": {key: texts.get(key) for key in ("reference", "revision", "sha256")}
        | {"lineage": before if before and isinstance(before, dict) else None},
    }


def read_counts(value: Any) -> dict[str, int] | None:
    """Whole numbers by name; None where they are not recorded, or are something else."""
    if not isinstance(value, dict) or not all(isinstance(recorded(each, int), int) for each in value.values()):
        return None
    return value


def find_taught(stages: Sequence[Lineage]) -> dict[str, int] | None:
    """How many samples had what makes a caption (data.index.count_fields), over all stages and what they forked from.

    None where one of them did not record it.
    """
    counts: Counter[str] = Counter()
    for made in stages:
        before = made["fork"]["lineage"] if made["fork"] and isinstance(made["fork"].get("lineage"), dict) else None
        for one in [made, *([complete_stage(before)] if before else [])]:
            if one["caption_fields"] is None:
                return None
            counts.update(one["caption_fields"])
    return dict(counts)


def name_base(base: Mapping[str, Any]) -> str:
    """What strangers call a base: the hub's name; of what lay on a disk no more than its own name.

    A folder before that would make it look like a model of somebody's on the hub.
    """
    reference = base["reference"]
    if reference is None or base["revision"] is not None or "${" in reference:
        return words(reference)
    return f'a local {"file" if reference.endswith(".safetensors") else "folder"} "{Path(reference).name}"'


def caption_words(counts: Mapping[str, int] | None) -> str:
    """What captions were made of, of one stage or of several."""
    if counts is None:
        return NOT_RECORDED
    finished, names = counts.get("caption", 0), [name for name in counts if name != "caption" and counts[name]]
    parts = [f"{name.removeprefix('tags_').removeprefix('extra.')} ({counts[name]:,})" for name in names]
    if not finished:
        return f"composed of {', '.join(parts) or 'nothing'}"
    rest = f"; the others composed of {', '.join(parts)}" if parts else ""
    return f"finished captions, as written ({finished:,} samples){rest}"


def recorded(value: Any, kind: type | tuple[type, ...]) -> Any:
    """A value of its type, else None; of whole numbers those that a float holds, since JSON has others."""
    return value if isinstance(value, kind) and not (isinstance(value, int) and abs(value) > 2**53) else None


def stage_rows(made: Lineage) -> dict[str, str]:
    """Name -> words of all that is recorded of one stage, one of :func:`list_stages`."""
    base, code, fork = made["base"], made["code"], made["fork"]
    seen, images, skipped = made["samples_seen"], made["images"], made["nonfinite_steps"]
    versions = [f"{name} {made['versions'][name]}" for name in SHOWN_LIBRARIES if made["versions"].get(name)]
    return {
        "run": words(made["run"]) + (f", forked from {fork['run']} at step {words(fork['step'])}" if fork else ""),
        "starts from": name_base(base),
        "its commit": identifier(base["revision"]),
        "its SHA-256": identifier(base["sha256"]),
        "images": words(images),
        "index fingerprint": identifier(made["index_fingerprint"]),
        "optimizer steps": words(made["step"]),
        **({"steps withheld": f"{skipped:,}, whose loss or gradients were not finite"} if skipped else {}),
        "samples seen": words(seen),
        **({"bad samples": f"{bad:,}, for which others stood in"} if (bad := made["substituted"]) else {}),
        "epochs (samples seen / images)": f"{seen / images:.2f}" if seen is not None and images else NOT_RECORDED,
        **config_rows(made["config"]),
        "captions made of": caption_words(made["caption_fields"]),
        "hardware": ", ".join(made["hardware"]) or NOT_RECORDED,
        "started": words(made["started_at"]),
        "written": words(made["written_at"]),
        "hours (wall clock)": f"{made['hours']:g}" if made["hours"] is not None else NOT_RECORDED,
        "code": f"{words(code['version'])}, commit {identifier(code['commit'])}"
        + (" with changes that were not committed" if code["commit"] and code["dirty"] else ""),
        "libraries": ", ".join(versions) or NOT_RECORDED,
    }


WEIGHT_WORDS = {  # precision.weights
    "autocast": "trained weights in fp32",
    "master": "trained weights in 16 bits with fp32 masters",
    "stochastic": "trained weights in 16 bits, rounded stochastically",
}


def config_rows(config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The rows that come from a stage's config, in which sections and fields may be missing."""

    def value(key: str, off: str | None = None) -> str:
        """A field; ``off`` is what null and 0 mean, where they mean that something is not done."""
        section, _, name = key.partition(".")
        found = config.get(section, {}).get(name)
        if section in config and not found and off:
            return off
        return NOT_RECORDED if found is None else str(found)

    optim, model = config.get("optim", {}), config.get("model", {})
    trained = [part for part in PART_NAMES if model.get(f"train_{part}")]
    weights = str(config.get("precision", {}).get("weights", "autocast"))  # older configs lack it
    betas = "" if optim.get("betas") is None else f"betas {optim['betas']}, "
    return {
        "samples per step": value("data.global_batch_size"),
        "trained": ", ".join(PART_NAMES[part] for part in trained),
        "not trained": ", ".join([*(name for part, name in PART_NAMES.items() if part not in trained), "VAE"]),
        "learning rates": ", ".join(rate_words(optim.get(f"{part}_lr")) for part in trained),
        "rate schedule": f"{value('schedule.lr')}, warm-up of {value('schedule.warmup_steps')} steps",
        "optimizer": f"{value('optim.name')}, {betas}weight decay {value('optim.weight_decay')}",
        "gradient norm": value("optim.max_grad_norm", off="not clipped"),
        "noise offset": value("diffusion.noise_offset", off="none"),
        "prediction": value("diffusion.prediction_type"),
        "zero terminal SNR": value("diffusion.zero_terminal_snr"),
        "min-SNR gamma": value("diffusion.min_snr_gamma", off="off"),
        "arithmetic": f"{value('precision.compute')}, {WEIGHT_WORDS.get(weights, f'weights {weights}')}",
        "resolution": f"buckets of {value('buckets.base_resolution')}², sides {value('buckets.min_side')} to "
        f"{value('buckets.max_side')}",
        "captions": f"{value('captions.max_token_length')} tokens, shuffled: {value('captions.shuffle')}, dropped: "
        f"{value('captions.caption_dropout')}, tags dropped: {value('captions.tag_dropout')}",
        "seed": value("run.seed"),
    }


def words(value: Any) -> str:
    """A value as people read it: whole numbers with their thousands apart."""
    if value is None:
        return NOT_RECORDED
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def identifier(value: Any) -> str:
    """A commit or a hash."""
    return f"`{value}`" if value else NOT_RECORDED


def rate_words(value: Any) -> str:
    """7.5e-06 as 7.5e-6; an interpolation as it was written."""
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else words(value)


def format_tree(lineage: Lineage, with_config: bool = False) -> str:
    """The tree for a terminal: each stage below the one that was made from it, indented; whole configs if asked for."""
    lines: list[str] = []
    indent = ""
    for made in reversed(list_stages(lineage)):
        lines += [indent + line for line in format_stage(made, with_config)]
        before = "that base was made so:" if made["base"]["lineage"] else "nothing recorded before this"
        lines.append(f"{indent}  └─ {before}")
        indent += "     "
    return "\n".join(lines) + "\n"


def format_stage(made: Lineage, with_config: bool) -> Iterator[str]:
    """One stage's own part of the tree, and, of a fork, what it branched off."""
    yield terminal_text(f"{words(made['run'])}, stage {words(made['stage'])}, {words(made['step'])} steps")
    for name, text in stage_rows(made).items():
        yield f"  {name:<32}{terminal_text(text.replace('`', ''))}"
    if made["fork"] and isinstance(before := made["fork"].get("lineage"), dict):
        yield f"  forked from a run that had seen {terminal_text(words(made['fork'].get('samples_seen')))} samples:"
        yield from (f"    {line}" for line in format_stage(complete_stage(before), with_config))
    if with_config:
        yield "  config"
        dumped = yaml.safe_dump(made["config"], sort_keys=False, allow_unicode=False, width=110)
        yield from (f"    {line}" for line in dumped.splitlines())


def terminal_text(text: str) -> str:
    """A text on one line, without control characters, which could rewrite the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

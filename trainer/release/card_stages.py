"""What the lineage says of each stage: the card's table of hyperparameters, CHANGES.md; and pieces of Markdown."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NOT_RECORDED = "not recorded"
PARTS = {"unet": "UNet", "text_encoder_1": "text encoder 1", "text_encoder_2": "text encoder 2"}


@dataclass(frozen=True)
class Stage:
    """One run of the lineage, the first of them first."""

    lineage: dict[str, Any]
    hours: float | None
    hardware: tuple[str, ...]
    config_file: str  # in the folder

    def value(self, key: str) -> Any:
        """What the user wrote for a dotted key; None where that run knew no such field."""
        section, name = key.split(".")
        return self.lineage["config"].get(section, {}).get(name)


def training(stages: Sequence[Stage]) -> Iterator[str]:
    """Hyperparameters of every stage, from the configs and the records."""
    rows = [[name, *(stage_rows(stage)[name] for stage in stages)] for name in stage_rows(stages[0])]
    yield "## Training"
    yield table(["", *(stage.lineage["stage"] for stage in stages)], rows)
    yield "The training configs are in `configs/`; the data, named by their index's fingerprint, are not published."


def stage_rows(stage: Stage) -> dict[str, str]:
    """What the table says of one stage, by row."""
    made, value = stage.lineage, stage.value
    rates = {part: value(f"optim.{part}_lr") for part in PARTS}
    trained = {part: rate for part, rate in rates.items() if value(f"model.train_{part}")}
    betas = "" if value("optim.betas") is None else f"betas {value('optim.betas')}, "
    return {
        "run": made["run"] + fork_words(made.get("fork")),
        "starts from": made["base"]["reference"],
        "its SHA-256": f"`{made['base']['sha256']}`",
        "images": count(made["images"]),
        "index fingerprint": f"`{made['index_fingerprint']}`",
        "optimizer steps": count(made["step"]),
        "samples per step": str(value("data.global_batch_size")),
        "epochs (samples seen / images)": f"{made['samples_seen'] / made['images']:.2f}"
        if made["samples_seen"] is not None and made["images"]
        else NOT_RECORDED,
        "trained": ", ".join(PARTS[part] for part in trained),
        "learning rates": ", ".join(f"{number(rate)}" for rate in trained.values()),
        "rate schedule": f"{value('schedule.lr')}, warm-up of {value('schedule.warmup_steps')} steps",
        "optimizer": f"{value('optim.name')}, {betas}weight decay {value('optim.weight_decay')}",
        "gradient norm": str(value("optim.max_grad_norm") or "not clipped"),
        "noise offset": str(value("diffusion.noise_offset") or "none"),
        "prediction": str(value("diffusion.prediction_type")),
        "min-SNR gamma": str(value("diffusion.min_snr_gamma") or "off"),
        "arithmetic": f"{value('precision.compute')}, trained weights in fp32",
        "resolution": f"buckets of {value('buckets.base_resolution')}², sides {value('buckets.min_side')} to "
        f"{value('buckets.max_side')}",
        "captions": f"{value('captions.max_token_length')} tokens, shuffled: {value('captions.shuffle')}, dropped: "
        f"{value('captions.caption_dropout')}, tags dropped: {value('captions.tag_dropout')}",
        "hardware": ", ".join(stage.hardware) or NOT_RECORDED,
        "hours (wall clock)": f"{stage.hours:g}" if stage.hours is not None else NOT_RECORDED,
        "code": f"{made['code']['version']}, commit {commit_words(made['code'])}",
    }


def write_changes(title: str, stages: Sequence[Stage], dtype: str, vae: str | None) -> str:
    """CHANGES.md: what was done to which base, stage by stage; the licences ask changed files to say so."""
    parts = [
        f"# What was changed in {cell(title)}",
        "This file is made from the lineage that the training wrote (`lineage.json`). Each stage changed the model "
        "that it started from.",
        *(f"## {cell(stage.lineage['stage'])}\n\n{changes_of(stage)}" for stage in stages),
        f"The weights were converted to {dtype} for this publication. The VAE is the one that made the latents: "
        + (cell(vae) if vae else "the base's own")
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def changes_of(stage: Stage) -> str:
    """One stage's changes, as a list."""
    made = stage.lineage
    trained = [part for part in PARTS if stage.value(f"model.train_{part}")]
    kept = [*(PARTS[part] for part in PARTS if part not in trained), "VAE"]
    lines = {
        "Run": made["run"] + fork_words(made.get("fork")),
        "Base": base_words(made["base"]),
        "Changed": f"weights of {', '.join(PARTS[part] for part in trained)}",
        "Not trained": ", ".join(kept),
        "How": f"{count(made['step'])} optimizer steps, {count(made['samples_seen'])} samples seen, of "
        f"{count(made['images'])} images",
        "Data": f"index fingerprint `{made['index_fingerprint']}`",
        "Config": f"[{stage.config_file}]({stage.config_file})",
        "Code": f"version {made['code']['version']}, commit {commit_words(made['code'])}",
        "Written": made["written_at"],
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def fork_words(fork: dict[str, Any] | None) -> str:
    """From which run, and where, a run branched off."""
    return "" if fork is None else f", forked from {cell(fork['run'])} at step {count(fork['step'])}"


def base_words(base: dict[str, Any]) -> str:
    """A base by name, commit and hash; linked where the Hub knows it."""
    name = cell(base["reference"])
    if base["revision"] is not None:
        name = f"[{name}](https://huggingface.co/{base['reference']}), commit `{base['revision']}`"
    return f"{name}, SHA-256 `{base['sha256']}`"


def commit_words(code: dict[str, Any]) -> str:
    """A commit, and whether it was all."""
    if not code["commit"]:
        return NOT_RECORDED
    return f"`{code['commit']}`" + (" with changes that were not committed" if code["dirty"] else "")


def count(value: int | None) -> str:
    """A whole number with its thousands apart."""
    return NOT_RECORDED if value is None else f"{value:,}"


def number(value: Any) -> str:
    """7.5e-06 as 7.5e-6; an interpolation as it was written."""
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, int | float) else str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is: prompts are full of its signs, as in ``saber \\(fate\\)`` and ``^_^``."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text)


def cell(text: str) -> str:
    """Text that breaks neither a table nor the page: no line breaks, bars, or tags."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")

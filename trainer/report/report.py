"""Look before you train: what a set of shards holds and what a run will make of it, as a page and as a short table."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.files import write_text
from trainer.data.index import open_index
from trainer.data.plan import build_plan
from trainer.data.sites import TAG_CATEGORIES
from trainer.report.facts import Report, find_models, show_samples, walk_run
from trainer.report.page import GENERATOR, page
from trainer.report.sections import (
    FINISHED,
    bucket_rows,
    count_enlarged,
    list_sections,
    tell_share_truncated,
    view_range,
)
from trainer.report.survey import (
    choose_rows,
    count_finished,
    count_rules,
    count_sources,
    count_tags,
    find_duplicates,
    measure_captions,
    measure_fits,
)
from trainer.report.thresholds import find_thresholds

TOP_TAGS = 40  # of each category
SAMPLES = 12
MAX_TOKENIZED = 20_000  # captions: a million would take many minutes
MAX_PRINTED = 10  # buckets in the terminal's table


def make_report(config: Config, progress: bool = True) -> Report:
    """Count everything; the same for the same shards and config.

    Raises:
        UserError: when the shards are missing or damaged. A missing model only leaves something out.
    """
    index = open_index(config.data.shards)
    rows, seed = index.table, config.run.seed
    config = replace(config, captions=find_thresholds(config, rows).captions)
    plan = build_plan(index, seed, config.data)
    # by exactly one of the two the run's length is given
    steps = config.schedule.max_steps or plan.steps_for_epochs(config.schedule.epochs or 1)
    fits = measure_fits(rows, index.manifest["latents"].get("buckets", {}).get("upscale", True))
    tags = {category: count_tags(rows, category, TOP_TAGS) for category in TAG_CATEGORIES}
    finished = count_finished(rows, config.captions.keep_tokens_separator, TOP_TAGS)
    models = find_models(config, index.manifest["latents"].get("vae_sha256", ""))
    lengths = None
    if models.tokenizer is not None:
        chosen = choose_rows("report lengths", seed, len(index), MAX_TOKENIZED)
        lengths = measure_captions(rows, chosen, config.captions, models.tokenizer, progress)
    shown = choose_rows("report samples", seed, len(index), SAMPLES).tolist()
    return Report(
        config=config,
        index=index,
        plan=plan,
        run=walk_run(plan, steps),
        fits=fits,
        sources=count_sources(rows),
        tags=tags | ({FINISHED: finished} if finished.images else {}),
        rules=count_rules(rows, config.captions),
        lengths=lengths,
        duplicates=find_duplicates(rows),
        samples=show_samples(index, config, fits, shown, models.vae, progress),
        missing=models.missing,
    )


def check_page_path(path: Path) -> None:
    """Refuse to write over anything but an earlier page of ours.

    Raises:
        UserError: naming the path.
    """
    if path.is_file():
        with path.open("rb") as file:
            if GENERATOR.encode() in file.read(1000):
                return
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} is there and is not a page of scripts/inspect_shards.py: name another with --out")


def write_page(report: Report, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: when something else lies there, or nothing can be written.
    """
    check_page_path(path)
    try:
        write_text(path, render(report))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another place with --out") from error


def render(report: Report) -> str:
    """The page as HTML."""
    subtitle = f"{report.config.data.shards} · fingerprint {report.index.fingerprint[:16]}"
    return page(f"Before training: {report.config.run.name}", subtitle, list_sections(report))


def summarise(report: Report) -> str:
    """The short table for the terminal."""
    run, fits, images = report.run, report.fits, len(report.index)
    lines = [f"{'bucket':>11} {'images':>9} {'share':>7}  {'views':<12} units with a repeat"]
    rows = list(bucket_rows(report))
    for (width, height), count, views, units, repeating in rows[:MAX_PRINTED]:
        lines.append(
            f"{width:>5}x{height:<5} {count:>9,} {count / images:>7.1%}  {views:<12} {repeating:,} of {units:,}"
        )
    if len(rows) > MAX_PRINTED:
        others = rows[MAX_PRINTED:]
        count, repeating = sum(row[1] for row in others), sum(row[4] for row in others)
        lines.append(f"{len(others):>5} more  {count:>9,} {count / images:>7.1%}  {'':<12} {repeating:,} of "
                     f"{sum(row[3] for row in others):,}")  # fmt: skip
    told = {
        "images": f"{images:,}, each seen {view_range(run.views)} times",
        "steps": f"{run.steps:,} in all, {run.steps_per_epoch:,.1f} an epoch, {run.epochs:,.1f} epochs",
        "cropped": f"{fits.cropped.mean():.2%} of the pixels on average, at most {fits.cropped.max():.1%}",
        "enlarged": f"{count_enlarged(report) / images:.1%} of the images",
        "captions": tell_lengths_shortly(report),
        "set aside": ", ".join(f"{count:,} {reason}" for reason, count in report.set_aside.items()) or "none",
        **({"noted": tell_remarks_shortly(report)} if report.remarks else {}),
        "duplicates": f"{report.duplicates.images:,} images in {report.duplicates.groups:,} groups",
    }
    return "\n".join(lines + [f"{name:>10}: {text}" for name, text in told.items()])


def tell_remarks_shortly(report: Report) -> str:
    """What sources said of their inputs, in one line."""
    return ", ".join(
        f"{count:,} {kind} ({source})" for source, kinds in report.remarks.items() for kind, count in kinds.items()
    )


def tell_lengths_shortly(report: Report) -> str:
    """Caption lengths in one line."""
    lengths, limit = report.lengths, report.config.captions.max_token_length
    if lengths is None:
        return "lengths unknown, see the page"
    whole = "" if len(lengths) == len(report.index) else f" ({len(lengths):,} captions looked at)"
    return (
        f"{np.median(lengths):.0f} tokens in the middle, {lengths.max()} at most, "
        f"{tell_share_truncated(report)} truncated at {limit}{whole}"
    )

"""Look before you train: what a set of shards holds and what a run will make of it, as a page and as a short table."""

from dataclasses import replace

import numpy as np

from trainer.config.schema import Config
from trainer.core.layout import NOTES_FILE, QUARANTINE_FILE
from trainer.core.progress import format_count
from trainer.data.plan import build_plan
from trainer.data.sample_weights import describe_sum, find_sample_weights
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.sources.records import explain_reason
from trainer.data.subset import describe_subset, open_chosen, record_subset
from trainer.report.caption_survey import count_kinds, count_mapped, measure_captions
from trainer.report.examples import draw_examples
from trainer.report.facts import (
    CROP_RANGES,
    FACTOR_RANGES,
    FINISHED,
    LengthFacts,
    Report,
    count_in_ranges,
    count_lengths,
    count_views,
    describe_buckets,
    find_models,
    trim_counts,
    view_range,
    walk_run,
)
from trainer.report.pages import percent, render
from trainer.report.survey import (
    choose_rows,
    count_finished,
    count_rules,
    count_sources,
    count_tags,
    find_duplicates,
    measure_fits,
)
from trainer.report.thresholds import find_caption_rules
from trainer.report.views import count_views_by

DATA_GENERATOR = "anime-base-trainer inspect_shards"  # by this a page is known as ours
TOP_TAGS = 40  # of each category
SAMPLES = 12
MAX_TOKENIZED = 20_000  # captions: a million would take many minutes
MAX_PRINTED = 10  # buckets in the terminal's table


def make_report(config: Config) -> Report:
    """Count everything; the same for the same shards and config.

    Raises:
        UserError: when the shards are missing or damaged. A missing model only leaves something out.
    """
    index = open_chosen(config.data, config.captions)
    rows, seed, latents = index.table, config.run.seed, index.manifest["latents"]
    captions = find_caption_rules(config, rows)
    config, beside = replace(config, captions=captions.config), captions.uses_caption
    weights = find_sample_weights(index, config.data, config.captions)
    plan = build_plan(index, seed, config.data, weights)
    # by exactly one of the two the run's length is given
    steps = config.schedule.max_steps or plan.steps_for_epochs(config.schedule.epochs or 1)
    fits = measure_fits(rows, latents.get("buckets", {}).get("upscale", True))
    tags = {category: count_tags(rows, category, TOP_TAGS, beside) for category in TAG_CATEGORIES}
    finished = None if beside else count_finished(rows, config.captions.keep_tokens_separator, TOP_TAGS)
    vae, tokenizer, missing = find_models(config, latents.get("vae_sha256", ""))
    lengths = None
    if tokenizer is not None:
        chosen = choose_rows("report lengths", seed, len(index), MAX_TOKENIZED)
        measured = measure_captions(index, chosen, captions, tokenizer, seed)
        lengths = count_lengths(measured.tokens, config.captions.max_token_length, measured.cut)
    run, shown = walk_run(plan, steps), choose_rows("report samples", seed, len(index), SAMPLES).tolist()
    return Report(
        config=config,
        index=index,
        plan=plan,
        run=run,
        weights=weights.record,
        views=count_views_by(rows, run.views),
        buckets=describe_buckets(index, plan, run),
        fits=fits,
        sources=count_sources(rows),
        tags=tags | ({FINISHED: finished} if finished is not None and finished.images else {}),
        rules=count_rules(rows, config.captions, beside),
        kinds=count_kinds(rows, captions),
        mapped=count_mapped(rows, captions),
        frequent=sorted(captions.frequent),
        lengths=lengths,
        duplicates=find_duplicates(rows),
        examples=draw_examples(index, config, captions, fits, shown, vae),
        missing=missing,
        counts=index.manifest.get("counts", {}),
    )


def render_data(report: Report) -> str:
    """The page as HTML."""
    return render(
        "data.html",
        report=report,
        views=view_range(report.run.views),
        views_table=count_views(report.run.views),
        crops=trim_counts(count_in_ranges(report.fits.cropped, CROP_RANGES)),
        factors=trim_counts(count_in_ranges(report.fits.factors, FACTOR_RANGES)),
        generator=DATA_GENERATOR,
        finished=FINISHED,
        quarantine_file=QUARANTINE_FILE,
        notes_file=NOTES_FILE,
    )


def summarise(report: Report) -> str:
    """The short table for the terminal."""
    run, fits, images = report.run, report.fits, len(report.index)
    set_aside, by_source = (report.counts.get(name, {}) for name in ("set_aside", "by_source"))
    remarks = [f"{count:,} {kind} ({source})" for source, kinds in by_source.items() for kind, count in kinds.items()]
    facts = {
        "images": f"{images:,}, each seen {view_range(run.views)} times",
        **(
            {"subset": describe_subset(record_subset(report.index)).removeprefix("subset: ")}
            if report.index.chosen is not None
            else {}
        ),
        **({"weights": describe_sum(report.weights, images)} if report.weights else {}),
        "steps": f"{run.steps:,} in all, {run.steps_per_epoch:,.1f} an epoch, {run.epochs:,.1f} epochs",
        "cropped": f"{fits.cropped.mean():.2%} of the pixels on average, at most {fits.cropped.max():.1%}",
        "enlarged": f"{(fits.factors > 1).mean():.1%} of the images",
        "captions": summarise_lengths(report.lengths, images),
        "set aside": ", ".join(f"{count:,} {explain_reason(reason)}" for reason, count in set_aside.items()) or "none",
        **({"noted": ", ".join(remarks)} if remarks else {}),
        "duplicates": f"{format_count(report.duplicates.images, 'image')} in "
        f"{format_count(report.duplicates.groups, 'group')}",
    }
    return "\n".join([*summarise_buckets(report), *(f"{name:>10}: {text}" for name, text in facts.items())])


def summarise_buckets(report: Report) -> list[str]:
    """A table of the fullest buckets, and one line for the rest."""
    images, shown, rest = len(report.index), report.buckets[:MAX_PRINTED], report.buckets[MAX_PRINTED:]
    lines = [(f"{b.width:>5}x{b.height:<5}", b.images, b.views, b.repeating, b.units) for b in shown]
    if rest:
        count, repeating, units = (sum(getattr(b, name) for b in rest) for name in ("images", "repeating", "units"))
        lines.append((f"{len(rest):>5} more ", count, "", repeating, units))
    return [f"{'bucket':>11} {'images':>9} {'share':>7}  {'views':<12} units with a repeat"] + [
        f"{name} {count:>9,} {count / images:>7.1%}  {views:<12} {repeating:,} of {units:,}"
        for name, count, views, repeating, units in lines
    ]


def summarise_lengths(lengths: LengthFacts | None, images: int) -> str:
    """Caption lengths in one line."""
    if lengths is None:
        return "lengths unknown, see the page"
    captions = len(lengths.tokens)
    whole = "" if captions == images else f" ({format_count(captions, 'caption')} looked at)"
    return (
        f"{np.median(lengths.tokens):.0f} tokens in the middle, {lengths.tokens.max()} at most, "
        f"{percent(lengths.truncated, captions)} truncated at {lengths.limit}{whole}"
    )

"""The chapters of the page that looks at a set before training: each a function of all numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer.core.layout import NOTES_FILE, QUARANTINE_FILE
from trainer.report.facts import Report, Sample
from trainer.report.page import (
    Html,
    Section,
    bar,
    bars,
    bucket_icon,
    columns,
    element,
    escape,
    facts,
    histogram,
    join,
    notice,
    number,
    paragraph,
    percent,
    picture,
    table,
)
from trainer.report.survey import count_in_ranges

FINISHED = "finished captions"  # a category of tags beside the index's
MAX_COLUMNS = 60  # of the histogram
MAX_VIEW_ROWS = 24
CHUNKS = (75, 150, 225)  # content tokens of one, two and three chunks
CROP_RANGES = {0.0: "nothing", 0.01: "up to 1%", 0.02: "1 to 2%", 0.05: "2 to 5%", 0.1: "5 to 10%",
               0.2: "10 to 20%", np.inf: "more than 20%"}  # fmt: skip
FACTOR_RANGES = {0.25: "shrunk to 0.25 or less", 0.5: "shrunk to 0.25 .. 0.5", 0.75: "shrunk to 0.5 .. 0.75",
                 np.nextafter(1, 0): "shrunk to 0.75 .. 1", 1.0: "unchanged", 1.25: "enlarged by up to 1.25",
                 1.5: "enlarged by 1.25 .. 1.5", 2.0: "enlarged by 1.5 .. 2", 4.0: "enlarged by 2 .. 4",
                 np.inf: "enlarged by more than 4"}  # fmt: skip


def view_range(views: np.ndarray) -> str:
    """The fewest and the most views of some images."""
    low, high = int(views.min()), int(views.max())
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def tell_overview(report: Report) -> Iterator[Html]:
    """The numbers that matter most."""
    run, images = report.run, len(report.index)
    yield facts([
        ("images", number(images)),
        ("buckets", number(len(report.plan.buckets))),
        ("steps in all", number(run.steps)),
        ("steps per epoch", number(run.steps_per_epoch, 1)),
        ("epochs", number(run.epochs, 1)),
        ("views of each image", view_range(run.views)),
        ("of pixels cropped away, mean", percent(report.fits.cropped.mean(), 1)),
        ("of images enlarged", percent(count_enlarged(report), images)),
        ("of captions truncated", tell_share_truncated(report) if report.lengths is not None else "unknown"),
        ("images set aside", number(sum(report.set_aside.values()))),
        ("images in groups of duplicates", number(report.duplicates.images)),
    ])  # fmt: skip
    data = report.config.data
    yield paragraph(
        f"A step sees {data.global_batch_size} images in units of {data.bucket_batch_size} that share a bucket. "
        f"All numbers are of steps 0 to {number(run.steps - 1)}, which this config runs."
    )
    if len(report.sources) > 1:
        yield bars("source", report.sources, images, "Sources")
    yield from (notice(f"Left out: {what}") for what in report.missing)


def count_enlarged(report: Report) -> int:
    """Images that are resized to more pixels than they have."""
    return int((report.fits.factors > 1).sum())


def tell_share_truncated(report: Report) -> str:
    """The share of captions that lose their end."""
    assert report.lengths is not None
    return percent(int((report.lengths > report.config.captions.max_token_length).sum()), len(report.lengths))


def bucket_rows(report: Report) -> Iterator[tuple[tuple[int, int], int, str, int, int]]:
    """(width, height), images, views, units, units with a repeat; the fullest bucket first."""
    plan, run = report.plan, report.run
    sizes = report.index.bucket_sizes
    codes = (sizes[:, 0].astype(np.int64) << 20) | sizes[:, 1]
    for place in np.argsort(-plan.images, kind="stable"):
        width, height = plan.buckets[place]
        views = view_range(run.views[codes == (width << 20 | height)])
        yield (width, height), int(plan.images[place]), views, int(run.units[place]), int(run.repeating[place])


def tell_buckets(report: Report) -> Iterator[Html]:
    """Images by bucket, and where an image repeats within a unit."""
    size = report.plan.unit_size
    if small := report.plan.repeating_buckets():
        names = ", ".join(f"{width} x {height}" for width, height in small)
        yield notice(
            f"{len(small)} of {len(report.plan.buckets)} buckets hold fewer images than a unit of {size}, so that an "
            f"image is in each of their units more than once: {names}. Lower data.bucket_batch_size, or add images."
        )
    rows, images = list(bucket_rows(report)), len(report.index)
    most = max(count for _, count, *_ in rows)
    cells = []
    for (width, height), count, views, units, repeating in rows:
        bucket = element("span", join([bucket_icon(width, height), f"{width} x {height}"]), "nowrap")
        share = percent(count, images)
        repeats = f"{number(repeating)} ({percent(repeating, units)})" if repeating else "none"
        cells.append((bucket, number(width / height, 2), number(count), share, bar(count / most), views,
                      number(units), repeats))  # fmt: skip
    head = ("bucket", "aspect", "images", "share", "", "views", "units", "units with a repeat")
    yield table(head, cells, numeric=(1, 2, 3, 5, 6, 7))
    yield paragraph(
        "A unit holds an image twice where its bucket has fewer images than the unit, or where the unit lies across "
        "the end of a pass: the next pass is in another order and may begin with what the last one ended with."
    )
    yield tell_views(report)


def tell_views(report: Report) -> Html:
    """How often images are seen; neighbouring numbers are joined where there are many."""
    views = report.run.views
    low, high = int(views.min()), int(views.max())
    width = -(-(high - low + 1) // MAX_VIEW_ROWS)
    counts = np.bincount((views - low) // width).tolist()
    starts = [low + width * place for place in range(len(counts))]
    labels = [f"{start} times" if width == 1 else f"{start} to {start + width - 1} times" for start in starts]
    shown = [(label, count) for label, count in zip(labels, counts, strict=True) if count]
    return bars("an image is seen", shown, len(views), "Views of an image in the whole run")


def ranges(values: np.ndarray, edges: dict[float, str]) -> list[tuple[str, int]]:
    """How many values lie in each range, named by its upper edge; empty ranges at both ends are left out."""
    counts = count_in_ranges(values, list(edges)[:-1])
    filled = np.flatnonzero(counts)
    return list(zip(edges.values(), counts, strict=True))[filled[0] : filled[-1] + 1]


def tell_sizes(report: Report) -> Iterator[Html]:
    """What resizing and cropping does to the images."""
    images, cropped, factors = len(report.index), report.fits.cropped, report.fits.factors
    low, middle, high = np.percentile(cropped, [50, 95, 100])
    yield paragraph(
        f"To fit its bucket an image is resized until it covers it, and its centre is cropped. On average "
        f"{cropped.mean():.2%} of the resized pixels are cut away; half of the images lose at most {low:.2%}, "
        f"95% at most {middle:.2%}, one {high:.2%}. {number(count_enlarged(report))} of {number(images)} images are "
        f"enlarged, the factor is {factors.min():.2f} to {factors.max():.2f}."
    )
    yield columns([
        bars("cut away", ranges(cropped, CROP_RANGES), images, "Share of the pixels cropped away"),
        bars("resized", ranges(factors, FACTOR_RANGES), images, "Factor of the resize, side by side"),
    ])  # fmt: skip


def tell_tags(report: Report) -> Iterator[Html]:
    """The most frequent tags of each category."""
    rules = report.rules
    text = f"As the index has them, of the {number(rules.composed)} images whose caption is composed from tags."
    if rules.finished:
        text += f" {number(rules.finished)} images bring a finished caption, cut here at its commas."
    yield paragraph(text)
    blocks, none = [], []
    for category, counts in report.tags.items():
        title = f"{category.capitalize()}: {number(counts.distinct)} different, in {number(counts.images)} images"
        if counts.distinct > len(counts.top):
            title += f"; the first {len(counts.top)}"
        whole = rules.finished if category == FINISHED else rules.composed
        if counts.top:
            blocks.append(bars("tag", [(breakable(tag), count) for tag, count in counts.top], whole, title))
        else:
            none.append(category)
    yield columns(blocks)
    if none:
        yield element("p", f"No tags at all: {', '.join(none)}.", "soft")


def breakable(tag: str) -> Html:
    """A tag that may go on in the next line behind an underscore."""
    return Html(escape(tag).replace("_", "_<wbr>"))


def tell_rules(report: Report) -> Iterator[Html]:
    """The tags that the config's rules add."""
    rules = report.rules
    if rules.finished:
        yield paragraph(f"The rules do not touch the {number(rules.finished)} images that bring a finished caption.")
    kinds = {"Rating": rules.ratings, "Quality, by score": rules.quality, "Period, by year": rules.years}
    kinds |= {"Columns": rules.columns} if rules.columns else {}
    if empty := [name for name, counts in kinds.items() if rules.composed and dict(counts).get("") == rules.composed]:
        yield notice(f"No image gets a tag of: {'; '.join(empty)}. Does the source have these fields?")
    yield columns(
        [
            bars("tag", [(tag or element("i", "no tag"), count) for tag, count in counts], rules.composed, name)
            for name, counts in kinds.items()
        ]
    )


def tell_lengths(report: Report) -> Iterator[Html]:
    """Lengths of whole captions against one, two and three chunks."""
    lengths, limit = report.lengths, report.config.captions.max_token_length
    if lengths is None:
        yield notice("Unknown, because the tokenizer could not be found: see the overview.")
        return
    images = len(report.index)
    looked = "all captions" if len(lengths) == images else f"{number(len(lengths))} captions drawn at random"
    low, high = np.percentile(lengths, [50, 95])
    yield paragraph(
        f"Content tokens of {looked}, before anything is dropped. The middle caption has {low:.0f}, 95% have at most "
        f"{high:.0f}, the longest has {lengths.max()}; {number(int((lengths == 0).sum()))} are empty. With "
        f"captions.max_token_length {limit}, {tell_share_truncated(report)} lose their end."
    )
    names = ["up to 75", "76 to 150", "151 to 225", "more than 225"]
    kept = [f"{name} (truncated)" if edge > limit else name for name, edge in zip(names, (*CHUNKS, 226), strict=True)]
    counts = list(zip(kept, count_in_ranges(lengths, CHUNKS), strict=True))
    yield bars("tokens", counts, len(lengths), "Chunks", "captions")
    step = next(step for step in (5, 15, 25) if step == 25 or lengths.max() < 40 * step)
    shown = min(MAX_COLUMNS, -(-max(int(lengths.max()), limit, 1) // step))
    places = np.minimum(np.maximum(lengths - 1, 0) // step, shown - 1)
    yield histogram(np.bincount(places, minlength=shown).tolist(), step, [c for c in CHUNKS if c <= shown * step])
    if int(lengths.max()) > shown * step:
        yield element("p", f"The last column holds everything above {(shown - 1) * step} tokens.", "soft")


def tell_samples(report: Report) -> Iterator[Html]:
    """Pictures and captions of a few samples."""
    yield paragraph(
        f"{len(report.samples)} images drawn at random with the run's seed: the original with what is kept of it, what "
        "the VAE makes of the stored latents, and the caption as three passes see it."
    )
    yield element("div", join(tell_sample(sample) for sample in report.samples), "samples")


def tell_sample(sample: Sample) -> Html:
    """One card."""
    row = sample.row
    bucket, original = (row["bucket_width"], row["bucket_height"]), (row["original_width"], row["original_height"])
    text = f"{original[0]} x {original[1]}, resized by {sample.factor:.2f}, {sample.cropped:.1%} cropped"
    pictures = []
    if sample.original is not None:
        pictures.append(picture(sample.original, sample.original_size, "original, with the crop", sample.crop))
    if sample.decoded is not None:
        title = f"from latents, {bucket[0]} x {bucket[1]}"
        pictures.append(picture(sample.decoded, sample.decoded_size, title))
    missing = [] if sample.original is not None else [element("p", f"No original: {sample.why_not}", "soft")]
    captions = [
        element("p", join([element("b", f"pass {pass_} "), caption or element("i", "empty")]), "caption")
        for pass_, caption in enumerate(sample.captions)
    ]
    head = [element("h3", row["key"]), element("p", text, "soft"), element("div", join(pictures), "pictures")]
    return element("div", join([*head, *missing, *captions]), "sample")


def tell_set_aside(report: Report) -> Iterator[Html]:
    """What preparation left out, noted or filtered, as the manifest counts it."""
    counts: dict[str, Any] = report.index.manifest.get("counts", {})
    groups = {
        name: group for name, group in counts.items() if isinstance(group, dict) and group and name != "by_source"
    }
    if not report.set_aside:
        yield paragraph("Nothing was set aside.")
    for name, group in groups.items():
        yield bars("reason", list(group.items()), counts.get("inputs", 0), name.replace("_", " ").capitalize())
    for source, kinds in report.remarks.items():  # of what need not be an input: no share
        yield bars("remark", list(kinds.items()), 0, f"Noted in {source}", "count")
    if groups or report.remarks:
        yield paragraph(
            f"{QUARANTINE_FILE} beside the shards names each input, {NOTES_FILE} each or, of what is noted in a "
            f"source, the first of each kind. Shares are of "
            f"{number(counts.get('inputs', 0))} inputs."
        )


def tell_duplicates(report: Report) -> Iterator[Html]:
    """Images whose files are the same."""
    found = report.duplicates
    if not found.groups:
        yield paragraph("No two images come from files with the same bytes.")
        return
    yield paragraph(
        f"{number(found.images)} images in {number(found.groups)} groups come from files with the same bytes, so that "
        f"{number(found.images - found.groups)} are superfluous. The largest groups:"
    )
    yield table(["copies", "keys"], [(number(size), ", ".join(keys) + (", ..." if size > len(keys) else ""))
                                     for size, keys in found.examples], numeric=(0,))  # fmt: skip


def list_sections(report: Report) -> Sequence[Section]:
    """All chapters in their order."""
    return [
        Section("overview", "Overview", list(tell_overview(report))),
        Section("buckets", "Buckets", list(tell_buckets(report))),
        Section("sizes", "Cropping and enlarging", list(tell_sizes(report))),
        Section("tags", "Tags", list(tell_tags(report))),
        Section("rules", "Ratings, quality, years", list(tell_rules(report))),
        Section("lengths", "Caption lengths", list(tell_lengths(report))),
        Section("samples", "Samples", list(tell_samples(report))),
        Section("aside", "Set aside", list(tell_set_aside(report))),
        Section("duplicates", "Duplicates", list(tell_duplicates(report))),
    ]

"""A subset to look at before a stage is trained on it: what its rules choose of a set, as a page of thumbnails."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from trainer.config.schema import Config, SubsetRule
from trainer.core.errors import UserError
from trainer.core.progress import metered
from trainer.data.index import Index, open_index, read_raw_latents
from trainer.data.shards import Row
from trainer.data.subset import choose_images, find_rule_images
from trainer.report.examples import Thumbnail, draw_latents, draw_original, find_images
from trainer.report.facts import find_models
from trainer.report.pages import render
from trainer.report.survey import choose_rows
from trainer.report.thresholds import find_caption_rules
from trainer.report.views import ViewCounts, count_views_by

SUBSET_GENERATOR = "anime-base-trainer choose_subset"  # by this a page is known as ours
CHOSEN, LEFT_OUT = 96, 24  # thumbnails


@dataclass(frozen=True)
class Tile:
    """One image to look at."""

    row: Row
    picture: Thumbnail | None
    why_not: str  # where there is none


@dataclass(frozen=True)
class SubsetReport:
    """What rules choose of a set."""

    index: Index  # of what is chosen
    rules: list[tuple[str, bool, int]]  # words, whether it excludes, and the images of the whole set of which it holds
    counts: dict[str, list[ViewCounts]]  # of what is chosen, each image once
    chosen: list[Tile]
    left_out: list[Tile]
    missing: list[str]  # why there are fewer pictures


def make_subset_report(config: Config) -> SubsetReport:
    """Choose by a config's rules, which take the percentiles of the whole set, and draw some of both sides.

    Raises:
        UserError: where the config chooses nothing, or all.
    """
    data, whole = config.data, open_index(config.data.shards)
    if data.subset is None and not data.subset_rules:
        raise UserError(
            "data.subset_rules says nothing yet: by which rules? For example "
            "data.subset_rules='[{tag: masterpiece}, {column: score, above: 100}]'"
        )
    captions = find_caption_rules(config, whole.table).config
    index = choose_images(whole, data, captions)
    if index.chosen is None:
        raise UserError(f"data.subset_rules: all {len(whole):,} images of {whole.folder} are chosen")
    holds = find_rule_images(whole.table, data, captions)
    rules = [
        (describe_image_rule(rule), rule.exclude, int(here.sum()))
        for rule, here in zip(data.subset_rules, holds, strict=True)
    ]
    places = [np.flatnonzero(side) for side in (index.chosen, ~index.chosen)]
    numbers = [
        rows[choose_rows("report subset", config.run.seed, len(rows), most)].tolist()
        for rows, most in zip(places, (CHOSEN, LEFT_OUT), strict=True)
    ]
    tiles, missing = draw_tiles(whole, config, [*numbers[0], *numbers[1]])
    return SubsetReport(
        index=index,
        rules=rules,
        counts=count_views_by(index.table, np.ones(len(index), dtype=np.int64)),
        chosen=tiles[: len(numbers[0])],
        left_out=tiles[len(numbers[0]) :],
        missing=missing,
    )


def describe_image_rule(rule: SubsetRule) -> str:
    """A rule in words as a config has them."""
    said = {name: value for name, value in asdict(replace(rule, exclude=False)).items() if value not in (None, False)}
    return ", ".join(f"{name}: {value}" for name, value in said.items())


def draw_tiles(whole: Index, config: Config, numbers: Sequence[int]) -> tuple[list[Tile], list[str]]:
    """Some rows with their originals, or where those are gone with what the VAE makes of their latents."""
    rows = [whole.row(number) for number in numbers]
    posts, reason = find_images(config, {row["key"] for row in rows})
    originals = [draw_original(posts[row["key"]], row) if row["key"] in posts else (None, reason) for row in rows]
    vae, missing = None, list[str]()
    if any(picture is None for picture, _ in originals):
        vae, _, missing = find_models(config, whole.manifest["latents"].get("vae_sha256", ""))
    tiles = []
    drawn = metered(numbers, "draw thumbnails", "image", len(numbers))
    for number, row, (picture, why_not) in zip(drawn, rows, originals, strict=True):
        if picture is None and vae is not None:
            picture, why_not = draw_latents(vae, read_raw_latents(whole, number)), ""
        tiles.append(Tile(row, picture, why_not))
    return tiles, missing


def render_subset(report: SubsetReport, name: str, keys_file: str) -> str:
    """The page as HTML."""
    return render("subset.html", report=report, name=name, keys_file=keys_file, generator=SUBSET_GENERATOR)


def summarise_subset(report: SubsetReport) -> str:
    """A few lines for the terminal."""
    lines = [f"{count:>11,} {'but not' if exclude else 'have':>8} {words}" for words, exclude, count in report.rules]
    of = len(report.index) if report.index.chosen is None else len(report.index.chosen)
    return "\n".join([*lines, f"{len(report.index):>11,} chosen of the {of:,} images of {report.index.folder}"])

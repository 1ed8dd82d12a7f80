"""The model card (README.md) and CHANGES.md, from the config and the lineage, by two templates.

Nothing here is typed by hand for one model: what is not recorded is said to be so. The head of card.md lists what a
template of the user's may read. It is sandboxed, and all that it prints is escaped.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from trainer.config.load import resolved_values
from trainer.config.schema import CaptionsConfig, Config
from trainer.data.buckets import list_buckets
from trainer.model.diffusion import spell
from trainer.model.hub import HUB_ID
from trainer.model.lineage import Lineage, shorten_paths
from trainer.model.lineage_rows import identifier, stage_rows, words
from trainer.model.sdxl import DTYPES
from trainer.release.gallery import caption_of, line_of_all, settings_line
from trainer.release.licence import FAIPL, OPENRAIL, Terms
from trainer.release.markdown import cell, plain, render_markdown, spans
from trainer.sample.pictures import Sample

RATING_WORDS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
TEMPLATES = Path(str(resources.files("trainer.release")))
SIZE = re.compile(r"([1-9]\d{1,3})x([1-9]\d{1,3})")
HUB_TAGS = ["text-to-image", "stable-diffusion", "stable-diffusion-xl", "safetensors", "diffusers", "anime"]


@dataclass(frozen=True)
class Release:
    """What is published, as the card says it."""

    config: Config
    stages: list[Lineage]  # completed, the first of them first
    terms: Terms
    license_files: dict[str, str]  # file in the folder -> what it is
    acknowledged: str | None
    base_id: str | None  # the first base's name on the Hub, where the user says it and the lineage does not
    samples: list[Sample]
    weights: str | None  # the single file, if there is one
    full_precision: str | None  # the fp32 file, if it is in the folder
    sdxl_shapes: bool = True  # other programs read the single file only then
    vae_upcast: bool = True  # the VAE's config asks for fp32
    card_template: Path | None = None  # publish.card_template as it is found from here

    @property
    def title(self) -> str:
        return self.config.publish.title or self.config.run.name

    @property
    def base_model(self) -> str | None:
        """The nearest model of the lineage that the Hub knows."""
        bases = (made["base"] for made in reversed(self.stages))
        return next((base["reference"] for base in bases if base["revision"] is not None), self.base_id)


def write_card(release: Release) -> str:
    """README.md: the header that the Hub reads, then the sections that users of such models look for.

    Raises:
        UserError: for a ``publish.card_template`` that cannot be read or fails.
    """
    data = describe_release(release) | describe_use(release)
    return render_markdown(release.card_template or TEMPLATES / "card.md", data)


def write_changes(release: Release) -> str:
    """CHANGES.md: what was done to which base, stage by stage; the licences ask changed files to say so."""
    return render_markdown(TEMPLATES / "changes.md", describe_release(release))


def stage_config_file(place: int, made: Lineage) -> str:
    """The file in the folder that holds a stage's config; ``place`` counts from 0."""
    return f"configs/{place + 1}-{made['run']}.yaml"


def describe_release(release: Release) -> dict[str, Any]:
    """What a template may read of what the model is and where it comes from, as plain values."""
    publish = release.config.publish
    return {
        "config": resolved_values(release.config),
        "title": release.title,
        "repository": publish.repo_id,
        "prediction": spell(release.config.diffusion.prediction_type).card,
        "vae": shorten_paths(release.config.written["model"]["vae"]),
        "vae_upcast": release.vae_upcast,
        "weights": release.weights,
        "full_precision": release.full_precision,
        "sdxl_shapes": release.sdxl_shapes,
        "torch_dtype": str(DTYPES[publish.dtype]).removeprefix("torch."),
        "license_link": publish.license_link or "LICENSE.md",
        "license_files": release.license_files,
        "acknowledged": release.acknowledged,
        "openrail": release.terms.name == OPENRAIL,
        "stages": [
            {
                "name": words(made["stage"]),
                "config_file": stage_config_file(place, made),
                "base": link_base(made["base"]),
                "rows": stage_rows(made),
            }
            for place, made in enumerate(release.stages)
        ],
    }


def describe_use(release: Release) -> dict[str, Any]:
    """What a template may read of how the model is prompted, as plain values; and the card's header."""
    captions, buckets = release.config.captions, release.config.buckets
    sides = list_buckets(buckets.base_resolution, buckets.min_side, buckets.max_side, buckets.step)
    best, general = best_tags(captions), captions.ratings.get("g")
    year, (width, height) = ["year tag"] if captions.years else [], choose_size(release, sides)
    return {
        "header": yaml.safe_dump(build_header(release), sort_keys=False, allow_unicode=True, width=120),
        "people": [tag for tag in captions.people[:1] + captions.people[6:8] if tag],
        "best": best,
        "example": [*best, "1girl", "character", "series", "everything else", *year, *([general] if general else [])],
        "caution": caution(captions),
        "sizes": [f"{width} x {height}" for width, height in sides],
        "prompt": choose_prompt(release),
        "width": width,
        "height": height,
        "samples": describe_samples(release),
        "samples_line": line_of_all(release.samples),
        **describe_tags(captions),
    }


def describe_samples(release: Release) -> list[dict[str, str]]:
    """What a template may read of each sample."""
    special = special_tags(release.config.captions)
    return [
        {
            "name": sample.path.stem,
            "file": f"samples/{sample.path.name}",
            "caption": caption_of(sample.prompt, special),
            "prompt": sample.prompt,
            "negative_prompt": sample.negative_prompt,
            "settings": settings_line(sample.settings),
        }
        for sample in release.samples
    ]


def choose_prompt(release: Release) -> str:
    """A prompt to begin with, in the captions' order: a sample's, or one of the config's, with the best tags first."""
    captions = release.config.captions
    best, people, general = best_tags(captions), captions.people[:1], captions.ratings.get("g")
    prompts = [sample.prompt for sample in release.samples] + release.config.sampling.prompts
    prompts.append(", ".join([*people, "solo", "smile", *([general] if general else [])]))
    begin = ", ".join(best)
    return next((text for text in prompts if text.startswith(begin)), f"{begin}, {prompts[0]}")


def choose_size(release: Release, sides: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(width, height) to begin with: the first sample's, or the config's where it was drawn or is one of ``sides``."""
    buckets, sampling = release.config.buckets, release.config.sampling
    if release.samples and (match := SIZE.fullmatch(str(release.samples[0].settings.get("size")))):
        width, height = int(match[1]), int(match[2])
        if max(width, height) <= buckets.max_side and width % 8 == height % 8 == 0:
            return width, height
    square = buckets.base_resolution
    size = sampling.width or square, sampling.height or square
    return size if sampling.prompts or size in sides else (square, square)


def best_tags(captions: CaptionsConfig) -> list[str]:
    """The two tags of the highest scores; fewer where there are no more."""
    return list(dict.fromkeys(tag for tag, *_ in quality_rows(captions)))[:2]


def special_tags(captions: CaptionsConfig) -> list[str]:
    """All tags of quality, rating, years and numbers, of which none says what is in an image."""
    ratings = [tag for tags in captions.ratings.values() for tag in tags.split(", ")]
    quality, years = [rule.tag for rule in captions.quality], [rule.tag for rule in captions.years]
    return quality + years + [rule.tag for rule in captions.columns] + ratings


def build_header(release: Release) -> dict[str, Any]:
    """The card's metadata, in the Hub's words."""
    header: dict[str, Any] = {
        "license": "other",
        "license_name": FAIPL,
        "license_link": release.config.publish.license_link or "LICENSE.md",
        "language": ["en"],
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers",
        "tags": HUB_TAGS,
    }
    if release.base_model is not None:
        header |= {"base_model": release.base_model, "base_model_relation": "finetune"}
    if release.samples:
        header["widget"] = [
            {
                "text": sample.prompt,
                "parameters": {"negative_prompt": sample.negative_prompt},
                "output": {"url": f"samples/{sample.path.name}"},
            }
            for sample in release.samples
        ]
    return header


def link_base(base: dict[str, Any]) -> Markup:
    """A base by name, commit and hash; linked where the Hub knows it."""
    reference, revision = words(base["reference"]), base["revision"]
    name = cell(plain(reference))
    if revision is not None and HUB_ID.fullmatch(reference):
        name = Markup(f"[{name}](https://huggingface.co/{reference})")
    if revision is not None:
        name = Markup(f"{name}, commit {cell(spans(identifier(revision)))}")
    return Markup(f"{name}, SHA-256 {cell(spans(identifier(base['sha256'])))}")


def caution(captions: CaptionsConfig) -> dict[str, list[str]]:
    """What the card of Animagine XL 3.0 says of its quality tags, in the tags of these captions.

    The best ones go by scores, which many posts have that are not safe for work: ``general`` tags belong into the
    prompt, ``unsafe`` ones into the negative prompt.
    """
    tags = {rating: captions.ratings[rating].split(", ") for rating in RATING_WORDS if captions.ratings.get(rating)}
    unsafe = [tag for tag in tags.get("q", []) if tag in tags.get("e", [])] + tags.get("s", [])
    return {"general": tags.get("g", []), "unsafe": unsafe}


def describe_tags(captions: CaptionsConfig) -> dict[str, Any]:
    """Rows of the tables of quality and rating tags."""
    by_rating = any(rule.rating for rule in captions.quality)
    return {
        "quality": {"by_rating": by_rating, "rows": [row[: 2 + by_rating] for row in quality_rows(captions)]},
        "ratings": [[RATING_WORDS[key], tag] for key, tag in captions.ratings.items()],
    }


def quality_rows(captions: CaptionsConfig) -> list[list[str]]:
    """[tag, scores, rating] of each quality rule, from the highest to the lowest of each rating."""
    rows = []
    for rating in dict.fromkeys(rule.rating for rule in captions.quality):
        own = [rule for rule in captions.quality if rule.rating == rating]
        shares = any(rule.above_percentile is not None for rule in own)
        limits = [(rule.above_percentile if shares else rule.min_score, rule.tag) for rule in own]
        higher: float | None = None
        for limit, tag in sorted(limits, key=lambda item: -math.inf if item[0] is None else item[0], reverse=True):
            if shares:
                above = [f"above that of {limit:g}%"] if limit is not None else []
                up_to = [f"up to {higher:g}%"] if higher else []
                scores = ", ".join(above + up_to) + " of the posts of its rating"
            elif higher is None:
                scores = "all" if limit is None else f"{limit} and above"
            else:
                scores = f"below {higher}" if limit is None else f"{limit} to {int(higher) - 1}"
            rows.append([tag, scores, RATING_WORDS.get(str(rating), str(rating or "all"))])
            higher = limit
    return rows

"""The model card (README.md) and CHANGES.md, from the config and the lineage, by two templates.

Nothing here is typed by hand for one model: what is not recorded is said to be so. The head of card.md lists what a
template of the user's may read. It is sandboxed, and all that it prints is escaped.
"""

import math
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from trainer.config.load import resolved_values
from trainer.config.schema import CaptionsConfig, Config
from trainer.core.errors import UserError
from trainer.data.buckets import list_buckets
from trainer.model.diffusion import spell
from trainer.model.lineage import Lineage, shorten_paths
from trainer.model.lineage_rows import identifier, stage_rows, words
from trainer.model.sdxl import DTYPES
from trainer.release.licence import FAIPL, OPENRAIL, Terms
from trainer.sample.pictures import Sample

RATING_WORDS = {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}
TEMPLATES = Path(str(resources.files("trainer.release")))


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
        "prediction": spell(release.config.diffusion.prediction_type).card,
        "vae": shorten_paths(release.config.written["model"]["vae"]),
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
    best = list(dict.fromkeys(tag for tag, *_ in quality_rows(captions)))[:2]  # the highest
    general, year = captions.ratings.get("g"), ["year tag"] if captions.years else []
    return {
        "header": yaml.safe_dump(build_header(release), sort_keys=False, allow_unicode=True, width=120),
        "people": [tag for tag in captions.people[:1] + captions.people[6:8] if tag],
        "best": best,
        "example": [*best, "1girl", "character", "series", "everything else", *year, *([general] if general else [])],
        "caution": caution(captions),
        "sizes": [f"{width} x {height}" for width, height in sides],
        "samples": [
            {
                "name": sample.path.stem,
                "file": f"samples/{sample.path.name}",
                "prompt": sample.prompt,
                "negative_prompt": sample.negative_prompt,
                "settings": ", ".join(f"{key} {value}" for key, value in sample.settings.items()),
            }
            for sample in release.samples
        ],
        **describe_tags(captions),
    }


def build_header(release: Release) -> dict[str, Any]:
    """The card's metadata, in the Hub's words."""
    header: dict[str, Any] = {
        "license": "other",
        "license_name": FAIPL,
        "license_link": release.config.publish.license_link or "LICENSE.md",
        "language": ["en"],
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers",
        "tags": ["text-to-image", "stable-diffusion", "stable-diffusion-xl", "safetensors", "diffusers", "anime"],
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
    name, revision = cell(words(base["reference"])), base["revision"]
    if revision is not None:
        name = Markup(f"[{name}](https://huggingface.co/{name}), commit {cell(identifier(revision))}")
    return Markup(f"{name}, SHA-256 {cell(identifier(base['sha256']))}")


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


def cell(value: object) -> Markup:
    """Text that breaks neither a table nor the page: no line breaks, bars, or tags; what is marked as safe stays."""
    if isinstance(value, Markup):
        return value
    return Markup(" ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;"))


def plain(text: str) -> str:
    """Text that Markdown shows as it is: prompts are full of its signs, as in ``saber \\(fate\\)`` and ``^_^``."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", text)


def codes(words: Sequence[str]) -> Markup:
    """Words as code, with commas between them."""
    return Markup(", ".join(f"`{word}`" for word in words))


def render_markdown(template: Path, data: Mapping[str, Any]) -> str:
    """The text of a Jinja2 template with ``data``, which must be plain values: of an object, a template sees methods.

    Raises:
        UserError: for a template that cannot be read or that fails, naming the file and the line.
    """
    # autoescape leaves what is Markup as it is, and finalize makes everything that is printed Markup
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, finalize=cell, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"cell": cell, "plain": plain, "codes": codes}
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(data)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the template {template} cannot be read: {error}") from error
    except Exception as error:  # a template may raise whatever Python does, an AttributeError of a filter too
        raise UserError(f"the template {template} fails in line {find_line(error)}: {error}") from error


def find_line(error: Exception) -> int | None:
    """The line of a template in which it failed, or cannot be parsed."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return lines[-1] if lines else getattr(error, "lineno", None)

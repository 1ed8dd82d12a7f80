"""The model card (README.md) and CHANGES.md, from the config and the lineage, by two templates.

Nothing here is typed by hand for one model: what is not recorded is said to be so. The head of card.md lists what a
template of the user's may read. It is sandboxed, and all that it prints is escaped.
"""

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from trainer.config.load import resolved_values
from trainer.config.schema import CaptionsConfig, Config
from trainer.data.buckets import list_buckets
from trainer.data.captions import split_caption
from trainer.model.diffusion import spell
from trainer.model.hub import HUB_ID
from trainer.model.lineage import Lineage, shorten_paths
from trainer.model.lineage_rows import caption_words, find_taught, identifier, name_base, stage_rows, words
from trainer.model.sdxl import DTYPES
from trainer.release.gallery import caption_of, line_of_all, settings_line
from trainer.release.licence import FAIPL, OPENRAIL, Terms
from trainer.release.markdown import plain, render_markdown, spans
from trainer.release.tag_rules import (
    best_tags,
    caution,
    count_captions,
    describe_mix,
    describe_order,
    describe_tags,
    ends_with_quality,
    keep_taught,
    list_categories,
    special_tags,
)
from trainer.sample.pictures import Sample
from trainer.sample.sampling import training_size

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
    def taught(self) -> dict[str, int] | None:
        """How many samples had what makes a caption, over all stages; None where that is not recorded."""
        return find_taught(self.stages)

    @property
    def captions(self) -> CaptionsConfig:
        """The config's rules, without those of which no sample had what they ask for."""
        return keep_taught(self.config.captions, self.taught)

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
    publish, finished, composed = release.config.publish, *count_captions(release.taught)
    return {
        "config": resolved_values(dataclasses.replace(release.config, captions=release.captions)),
        "finished": {"any": finished > 0, "all": finished > 0 and not composed},
        "taught": caption_words(release.taught) if release.taught else None,
        "categories": list_categories(release.taught),
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
    captions, buckets = release.captions, release.config.buckets
    sides = list_buckets(buckets.base_resolution, buckets.min_side, buckets.max_side, buckets.step)
    best, (width, height) = best_tags(captions), choose_size(release, sides)
    return {
        "header": yaml.safe_dump(build_header(release), sort_keys=False, allow_unicode=True, width=120),
        "people": [tag for tag in captions.people[:1] + captions.people[6:8] if tag],
        "best": best,
        "order": describe_order(captions),
        "mix": describe_mix(captions),
        "example": list_example(release),
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


def list_example(release: Release) -> list[str]:
    """The order of a prompt, in words; where all captions were finished ones, one as they are."""
    finished, composed = count_captions(release.taught)
    if finished and not composed:
        return split_caption(choose_prompt(release))
    captions, there = release.captions, list_categories(release.taught)
    kinds = [word for word, name in (("character", "characters"), ("series", "series")) if name in there]
    year, general = ["year tag"] if captions.years else [], captions.ratings.get("g")
    people = ["1girl"] if captions.people or release.taught is None else []
    best, rating = best_tags(captions), [general] if general else []
    if ends_with_quality(captions):
        return [*people, *kinds, "everything else", *year, *rating, *best]
    return [*best, *people, *kinds, "everything else", *year, *rating]


def choose_prompt(release: Release) -> str:
    """A prompt to begin with, in the captions' order: a sample's, or one of the config's, with the best tags.

    Tags that no sample had are none to begin with: a prompt without any of them is preferred, else they are left out.
    """
    captions = release.captions
    best, people, general = best_tags(captions), captions.people[:1], captions.ratings.get("g")
    prompts = [sample.prompt for sample in release.samples] + release.config.sampling.prompts
    known = [prompt for prompt in prompts if not find_untaught(release, prompt)]
    prompts = known or [kept for prompt in prompts if (kept := leave_out(prompt, find_untaught(release, prompt)))]
    prompts.append(", ".join([*people, "solo", "smile", *([general] if general else [])]))
    words = ", ".join(best)
    if not words:
        return prompts[0]
    if ends_with_quality(captions):
        return next((text for text in prompts if text.endswith(words)), f"{prompts[0]}, {words}")
    return next((text for text in prompts if text.startswith(words)), f"{words}, {prompts[0]}")


def find_untaught(release: Release, prompt: str) -> set[str]:
    """The tags of a prompt that rules of the config would give, and gave no sample."""
    untaught = set(special_tags(release.config.captions)) - set(special_tags(release.captions))
    return untaught & set(split_caption(prompt))


def leave_out(prompt: str, tags: Collection[str]) -> str:
    """A prompt without some of its tags."""
    return ", ".join(tag for tag in split_caption(prompt) if tag not in tags)


def choose_size(release: Release, sides: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(width, height) to begin with: the first sample's, or the config's where it was drawn or is one of ``sides``."""
    buckets, sampling = release.config.buckets, release.config.sampling
    if release.samples and (match := SIZE.fullmatch(str(release.samples[0].settings.get("size")))):
        width, height = int(match[1]), int(match[2])
        if max(width, height) <= buckets.max_side and width % 8 == height % 8 == 0:
            return width, height
    square = buckets.base_resolution
    size = training_size(sampling, square)
    return size if sampling.prompts or size in sides else (square, square)


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
    fitting = [sample for sample in release.samples if not find_untaught(release, sample.prompt)]
    if release.samples and not fitting:
        header["widget"] = [{"text": choose_prompt(release)}]  # those pictures are of prompts that nobody should take
    elif fitting:
        header["widget"] = [
            {
                "text": sample.prompt,
                "parameters": {"negative_prompt": sample.negative_prompt},
                "output": {"url": f"samples/{sample.path.name}"},
            }
            for sample in fitting
        ]
    return header


def link_base(base: dict[str, Any]) -> Markup:
    """A base by name, commit and hash; linked where the Hub knows it."""
    reference, revision = words(base["reference"]), base["revision"]
    name = plain(name_base(base))
    if revision is not None and HUB_ID.fullmatch(reference):
        name = Markup(f"[{name}](https://huggingface.co/{reference})")
    if revision is not None:
        name = Markup(f"{name}, commit {spans(identifier(revision))}")
    return Markup(f"{name}, SHA-256 {spans(identifier(base['sha256']))}")

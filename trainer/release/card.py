"""The model card (README.md), made from the config, the lineage and the run's records.

Nothing here is typed by hand for one model: what is not recorded is said to be so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.config.schema import Config
from trainer.data.buckets import list_buckets
from trainer.model.diffusion import spell
from trainer.release.card_stages import (
    NOT_RECORDED,
    Stage,
    base_words,
    cell,
    commit_words,
    count,
    plain,
    table,
    training,
)
from trainer.release.card_tags import best_quality, caution, tag_tables
from trainer.release.licence import FAIPL, OPENRAIL, Terms
from trainer.sample.pictures import Sample


@dataclass(frozen=True)
class Release:
    """What is published, as the card tells it."""

    config: Config
    stages: list[Stage]
    terms: Terms
    license_files: dict[str, str]  # file in the folder -> what it is
    acknowledged: str | None
    base_id: str | None  # the first base's name on the Hub, where the user says it and the lineage does not
    samples: list[Sample]
    weights: str | None  # the single file, if there is one
    full_precision: str | None  # the fp32 file, if it is in the folder
    sdxl_shapes: bool = True  # other programs read the single file only then

    @property
    def title(self) -> str:
        return self.config.publish.title or self.config.run.name

    @property
    def base_model(self) -> str | None:
        """The nearest model of the lineage that the Hub knows."""
        bases = (stage.lineage["base"] for stage in reversed(self.stages))
        return next((base["reference"] for base in bases if base["revision"] is not None), self.base_id)


def write_card(release: Release) -> str:
    """README.md: the header that the Hub reads, then the sections that users of such models look for."""
    header = yaml.safe_dump(build_header(release), sort_keys=False, allow_unicode=True, width=120)
    sections = [
        f"# {cell(release.title)}",
        *details(release),
        *usage(release),
        *tag_tables(release.config.captions),
        *gallery(release.samples),
        *training(release.stages),
        *limitations(),
        *licence(release),
    ]
    return f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n"


def build_header(release: Release) -> dict[str, Any]:
    """The card's metadata, in the Hub's words."""
    publish = release.config.publish
    header: dict[str, Any] = {
        "license": "other",
        "license_name": FAIPL,
        "license_link": publish.license_link or "LICENSE.md",
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


def details(release: Release) -> Iterator[str]:
    """What it is and who made it from what."""
    last, first = release.stages[-1].lineage, release.stages[0].lineage
    trained = ", then ".join(
        f"{stage.lineage['stage']} ({count(stage.lineage['step'])} steps)" for stage in release.stages
    )
    yield "## Model details"
    yield "\n".join(
        [
            f"- **Developed by**: {cell(release.config.publish.author or NOT_RECORDED)}",
            "- **Model type**: diffusion model for text to image, SDXL's architecture, predicts "
            + spell(release.config.diffusion.prediction_type).card,
            f"- **Finetuned from**: {base_words(first['base'])}",
            f"- **Trained in**: {cell(trained)}",
            "- **Text**: tags in English, separated by commas, in the manner of Danbooru",
            f"- **License**: [FAIPL-1.0-SD]({release.config.publish.license_link or 'LICENSE.md'}); see below",
            f"- **Source**: {release.config.publish.source_url}",
            f"- **Code**: version {last['code']['version']}, commit {commit_words(last['code'])}",
        ]
    )
    yield from files(release)


def files(release: Release) -> Iterator[str]:
    """What lies in the folder, and where the rest is to be had."""
    publish = release.config.publish
    full = "The weights in full precision"
    lines_of = {
        "single_file": f"`{release.weights}`: everything in one {publish.dtype} file"
        + (", for ComfyUI, Forge and others" if release.sdxl_shapes else ""),
        "diffusers": "`model_index.json` and the folders beside it: the same for diffusers",
    }
    lines = [
        *(lines_of[form] for form in publish.formats),
        f"[`{release.full_precision}`]({release.full_precision}): {full.lower()}"
        if release.full_precision
        else f"{full}: offered at {publish.source_url}",
        "The optimizer's states, which the license counts as part of the model: on request, at the same address",
        "`CHANGES.md`, `configs/`: what was done to which base, with which settings; `lineage.json`: the same for "
        "programs",
        "`SHA256SUMS`: for `sha256sum --check SHA256SUMS`",
    ]
    yield "## Files"
    yield "\n".join(f"- {line}" for line in lines)
    if "diffusers" in publish.formats:
        dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[publish.dtype]
        yield PYTHON.format(dtype=dtype)


PYTHON = """```python
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline

name = "..."  # this repository's, owner/name, or the folder it lies in
pipeline = StableDiffusionXLPipeline.from_pretrained(name, torch_dtype=torch.{dtype})
pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
```"""


def usage(release: Release) -> Iterator[str]:
    """Order of tags, settings and sizes, as the model was trained and drawn with."""
    config = release.config
    sampling, buckets = config.sampling, config.buckets
    yield "## Prompts"
    order = "characters, series, artists and then everything else"
    people = ", ".join(f"`{tag}`" for tag in config.captions.people[:1] + config.captions.people[6:8] if tag)
    who = f"who ({people} and so on), " if people else ""
    yield (
        f"Tags stand in the order of the training captions: {who}{order}"
        + (", the latter in any order, because it was shuffled." if config.captions.shuffle else ".")
    )
    general, year = config.captions.ratings.get("g"), ["year tag"] if config.captions.years else []
    order_of_prompts = ["1girl", "character", "series", "everything else", *year, *([general] if general else [])]
    yield f"```\n{', '.join([*best_quality(config.captions), *order_of_prompts])}\n```"
    yield from caution(config.captions)
    sides = list_buckets(buckets.base_resolution, buckets.min_side, buckets.max_side, buckets.step)
    yield "## Recommended settings"
    yield table(
        ["setting", "value"],
        [
            ["sampler", "Euler ancestral"],
            ["steps", str(sampling.num_inference_steps)],
            ["guidance scale", f"{sampling.guidance_scale:g}"],
            ["negative prompt", sampling.negative_prompt or "none"],
            ["tokens", f"up to {config.captions.max_token_length}, in chunks of 75"],
        ],
    )
    drawn = "Images were drawn with them during training." if sampling.prompts else "No images were drawn in training."
    yield f"These are the settings in the training config. {drawn}"
    yield "## Sizes"
    yield f"Width x height in pixels, about {buckets.base_resolution} x {buckets.base_resolution} in area: " + (
        ", ".join(f"{width} x {height}" for width, height in sides) + "."
    )


def gallery(samples: Sequence[Sample]) -> Iterator[str]:
    """The sample images with what they were made from."""
    if samples:
        yield "## Samples"
        yield table(
            ["image", "prompt", "negative prompt", "settings"],
            [
                [
                    f"![{sample.path.stem}](samples/{sample.path.name})",
                    plain(sample.prompt),
                    plain(sample.negative_prompt),
                    ", ".join(f"{key} {value}" for key, value in sample.settings.items()),
                ]
                for sample in samples
            ],
        )


def limitations() -> Iterator[str]:
    yield "## Limitations"
    yield "\n".join(
        [
            "- It was trained on tags and follows tags; sentences work less well, and so do languages other than "
            "English.",
            "- It draws in the manner of the images it was trained on and carries their biases, of who is drawn and "
            "how.",
            "- Hands, fine detail, text within images and several distinct characters may go wrong.",
            "- Images of every rating may come out. Rating tags in the prompt and the negative prompt steer that, and "
            "guarantee nothing: filter what others see.",
            "- Quality and year tags reflect scores and dates of posts, not a judgement of art.",
        ]
    )


def licence(release: Release) -> Iterator[str]:
    """The licence in plain words; what counts is its text."""
    yield "## License"
    yield (
        "This model is under the Fair AI Public License 1.0-SD ([LICENSE.md](LICENSE.md)). In plain words, which do "
        "not replace the text and are not legal advice:"
    )
    yield "\n".join(
        [
            "- You may use, change and share the model, also for money.",
            "- Whoever gets a copy from you, changed or not, also gets the text of the license and the corresponding "
            "source: the model and the changed software, but not the data.",
            "- If you let others use a changed version over a network, give them a way to its source; for a derived "
            "model alone, a download link or a written offer of that model is enough.",
            "- What you derive stays under this license, or one that allows everything this one allows.",
            "- If someone tells you in writing that you broke these rules, you have 30 days to mend it.",
            "- Eleven uses are prohibited, and stay so for everyone who gets it from you: read them in the text.",
            "- What the model draws is not covered by the license.",
        ]
    )
    if release.terms.name == OPENRAIL:
        yield (
            "Its base is under CreativeML Open RAIL++-M, whose use restrictions go on to apply to this model and to "
            "everything derived from it (Attachment A of that license)."
        )
    if len(release.license_files) > 1:
        yield "\n".join(f"- [{name}]({name}): {what}" for name, what in release.license_files.items())
    if release.acknowledged:
        yield f"The publisher says of the base's own terms: {cell(release.acknowledged)}"

"""Draw prompts with any checkpoint: one PNG an image that says how it was made, and a grid of all with labels.

Sampler, text encoding and noise are those of the samples while training. An image is a function of model, prompt, size,
settings and its own seed: drawn alone, with that seed, it is the same file (on the same device).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from PIL import Image

import trainer
from trainer.config.fixed import INTERPOLATION
from trainer.config.schema import (
    BucketsConfig,
    CaptionsConfig,
    Dtype,
    MemoryConfig,
    ModelConfig,
    PrecisionConfig,
    SamplingConfig,
    TokenLength,
)
from trainer.core.console import log
from trainer.core.distributed import choose_device, describe_device
from trainer.core.errors import UserError
from trainer.core.files import write_file
from trainer.core.layout import GRID_FILE, SAMPLES_FOLDER, SUMS_FILE
from trainer.core.progress import Meter
from trainer.data.tokens import load_tokenizers
from trainer.model.base import (
    Base,
    find_base,
    find_tokenizers,
    has_vae,
    hash_base,
    read_predictions,
    read_vae,
    read_vocab_sizes,
)
from trainer.model.diffusion import Prediction
from trainer.model.lineage import Lineage, read_lineage, read_versions
from trainer.model.sdxl import DTYPES, build_sdxl
from trainer.model.vae import build_vae
from trainer.sample.pictures import (
    Picture,
    describe_picture,
    file_name,
    grid_scale,
    label,
    refuse_existing,
    shrink,
    write_png,
)
from trainer.sample.sampling import LoadedModel, build_pipeline, draw_image, make_grid

SETTINGS: dict[str, tuple[type, ...]] = {  # of SamplingConfig, with the types that a lineage's JSON may have
    "num_inference_steps": (int,), "guidance_scale": (int, float), "negative_prompt": (str,),
    "width": (int,), "height": (int,),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model that was found, but not loaded yet."""

    name: str
    base: Base
    tokenizers: tuple[Path, Path]
    prediction: Prediction
    max_token_length: int
    sampling: SamplingConfig  # as the run's own samples were drawn, size included; else the card's


def draw(
    sources: Sequence[Source],
    pictures: Sequence[Picture],
    sampling: SamplingConfig,
    out: Path,
    *,
    columns: int,
    dtype: Dtype | None = None,
    beside: bool = False,
) -> list[Path]:
    """Draw all pictures with each model, one model in memory at a time; write them and a grid into ``out``.

    Args:
        sampling: of it only the negative prompt, the steps and the guidance.
        columns: of the grid; several models have a column each instead.
        dtype: fp16 on a GPU and fp32 on the CPU unless given.
        beside: number on after the images that lie in ``out``, with a grid of their own.

    Returns: the paths of what was written, the grid's first.

    Raises:
        UserError: before anything is drawn, where a file lies that would be written.
    """
    several = len(sources) > 1
    letters = [chr(ord("A") + number) for number in range(len(sources))] if several else [""]
    first, grid_file = find_next(out) if beside else (0, out / GRID_FILE)
    numbered = list(enumerate(pictures, start=first))
    paths = [[out / file_name(number, each, letter) for number, each in numbered] for letter in letters]
    refuse_existing([grid_file, *(path for column in paths for path in column)])
    scale = grid_scale([picture.size for picture in pictures], len(sources))
    cells: list[list[tuple[Image.Image, str]]] = [[] for _ in pictures]  # a row for each picture
    for letter, source, column in zip(letters, sources, paths, strict=True):
        drawn = draw_pictures(source, pictures, sampling, dtype)
        for row, picture, path, (image, texts) in zip(cells, pictures, column, drawn, strict=True):
            write_png(path, image, texts)
            row.append((shrink(image, scale), label(picture, f"{letter}: {source.name}" if several else "")))
    images, labels = zip(*(cell for row in cells for cell in row), strict=True)
    grid = make_grid(list(images), list(labels), len(sources) if several else columns)
    write_file(grid_file, lambda path: grid.save(path, format="PNG"))
    return [grid_file, *(path for column in paths for path in column)]


def find_next(folder: Path) -> tuple[int, Path]:
    """The number with which images go on after those that lie in a folder, and a name for another grid there."""
    taken = {path.name for path in folder.glob("*.png")}
    numbers = [int(found[1]) for name in taken if (found := re.match(r"(\d{3,})-", name))]
    grids = [GRID_FILE, *(f"grid-{number}.png" for number in range(2, len(taken) + 3))]
    return max(numbers, default=-1) + 1, folder / next(name for name in grids if name not in taken)


def draw_pictures(
    source: Source, pictures: Sequence[Picture], sampling: SamplingConfig, dtype: Dtype | None
) -> Iterator[tuple[Image.Image, dict[str, str]]]:
    """Each picture as drawn by one model, with the texts for its file; it is loaded here and freed at the end."""
    model = load_source(source, dtype)
    prompts = dict.fromkeys([*(picture.prompt for picture in pictures), sampling.negative_prompt])
    for note in find_cut_prompts(model, list(prompts)):
        log.info("note: %s", note)
    steps, total = sampling.num_inference_steps, len(pictures)
    with Meter(f"draw with {source.name}", total * steps, "denoising step") as meter:
        for number, picture in enumerate(pictures, start=1):
            advance = partial(meter.update, 1, f"image {number:,} of {total:,}")
            image = draw_image(
                model, picture.prompt, sampling, size=picture.size, seed=(picture.seed, 0), advance=advance
            )
            yield image, describe_picture(picture, sampling, model.facts)


def find_source(reference: str, tokenizer: str | None = None) -> Source:
    """A diffusers folder, a single file, a run's newest export or a hub id.

    Tokenizers come from ``tokenizer`` (folder or hub id) if given, else from the folder itself. A single file has none
    and takes those of the diffusers folder of its name beside it, as exported, or of the one around it, as published.

    Raises:
        UserError: when the model, its VAE or its tokenizers are missing.
    """
    base = find_base(reference, key="MODEL")
    name = base.reference if base.revision else base.path.resolve().name.removesuffix(".safetensors")
    if not has_vae(base):
        raise UserError(
            f"{reference} has no VAE, without which it cannot draw: export it whole, as scripts/export.py does"
        )
    if tokenizer is None and base.path.is_file():
        near = (base.path.with_suffix(""), base.path.parent)
        tokenizer = next((str(folder) for folder in near if (folder / "tokenizer").is_dir()), None)
    lineage = read_lineage(base.path)
    return Source(
        name=name,
        base=base,
        tokenizers=find_tokenizers(base, tokenizer, "--tokenizer"),
        prediction=next(iter(read_predictions(base).values())),
        max_token_length=trained_token_length(lineage),
        sampling=trained_sampling(lineage),
    )


def trained_token_length(lineage: Lineage | None) -> int:
    """The length to which captions were encoded in training, if the model's lineage has it, else the recipe's 225."""
    try:
        length = lineage["config"]["captions"]["max_token_length"] if lineage else None
    except (KeyError, TypeError):  # of another version, or of other hands
        length = None
    if isinstance(length, int) and length in get_args(TokenLength):
        return length
    return CaptionsConfig.max_token_length


def trained_sampling(lineage: Lineage | None) -> SamplingConfig:
    """How the samples of the model's run were drawn, as far as its lineage says; else the card's settings at 1024."""
    config = lineage.get("config") if lineage else None
    sections = [config.get(name) if isinstance(config, dict) else None for name in ("sampling", "buckets")]
    sampling, buckets = (section if isinstance(section, dict) else {} for section in sections)
    side = buckets.get("base_resolution")
    given = {"width": side, "height": side, **{name: value for name, value in sampling.items() if value is not None}}
    known = {
        name: given[name]
        for name, kinds in SETTINGS.items()
        # a config lies there as written, with its interpolations
        if type(given.get(name)) in kinds and INTERPOLATION not in str(given[name])
    }
    side = BucketsConfig.base_resolution
    return replace(SamplingConfig(width=side, height=side), **known)


def load_source(source: Source, dtype: Dtype | None) -> LoadedModel:
    """The model with its weights in ``dtype``, on the GPU if there is one."""
    base, device = source.base, choose_device()
    dtype = dtype or ("fp16" if device.type == "cuda" else "fp32")
    frozen = ModelConfig("", train_unet=False)
    sdxl = build_sdxl(base, frozen, PrecisionConfig(compute=dtype, frozen=dtype), MemoryConfig("none"), device)
    weights = read_vae(None, base)
    # SDXL's own VAE overflows in fp16; one that does not says so in its config
    vae_dtype: Dtype = "fp32" if weights.config.get("force_upcast", True) else dtype
    vae = build_vae(weights.config, weights.state, DTYPES[vae_dtype]).to(device)
    pipeline = build_pipeline(sdxl, vae, source.prediction)
    return LoadedModel(
        sdxl=sdxl,
        pipeline=pipeline,
        tokenizers=load_tokenizers(*source.tokenizers, read_vocab_sizes(base)),
        max_token_length=source.max_token_length,
        compute=DTYPES[dtype],
        facts={
            "model": source.name,
            "sha256": hash_base(base),
            "prediction_type": source.prediction.prediction_type,
            "zero_terminal_snr": bool(source.prediction.zero_terminal_snr),
            "max_token_length": source.max_token_length,
            "dtype": dtype,
            "vae_dtype": vae_dtype,
            "device": describe_device(device),
            "versions": {"trainer": trainer.__version__, **read_versions()},
        },
    )


def find_cut_prompts(model: LoadedModel, prompts: list[str]) -> Iterator[str]:
    """A note for each prompt of which the model does not see the end."""
    for prompt, content in zip(prompts, model.tokenizers[0].content_ids(prompts), strict=True):
        if len(content) > model.max_token_length:
            seen = f"only the first {model.max_token_length} of its {len(content)} tokens are seen, as in training"
            yield f"{prompt[:60]} ...: {seen}"


def default_folder(sources: Sequence[Source]) -> Path:
    """``samples`` beside the model, which of a run's export is where scripts/publish.py looks; of a hub id, here."""
    base = sources[0].base
    folder = Path() if base.revision else base.path.parent
    if (folder / SUMS_FILE).exists():
        raise UserError(f"{folder} is a published folder, which its SHA256SUMS name whole: say where with --out DIR")
    return folder / (SAMPLES_FOLDER if len(sources) == 1 else "comparison")

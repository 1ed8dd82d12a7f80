"""Draw images with a model: one PNG per image, which records how it was made, and a labelled grid of all.

    python scripts/sample.py MODEL --prompts FILE [--all-sizes | --size 832x1216 ...] [--seed N]
    python scripts/sample.py MODEL --prompt "masterpiece, best quality, 1girl, solo" --compare MODEL_B

MODEL is a diffusers folder, a single file, a hub id or a run, by its name, folder or config, which stands for its
newest export. An export is drawn with as its run's own samples were, another model with the model card's settings.
Nothing in the folder of images is overwritten: drawing again numbers on, and a folder that --out names must be free.
"""

import argparse
import dataclasses
from pathlib import Path

from trainer.config.run_names import find_run_path, name_run
from trainer.config.schema import SamplingConfig
from trainer.core.commands import command
from trainer.core.console import CommandParser, NextStep, Result, log
from trainer.core.errors import UserError, run_command
from trainer.core.files import expand_home, home_path
from trainer.core.layout import EXPORT_FOLDER, RUN_FILE, SAMPLES_FOLDER
from trainer.core.progress import format_count
from trainer.sample.pictures import (
    CARD_SIZES,
    OF_COMMAND,
    check_prompts,
    check_sampling,
    plan_pictures,
    read_negative,
    read_prompts,
    read_seed,
    read_size,
)

CARD = SamplingConfig()


def parse() -> argparse.Namespace:
    parser = CommandParser("Draw images with a model. Defaults: those of the run's own samples, else the model card's.")
    parser.add_argument("model", metavar="MODEL", help="diffusers folder, single file, run or hub id")
    parser.add_argument(
        "--prompts", type=home_path, metavar="FILE", help="one prompt per line; empty and # lines are skipped"
    )
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="prompts, after those of the file")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", nargs="+", metavar="WxH", help="default: the run's, else 1024x1024")
    sizes.add_argument("--all-sizes", action="store_true", help="the card's nine sizes")
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help="seed of the first image, the next has N + 1, ...; -1: random"
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"default: the run's, else {CARD.num_inference_steps}")
    parser.add_argument("--guidance", type=float, metavar="SCALE",
                        help=f"default: the run's, else {CARD.guidance_scale:g}; 1 is none")  # fmt: skip
    parser.add_argument(
        "--negative", metavar="TEXT", help="default: the run's, else the card's; at guidance 1 there is none"
    )
    parser.add_argument(
        "--out", type=home_path, metavar="DIR", help="default: samples/ beside MODEL, or here for a hub id"
    )
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument(
        "--tokenizer", type=expand_home, metavar="DIR", help="folder or hub id with tokenizer/ and tokenizer_2/"
    )
    parser.add_argument("--compare", metavar="MODEL_B", help="draw everything with this model too, in a second column")
    return parser.parse_args()


def main() -> Result:
    arguments = parse()
    prompts = [*(read_prompts(arguments.prompts) if arguments.prompts else []), *arguments.prompt]
    if not prompts:
        raise UserError("nothing to draw: give --prompt TEXT, or --prompts FILE with one prompt per line")
    given = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    given = {name: value for name, value in given.items() if value is not None}
    check_sampling(dataclasses.replace(CARD, **given))
    sizes = CARD_SIZES if arguments.all_sizes else [read_size(text) for text in arguments.size or ()]
    seed = read_seed(arguments.seed)
    from trainer.sample.drawing import default_folder, draw, find_source  # torch takes seconds to import

    models = [find_run_path(model) for model in (arguments.model, arguments.compare) if model]
    sources = [find_source(model, arguments.tokenizer) for model in models]
    sampling = dataclasses.replace(sources[0].sampling, **given)
    check_sampling(sampling)
    sampling = dataclasses.replace(sampling, negative_prompt=read_negative(arguments.negative, sampling))
    if note := check_prompts(prompts, sampling.negative_prompt, "prompts", OF_COMMAND):
        log.info("note: %s", note)
    sizes = sizes or [read_size(f"{sampling.width}x{sampling.height}")]
    out = arguments.out or default_folder(sources)
    pictures = plan_pictures(prompts, sizes, seed)
    columns = len(sizes) if len(sizes) > 1 else min(4, len(prompts))
    grid, *files = draw(sources, pictures, sampling, out, columns=columns, dtype=arguments.dtype,
                        beside=arguments.out is None)  # fmt: skip
    lines = [f"random seed of the first image: {seed}"] if arguments.seed == -1 else []
    lines += [f"{format_count(len(files), 'image')}, each with its prompt and settings in it: {out}", f"grid: {grid}"]
    facts = {"folder": str(out), "grid": str(grid), "seed": seed, "models": [source.name for source in sources]}
    return Result("\n".join(lines), [grid, *files], facts, suggest(sources[0].base.path, out))


def suggest(model: Path, out: Path) -> list[NextStep]:
    """To publish the run of which this is an export, where the images lie where publishing looks for them."""
    run = model.parent.parent
    if not (run / RUN_FILE).is_file() or out.resolve() != (run / EXPORT_FOLDER / SAMPLES_FOLDER).resolve():
        return []
    words = ["publish.source_url=https://...", "--license-file", "faipl-1.0-sd.md"]
    return [NextStep("publish it, with your own address", command("scripts/publish.py", name_run(run), *words))]


if __name__ == "__main__":
    run_command(main, "the images that are drawn stay; the same command draws all of them again, beside these")

"""Draw images with a model: one PNG per image, which records how it was made, and a labelled grid of all.

    python scripts/sample.py MODEL --prompts FILE [--all-sizes | --size 832x1216 ...] [--seed N]
    python scripts/sample.py MODEL --prompt "masterpiece, best quality, 1girl, solo" --compare MODEL_B

MODEL is a diffusers folder, a single file, a hub id or a run, by its name, folder or config, which stands for its
newest export. The defaults are the model card's settings. Nothing in the folder of images is overwritten.
"""

import argparse
import dataclasses
import sys

from trainer.config.run_names import find_run_path
from trainer.config.schema import SamplingConfig
from trainer.core.errors import UserError, run_command
from trainer.core.files import expand_home, home_path
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


def parse() -> argparse.Namespace:
    card = SamplingConfig()
    parser = argparse.ArgumentParser(
        description="Draw images with a model. The defaults are the model card's settings."
    )
    parser.add_argument("model", metavar="MODEL", help="diffusers folder, single file, run or hub id")
    parser.add_argument(
        "--prompts", type=home_path, metavar="FILE", help="one prompt per line; empty and # lines are skipped"
    )
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="prompts, after those of the file")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", nargs="+", default=["1024x1024"], metavar="WxH", help="default: 1024x1024")
    sizes.add_argument("--all-sizes", action="store_true", help="the card's nine sizes")
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help="seed of the first image, the next has N + 1, ...; -1: random"
    )
    parser.add_argument("--steps", type=int, default=card.num_inference_steps, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=card.guidance_scale, help="default: %(default)g; 1 is none")
    parser.add_argument("--negative", metavar="TEXT", help="default: the card's; at guidance 1 there is none")
    parser.add_argument(
        "--out", type=home_path, metavar="DIR", help="default: samples/ beside MODEL, or here for a hub id"
    )
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: fp16 on a GPU, fp32 on the CPU")
    parser.add_argument(
        "--tokenizer", type=expand_home, metavar="DIR", help="folder or hub id with tokenizer/ and tokenizer_2/"
    )
    parser.add_argument("--compare", metavar="MODEL_B", help="draw everything with this model too, in a second column")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    prompts = [*(read_prompts(arguments.prompts) if arguments.prompts else []), *arguments.prompt]
    if not prompts:
        raise UserError("nothing to draw: give --prompt TEXT, or --prompts FILE with one prompt per line")
    sizes = CARD_SIZES if arguments.all_sizes else [read_size(text) for text in arguments.size]
    sampling = SamplingConfig(num_inference_steps=arguments.steps, guidance_scale=arguments.guidance)
    check_sampling(sampling)
    negative = read_negative(arguments.negative, sampling)
    sampling = dataclasses.replace(sampling, negative_prompt=negative)
    if note := check_prompts(prompts, negative, "prompts", OF_COMMAND):
        print(note, file=sys.stderr)
    seed = read_seed(arguments.seed)
    if arguments.seed == -1:
        print(f"random seed of the first image: {seed}")
    from trainer.sample.drawing import default_folder, draw, find_source  # torch takes seconds to import

    models = [find_run_path(model) for model in (arguments.model, arguments.compare) if model]
    sources = [find_source(model, arguments.tokenizer) for model in models]
    out = arguments.out or default_folder(sources)
    pictures = plan_pictures(prompts, sizes, seed)
    columns = len(sizes) if len(sizes) > 1 else min(4, len(prompts))
    grid = draw(sources, pictures, sampling, out, columns=columns, dtype=arguments.dtype)
    print(f"{len(pictures) * len(sources)} image(s), each with its prompt and settings in it: {out}")
    print(f"grid: {grid}")


if __name__ == "__main__":
    run_command(main)

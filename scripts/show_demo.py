"""The end of ``make demo``: draw the captions with both exported stages, beside the drawings they were trained on.

``python scripts/show_demo.py demo_run`` writes demo_run/samples.png and lists what lies where.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from PIL import Image

from trainer.config.load import load_config
from trainer.config.schema import SamplingConfig
from trainer.core.errors import run_command
from trainer.core.files import home_path, write_file

STAGES = ("stage1_feature_alignment", "stage2_refine_unet")


def draw(seed: int, export: Path, prompts: list[str], sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """One image per prompt, from an exported folder alone, each at its own (width, height)."""
    from trainer.sample.drawing import find_source, load_source
    from trainer.sample.sampling import draw_image

    model = load_source(find_source(str(export)), "fp32")
    model.pipeline.set_progress_bar_config(disable=True)
    # guidance 1: a model made from nothing without caption dropout has no unconditional branch
    sampling = SamplingConfig(guidance_scale=1.0)
    return [
        draw_image(model, prompt, sampling, size=size, seed=(seed, number))
        for number, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the demo's captions with both exported stages.")
    parser.add_argument("folder", type=home_path, help="where make demo has written")
    folder = parser.parse_args().folder
    show(folder)


def show(folder: Path) -> None:
    """Draw, write the picture, and list what lies where."""
    from trainer.core.rng import rng  # here and above: torch takes seconds to import, and --help needs none of it
    from trainer.data.buckets import fit_to_bucket
    from trainer.data.captions import compose_caption, draw_caption
    from trainer.data.images import read_bytes, read_pixels
    from trainer.data.index import open_index
    from trainer.data.post import ImagePlace
    from trainer.model.exports import find_export
    from trainer.sample.sampling import make_grid

    runs = [folder / "runs" / name for name in STAGES]
    config = load_config([runs[1] / "config.yaml"])
    index = open_index(config.data.shards)
    records = [index.row(row) for row in range(len(index))]
    unshuffled = dataclasses.replace(config.captions, shuffle=False)
    prompts = [draw_caption(compose_caption(record, config.captions), unshuffled, rng("prompt")) for record in records]
    sizes = [(record["bucket_width"], record["bucket_height"]) for record in records]
    posts = [json.loads(line) for file in config.data.posts or [] for line in Path(file).read_text().splitlines()]
    files = {str(post["id"]): Path(config.data.images or "") / post["file"] for post in posts}
    drawings = []
    for record, size in zip(records, sizes, strict=True):
        fit = fit_to_bucket((record["original_width"], record["original_height"]), size)
        drawings.append(Image.fromarray(read_pixels(read_bytes(ImagePlace(files[record["key"]])), fit)))
    exports = [find_export(run) for run in runs]
    drawn = [draw(config.run.seed, export, prompts, sizes) for export in exports]
    cells = [image for row in zip(drawings, *drawn, strict=True) for image in row]
    labels = [
        label for prompt in prompts for label in (f"trained on: {prompt}", "drawn after stage 1", "after stage 2")
    ]
    grid = make_grid(cells, labels, columns=6)
    write_file(folder / "samples.png", lambda path: grid.save(path, format="PNG"))
    print(RESULT.format(folder=folder, stage1=exports[0], stage2=exports[1]))


RESULT = """
The two-stage run is done. Look at {folder}/samples.png first: drawings, and what the exported models draw for their captions.

  shards           {folder}/shards1, {folder}/shards2  (index.arrow, manifest.json, quarantine.jsonl)
  runs             {folder}/runs  (config.yaml, metrics.jsonl, samples/, checkpoints/)
  stage 1 export   {stage1}
  stage 2 export   {stage2}  (and .safetensors beside it)

For your own data, with a GPU of 80 GB:

  python scripts/build_shards.py --config configs/stage1_feature_alignment.yaml data.posts=[my/posts.jsonl] data.images=my/images data.shards=my/shards
  accelerate launch train.py --config configs/stage1_feature_alignment.yaml data.shards=my/shards
  python scripts/export.py runs/stage1_feature_alignment

The README describes the rest."""  # noqa: E501


if __name__ == "__main__":
    run_command(main)

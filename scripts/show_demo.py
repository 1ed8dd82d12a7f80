"""The end of ``make demo``: draw the captions with both exported stages, below the drawings they were trained on.

``python scripts/show_demo.py demo_run`` writes demo_run/samples.png, the same at half the size as demo_run/demo.png
(docs/demo.png is a copy of that), and lists what lies where.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainer.config.load import load_config
from trainer.config.schema import Config, SamplingConfig
from trainer.core.console import CommandParser, Result
from trainer.core.errors import run_command
from trainer.core.files import home_path, write_file

STAGES = ("stage1_feature_alignment", "stage2_refine_unet")
# Guidance 1: a model made from nothing without caption dropout has no unconditional branch. The steps are the card's.
SAMPLING = SamplingConfig(guidance_scale=1.0)
SCALE = 2  # px of samples.png for one that was drawn
MARGIN, ROW_LABEL, CAPTION = 12, 140, 172  # px: between cells, left of a row, below a column
LETTERS = 26  # px


@dataclass(frozen=True)
class Drawing:
    """A drawing of a set, as it was trained on: its prompt is its caption, unshuffled."""

    key: str
    prompt: str
    image: Image.Image  # in its bucket's size


def open_drawings(config: Config, size: tuple[int, int] | None = None) -> list[Drawing]:
    """A set's drawings in the order of their keys; in another bucket's ``size``, if given."""
    # here and below: torch takes seconds to import, and --help needs none of it
    from trainer.data.buckets import fit_to_bucket
    from trainer.data.caption_draws import whole_caption
    from trainer.data.images import read_bytes, read_pixels
    from trainer.data.index import open_index
    from trainer.data.post import ImagePlace
    from trainer.data.template import ready_rules

    index = open_index(config.data.shards)
    posts = [json.loads(line) for file in config.data.posts or [] for line in Path(file).read_text().splitlines()]
    files = {str(post["id"]): Path(config.data.images or "") / post["file"] for post in posts}
    rules = ready_rules(config.captions)
    drawings = []
    for record in (index.row(row) for row in range(len(index))):
        bucket = size or (record["bucket_width"], record["bucket_height"])
        fit = fit_to_bucket((record["original_width"], record["original_height"]), bucket)
        pixels = read_pixels(read_bytes(ImagePlace(files[record["key"]])), fit)
        drawings.append(Drawing(record["key"], whole_caption(record, rules), Image.fromarray(pixels)))
    return drawings


def draw(seed: int, export: Path, drawings: Sequence[Drawing]) -> list[Image.Image]:
    """One image for each drawing's prompt and size, from an exported folder alone."""
    from trainer.sample.drawing import find_source, load_source
    from trainer.sample.sampling import draw_image

    model = load_source(find_source(str(export)), "fp32")
    return [
        draw_image(model, drawing.prompt, SAMPLING, size=drawing.image.size, seed=(seed, number))
        for number, drawing in enumerate(drawings)
    ]


def paint(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str], title: str) -> Image.Image:
    """Rows of images, each with its label at the left; below, a column's caption."""
    width = SCALE * max(image.width for _, images in rows for image in images)
    height = SCALE * max(image.height for _, images in rows for image in images)
    heading = 2 * LETTERS - MARGIN
    size = (ROW_LABEL + len(captions) * (width + MARGIN), heading + len(rows) * (height + MARGIN) + CAPTION)
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(LETTERS)
    pen.text((MARGIN, MARGIN), title, fill="black", font=font)
    for row, (label, images) in enumerate(rows):
        top = heading + MARGIN + row * (height + MARGIN)
        lines = "\n".join(textwrap.wrap(label, 8))
        pen.multiline_text((MARGIN, top + height // 2), lines, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            shown = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC)
            left = ROW_LABEL + column * (width + MARGIN) + (width - shown.width) // 2
            picture.paste(shown, (left, top + (height - shown.height) // 2))
    small = ImageFont.load_default(LETTERS * 5 // 6)
    for column, caption in enumerate(captions):
        lines = "\n".join(textwrap.wrap(caption, 25, max_lines=6, placeholder=" ..."))
        left = ROW_LABEL + column * (width + MARGIN)
        pen.multiline_text((left, size[1] - CAPTION + MARGIN), lines, fill="black", font=small)
    return picture


def save_png(picture: Image.Image, path: Path) -> None:
    """Written whole."""
    write_file(path, lambda part: picture.save(part, format="PNG", optimize=True))


def show(folder: Path) -> Result:
    """Draw, write the pictures, and list what lies where."""
    from trainer.model.exports import find_export

    runs = [folder / "runs" / name for name in STAGES]
    config = load_config([runs[1] / "config.yaml"])
    drawings = sorted(open_drawings(config), key=lambda drawing: drawing.prompt)  # people first: 1boy, 1girl
    exports = [find_export(run) for run in runs]
    rows = [("trained on", [drawing.image for drawing in drawings])]
    for label, export in zip(("after stage 1", "after stage 2"), exports, strict=True):
        rows.append((label, draw(config.run.seed, export, drawings)))
    title = TITLE.format(seed=config.run.seed, steps=SAMPLING.num_inference_steps)
    picture = paint(rows, [drawing.prompt for drawing in drawings], title)
    save_png(picture, folder / "samples.png")
    half = picture.resize((picture.width // SCALE, picture.height // SCALE), Image.Resampling.BOX)
    save_png(half.quantize(256, kmeans=2), folder / "demo.png")  # a third of the bytes
    said = RESULT.format(folder=folder, stage1=exports[0], stage2=exports[1])
    return Result(said, [folder / "samples.png", *exports])


def main() -> Result:
    parser = CommandParser("Draw the demo's captions with both exported stages.")
    parser.add_argument("folder", type=home_path, help="where make demo has written")
    return show(parser.parse_args().folder)


TITLE = (
    "A tiny SDXL made from nothing, on a CPU. Euler ancestral, {steps} steps, guidance 1, seed {seed}; prompts below."
)

RESULT = """
The two-stage run is done. Look at {folder}/samples.png first: drawings, and what the exported models draw for their captions.

  pictures         {folder}/samples.png, {folder}/demo.png (half the size)
  shards           {folder}/shards1, {folder}/shards2  (index.arrow, manifest.json, quarantine.jsonl)
  runs             {folder}/runs  (index.html, config.yaml, metrics.jsonl, checkpoints/)
  stage 1 export   {stage1}
  stage 2 export   {stage2}  (and .safetensors beside it)

For your own images, after . .venv/bin/activate:

  python scripts/new_run.py my.yaml --data my/pictures --model sdxl.safetensors

It says what comes next; the README describes the rest."""  # noqa: E501


if __name__ == "__main__":
    run_command(main)

"""What is to be drawn: prompts, sizes, seeds, settings; and its files: PNGs that say how they were made.

Settings and words of prompts that would have no effect are refused, or named as the plain text that they are here.
"""

import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from trainer.config.schema import NEGATIVE_PROMPT, NUM_TIMESTEPS, SamplingConfig
from trainer.core.errors import UserError
from trainer.core.files import write_file
from trainer.core.layout import GRID_NAME

CARD_SIZES = (  # (width, height), as on the card of Animagine XL 3.0
    (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344),
    (1536, 640), (640, 1536),
)  # fmt: skip
SAMPLE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*\.png")
SAMPLE_CHUNKS = {"prompt", "negative_prompt", "settings"}  # the last is a JSON object
# What sd-scripts reads at the end of a prompt, by what it is called here: on the command line, and in a config.
OF_COMMAND = {
    "n": "--negative", "w": "--size", "h": "--size", "d": "--seed", "l": "--guidance", "s": "--steps",
}  # fmt: skip
OF_CONFIG = {
    "n": "sampling.negative_prompt", "w": "sampling.width", "h": "sampling.height", "d": "run.seed",
    "l": "sampling.guidance_scale", "s": "sampling.num_inference_steps",
}  # fmt: skip
OPTION = re.compile(r"(?<!\S)--([A-Za-z]+)(?!\S)")
SYNTAX = (  # of other programs
    r"\([^()]*[^()\s]\s*:\s*-?(?:\d+\.?\d*|\.\d+)\s*\)",  # (smile:1.3), which (:3) is not
    r"\(\([^()]+\)\)",
    r"\[[^\[\]]*[:|][^\[\]]*\]",  # [cat:dog:0.5], [cat|dog]
    r"<(?:lora|lyco|hypernet)[:\w][^<>]*>",
    r"\bembedding:[^\s,]+",
    r"(?<![A-Za-z])(?:BREAK|AND)(?![A-Za-z])",
    r"\{[^{}]*\|[^{}]*\}",  # {red|blue} hair
    r"(?<!\w)__[\w/-]+__(?!\w)",
    r"\\[()]",  # parentheses are not escaped here
)
PLAIN = re.compile("|".join(SYNTAX))
MAX_SHOWN_WORDS = 8
SHEET_COLUMNS = 4  # of the samples while training
SHEET_PROMPTS, SHEET_SIZE = "prompts", "size"  # text chunks of their file: a JSON list, and WIDTHxHEIGHT of an image
GRID_PIXELS = 64_000_000  # a larger grid is shrunk: Pillow takes files of more than 89 million pixels for bombs


@dataclass(frozen=True)
class Picture:
    """One image to draw."""

    prompt: str
    size: tuple[int, int]  # (width, height)
    seed: int


@dataclass(frozen=True)
class Sample:
    """One image and how it was made."""

    path: Path
    prompt: str
    negative_prompt: str
    settings: dict[str, Any]  # JSON values: steps, guidance, seed, size, ...


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines and lines that begin with # are skipped.

    Raises:
        UserError: when the file cannot be read or has none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the prompts file {path} cannot be read as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise UserError(f"the prompts file {path} has no prompt: write one a line")
    return prompts


def read_size(text: str) -> tuple[int, int]:
    """``832x1216`` as (width, height).

    Raises:
        UserError: when it is none, or sides are not multiples of 8.
    """
    width, _, height = text.lower().partition("x")
    sides = [int(side) if side.isascii() and side.isdigit() else 0 for side in (width, height)]
    if 0 in sides or any(side % 8 for side in sides):  # a latent is 8 x 8 pixels
        raise UserError(f"size {text!r}: write WIDTHxHEIGHT in multiples of 8, such as 832x1216")
    return sides[0], sides[1]


def plan_pictures(prompts: Sequence[str], sizes: Sequence[tuple[int, int]], seed: int) -> list[Picture]:
    """Every prompt in every size, each with a seed of its own, counted up from ``seed``."""
    pairs = [(prompt, size) for prompt in prompts for size in sizes]
    return [Picture(prompt, size, seed + number) for number, (prompt, size) in enumerate(pairs)]


def check_sampling(sampling: SamplingConfig) -> None:
    """Refuse steps and guidance that mean nothing."""
    if not 1 <= sampling.num_inference_steps <= NUM_TIMESTEPS:
        raise UserError(f"--steps {sampling.num_inference_steps}: there can be 1 to {NUM_TIMESTEPS}")
    if not 1 <= sampling.guidance_scale < math.inf:
        raise UserError(
            f"--guidance {sampling.guidance_scale:g}: 1 is none, the card advises 5 to 7; less has no effect"
        )


def check_config_prompts(sampling: SamplingConfig) -> str | None:
    """What to say of the samples that are drawn while training; None where there is nothing to say.

    Raises:
        UserError: for settings without effect.
    """
    if sampling.guidance_scale == 1 and sampling.negative_prompt not in ("", NEGATIVE_PROMPT):
        raise UserError("sampling.negative_prompt has no effect: sampling.guidance_scale is 1; set it to ''")
    return check_prompts(sampling.prompts, sampling.negative_prompt, "sampling.prompts", OF_CONFIG)


def check_prompts(prompts: Iterable[str], negative: str, where: str, options: Mapping[str, str]) -> str | None:
    """One note of what in the prompts other programs take for more than text; None where there is nothing.

    Args:
        where: what messages call the prompts.
        options: what sd-scripts' options of prompts are called here.

    Raises:
        UserError: for such options, which would be drawn as words.
    """
    texts = [*prompts, negative]
    for text in texts:
        if letters := dict.fromkeys(OPTION.findall(text)):
            ways = [f"--{letter} is {options[letter]} here" for letter in letters if letter in options]
            raise UserError(
                f"{where}: {text[:60]!r} holds options of other programs, which would be read as words: "
                f"{', '.join(f'--{letter}' for letter in letters)}. Take them out"
                + (f"; {', '.join(ways)}" if ways else "")
            )
    # what weighs, mixes, splits or loads something in other programs
    found = list(dict.fromkeys(match[0] for text in texts for match in PLAIN.finditer(text)))
    if not found:
        return None
    more = f" and {len(found) - MAX_SHOWN_WORDS} more" if len(found) > MAX_SHOWN_WORDS else ""
    return f"{where}: plain text here as in the captions, not a command: {'  '.join(found[:MAX_SHOWN_WORDS])}{more}"


def read_seed(seed: int) -> int:
    """The seed of the first image; -1 asks for a random one.

    Raises:
        UserError: for other negative numbers.
    """
    if seed < -1:
        raise UserError(f"--seed {seed}: a whole number from 0 on, or -1 for a random one")
    return secrets.randbelow(2**31) if seed == -1 else seed


def read_negative(given: str | None, sampling: SamplingConfig) -> str:
    """The negative prompt, ``sampling``'s unless given; none at guidance 1, where it could have no effect.

    Raises:
        UserError: where one is given all the same.
    """
    if sampling.guidance_scale > 1:
        return sampling.negative_prompt if given is None else given
    if given:
        raise UserError("--negative has no effect at --guidance 1: leave it out, or raise the guidance")
    return ""


def describe_picture(picture: Picture, sampling: SamplingConfig, facts: dict[str, Any]) -> dict[str, str]:
    """The text chunks of an image's file: all that is needed to draw it again."""
    settings = {
        "size": f"{picture.size[0]}x{picture.size[1]}",
        "seed": picture.seed,
        "steps": sampling.num_inference_steps,
        "guidance": sampling.guidance_scale,
        "sampler": "Euler ancestral",
    }
    return {
        "prompt": picture.prompt,
        "negative_prompt": sampling.negative_prompt,
        "settings": json.dumps(facts | settings, ensure_ascii=False),
    }


def label(picture: Picture, model: str) -> str:
    """What stands below an image in the grid; ``model`` is "" where all are of one."""
    said = f"seed {picture.seed}, {picture.size[0]}x{picture.size[1]}: {picture.prompt}"
    return f"{model}, {said}" if model else said


def file_name(number: int, picture: Picture, letter: str) -> str:
    """``000-832x1216-seed42.png``; ``letter`` distinguishes models."""
    name = f"{number:03d}-{picture.size[0]}x{picture.size[1]}-seed{picture.seed}"
    return f"{name}-{letter}.png" if letter else f"{name}.png"


def refuse_existing(paths: Sequence[Path]) -> None:
    """Refuse to write over what is there."""
    if there := [path.name for path in paths if path.exists()]:
        raise UserError(
            f"{paths[0].parent} holds {there[0]} already, and nothing is overwritten: "
            "move the images away, or name another folder with --out DIR"
        )


def write_png(path: Path, image: Image.Image, texts: dict[str, str]) -> None:
    """A PNG with text chunks, whole or not at all."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)  # as iTXt in UTF-8 where Latin-1 does not do
    write_file(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=chunks))


@dataclass(frozen=True)
class GridLayout:
    """Images of one size in rows, each with room for its label below."""

    image: tuple[int, int]  # (width, height)
    count: int
    columns: int
    margin: int = 8  # pixels

    @property
    def letters(self) -> int:
        """The height of the labels' letters in pixels, larger below large images."""
        return max(10, self.image[0] // 50)

    @property
    def cell(self) -> tuple[int, int]:
        """(width, height) from one image to the next; three lines of 10 pixels take 40."""
        return self.image[0] + self.margin, self.image[1] + 4 * self.letters + self.margin

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the whole."""
        rows = -(-self.count // self.columns)
        return self.columns * self.cell[0] + self.margin, rows * self.cell[1] + self.margin

    def place(self, number: int) -> tuple[int, int]:
        """The left and upper edge of an image."""
        row, column = divmod(number, self.columns)
        return self.margin + column * self.cell[0], self.margin + row * self.cell[1]


def lay_out_sheet(size: tuple[int, int], count: int) -> GridLayout:
    """The samples of a step while training."""
    return GridLayout(size, count, min(SHEET_COLUMNS, count))


def grid_scale(sizes: Sequence[tuple[int, int]], columns: int) -> float:
    """By how much images are shrunk, so that a grid of ``columns`` times these sizes does not become too large."""
    cell = max(width for width, _ in sizes) * max(height for _, height in sizes)
    return min(1.0, math.sqrt(GRID_PIXELS / (cell * len(sizes) * columns)))


def shrink(image: Image.Image, scale: float) -> Image.Image:
    """A smaller copy, or the image itself at scale 1."""
    if scale == 1.0:
        return image
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.LANCZOS)


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a folder, by name; none where the folder does not exist.

    Raises:
        UserError: for a PNG that is a link, has a strange name, or does not say from what it was made.
    """
    files = (
        sorted(file for file in folder.glob("*.png") if not GRID_NAME.fullmatch(file.name)) if folder.is_dir() else []
    )
    return [read_sample(file) for file in files]


def read_sample(path: Path) -> Sample:
    """One sample from the text chunks ``prompt``, ``negative_prompt`` and ``settings`` (a JSON object).

    Raises:
        UserError: see :func:`read_samples`.
    """
    if path.is_symlink() or not SAMPLE_NAME.fullmatch(path.name):
        raise UserError(f"{path} is a link or has a name of other than letters, digits, . _ and -: it is not published")
    try:
        said = read_chunks(path)
        settings = json.loads(said.get("settings", "{}"))
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a PNG with readable settings: {error}") from error
    if "prompt" not in said or not isinstance(settings, dict):
        raise UserError(
            f"{path} does not say from which prompt it was made (PNG text chunks prompt, negative_prompt, settings "
            "as a JSON object): draw it with scripts/sample.py, or take it out of the folder"
        )
    return Sample(path, said["prompt"], said.get("negative_prompt", ""), settings)


def read_chunks(path: Path) -> dict[str, str]:
    """The texts in a PNG: of text chunks, and whatever else Pillow finds there as text or bytes, such as EXIF."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()  # text chunks may also stand after the pixels
        said = {str(key): value for key, value in image.info.items() if isinstance(value, str | bytes)}
    if isinstance(said.get("transparency"), bytes):  # a palette's, and no text
        del said["transparency"]
    return {
        key: str(value) if isinstance(value, str) else value.decode("utf-8", errors="replace")  # plain ones
        for key, value in said.items()
    }

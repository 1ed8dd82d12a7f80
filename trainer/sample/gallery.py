"""Sample images with what they were made from: PNG files whose text chunks hold prompt and settings."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from trainer.core.errors import UserError
from trainer.core.layout import GRID_FILE

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*\.png")


@dataclass(frozen=True)
class Sample:
    """One image and how it was made."""

    path: Path
    prompt: str
    negative_prompt: str
    settings: dict[str, Any]  # JSON values: steps, guidance, seed, size, ...


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a folder, by name; none where the folder does not exist.

    Raises:
        UserError: for a PNG that is a link, has a strange name, or does not say from what it was made.
    """
    files = sorted(file for file in folder.glob("*.png") if file.name != GRID_FILE) if folder.is_dir() else []
    return [read_sample(file) for file in files]


def read_sample(path: Path) -> Sample:
    """One sample from the text chunks ``prompt``, ``negative_prompt`` and ``settings`` (a JSON object).

    Raises:
        UserError: see :func:`read_samples`.
    """
    if path.is_symlink() or not NAME.fullmatch(path.name):
        raise UserError(f"{path} is a link or has a name of other than letters, digits, . _ and -: it is not published")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may also stand behind the pixels
            said = {key: str(value) for key, value in image.info.items() if isinstance(value, str)}  # plain ones
        settings = json.loads(said.get("settings", "{}"))
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a PNG with readable settings: {error}") from error
    if "prompt" not in said or not isinstance(settings, dict):
        raise UserError(
            f"{path} does not say from which prompt it was made (PNG text chunks prompt, negative_prompt, settings "
            "as a JSON object): draw it with scripts/sample.py, or take it out of the folder"
        )
    return Sample(path, said["prompt"], said.get("negative_prompt", ""), settings)

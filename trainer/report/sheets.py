"""The samples of a run: one file a step, in which all prompts lie side by side, shown prompt by prompt."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from trainer.core.errors import UserError
from trainer.core.layout import SAMPLES_FOLDER
from trainer.sample.pictures import SHEET_PROMPTS, SHEET_SIZE, lay_out_sheet, read_size

SHEET_NAME = re.compile(r"step-(\d{8,15})\.png")
WHOLE = ("", 0)  # stands for a prompt where a file does not say what it shows

Drawing = tuple[str, int]  # a prompt, and the how many-th of its kind it is: a list may have it twice


@dataclass(frozen=True)
class Cell:
    """Where one image lies in a file: what CSS needs to show nothing else, in percent of the image's sides."""

    width: int  # pixels
    height: int
    left: float
    top: float
    zoom: float  # the file's width

    def as_list(self) -> list[float]:
        """For the script."""
        return [self.width, self.height, self.left, self.top, self.zoom]


@dataclass(frozen=True)
class Sheet:
    """One file."""

    step: int
    name: str
    cells: dict[Drawing, Cell]


class Sheets:
    """The files in a run's folder of samples; each is opened once, and again when it was written anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / SAMPLES_FOLDER
        self.known: dict[tuple[str, int, int], Sheet | None] = {}
        self.unreadable: list[str] = []

    def read(self, prompts: Sequence[str], size: tuple[int, int]) -> list[Sheet]:
        """All by step. Version 0.2.0 did not write what a file shows: then it shows these prompts, where they fit."""
        known, self.unreadable = {}, []
        for path in sorted(self.folder.glob("step-*.png")) if self.folder.is_dir() else []:
            if not SHEET_NAME.fullmatch(path.name):
                continue
            state = path.stat()
            key = (path.name, state.st_mtime_ns, state.st_size)
            known[key] = self.known[key] if key in self.known else read_sheet(path, prompts, size)
            if known[key] is None:
                self.unreadable.append(path.name)
        self.known = known
        return sorted(filter(None, known.values()), key=lambda sheet: sheet.step)


def read_sheet(path: Path, prompts: Sequence[str], size: tuple[int, int]) -> Sheet | None:
    """One file, of which only the beginning is read; None where it is no image."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            whole, said = image.size, dict(image.info)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    if SHEET_PROMPTS in said:
        try:
            prompts, size = json.loads(said[SHEET_PROMPTS]), read_size(said.get(SHEET_SIZE, ""))
        except (ValueError, TypeError, AttributeError, RecursionError, UserError):
            prompts = []
        if not isinstance(prompts, list):
            prompts = []
    match = SHEET_NAME.fullmatch(path.name)
    assert match is not None
    return Sheet(int(match[1]), path.name, find_cells(whole, prompts, size))


def find_cells(whole: tuple[int, int], prompts: Sequence[str], size: tuple[int, int]) -> dict[Drawing, Cell]:
    """The images of a file of (width, height) ``whole``; it is shown as it is where they cannot lie in it so."""
    layout = lay_out_sheet(size, len(prompts)) if prompts else None
    if layout is None or layout.size != whole:
        return {WHOLE: Cell(*whole, left=0.0, top=0.0, zoom=100.0)}
    width, height = size
    places = [layout.place(number) for number in range(len(prompts))]
    return {
        drawing: Cell(width, height, -100 * left / width, -100 * top / height, 100 * whole[0] / width)
        for drawing, (left, top) in zip(number_prompts(prompts), places, strict=True)
    }


def number_prompts(prompts: Sequence[str]) -> list[Drawing]:
    """Prompts with the number of times that each has come before."""
    seen: Counter[str] = Counter()
    drawings = []
    for prompt in map(str, prompts):
        drawings.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return drawings


def list_drawings(shelves: Sequence[Sequence[Sheet]]) -> list[Drawing]:
    """What was drawn by some runs, as the newest files have it; then what only older ones have."""
    newest_first = [sheet for sheets in shelves for sheet in reversed(sheets)]
    return list(dict.fromkeys(drawing for sheet in newest_first for drawing in sheet.cells))


@dataclass(frozen=True)
class Strip:
    """One prompt over the steps of a run: the first picture and the newest."""

    number: int  # of the drawing
    drawing: Drawing
    first: Sheet
    newest: Sheet


def show_strips(sheets: Sequence[Sheet], drawings: Sequence[Drawing]) -> list[Strip]:
    """A strip for each drawing that the run has."""
    strips = []
    for number, drawing in enumerate(drawings):
        drawn = [sheet for sheet in sheets if drawing in sheet.cells]
        if drawn:
            strips.append(Strip(number, drawing, drawn[0], drawn[-1]))
    return strips


def shelve(sheets: Sequence[Sheet], drawings: Sequence[Drawing], prefix: str) -> dict[str, Any]:
    """A run's files for the page's script: ``prefix`` is the URL of their folder; layouts are few, and files many."""
    numbers = {drawing: number for number, drawing in enumerate(drawings)}
    layouts: dict[str, int] = {}
    places = []
    for sheet in sheets:
        layout = json.dumps({numbers[drawing]: cell.as_list() for drawing, cell in sheet.cells.items()})
        places.append(layouts.setdefault(layout, len(layouts)))
    return {
        "prefix": prefix, "steps": [sheet.step for sheet in sheets], "names": [sheet.name for sheet in sheets],
        "layout": places, "layouts": [json.loads(layout) for layout in layouts],
    }  # fmt: skip

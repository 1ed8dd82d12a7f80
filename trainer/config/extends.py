"""Config files that extend others: ``extends: configs/stage1_feature_alignment.yaml``, or a list, later over earlier.

A file lies over what it extends, and the run's own config.yaml holds what became of all of them.
"""

import os
from pathlib import Path
from typing import Any

from trainer.config.yaml_text import read_yaml
from trainer.core.errors import UserError
from trainer.core.files import home_path, is_file
from trainer.core.layout import CONFIG_FILE

EXTENDS = "extends"
MAX_CHAIN, MAX_LAYERS = 20, 100  # files that lead to one; layers of a config
PROGRAM_FOLDER = Path(__file__).resolve().parents[2]  # where configs/ lies
LOOKED_FOR = "beside the file that names it, then in the working folder, then in the program's"


def read_with_extended(file: Path, chain: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The layers of a config file, each with its name: those of the files that it extends, then its own.

    ``chain`` holds the files that led here.

    Raises:
        UserError: for a file that cannot be read, is not there, or extends itself by a detour.
    """
    if len(chain) > MAX_CHAIN:
        raise UserError(f"{chain[0]}: {EXTENDS}: a chain of more than {MAX_CHAIN} files")
    if os.path.realpath(file) in [os.path.realpath(one) for one in chain]:
        circle = " extends ".join(map(str, (*chain, file)))
        raise UserError(f"{chain[-1]}: {EXTENDS}: a circle: {circle}")
    own = read_yaml(file)
    if EXTENDS not in own:
        return [(str(file), own)]
    layers = []
    for name in read_names(own.pop(EXTENDS), file):
        layers += read_with_extended(find_extended(name, file), (*chain, file))
        if len(layers) > MAX_LAYERS:  # files that each name the next twice would be read without end
            raise UserError(f"{file}: {EXTENDS}: it extends more than {MAX_LAYERS} files")
    return [*layers, (str(file), own)]


def read_names(value: Any, file: Path) -> list[str]:
    """What ``extends`` says, as a list."""
    if value in (None, "", []):
        raise UserError(f"{file}: {EXTENDS}: names no file: name one, such as configs/stage1_feature_alignment.yaml, "
                        "or take the line out")  # fmt: skip
    names = value if isinstance(value, list) else [value]
    if wrong := [name for name in names if not isinstance(name, str) or not name.strip()]:
        raise UserError(f"{file}: {EXTENDS}: must be the name of a config file, or a list of names, not {wrong[0]!r}")
    return names


def find_extended(name: str, file: Path) -> Path:
    """The file that ``file`` means by ``name``: the first that is there, of three.

    Raises:
        UserError: when none is there, or when the first two are there and differ.
    """
    try:
        path = home_path(name)
    except UserError as error:
        raise UserError(f"{file}: {EXTENDS}: {error}") from error
    places = list(dict.fromkeys(folder / path for folder in (file.parent, Path(), PROGRAM_FOLDER)))
    if not (found := [place for place in places if is_file(place)]):
        if run := next((place for place in places if is_file(place / CONFIG_FILE)), None):
            raise UserError(f"{file}: {EXTENDS}: {name} is a run's folder: {run / CONFIG_FILE}?")
        listed = ", ".join(map(str, places))
        raise UserError(f"{file}: {EXTENDS}: {name} is not there. It was looked for {LOOKED_FOR}: {listed}")
    beside, here = file.parent / path, Path() / path
    if beside != here and beside in found and here in found and beside.read_bytes() != here.read_bytes():
        raise UserError(
            f"{file}: {EXTENDS}: {name} may be {beside.resolve()} or {here.resolve()}, which differ: "
            "write the path of one in full"
        )
    return found[0]

"""What a run's folder offers to start from: its exports, by step, and what to say where there are none.

A checkpoint holds trained parameters only, so that of a run's files only its exports are models.
"""

from pathlib import Path

from trainer.core.errors import UserError
from trainer.core.layout import (
    CHECKPOINT_NAME,
    CHECKPOINTS_FOLDER,
    EXPORT_FOLDER,
    MODEL_INDEX_FILE,
    NEWEST,
    RUN_FILE,
    checkpoint_name,
    find_record,
)


def find_run(path: Path) -> tuple[Path, int | None] | None:
    """The run's folder that a folder is or lies in, and the step if the folder is a checkpoint; None for others.

    ``RUN/latest`` is the run, as it is where a checkpoint is asked for.
    """
    if CHECKPOINT_NAME.fullmatch(path.name) and find_record(path) is not None:
        return path.parent.parent, int(path.name.removeprefix("step-"))
    if (path / RUN_FILE).is_file():
        return path, None
    word = path.name in NEWEST and not path.exists()
    if (word or path.name in (CHECKPOINTS_FOLDER, EXPORT_FOLDER)) and (path.parent / RUN_FILE).is_file():
        return path.parent, None
    return None


def find_export(run: Path, step: int | None = None) -> Path:
    """A run's exported diffusers folder, ``export/<run>-step-XXXXXXXX-<dtype>``, of a step, or else of its newest.

    Raises:
        UserError: when there is none, with the command that makes one and what there is; or when the step was exported
            in several dtypes.
    """
    here = list_exports(run)
    folders = [path for path in here if path.is_dir() and step in (None, export_step(path))]
    if not folders:
        checkpoint = run / CHECKPOINTS_FOLDER / checkpoint_name(step) if step is not None else None
        what = (
            f"{run} is a run without an exported diffusers folder"
            if checkpoint is None
            else f"{checkpoint} is a checkpoint, which holds trained parameters only, and that step was not exported"
        )
        listed = f"; exported are: {', '.join(map(str, here))}" if here else ""
        raise UserError(f"{what}: python scripts/export.py {checkpoint or run}{listed}")
    newest = [path for path in folders if export_step(path) == export_step(folders[-1])]
    if len(newest) > 1:
        which = "its newest step" if step is None else f"step {step}"
        raise UserError(f"{run} has several exports of {which}; name one: {', '.join(map(str, newest))}")
    return newest[0]


def find_recorded(pretrained: Path, reference: str) -> Path | None:
    """The export that was once meant by a run's folder, or a folder in it, by the name that was recorded; None without.

    Today the same words may mean a newer export.
    """
    run = find_run(pretrained)
    export = None if run is None else run[0] / EXPORT_FOLDER / Path(reference).name
    return export if export is not None and (export / MODEL_INDEX_FILE).is_file() else None


def list_exports(run: Path) -> list[Path]:
    """A run's exported models, diffusers folders and single files, the newest last."""
    found = [
        path
        for path in run.glob("export/*-step-*")
        if (path / MODEL_INDEX_FILE).is_file() or (path.suffix == ".safetensors" and path.is_file())
    ]
    return sorted(found, key=lambda path: (export_step(path), path.name))


def export_step(export: Path) -> int:
    """The step in an export's name; -1 in a name that has none."""
    match = CHECKPOINT_NAME.search(export.name)
    return int(match[1]) if match else -1


def suggest_exports(reference: str, runs: Path) -> str:
    """What there is instead of a reference that names nothing, as a part of a message; empty without runs here.

    Words such as ``latest`` and the names of steps or runs are no paths: a model is named by a path or a hub id.
    """
    candidates = [path for path in sorted(runs.glob("*")) if (path / RUN_FILE).is_file()]
    name = Path(reference).name
    if (near := runs / name) in candidates:
        return f"; {near} is a run's folder, which stands for its newest export"
    exports = [export for run in candidates for export in list_exports(run)]
    if CHECKPOINT_NAME.fullmatch(name) and (of_step := [export for export in exports if name in export.name]):
        exports = of_step
    if exports:
        return f"; a run's folder stands for its newest export, and exported are: {', '.join(map(str, exports[-8:]))}"
    if not candidates:
        return ""
    names = ", ".join(run.name for run in candidates[-8:])
    return f"; no run in {runs} has an export yet: python scripts/export.py RUN makes one, and runs are: {names}"

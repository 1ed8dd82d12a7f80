"""What stands for a run on a command line: its folder, its bare name, or the config that it is a run of."""

from pathlib import Path

from trainer.config.load import load_config
from trainer.config.schema import RunConfig
from trainer.config.yaml_text import YAML_ENDINGS
from trainer.core.commands import command
from trainer.core.console import log
from trainer.core.errors import UserError
from trainer.core.files import expand_home, is_file
from trainer.core.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, MODEL_INDEX_FILE, RUN_FILE, find_record

RUNS = Path(RunConfig.output_dir)
MOST_RUNS = 12  # runs in a message


def find_run_path(text: str) -> str:
    """The path that is meant: ``NAME`` is ``runs/NAME`` where no such file, run, checkpoint or model lies here,
    ``my.yaml`` the run it names.

    A path into a run may begin with its name, as in ``NAME/checkpoints/step-00001000``. What is neither stays as it is,
    a hub id or a path that is not there.

    Raises:
        UserError: for a config whose run is not there.
    """
    path = Path(expand_home(text))
    if path.suffix in YAML_ENDINGS and path.is_file():
        return str(find_configs_run(path))
    relative = not path.is_absolute() and path.parts and not text.startswith(".")
    is_run = relative and is_run_folder(RUNS / path.parts[0])
    if path.exists() and not (is_run and len(path.parts) == 1 and is_other_folder(path)):
        if is_run and len(path.parts) == 1:
            run = RUNS / path
            log.warning(
                "note: %s is a path here, which is taken, and also the name of a run: %s is that run", text, run
            )
        return str(path)
    return str(RUNS / path) if is_run else str(path)


def name_run(folder: Path) -> str:
    """What to type for a run: its bare name where that means it from here, else its path."""
    here = Path(folder.name)
    means_it = folder == RUNS / folder.name and (not here.exists() or is_other_folder(here))
    return folder.name if means_it else str(folder)


def find_configs_run(file: Path) -> Path:
    """The run of a config file: beside a run's own config.yaml, else where the config says."""
    if file.name == CONFIG_FILE and is_run_folder(file.parent):
        return file.parent
    run = load_config([file], preparing=True).run
    folder = Path(run.output_dir) / run.name
    if not folder.is_dir():
        raise UserError(f"{file} names the run {folder}, which is not there yet: {command('train.py', file)}")
    return folder


def is_run_folder(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return is_file(folder / RUN_FILE) or is_file(folder / CONFIG_FILE)


def is_other_folder(path: Path) -> bool:
    """Whether something is a folder that no command takes for a run, a checkpoint or a model."""
    if not path.is_dir() or is_run_folder(path):
        return False
    known = (MODEL_INDEX_FILE, "unet", CHECKPOINTS_FOLDER)
    is_known = find_record(path) is not None or any((path / name).exists() for name in known)
    return not is_known and not any(path.glob("*.safetensors"))


def say_runs(folder: Path = RUNS) -> str:
    """Which runs there are, as the end of a message."""
    names = sorted(path.name for path in folder.glob("*") if is_run_folder(path))
    left_out = f" and {len(names) - MOST_RUNS} more" if len(names) > MOST_RUNS else ""
    return f"runs are: {', '.join(names[:MOST_RUNS])}{left_out}" if names else f"there is no run in {folder}"

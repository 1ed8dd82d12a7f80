"""What scripts/publish.py is asked for, and the config that it asks: both can be refused before torch is imported."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.environment import uses_environment
from trainer.config.load import load_config
from trainer.config.schema import Config, PublishConfig
from trainer.core.errors import UserError
from trainer.core.layout import CONFIG_FILE, RUN_FILE

# of publish: what others get to read
WRITTEN_WORDS = ("source_url", "title", "author", "license_link", "notes", "acknowledgements")


@dataclass(frozen=True)
class Request:
    """What the command line says beside the config."""

    run: Path
    out: Path | None = None  # instead of RUN/published/<the repository's name, or the run's>
    license_files: Sequence[Path] = ()
    acknowledged: str | None = None  # what the publisher says of the base's terms
    base: str | None = None  # where the first base of the lineage lies now
    samples: Path | None = None  # instead of RUN/export/samples
    full_precision: bool = False


def read_publish_config(run: Path, overrides: Sequence[str]) -> Config:
    """The run's config with ``publish.key=value`` over it.

    Raises:
        UserError: for words that would change what the run was.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run: it has no config.yaml. {suggest_runs(run)}")
    if strange := [word for word in overrides if not word.startswith("publish.")]:
        raise UserError(f"{strange[0]} has no effect on a run that is made: only publish.key=value can be set here")
    config = load_config([run / CONFIG_FILE], overrides)
    said = config.written["publish"]
    if taken := [name for name in WRITTEN_WORDS if uses_environment(str(said.get(name)), config.written)]:
        raise UserError(
            f"publish.{taken[0]} comes from an environment variable, and would be written to files that others get: "
            f"set it here, as publish.{taken[0]}=..."
        )
    return config


def remark_on_card(publish: PublishConfig) -> Iterator[str]:
    """What the card says by itself, or leaves open, which a reader of the config may not expect."""
    if publish.base_only:
        yield "the card calls it a base to build on, not for inference: publish.base_only is true"
    else:
        yield "the card does not call it a base to build on: publish.base_only=true does"
    if publish.repo_id is None and "diffusers" in publish.formats:
        yield "its script names no repository: publish.repo_id=owner/name builds a folder whose card does"


def suggest_runs(path: Path) -> str:
    """Which run was meant where a checkpoint or an export of one was named; else which runs are near."""
    if run := next((folder for folder in path.parents if (folder / RUN_FILE).is_file()), None):
        return f"What is published is a run's newest step: name {run}"
    for folder in (path, path.parent, Path("runs")):
        if runs := sorted(record.parent for record in folder.glob("*/run.json")):
            return f"Runs are: {', '.join(map(str, runs[:8]))}"
    return "A run's folder lies in run.output_dir under its name"

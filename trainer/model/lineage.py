"""What made a file: run, data, config, code, libraries and the model it started from, and what made that.

A plain dict of JSON values. It travels in checkpoints (``checkpoint.json``), in the metadata of single files and as
``lineage.json`` in diffusers folders, so that a published file can be traced back to the first base. Published files
must not carry a user's folders: absolute paths are cut to their last two parts, and to what follows a user's name.
"""

import datetime
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import trainer
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.json_text import decode_json
from trainer.core.layout import CHECKPOINTS_FOLDER, LINEAGE_FILE, RUN_FILE, find_record
from trainer.model.checkpoint import list_checkpoints, read_train_state
from trainer.model.exports import list_exports

LINEAGE_KEY = "trainer.lineage"  # metadata of a single file
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pillow")
ABSOLUTE = re.compile(r"(file://)?(~[\w.-]*(/|$)|[/\\]|[A-Za-z]:[\\/])")
DEFAULT = re.compile(r"(\$\{oc\.env:\w+,\s*['\"]?)([^${}'\"]+)")  # of an interpolation
USERS = {"home", "users", "media"}  # folders in which each user has one
# sections and fields of the config that are prose, prompts or tags, in which a slash makes no path
PROSE = {
    "captions", "sampling", "filters", "stage", "title", "author", "notes", "acknowledgements", "prompt", "prompts",
    "negative_prompt", "tags",
}  # fmt: skip
PATHS_IN_PROSE = {  # of captions
    "thresholds_from", "protected_tags_file", "tag_aliases", "tag_implications", "tag_removals",
}  # fmt: skip

Lineage = dict[str, Any]


def build_lineage(
    config: Config,
    facts: Mapping[str, Any],
    step: int,
    *,
    fork: Mapping[str, Any] | None = None,
    software: Mapping[str, Any] | None = None,
    started_at: str | None = None,
    hours: float | None = None,
    hardware: Sequence[str] = (),
    nonfinite_steps: int = 0,
    substituted: int = 0,
) -> Lineage:
    """The lineage of what a run has made with ``step`` completed optimizer steps.

    Args:
        config: of it only the run's names, the batch size and what the user wrote (``Config.written``).
        facts: ``images`` in the index, ``index_fingerprint``, ``caption_fields`` where known (data.index.count_fields),
            and ``base``: reference, revision and sha256 of the start weights; their own ``lineage`` too, or else it is
            looked up where the reference is local.
        fork: the run that this one branched off, if it did: ``run``, ``step``, ``samples_seen`` and its own
            ``lineage``, without the base, which is the same.
        software: :func:`describe_software` as it was when the run was launched; None: as it is now.
        started_at: ISO 8601; ``hours`` of training so far. Both None when unknown.
        nonfinite_steps: steps whose update was withheld because loss or gradients were not finite.
        substituted: samples that could not be read, for which others stood in.
        hardware: such as "2 x NVIDIA A100-SXM4-80GB"; several where attempts differed, none when unknown.
    """
    base = facts["base"]
    lineage = {
        "run": config.run.name,
        "stage": config.run.stage,
        "step": step,
        "samples_seen": count_samples(step, config.data.global_batch_size, fork),
        **({"fork": dict(fork)} if fork else {}),
        "images": facts["images"],
        "index_fingerprint": facts["index_fingerprint"],
        # what captions could be made of: how many samples had it; not recorded by version 0.2
        **({"caption_fields": facts["caption_fields"]} if "caption_fields" in facts else {}),
        **({"thresholds": facts["thresholds"]} if facts.get("thresholds") else {}),
        "started_at": started_at,
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hours": hours,
        "hardware": list(hardware),
        **({"nonfinite_steps": nonfinite_steps} if nonfinite_steps else {}),
        **({"substituted": substituted} if substituted else {}),
        "config": config.written,
        **(describe_software() if software is None else software),
        "base": {
            **{key: base[key] for key in ("reference", "revision", "sha256")},
            # what it predicts; not recorded by version 0.2
            **({"prediction": base["prediction"]} if "prediction" in base else {}),
            "lineage": base["lineage"] if "lineage" in base else read_lineage(Path(base["reference"]).expanduser()),
        },
    }
    return shorten_paths(lineage)


def count_samples(step: int, global_batch_size: int, fork: Mapping[str, Any] | None) -> int:
    """Samples that the weights have seen after ``step`` completed steps; a fork's first ones were another run's."""
    if fork is None:
        return step * global_batch_size
    return fork["samples_seen"] + (step - fork["step"]) * global_batch_size


def describe_software() -> dict[str, Any]:
    """``code`` and ``versions`` of what lies on the disk now."""
    return {"code": describe_code(), "versions": read_versions()}


def describe_code() -> dict[str, Any]:
    """Our version, and the commit if this code runs from its own git checkout."""
    root = Path(trainer.__file__).parent.parent
    top = run_git(root, "rev-parse", "--show-toplevel")
    # an installed package may lie in a virtual environment inside somebody else's checkout
    commit = run_git(root, "rev-parse", "HEAD") if top is not None and Path(top) == root.resolve() else None
    changes = run_git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return {"version": trainer.__version__, "commit": commit, "dirty": None if changes is None else bool(changes)}


def run_git(folder: Path, *words: str) -> str | None:
    """What a git command prints; None where it fails, or where there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that decide what comes out."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def shorten_paths(value: Any, prose: bool = False) -> Any:
    """A JSON value with every text that is an absolute path cut, at any depth.

    Prose and prompts stay as they are: nothing in them is a path but the fields that say so.
    """
    if isinstance(value, dict):
        return {
            key: shorten_paths(item, (prose or key in PROSE) and key not in PATHS_IN_PROSE)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [shorten_paths(item, prose) for item in value]
    return shorten_path(value) if isinstance(value, str) and not prose else value


def shorten_path(text: str) -> str:
    """``/home/someone/models/sdxl/unet`` becomes ``sdxl/unet``; other texts stay.

    Of ``${oc.env:NAME,/default}`` the default is cut; ``/home/someone/images`` becomes ``images``.
    """
    if not ABSOLUTE.match(text):
        return DEFAULT.sub(lambda match: match[1] + shorten_path(match[2]), text)
    parts = [part for part in re.split(r"[\\/]+", ABSOLUTE.sub("", text, count=1)) if part]
    named = max((place for place, part in enumerate(parts[:-1]) if part.lower() in USERS), default=None)
    own = parts if named is None else parts[named + 2 :] or [parts[named]]
    return "/".join(own[-2:]) or ("home" if text.startswith("~") else text)


def read_lineage(path: Path) -> Lineage | None:
    """The lineage of a single file, a diffusers folder or a checkpoint; None if it carries none.

    Raises:
        UserError: when the file cannot be read.
    """
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                lineage = decode_json((file.metadata() or {}).get(LINEAGE_KEY, "null"))
        elif (path / LINEAGE_FILE).is_file():
            lineage = decode_json((path / LINEAGE_FILE).read_bytes())
        elif find_record(path) is not None:
            lineage = read_train_state(path).get("lineage")
        else:
            return None
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(f"the lineage of {path} cannot be read: {error}") from error
    if not isinstance(lineage, dict | None):
        raise UserError(f"the lineage of {path} is damaged: it must be a JSON object")
    return lineage


def find_lineage(path: Path) -> Lineage:
    """The lineage of a single file, a diffusers folder or a checkpoint, or of what lies in a published folder.

    A run has that of its newest export, or else of its newest checkpoint.

    Raises:
        UserError: when there is none, when the files in a folder say different things, or when it cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / RUN_FILE).is_file():
        path = [path, *list_checkpoints(path / CHECKPOINTS_FOLDER), *list_exports(path)][-1]
    if (lineage := read_lineage(path)) is not None:
        return lineage
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")] if path.is_dir() else []
    inside = sorted(entry for entry in entries if entry.is_dir() or entry.suffix == ".safetensors")
    found = {entry.name: lineage for entry in inside if (lineage := read_lineage(entry)) is not None}
    if not found:
        raise UserError(
            f"{path} carries no lineage: it was not written by this trainer, or another program wrote it again and "
            "dropped the metadata"
        )
    first, *others = found.values()
    if any(other != first for other in others):
        raise UserError(f"{path} holds files with different lineages; name one of them: {', '.join(found)}")
    return first

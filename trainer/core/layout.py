"""Names on the disk: what the files and folders of sets, runs, checkpoints and published models are called."""

import re
from pathlib import Path
from typing import Literal

# a set of shards (data.shards); shard-00000.tar and so on lie beside these
SHARD_NAME = re.compile(r"shard-\d{5,}\.tar")
INDEX_FILE = "index.arrow"
MANIFEST_FILE = "manifest.json"
LATENTS_FILE = "latents.arrow"  # every sample that lies in a tar, in the index or not
QUARANTINE_FILE = "quarantine.jsonl"
NOTES_FILE = "notes.jsonl"
PAGE_FILE = "report.html"

# a preparation on its way, in <shards>.unfinished
WORK_SUFFIX = ".unfinished"
WORK_LOCK_FILE = "lock"  # held by the main process
OTHERS_LOCK_FILE = "lock.others"  # shared by the others
SETTINGS_FILE = "settings.json"
INPUTS_FILE = "inputs.arrow"
PENDING_FILE = "pending.arrow"  # posts to encode, in order of their keys, a batch a chunk
DONE_FOLDER = "rows"  # a file for each chunk that is done
SET_FOLDER = "set"  # shards, and at the end what becomes the set
QUERIES_FOLDER = "tmp"  # of DuckDB
OLD_STORE_FILE = "store.arrow"  # what was encoded, in unfinished folders of version 0.2.0

# a run's folder
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
RUN_PAGE_FILE = "index.html"
RUN_LOCK_FILE = ".lock"
RUN_CHANGE_FILE = ".run.json.lock"  # held while run.json is read, changed and written
CHECKPOINTS_FOLDER = "checkpoints"
SAMPLES_FOLDER = "samples"
BLACK_BOX_FOLDER = "black_box"  # a folder for each attempt, see attempt_name
EXPORT_FOLDER = "export"
PUBLISHED_FOLDER = "published"

# a checkpoint's folder
NEWEST = ("latest", "newest", "last")  # words behind a run's folder for the newest
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")
CHECKPOINT_FILE = "checkpoint.json"  # written last
PIECE_NAME = re.compile(r"(model|optimizer)-(\d{5,})\.safetensors")
# what a checkpoint of version 0.2.0 holds
STATE_FILE = "train_state.json"  # written last
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

# a model's folder, as diffusers has it, and what is published
MODEL_INDEX_FILE = "model_index.json"
COMPONENT_FILE = "config.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
LINEAGE_FILE = "lineage.json"
SUMS_FILE = "SHA256SUMS"
EXPORT_SUMS_SUFFIX = ".sha256"  # beside an export: <name>.sha256 names what lies under its name
GRID_FILE = "grid.png"  # all of a folder's samples in one image, which is none of them
GRID_NAME = re.compile(r"grid(-\d+)?\.png")  # the second time it is grid-2.png


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint that has made ``step`` optimizer steps."""
    return f"step-{step:08d}"


def attempt_name(attempt: int) -> str:
    """The folder of an attempt's black box, counted from 1."""
    return f"attempt-{attempt:04d}"


def steps_name(rank: int, older: bool = False) -> str:
    """The file of a rank's last steps in it; there is a second one for those before them."""
    return f"rank-{rank:05d}.{'older.' if older else ''}jsonl"


def piece_name(kind: Literal["model", "optimizer"], number: int) -> str:
    """A file of a checkpoint's tensors, counted from 1."""
    return f"{kind}-{number:05d}.safetensors"


def find_record(folder: Path) -> Path | None:
    """The file by which a folder is a whole checkpoint, of this version or of 0.2.0; None where there is none."""
    return next((folder / name for name in (CHECKPOINT_FILE, STATE_FILE) if (folder / name).is_file()), None)


def export_name(run: str, step: int, dtype: str) -> str:
    """What a run's export of a step is called: the folder, and the single file with .safetensors behind it."""
    return f"{run}-{checkpoint_name(step)}-{dtype}"


def shard_name(number: int) -> str:
    """The name of a set's shard, counted from 0."""
    return f"shard-{number:05d}.tar"


def shard_number(name: str) -> int:
    """The number of a shard, or of the file of its chunk."""
    return int(Path(name).stem.removeprefix("shard-"))


def done_name(number: int) -> str:
    """The file of a chunk that is done, by the number of its shard."""
    return f"shard-{number:05d}.arrow"

"""What a config has to say of a model that somebody names, looked at where it lies."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import RepositoryNotFoundError

from trainer.config.run_names import find_run_path
from trainer.core.errors import UserError, shorten
from trainer.core.layout import COMPONENT_FILE, MODEL_INDEX_FILE
from trainer.model.base import (
    Base,
    config_file,
    find_base,
    find_tokenizers,
    has_vae,
    note_configs,
    note_weights,
    read_config,
    read_predictions,
)
from trainer.model.diffusion import Prediction, spell
from trainer.model.exports import find_run
from trainer.model.hub import HUB_ERRORS, HUB_ID, find_cached, list_hub_files

SDXL_TOKENIZERS = "stabilityai/stable-diffusion-xl-base-1.0"
PATIENCE = 10.0  # seconds for the hub's answer
MOST_SHOWN = 8  # names of what lies beside
SMALL = 1024  # numbers of a token's embedding, below which a model is one of the demo's size; SDXL's have 2048


@dataclass(frozen=True)
class ModelGuess:
    """A model by its name in the config, and what the config should say of it."""

    reference: str
    said: str  # in words
    prediction: Prediction | None = None  # None where the model is not here
    is_small: bool = False  # of the demo's size
    has_vae: bool = False  # of its own, here
    tokenizer: str | None = None  # where the model has none
    notes: list[str] = field(default_factory=list)


def guess_model(text: str) -> ModelGuess:
    """A folder, a file, a run or a hub id.

    Raises:
        UserError: for what cannot be trained, saying what it is.
    """
    reference = find_run_path(text)
    if Path(reference).exists() or find_run(Path(reference)) is not None or not HUB_ID.fullmatch(reference):
        return describe_model(reference, find_base(reference, key="--model"))
    if (index := find_cached(reference, None, MODEL_INDEX_FILE)) is not None:
        folder = index.parent
        if all((folder / config_file(name)).is_file() for name in ("scheduler", "unet")):
            return describe_model(reference, Base(reference, folder, folder.name), is_hub_id=True)
    return ModelGuess(reference, ask_hub(reference))


def ask_hub(reference: str) -> str:
    """What a hub id is, as far as the hub says it without sending the model.

    Raises:
        UserError: when there is no such model, or it is in another layout; and for a path that looks like a hub id.
    """
    folder = Path(reference).parent
    if folder.is_dir():
        there = ", ".join(sorted(each.name for each in folder.iterdir())[:MOST_SHOWN]) or "nothing"
        raise UserError(f"--model {reference} is not there; in {folder} there is: {there}")
    try:
        list_hub_files(reference, None, "--model", timeout=PATIENCE)
        return "a hub id, which is fetched when it is needed"
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--model {reference} is neither a path here nor a model on the hub; a private one needs hf auth login"
        ) from error
    except HUB_ERRORS as error:
        return f"a hub id; the hub could not be asked, so what it is will be seen later ({shorten(str(error), 100)})"


def describe_model(reference: str, base: Base, is_hub_id: bool = False) -> ModelGuess:
    """A model that lies here, of a hub id its configs at least."""
    prediction = next(iter(read_predictions(base).values()))
    kind = "a hub id, in the cache" if is_hub_id else "a diffusers folder" if base.path.is_dir() else "a single file"
    if not is_hub_id and Path(reference).resolve() != base.path.resolve() and (run := find_run(Path(reference))):
        named = "a run, whose newest export" if run[1] is None else f"a checkpoint, of whose step {run[1]:,} the export"
        kind = f"{named} is {base.path.name}"
    small = read_config(base, "unet")["cross_attention_dim"] < SMALL
    size = ", a tiny model like the demo's" if small else ""
    schedule = ", as SDXL does" if prediction == Prediction() else ""
    schedule = ", with zero terminal SNR" if prediction.zero_terminal_snr else schedule
    tokenizer = None if is_hub_id else find_own_tokenizer(base)
    notes = [] if is_hub_id or (note := note_weights(base)) is None else [note]
    notes += note_configs(base)
    if tokenizer is not None:
        notes.append(f"{reference} has no tokenizers: model.tokenizer is {tokenizer}")
    said = f"{kind}{size}, which predicts {spell(prediction.prediction_type).card}{schedule}"
    own_vae = (base.path / "vae" / COMPONENT_FILE).is_file() if is_hub_id else has_vae(base)
    return ModelGuess(reference, said, prediction, small, own_vae, tokenizer, notes)


def find_own_tokenizer(base: Base) -> str | None:
    """What model.tokenizer must name: nothing, a folder beside a single file, or SDXL's own on the hub."""
    try:
        find_tokenizers(base, None)
        return None
    except UserError:
        near = (base.path.with_suffix(""), base.path.parent)
        return next((str(folder) for folder in near if (folder / "tokenizer").is_dir()), SDXL_TOKENIZERS)

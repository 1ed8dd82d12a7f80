"""What a base says of itself, and what is to be known of it, before its weights are loaded."""

import json

from trainer.core.errors import UserError
from trainer.model.base import CONFIGS_KEY, Base, config_file, read_config
from trainer.model.diffusion import SILENT, Prediction, file_predictions, scheduler_prediction
from trainer.model.hub import STEMS, find_weights
from trainer.model.recognise import note_fp8
from trainer.model.weights_file import LazyFile


def read_predictions(base: Base) -> dict[str, Prediction]:
    """What a base says that it predicts, by where it says so, the strongest first; never empty.

    Raises:
        UserError: for a prediction or noise schedule of which nothing is known here.
    """
    try:
        if base.path.is_dir():
            return {f"by {config_file('scheduler')}": scheduler_prediction(read_config(base, "scheduler"))}
        file = LazyFile(base.path)
        said = file_predictions(file, file.metadata)
        if "scheduler" in json.loads(file.metadata.get(CONFIGS_KEY, "{}")):
            said[f"by {CONFIGS_KEY}"] = scheduler_prediction(read_config(base, "scheduler"))
        return said or {SILENT: Prediction()}
    except UserError as error:
        raise UserError(f"{base.reference}: {error}") from error


def note_weights(base: Base) -> str | None:
    """What is to be known of a base's weights before they are trained: that some are stored in fp8."""
    files = {"the file": LazyFile(base.path)} if base.path.is_file() else {
        path.relative_to(base.path).as_posix(): LazyFile(path)
        for component in ("unet", "text_encoder", "text_encoder_2")
        for path in find_weights(base.path / component, STEMS[component])
    }  # fmt: skip
    note = note_fp8(files)
    return None if note is None else f"{base.reference}: {note}"

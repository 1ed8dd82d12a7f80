"""Whether an export that lies in RUN/export is whole and says what is to be published now, before it is copied."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.layout import MODEL_FILE
from trainer.model.base import find_base, has_vae, read_state
from trainer.model.checkpoint import verify_checkpoint
from trainer.model.lineage import Lineage, read_lineage
from trainer.model.sdxl import COMPONENTS, DTYPES
from trainer.model.weights_file import LazyFile
from trainer.release.artefacts import check_stamp


def check_export(paths: Sequence[Path], lineage: Lineage, checkpoint: Path | None, config: Config) -> None:
    """Refuse an export that is damaged or another checkpoint's.

    ``paths``: the single file and the folder, one of them or both; ``checkpoint``: the one they came from, if it is
    still there.

    Raises:
        UserError: naming what differs.
    """
    again = (
        "move that export away, and it is made anew from the checkpoint"
        if checkpoint
        else "its checkpoint is gone, so that it cannot be made anew"
    )
    for path in paths:
        if read_lineage(path) != lineage:
            raise UserError(f"{path} was made from another checkpoint than {checkpoint or paths[0]}: {again}")
        if path.is_dir():
            check_folder(path, checkpoint, config, again)
        else:
            check_single_file(path, again)


def check_single_file(path: Path, again: str) -> None:
    """Open a single file and compare it with its own hash.

    Raises:
        UserError: when it is truncated or damaged.
    """
    LazyFile(path)  # a truncated header, or fewer bytes than it names
    try:
        check_stamp(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error


def check_folder(path: Path, checkpoint: Path | None, config: Config, again: str) -> None:
    """Compare a diffusers folder's weights with the single file beside it, else with what the checkpoint trained.

    Raises:
        UserError: when a file cannot be opened, or a tensor is another.
    """
    single = path.with_name(f"{path.name}.safetensors")
    if single.is_file() and read_lineage(single) == read_lineage(path):
        check_single_file(single, again)
    else:
        single = Path()
        if checkpoint:
            verify_checkpoint(checkpoint)
    folder = find_base(str(path))
    for part, component in [*COMPONENTS.items(), ("vae", "vae")]:
        if component == "vae" and not has_vae(folder):
            raise UserError(f"{path} has no vae/: {again}")
        here = read_state(folder, component)
        if single.is_file():
            true = read_state(find_base(str(single)), component)
        else:
            true = dict(trained_tensors(part, checkpoint, config)) if checkpoint else {}
        if wrong := next(differing(here, true), None):
            raise UserError(f"{path / component} is damaged: {wrong} is not what was exported; {again}")


def trained_tensors(part: str, checkpoint: Path, config: Config) -> Mapping[str, Tensor]:
    """The tensors of a part that the checkpoint trained, in the dtype of the publication."""
    trained = LazyFile(checkpoint / MODEL_FILE)
    own = [name for name in trained if name.startswith(f"{part}.")]
    return {name.removeprefix(f"{part}."): trained[name].to(DTYPES[config.publish.dtype]) for name in own}


def differing(here: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of tensors that have another dtype, shape or value, or are not finite."""
    for name, tensor in here.items():
        other = true.get(name, tensor)
        if tensor.dtype != other.dtype or not torch.equal(tensor, other):  # nan equals nothing, itself neither
            yield name
    yield from true.keys() - here.keys()

"""A checkpoint's tensors: its weights one by one, and all of them back into a model and its optimizer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.core.progress import BYTES, Meter
from trainer.model.checkpoint import REMEDY_DAMAGED, list_pieces, read_train_state
from trainer.model.sdxl import load_trained, put_weights, trained_parameters
from trainer.model.weights_file import JoinedFiles, LazyFile, check_finite

SHARED = "shared."  # prefix of tensors that several parameters' states have in common


def open_weights(checkpoint: Path) -> JoinedFiles:
    """The trained weights, read one by one as they are asked for."""
    paths = list_pieces(checkpoint, read_train_state(checkpoint), "model")
    return JoinedFiles([LazyFile(path) for path in paths])


def restore_checkpoint(
    checkpoint: Path,
    model: nn.Module,
    optimizer: Optimizer,
    put: Callable[[nn.Parameter, Tensor], None] = put_weights,
) -> None:
    """Put a checkpoint's weights and optimizer state into place, bit by bit; ``put`` sets a parameter."""
    state = read_train_state(checkpoint)
    weights, states = (list(list_pieces(checkpoint, state, kind)) for kind in ("model", "optimizer"))
    with Meter(f"read the weights of {checkpoint.name}", measure(weights), BYTES) as meter:
        tensors = JoinedFiles([LazyFile(path, meter) for path in weights])
        load_trained(model, tensors, put, str(checkpoint), REMEDY_DAMAGED)
    parameters = trained_parameters(model)
    with Meter(f"read the optimizer state of {checkpoint.name}", measure(states), BYTES) as meter:
        for path in states:
            for (of, name), value in read_optimizer_state(LazyFile(path, meter), parameters):
                optimizer.state[parameters[of]][name] = value


def measure(files: list[Path]) -> int:
    """Bytes of files."""
    return sum(path.stat().st_size for path in files)


def read_optimizer_state(
    file: LazyFile, parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[tuple[str, str], Tensor | float]]:
    """((parameter, state), value on its device) of these parameters; what they shared they share again."""
    rest = json.loads(file.metadata["state"])
    own = {key: key for key in file if not key.startswith(SHARED)}
    moved: dict[str, Tensor] = {}  # shared tensors, by name
    for key, stored in (own | rest["shared"]).items():
        of, _, name = key.rpartition(".")
        if of in parameters:
            value = moved.get(stored)
            if value is None:
                value = read_finite(file, stored).to(parameters[of].device)
            if stored != key:
                moved[stored] = value
            yield (of, name), value
    for key, number in rest["numbers"].items():
        of, _, name = key.rpartition(".")
        if of in parameters:
            yield (of, name), number


def read_finite(file: LazyFile, name: str) -> Tensor:
    """One tensor of an optimizer's state; whole numbers are so of 8-bit ones."""
    tensor = file[name]
    if tensor.is_floating_point():
        check_finite({name: tensor}, str(file.path), REMEDY_DAMAGED)
    return tensor

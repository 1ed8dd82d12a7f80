"""What starting a run, and clipping, take of a process's own memory, beside the model: one tensor at a time."""

from pathlib import Path

import pytest

from support import middle_model
from support.private_memory import MB, measure

SPARE = 120 * MB  # some tensors, of up to 10 MB in fp32, on their way, and what the allocator keeps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A model, and the bytes of its UNet in fp32."""
    folder = tmp_path_factory.mktemp("middle") / "base"
    return str(folder), 4 * middle_model.write_base(folder)


def test_a_checkpoint_is_restored_tensor_by_tensor(base: tuple[str, int], tmp_path: Path) -> None:
    path, size = base
    saved = middle_model.write_checkpoint(path, str(tmp_path))
    taken = measure(middle_model.restore, path, str(saved))
    assert taken < SPARE < size / 2, f"{taken / MB:.0f} of {size / MB:.0f} MB"


@pytest.mark.parametrize("weights", ["autocast", "stochastic"])
def test_a_model_is_loaded_tensor_by_tensor(base: tuple[str, int], weights: str) -> None:
    path, size = base
    beside = measure(middle_model.start, path, weights)
    assert beside < SPARE < size / 3, f"{beside / MB:.0f} MB beside the model of {size / MB:.0f} MB"


def test_norms_of_gradients_take_one_copy_in_fp32() -> None:
    taken = measure(middle_model.take_norms)
    assert taken < SPARE, f"{taken / MB:.0f} MB, and all copies have {2048 * 4 * 2**16 / MB:.0f} MB"

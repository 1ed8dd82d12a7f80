"""The same bits each time: no part's backward depends on which thread adds first."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trainer.config.schema import Config, DiffusionConfig, MemoryConfig, ModelConfig, PrecisionConfig
from trainer.data.loader import Batch
from trainer.model.base import find_base
from trainer.model.diffusion import alphas_cumprod
from trainer.model.latents import LatentScale
from trainer.model.sdxl import SDXL, add_rows_by_product, add_rows_in_order, build_sdxl, join_chunks, repeat_rows
from trainer.train.loop import train
from trainer.train.step import Objective, batch_losses

REPEATS = 20


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients_of(make: Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]) -> list[torch.Tensor]:
    loss, leaves = make()
    return [grad.clone() for grad in torch.autograd.grad(loss, leaves, allow_unused=True) if grad is not None]


def assert_the_same_bits(make: Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]) -> None:
    first = gradients_of(make)
    assert first
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients_of(make), strict=True))


def repeating_map(batch: int, chunks: int) -> torch.Tensor:
    """Each caption has a first chunk of its own, and shares the empty one: row 0."""
    chunk_map = torch.zeros(batch, chunks, dtype=torch.int64)
    chunk_map[:, 0] = torch.arange(batch) % (batch - 1)
    return chunk_map


def test_joining_chunks(threads: int) -> None:
    hidden, weights = numbers(8, 77, 160).requires_grad_(), numbers(16, 227, 160, seed=1)
    assert_the_same_bits(lambda: ((join_chunks(hidden, repeating_map(16, 3) % 8) * weights).sum(), [hidden]))


def test_every_part_of_the_model(tiny_base: Path, threads: int) -> None:
    parts = ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True)
    model: SDXL = build_sdxl(
        find_base(str(tiny_base)), parts, PrecisionConfig("fp32", frozen="fp32"), MemoryConfig("none")
    )
    ids = (torch.arange(77) * torch.arange(3, 10)[:, None]) % 50  # ids repeat within and between chunks
    batch = Batch(
        keys=list("abcdefgh"), raw_latents=numbers(8, 4, 8, 8).half(), noise=numbers(8, 4, 8, 8),
        timesteps=torch.full((8,), 500), input_ids_1=ids, input_ids_2=ids, chunk_map=repeating_map(8, 3) % 7,
        time_ids=torch.full((8, 6), 64.0),
    )  # fmt: skip
    objective = Objective(DiffusionConfig(min_snr_gamma=5.0), alphas_cumprod(), LatentScale(0.5))
    leaves = [value for value in model.parameters() if value.requires_grad]
    assert_the_same_bits(lambda: (batch_losses(model, batch, objective).mean(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [add_rows_in_order, add_rows_by_product])
def test_gradients_of_repeated_rows_are_their_sum(add: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    rows = torch.tensor([2, 0, 2, 2, 1, 0])
    gradient = numbers(6, 5, 7).to(dtype)
    expected = torch.zeros(4, 5, 7, dtype=torch.float64)
    for row, each in zip(rows, gradient.double(), strict=True):
        expected[row] += each
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(add(gradient, rows, 4).double(), expected, rtol=tolerance, atol=tolerance)


def test_repeating_rows_is_indexing() -> None:
    values, rows = numbers(4, 3).double().requires_grad_(), torch.tensor([3, 1, 1, 0, 1])
    assert torch.equal(repeat_rows(values, rows), values[rows])
    weights = numbers(5, 3, seed=1).double()
    ours, theirs = (
        torch.autograd.grad((x * weights).sum(), values)[0] for x in (repeat_rows(values, rows), values[rows])
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_runs_on_the_cpu_use_deterministic_kernels(make_config: Callable[..., Config]) -> None:
    torch.use_deterministic_algorithms(False)
    train(make_config("schedule.max_steps=1", "precision.deterministic=false"))
    assert torch.are_deterministic_algorithms_enabled()

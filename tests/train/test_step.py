"""One optimizer step: accumulation, one clip over all parts, and what never reaches the weights."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.host_reads import HostReads
from trainer.config.schema import DiffusionConfig, MemoryConfig, MemoryPolicy, ModelConfig, OptimConfig, PrecisionConfig
from trainer.data.loader import Batch
from trainer.model.base import find_base
from trainer.model.diffusion import alphas_cumprod
from trainer.model.latents import LatentScale
from trainer.model.sdxl import SDXL, build_sdxl, trained_parameters
from trainer.train.optim import build_groups, build_optimizer
from trainer.train.step import Objective, PendingStep, StepResult, training_step

OBJECTIVE = Objective(DiffusionConfig(), alphas_cumprod(), LatentScale(0.5))
RATES = OptimConfig(unet_lr=1e-3, text_encoder_1_lr=1e-3, text_encoder_2_lr=1e-3)


@pytest.fixture
def model(tiny_base: Path) -> SDXL:
    parts = ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True)
    return build_sdxl(find_base(str(tiny_base)), parts, PrecisionConfig("fp32", frozen="fp32"), MemoryConfig("none"))


def make_batch(first: int, count: int) -> Batch:
    """Samples ``first`` .. of an endless list, each with ids of its own."""

    def of(sample: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sample))

    ids = torch.stack([(torch.arange(77) * (sample + 3)) % 500 for sample in range(first, first + count)])
    return Batch(
        keys=[f"key{sample}" for sample in range(first, first + count)],
        raw_latents=torch.stack([of(sample, 4, 8, 8) for sample in range(first, first + count)]).half(),
        noise=torch.stack([of(sample + 100, 4, 8, 8) for sample in range(first, first + count)]),
        timesteps=torch.tensor([sample * 37 % 1000 for sample in range(first, first + count)]),
        input_ids_1=ids,
        input_ids_2=ids,
        chunk_map=torch.arange(count)[:, None],
        time_ids=torch.full((count, 6), 64.0),
    )


def launch(model: SDXL, batches: list[Batch], optimizer: Any, **options: Any) -> PendingStep:
    settings: dict[str, Any] = {
        "objective": OBJECTIVE, "step": 0, "micro_steps": len(batches), "max_grad_norm": 1.0,
        "no_sync": contextlib.nullcontext,
    }  # fmt: skip
    return training_step(model, batches, optimizer, **settings | options)


def step(model: SDXL, batches: list[Batch], optimizer: Any, **options: Any) -> StepResult:
    return launch(model, batches, optimizer, **options).wait()


def optimizer_of(model: SDXL, name: str) -> torch.optim.Optimizer:
    return build_optimizer(
        model, dataclasses.replace(RATES, name=name, **({"betas": None, "eps": None} if name == "adafactor" else {}))
    )


def weights(model: SDXL) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trained_parameters(model).items()}


def broken(batch: Batch, sample: int, value: float) -> Batch:
    latents = batch.raw_latents.clone()
    latents[sample] = value
    return dataclasses.replace(batch, raw_latents=latents)


def test_accumulated_micro_batches_are_one_batch(model: SDXL) -> None:
    results, after, before = [], [], weights(model)
    for batches in ([make_batch(0, 4)], [make_batch(0, 2), make_batch(2, 2)], [make_batch(i, 1) for i in range(4)]):
        with torch.no_grad():
            for name, value in trained_parameters(model).items():
                value.copy_(before[name])
        # plain gradient descent: what Adam makes of a gradient near zero depends on its last bits
        optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.1)
        results.append(step(model, batches, optimizer))
        after.append(weights(model))
    for result, end in zip(results[1:], after[1:], strict=True):
        torch.testing.assert_close(result.loss, results[0].loss)
        torch.testing.assert_close(result.grad_norm, results[0].grad_norm, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.losses, results[0].losses)
        assert result.keys == results[0].keys == [f"key{i}" for i in range(4)]
        for name in end:
            torch.testing.assert_close(end[name], after[0][name], rtol=1e-3, atol=1e-6)


def test_one_norm_clips_all_parts_together(model: SDXL) -> None:
    before = weights(model)
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=1.0)
    result = step(model, [make_batch(0, 2)], optimizer, max_grad_norm=0.01)
    assert result.grad_norm > 0.01
    moved = torch.stack([(value - before[name]).norm() for name, value in weights(model).items()]).norm()
    torch.testing.assert_close(moved, torch.tensor(0.01), rtol=1e-2, atol=1e-5)


def test_a_norm_of_none_clips_nothing(model: SDXL) -> None:
    """And what is not finite is found all the same."""
    before = weights(model)
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=1.0)
    result = step(model, [make_batch(0, 2)], optimizer, max_grad_norm=None)
    moved = torch.stack([(value - before[name]).norm() for name, value in weights(model).items()]).norm()
    torch.testing.assert_close(moved, result.grad_norm, rtol=1e-4, atol=0)
    before = weights(model)
    assert step(model, [broken(make_batch(2, 2), 1, float("inf"))], optimizer, max_grad_norm=None).bad
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(model: SDXL, name: str, value: float) -> None:
    optimizer = optimizer_of(model, name)
    assert not step(model, [make_batch(0, 2)], optimizer).bad
    before = weights(model)
    result = step(model, [make_batch(2, 2), broken(make_batch(4, 2), 1, value)], optimizer)
    assert result.bad
    assert [key for key, loss in zip(result.keys, result.losses, strict=True) if not loss.isfinite()] == ["key5"]
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    # and the optimizer is as if that step had not been: the next one goes on
    assert not step(model, [make_batch(6, 2)], optimizer).bad
    assert all(value.isfinite().all() for value in weights(model).values())


def test_gradients_that_are_not_finite_never_reach_the_weights_either(model: SDXL) -> None:
    optimizer = build_optimizer(model, RATES)
    before = weights(model)
    handle = model.unet.conv_in.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = step(model, [make_batch(0, 2)], optimizer)
    handle.remove()
    assert result.bad and bool(result.losses.isfinite().all())
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_overflow_under_loss_scaling_is_skipped_and_counted(model: SDXL) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = build_optimizer(model, RATES)
    before = weights(model)
    handle = model.unet.conv_in.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = step(model, [make_batch(0, 2)], optimizer, scaler=scaler)
    handle.remove()
    assert result.skipped and result.loss_scale == 2.0**7 and not result.bad
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    result = step(model, [make_batch(0, 2)], optimizer, scaler=scaler)
    assert not result.skipped and result.loss_scale == 2.0**7
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())


def test_loss_scaling_changes_no_gradient(model: SDXL) -> None:
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=0.0)
    plain = step(model, [make_batch(0, 2)], optimizer)
    scaled = step(model, [make_batch(0, 2)], optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert torch.equal(plain.loss, scaled.loss)
    torch.testing.assert_close(plain.grad_norm, scaled.grad_norm, rtol=1e-5, atol=0)


def test_a_non_finite_loss_under_loss_scaling_stops_instead_of_being_skipped(model: SDXL) -> None:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = build_optimizer(model, RATES)
    before = weights(model)
    result = step(model, [broken(make_batch(0, 2), 0, float("nan"))], optimizer, scaler=scaler)
    assert result.bad
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


# --- what the host waits for

CHANNELS = (1.0, 2.0, 3.0, 4.0)
CHANNELS_AND_WEIGHTS = Objective(
    DiffusionConfig(min_snr_gamma=5.0), alphas_cumprod(), LatentScale(0.5, 0.0, CHANNELS, CHANNELS)
)


def test_what_the_host_reads_is_seen() -> None:
    ones = torch.ones(3)
    reads: list[Callable[[], object]] = [
        lambda: ones[0].item(), lambda: bool(ones[0]), lambda: float(ones[0]), lambda: torch.equal(ones, ones),
        lambda: ones[ones > 0], lambda: ones.nonzero(), lambda: torch.tensor([1.0]), lambda: ones.to("meta"),
    ]  # fmt: skip
    for read in reads:
        with HostReads() as host:
            read()
        assert host.found.total() == 1, host.found
    for read in (ones.to("meta").cpu, ones.to("meta").tolist, ones.to("meta").numpy, ones.to("meta")[0].item):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            read()


@pytest.mark.parametrize(("scaled", "policy"), [(False, "full"), (True, "none"), (False, "selective")])
def test_a_step_on_a_device_is_launched_without_waiting(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool, policy: MemoryPolicy
) -> None:
    """The meta device stands for a GPU: it holds no values, so that whatever reads one raises.

    What is made of Python's numbers is seen on the CPU only, in the test after this.
    """
    module = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    parts = ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True)
    model = build_sdxl(find_base(str(tiny_base)), parts, PrecisionConfig("fp32", frozen="fp32"), MemoryConfig(policy))
    objective = dataclasses.replace(CHANNELS_AND_WEIGHTS, cumulative=alphas_cumprod().to("meta"))
    optimizer = build_optimizer(model.to("meta"), RATES)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    for batches in ([make_batch(0, 4)], [make_batch(0, 2), make_batch(2, 2)]):  # the first makes the optimizer's state
        with HostReads() as host:
            pending = launch(model, batches, optimizer, objective=objective, scaler=scaler)
        assert not host.found
        assert pending.numbers.is_meta and len(pending.numbers) == 3 + 2 * scaled + 4
    assert len(optimizer.state) == sum(len(group["params"]) for group in build_groups(model, RATES))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("name", "flags"), [("adamw", 0), ("adamw8bit", 1), ("adafactor", 1)])
def test_of_a_step_the_host_reads_at_most_one_flag(model: SDXL, name: str, flags: int, scaled: bool) -> None:
    """None with fused AdamW; whether to update at all with optimizers that cannot be gated on the device."""
    optimizer = optimizer_of(model, name)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    for number in range(2):
        batches = [make_batch(4 * number, 2), make_batch(4 * number + 2, 2)]
        with HostReads() as host:
            launch(model, batches, optimizer, objective=CHANNELS_AND_WEIGHTS, scaler=scaler)
        assert host.found == ({"_local_scalar_dense": flags} if flags else {})


def test_the_numbers_are_read_when_they_have_arrived(model: SDXL) -> None:
    """Not before: what the copy fills lies on the host all the time."""
    whole = launch(model, [make_batch(0, 2)], build_optimizer(model, RATES))

    class Event:
        def synchronize(self) -> None:
            late.numbers.copy_(whole.numbers)

    late = dataclasses.replace(whole, numbers=torch.full_like(whole.numbers, float("nan")), arrived=Event())  # type: ignore[arg-type]
    expected, result = whole.wait(), late.wait()
    assert result.losses.isfinite().all() and not result.bad
    assert all(
        torch.equal(value, getattr(result, field))
        if isinstance(value, torch.Tensor)
        else value == getattr(result, field)
        for field, value in vars(expected).items()
    )

"""16-bit weights: updates with the bits of fp32 masters, gates that hold, gradients that are summed in fp32."""

import contextlib
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from support.host_reads import HostReads
from support.tiny_model import make_batch, random_parts, write_folder
from trainer.config.schema import DiffusionConfig, MemoryConfig, ModelConfig, OptimConfig, PrecisionConfig
from trainer.core.errors import UserError
from trainer.model.base import find_base
from trainer.model.diffusion import alphas_cumprod
from trainer.model.latents import LatentScale
from trainer.model.sdxl import DTYPES, SDXL, build_sdxl
from trainer.train import narrow
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import build_optimizer, gated_step
from trainer.train.step import Objective, StepResult, training_step

CPU = torch.device("cpu")
RATES: dict[str, Any] = {"unet_lr": 1e-3, "text_encoder_1_lr": 5e-4, "text_encoder_2_lr": 2e-4}
OPTIMIZERS = {
    "adamw": OptimConfig(**RATES, decay_norms_and_biases=False),
    "adamw8bit": OptimConfig(name="adamw8bit", **RATES),
    "adafactor": OptimConfig(name="adafactor", betas=None, eps=None, **RATES),
}
MODES = [("bf16", "master"), ("fp16", "master"), ("bf16", "stochastic")]


class Part(nn.Module):
    """A matrix larger than a portion of the test, a norm, a convolution, and a parameter that is not trained."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.big = nn.Linear(128, 65)
        self.norm = nn.LayerNorm(65)
        self.convolution = nn.Conv2d(2, 3, 3)
        self.unused = nn.Linear(3, 3).requires_grad_(False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = Part(0)
        self.text_encoder_1 = Part(1)
        self.text_encoder_2 = Part(2)


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "PORTION", 2048)


def make(
    model: nn.Module, config: OptimConfig, compute: Any = "bf16", mode: Any = "master", gradients: Any = "fp32"
) -> Any:
    return NarrowOptimizer(model, config, PrecisionConfig(compute, mode, gradients), 42, CPU)


def grouped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def give_gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in grouped(optimizer):
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(optimizer, NarrowOptimizer):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        else:
            parameter.grad = gradient


def bits(values: Iterable[Any]) -> list[Any]:
    """Tensors as their bytes, which also compares NaN and the sign of zero."""
    return [
        value.detach().contiguous().flatten().view(torch.uint8).tolist() if isinstance(value, torch.Tensor) else value
        for value in values
    ]


def everything(model: nn.Module, optimizer: NarrowOptimizer) -> list[Any]:
    flat = optimizer.weights
    states = [value for parameter in flat.spans for _, value in sorted(optimizer.state[parameter].items())]
    return bits([flat.weights, *([] if flat.behind is None else [flat.behind]), *states])


# --- the update


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_have_the_bits_of_fp32_weights(name: str, compute: str) -> None:
    """Given the same gradients: weights, norm and state, clipping and all, over several steps."""
    plain, model = Model(), Model()
    optimizer, under_test = build_optimizer(plain, OPTIMIZERS[name]), make(model, OPTIMIZERS[name], compute)
    for step in range(4):
        for each in (optimizer, under_test):
            give_gradients(each, step)
            for group in each.param_groups:
                group["lr"] = group["base_lr"] * (1 - step / 8)
        norm = torch.nn.utils.clip_grad_norm_(grouped(optimizer), 1.0)
        assert torch.equal(under_test.clip(1.0), norm)
        optimizer.step()
        gated_step(under_test, torch.tensor(False))
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        if one.requires_grad:
            assert other.dtype == DTYPES[compute]  # type: ignore[index]
            assert torch.equal(under_test.weights.get(other), one)
            assert (other.float() - one).abs().max() <= one.abs().max() * 2**-8
            one_state, other_state = optimizer.state[one], under_test.state[other]
            assert one_state.keys() == other_state.keys()
            assert bits(one_state.values()) == bits(other_state[key] for key in one_state)
        else:
            assert other.dtype == DTYPES[compute]  # type: ignore[index]


@pytest.mark.parametrize(("compute", "mode"), MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_flag_on_the_device_withholds_the_whole_update(name: str, compute: str, mode: str) -> None:
    model = Model()
    optimizer = make(model, OPTIMIZERS[name], compute, mode)
    give_gradients(optimizer, 0)
    gated_step(optimizer, torch.tensor(False))
    before = everything(model, optimizer)
    for parameter in grouped(optimizer):
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))
    gated_step(optimizer, torch.tensor(True))
    assert everything(model, optimizer) == before
    give_gradients(optimizer, 1)
    gated_step(optimizer, torch.tensor(False))
    assert everything(model, optimizer) != before
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stochastic_rounding_takes_a_neighbour_of_the_fp32_update(name: str) -> None:
    plain, model = Model(), Model()
    under_test = make(model, OPTIMIZERS[name], mode="stochastic")
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        one.data = other.detach().float()
    optimizer = build_optimizer(plain, OPTIMIZERS[name])
    for each in (optimizer, under_test):
        give_gradients(each, 0)
        each.step()
    away, expected = [], []
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        if one.requires_grad:
            exact = one.detach().view(torch.int32)
            distance = (other.detach().view(torch.int16).int() << 16) - exact
            assert bool((distance.abs() < 2**16).all())
            away.append((distance > 0).double().flatten())
            expected.append((exact & 0xFFFF).double().flatten() / 2**16)
    assert float(torch.cat(away).mean()) == pytest.approx(float(torch.cat(expected).mean()), abs=0.01)


def test_a_step_draws_numbers_of_its_own() -> None:
    """And the same ones again: resume draws what a run that went on does."""
    ends = []
    for number in (5, 5, 6):
        model = Model()
        optimizer = make(model, OPTIMIZERS["adamw"], mode="stochastic")
        give_gradients(optimizer, 0)
        optimizer.begin(number, None)
        optimizer.step()
        ends.append(bits(model.parameters()))
    assert ends[0] == ends[1] != ends[2]


def test_values_that_fp16_cannot_hold_are_named() -> None:
    model: Any = Model()
    model.unet.big.weight.data[3, 4] = 1e5
    with pytest.raises(UserError, match=r"trained weights in fp16: unet\.big\.weight holds infinity .* autocast"):
        make(model, OPTIMIZERS["adamw"], "fp16")


# --- gradients


def relative_error(gradients: str, micro_batches: int) -> float:
    model = Model()
    optimizer = make(model, OPTIMIZERS["adamw"], gradients=gradients)
    weight = model.unet.big.weight
    generator = torch.Generator().manual_seed(0)
    true = torch.zeros(weight.shape, dtype=torch.float64)
    for _ in range(micro_batches):
        gradient = torch.randn(weight.shape, generator=generator) + 0.2
        true += gradient.double()
        weight.backward(gradient.bfloat16())
    total = optimizer.weights.spans[weight].view(optimizer.gradients.flat)
    assert (weight.grad is None) is (gradients == "fp32")  # what autograd made is freed at once, or is the sum itself
    return float((total.double() - true).norm() / true.norm())


def test_gradients_are_summed_in_fp32_or_bf16() -> None:
    """The error in fp32 is that of rounding each to bf16; in bf16 that of each sum too."""
    assert relative_error("fp32", 48) < 0.0015
    assert 0.004 < relative_error("bf16", 48) < 0.02


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_gradients_are_averaged_and_cleared_in_place(gradients: str) -> None:
    model = Model()
    optimizer = make(model, OPTIMIZERS["adamw"], gradients=gradients)
    give_gradients(optimizer, 0)
    flat = optimizer.gradients.flat.clone()
    optimizer.begin(0, lambda value: value / 2)
    assert torch.equal(optimizer.gradients.flat, flat / 2)
    seen = optimizer.clip(1e-3)
    assert seen.dtype == torch.float32 and seen == pytest.approx(float((flat.float() / 2).norm()), rel=1e-4)
    assert optimizer.clip(1.0) == pytest.approx(1e-3, rel=2e-3)
    optimizer.zero_grad()
    assert not optimizer.gradients.flat.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in grouped(optimizer))


# --- whole steps


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tiny") / "base", random_parts(0))


def load(base: Path, config: OptimConfig, compute: Any, mode: Any) -> tuple[SDXL, NarrowOptimizer]:
    parts = ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True)
    precision = PrecisionConfig(compute, mode, frozen=compute)
    model = build_sdxl(find_base(str(base)), parts, precision, MemoryConfig("none"))
    return model, NarrowOptimizer(model, config, precision, 42, CPU)


def step(
    model: SDXL, optimizer: Any, compute: Any, *seeds: int, broken: bool = False, scaler: Any = None
) -> StepResult:
    objective = Objective(DiffusionConfig(), alphas_cumprod(), LatentScale(0.5), DTYPES[compute])
    batches = [make_batch(seed, seed * 37 % 1000) for seed in seeds]
    if broken:
        batches[-1] = dataclasses.replace(batches[-1], noise=batches[-1].noise * float("inf"))
    return training_step(
        model, batches, optimizer, objective, step=0, micro_steps=len(batches), max_grad_norm=1.0,
        no_sync=contextlib.nullcontext, scaler=scaler,
    ).wait()  # fmt: skip


@pytest.mark.parametrize(("compute", "mode"), [("bf16", "master"), ("bf16", "stochastic")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(base: Path, name: str, compute: str, mode: str) -> None:
    model, optimizer = load(base, OPTIMIZERS[name], compute, mode)
    assert not step(model, optimizer, compute, 0, 1).bad
    before = everything(model, optimizer)
    assert step(model, optimizer, compute, 2, 3, broken=True).bad
    assert everything(model, optimizer) == before and not optimizer.gradients.flat.any()
    assert not step(model, optimizer, compute, 4).bad
    assert everything(model, optimizer) != before


def test_fp16_with_loss_scaling(base: Path) -> None:
    """Gradients are summed and unscaled in fp32; an overflow is skipped, and the scale falls."""
    model, optimizer = load(base, OPTIMIZERS["adamw"], "fp16", "master")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    other, unscaled = load(base, OPTIMIZERS["adamw"], "fp16", "master")
    result = step(model, optimizer, "fp16", 0, 1, scaler=scaler)
    plain = step(other, unscaled, "fp16", 0, 1)
    assert not result.bad and not result.skipped and torch.equal(result.loss, plain.loss)
    torch.testing.assert_close(result.grad_norm, plain.grad_norm, rtol=1e-3, atol=0)
    before = everything(model, optimizer)
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**30})
    result = step(model, optimizer, "fp16", 2, 3, scaler=scaler)
    assert result.skipped and not result.bad and result.loss_scale == 2.0**29
    assert everything(model, optimizer) == before
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**8})
    assert not step(model, optimizer, "fp16", 2, 3, scaler=scaler).skipped
    assert everything(model, optimizer) != before
    assert step(model, optimizer, "fp16", 4, broken=True, scaler=scaler).bad


@pytest.mark.parametrize("mode", ["master", "stochastic"])
def test_a_step_on_a_device_is_launched_without_waiting(base: Path, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: whatever reads a value there raises; copies from the host are counted."""
    module = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "meta"])
    meta = torch.device("meta")
    parts, precision = ModelConfig(pretrained=""), PrecisionConfig("bf16", mode, frozen="bf16")
    model = build_sdxl(find_base(str(base)), parts, precision, MemoryConfig("none"))
    optimizer = NarrowOptimizer(model.to(meta), OptimConfig(unet_lr=1e-3), precision, 42, meta)
    assert {value.device for value in (*model.parameters(), *model.buffers())} == {meta}
    objective = Objective(DiffusionConfig(), alphas_cumprod().to(meta), LatentScale(0.5), torch.bfloat16)
    for number in range(2):  # the first makes the optimizer's state
        batch = make_batch(number, number * 37 % 1000)
        with HostReads() as host:
            training_step(
                model, [batch], optimizer, objective, step=number, micro_steps=1, max_grad_norm=1.0,
                no_sync=contextlib.nullcontext,
            )  # fmt: skip
        assert not host.found


@pytest.mark.parametrize(("name", "flags"), [("adamw", 0), ("adamw8bit", 1), ("adafactor", 1)])
@pytest.mark.parametrize(("compute", "mode"), MODES)
def test_of_a_step_the_host_reads_at_most_one_flag(base: Path, name: str, flags: int, compute: str, mode: str) -> None:
    model, optimizer = load(base, OPTIMIZERS[name], compute, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if compute == "fp16" else None
    objective = Objective(DiffusionConfig(), alphas_cumprod(), LatentScale(0.5), DTYPES[compute])  # type: ignore[index]
    for number in range(2):
        batch = make_batch(number, number * 37 % 1000)
        with HostReads() as host:
            training_step(
                model, [batch], optimizer, objective, step=number, micro_steps=1, max_grad_norm=1.0,
                no_sync=contextlib.nullcontext, scaler=scaler,
            )  # fmt: skip
        assert host.found == ({"_local_scalar_dense": flags} if flags else {})


def test_what_needs_fp32_has_it(base: Path) -> None:
    """Without autocast: statistics of norms, sinusoids and the loss; parameters and activations are 16-bit."""
    model, optimizer = load(base, OPTIMIZERS["adamw"], "bf16", "master")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    seen: defaultdict[str, set[torch.dtype]] = defaultdict(set)

    def note(kind: str) -> Any:
        def hook(_module: Any, given: Any, out: Any) -> None:
            seen[kind].update((given[0].dtype, out.dtype))

        return hook

    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.Conv2d | nn.Linear):
            module.register_forward_hook(note(type(module).__name__))
        if isinstance(module, Timesteps):
            module.register_forward_hook(
                lambda _module, _given, out: seen.setdefault("sinusoids", set()).add(out.dtype)
            )
    result = step(model, optimizer, "bf16", 0)
    assert {key: seen[key] for key in ("GroupNorm", "LayerNorm")} == {
        "GroupNorm": {torch.bfloat16}, "LayerNorm": {torch.bfloat16}}  # fmt: skip
    assert seen["Linear"] == seen["Conv2d"] == {torch.bfloat16}
    assert seen["sinusoids"] == {torch.float32} and result.losses.dtype == torch.float32


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 64), nn.LayerNorm([64, 32])])
def test_norms_of_bf16_have_fp32_statistics(norm: nn.Module) -> None:
    """A mean far above the spread, whose square bf16 would round away."""
    values = (torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()
    expected = norm.float()(values.float())
    torch.testing.assert_close(norm.bfloat16()(values).float(), expected.detach(), rtol=0.01, atol=0.01)

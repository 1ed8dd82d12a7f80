"""Learning rates, parameter groups, and three optimizers that step, or on a bad loss do not, bit by bit."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainer.config.schema import OptimConfig, ScheduleConfig
from trainer.train.optim import build_groups, build_optimizer, gated_step, lr_factor, set_learning_rates

NAMES = ("adamw", "adamw8bit", "adafactor")


class Part(nn.Module):
    """Matrices, a convolution, biases and a norm; one matrix is large enough for 8-bit states (4,096 numbers)."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.big = nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)
        self.convolution = nn.Conv2d(2, 3, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = Part(0)
        self.text_encoder_1 = Part(1)
        self.text_encoder_2 = Part(2)


def make_config(name: str = "adamw", **more: Any) -> OptimConfig:
    options: dict[str, Any] = {"unet_lr": 1e-3, "text_encoder_1_lr": 5e-4, "text_encoder_2_lr": 2e-4, **more}
    if name == "adafactor":
        options |= {"betas": None, "eps": None}
    return OptimConfig(name=name, **options)  # type: ignore[arg-type]


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """All weights and all optimizer state, bit by bit."""

    def raw(value: Any) -> bytes:
        if isinstance(value, torch.Tensor):
            return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return repr(value).encode()

    taken = {name: raw(value) for name, value in model.named_parameters()}
    names = {id(value): name for name, value in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        taken |= {f"{names[id(parameter)]}.{key}": raw(value) for key, value in state.items()}
    return taken


# --- learning rates


def factors(steps: int, total: int, **options: Any) -> list[float]:
    return [lr_factor(step, total, ScheduleConfig(**options)) for step in range(steps)]


def test_a_constant_rate_is_constant_for_ever() -> None:
    assert factors(20, 10) == [1.0] * 20


@pytest.mark.parametrize("lr", ["constant", "cosine", "cosine_restarts"])
def test_warm_up(lr: str) -> None:
    warm = factors(5, 100, lr=lr, warmup_steps=4)
    assert warm[:4] == [0.25, 0.5, 0.75, 1.0]  # min(1, (s + 1) / w)
    assert warm[4] == 1.0  # where the schedule begins
    assert factors(1, 100, lr=lr, warmup_steps=1) == factors(1, 100, lr=lr) == [1.0]


def test_cosine() -> None:
    rates = factors(101, 100, lr="cosine", min_lr_ratio=0.1)
    assert rates[0] == 1.0 and rates[100] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55)
    assert rates[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert lr_factor(1000, 100, ScheduleConfig(lr="cosine", min_lr_ratio=0.1)) == pytest.approx(0.1)
    # behind the warm-up it is the same curve over the steps that are left
    behind = factors(111, 110, lr="cosine", min_lr_ratio=0.1, warmup_steps=10)
    assert behind[10:] == pytest.approx(rates)
    assert factors(101, 100, lr="cosine")[-1] == pytest.approx(0, abs=1e-12)


def test_restarts_with_gamma_and_floor() -> None:
    options = {"lr": "cosine_restarts", "num_cycles": 4, "cycle_gamma": 0.5, "min_lr_ratio": 0.2}
    rates = factors(101, 100, **options)
    assert [rates[step] for step in (0, 25, 50, 75)] == pytest.approx([1.0, 0.5, 0.25, 0.2])
    assert [rates[step + 12] for step in (0, 25, 50)] == pytest.approx(
        [0.2 + (peak - 0.2) * (1 + math.cos(math.pi * 12 / 25)) / 2 for peak in (1.0, 0.5, 0.25)]
    )
    assert rates[100] == pytest.approx(0.2) and min(rates) >= 0.2 - 1e-12
    assert rates[75:] == pytest.approx([0.2] * 26)  # gamma^3 is below the floor, which holds
    assert lr_factor(10_000, 100, ScheduleConfig(**options)) == pytest.approx(0.2)  # type: ignore[arg-type]
    # one cycle is the cosine
    assert factors(101, 100, lr="cosine_restarts", num_cycles=1) == pytest.approx(factors(101, 100, lr="cosine"))


@pytest.mark.parametrize(("total", "cycles"), [(100, 10), (333, 3), (49, 7), (12_340, 10), (90, 6)])
def test_every_restart_begins_at_its_peak(total: int, cycles: int) -> None:
    """No step falls into the cycle before by a rounding of the progress."""
    options = {"lr": "cosine_restarts", "num_cycles": cycles, "cycle_gamma": 0.9}
    config = ScheduleConfig(**options)  # type: ignore[arg-type]
    peaks = [lr_factor(cycle * total // cycles, total, config) for cycle in range(cycles)]
    assert peaks == pytest.approx([0.9**cycle for cycle in range(cycles)])


def test_the_schedule_of_3_1() -> None:
    """Rates from 1e-5 down to 1e-6, each restart's peak 0.9 of the one before."""
    config = ScheduleConfig(lr="cosine_restarts", num_cycles=10, cycle_gamma=0.9, min_lr_ratio=0.1)
    rates = [1e-5 * lr_factor(step, 1000, config) for step in range(1000)]
    assert max(rates) == rates[0] == 1e-5
    assert rates[900] == pytest.approx(1e-5 * 0.9**9)
    assert min(rates) == pytest.approx(1e-6, rel=0.01) and min(rates) >= 1e-6


def test_a_run_that_is_all_warm_up() -> None:
    assert factors(6, 4, lr="cosine", warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(0 <= rate <= 1 for rate in factors(6, 4, lr="cosine", warmup_steps=4))


def test_rates_are_set_for_each_part() -> None:
    optimizer = build_optimizer(Model(), make_config())
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 2.5e-4, 1e-4]
    set_learning_rates(optimizer, 0.5)  # of the base rate, not of the last
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 2.5e-4, 1e-4]


# --- groups


def test_each_part_is_a_group_with_its_own_rate() -> None:
    model = Model()
    groups = build_groups(model, make_config(weight_decay=0.1))
    assert [(group["part"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("unet", 1e-3, 0.1), ("text_encoder_1", 5e-4, 0.1), ("text_encoder_2", 2e-4, 0.1)]  # fmt: skip
    for group in groups:
        owned = list(getattr(model, group["part"]).parameters())
        assert list(map(id, group["params"])) == list(map(id, owned))


def test_what_is_frozen_is_in_no_group() -> None:
    model = Model()
    model.text_encoder_1.requires_grad_(False)
    model.unet.norm.requires_grad_(False)
    groups = build_groups(model, make_config())
    assert [group["part"] for group in groups] == ["unet", "text_encoder_2"]
    assert len(groups[0]["params"]) == len(list(model.unet.parameters())) - 2


def test_norms_and_biases_may_be_left_without_decay() -> None:
    model = Model()
    groups = build_groups(model, make_config(decay_norms_and_biases=False, weight_decay=0.1))
    assert [(group["part"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (part, decay, count)
        for part in ("unet", "text_encoder_1", "text_encoder_2")
        for decay, count in ((0.1, 2), (0.0, 4))
    ]
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (name.endswith(("big.weight", "convolution.weight")))
    assert {group["lr"] for group in groups if group["part"] == "unet"} == {1e-3}


@pytest.mark.parametrize("name", NAMES)
def test_decay_pulls_only_what_it_should(name: str) -> None:
    """With a gradient of zero the decay is all that moves a weight: by rate times decay of itself."""
    model = Model()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = build_optimizer(model, make_config(name, weight_decay=0.1, decay_norms_and_biases=False))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, value in model.named_parameters():
        rate = {"unet": 1e-3, "text_encoder_1": 5e-4, "text_encoder_2": 2e-4}[key.split(".")[0]]
        decay = 0.1 if value.ndim > 1 else 0.0
        torch.testing.assert_close(value.detach(), before[key] * (1 - rate * decay), rtol=1e-6, atol=1e-8)


# --- the optimizers


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_moves_weights_by_about_the_rate(name: str) -> None:
    """For Adafactor this shows the fixed-rate form: with scale_parameter it would move by the rate times the weight."""
    model = Model()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 100.0)
    optimizer = build_optimizer(model, make_config(name, weight_decay=0.0))
    set_gradients(model, 0)
    optimizer.step()
    for key, parameter in model.named_parameters():
        rate = {"unet": 1e-3, "text_encoder_1": 5e-4, "text_encoder_2": 2e-4}[key.split(".")[0]]
        moved = (parameter.detach() - 100).square().mean().sqrt().item()
        assert 0.7 * rate < moved < 1.3 * rate, key


def test_adafactors_rate_is_not_a_function_of_the_step() -> None:
    model = Model()
    optimizer = build_optimizer(model, make_config("adafactor", weight_decay=0.0))
    assert {(group["scale_parameter"], group["relative_step"], group["warmup_init"])
            for group in optimizer.param_groups} == {(False, False, False)}  # fmt: skip
    set_gradients(model, 0)
    for _ in range(30):
        before = model.unet.big.weight.detach().clone()
        optimizer.step()
        moved = (model.unet.big.weight.detach() - before).square().mean().sqrt().item()
        assert 0.7e-3 < moved < 1.3e-3


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_betas_and_eps_reach_the_optimizer(name: str) -> None:
    optimizer = build_optimizer(Model(), make_config(name, betas=[0.7, 0.8], eps=1e-3))
    assert all(tuple(group["betas"]) == (0.7, 0.8) and group["eps"] == 1e-3 for group in optimizer.param_groups)


def test_adamw_is_the_textbooks() -> None:
    model, config = Model(), make_config(betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    weight = model.unet.big.weight.detach().double().clone()
    moment, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 6):
        set_gradients(model, step)
        assert model.unet.big.weight.grad is not None
        gradient = model.unet.big.weight.grad.double()
        moment, square = 0.9 * moment + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        unbiased = moment / (1 - 0.9**step), square / (1 - 0.99**step)
        weight = weight * (1 - 1e-3 * 0.1) - 1e-3 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(model.unet.big.weight.detach().double(), weight, rtol=1e-5, atol=1e-7)


def test_adamw8bit_keeps_its_moments_in_8_bits_and_stays_near_adamw() -> None:
    models = {name: Model() for name in ("adamw", "adamw8bit")}
    for name, model in models.items():
        optimizer = build_optimizer(model, make_config(name))
        for step in range(10):
            set_gradients(model, step)
            optimizer.step()
        if name == "adamw8bit":
            assert optimizer.state[model.unet.big.weight]["state1"].dtype == torch.uint8
            assert optimizer.state[model.unet.norm.weight]["state1"].dtype == torch.float32  # too small for it
    for one, two in zip(models["adamw"].parameters(), models["adamw8bit"].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)


# --- the gate


def plain_step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


def good_step(optimizer: torch.optim.Optimizer) -> None:
    gated_step(optimizer, torch.tensor(False))


def run_steps(name: str, *steps: Callable[[torch.optim.Optimizer], None]) -> dict[str, bytes]:
    model = Model()
    optimizer = build_optimizer(model, make_config(name))
    for number, step in enumerate(steps):
        set_gradients(model, number)
        step(optimizer)
    return snapshot(model, optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_step_changes_nothing_and_a_good_one_is_the_plain_one(name: str) -> None:
    model = Model()
    optimizer = build_optimizer(model, make_config(name))
    for number in range(3):
        set_gradients(model, number)
        gated_step(optimizer, torch.tensor(False))
        before = snapshot(model, optimizer)
        for value in (math.nan, math.inf, 1e30):
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(value)
            gated_step(optimizer, torch.tensor(True))
        assert snapshot(model, optimizer) == before
    assert len(before) > 18 and any(".step" in key or key.endswith("step") for key in before)
    assert before == run_steps(name, plain_step, plain_step, plain_step) == run_steps(name, *[good_step] * 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_first_step_that_is_bad_leaves_no_trace_in_the_next(name: str) -> None:
    model = Model()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, make_config(name))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    gated_step(optimizer, torch.tensor(True))
    assert all(torch.equal(one, two) for one, two in zip(weights, model.parameters(), strict=True))
    set_gradients(model, 0)
    gated_step(optimizer, torch.tensor(False))
    assert snapshot(model, optimizer) == run_steps(name, plain_step)


def test_the_gate_leaves_no_flag_behind() -> None:
    model = Model()
    optimizer = build_optimizer(model, make_config())
    set_gradients(model, 0)
    gated_step(optimizer, torch.tensor(True))
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    before = snapshot(model, optimizer)
    optimizer.step()
    assert snapshot(model, optimizer) != before

"""Which kernels a run asks PyTorch for."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from trainer.config.schema import Config, PrecisionConfig
from trainer.train.kernels import CUDNN_FIRST, attention_order, device_capability, prefer_attention, set_kernels
from trainer.train.loop import train


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(
    ("deterministic", "on_cpu", "benchmark"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_cudnn_chooses_by_time_unless_bits_are_to_repeat(deterministic: bool, on_cpu: bool, benchmark: bool) -> None:
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = not benchmark
    set_kernels(PrecisionConfig(deterministic=deterministic), on_cpu)
    assert torch.backends.cudnn.benchmark is benchmark
    assert torch.are_deterministic_algorithms_enabled() is not benchmark


def test_cudnns_attention_comes_first_on_hopper_alone() -> None:
    assert attention_order((9, 0), deterministic=False) == CUDNN_FIRST
    assert attention_order((9, 0), deterministic=True) is None
    for capability in (None, (7, 5), (8, 0), (8, 6), (8, 9), (10, 0), (12, 0)):  # to Blackwell
        assert attention_order(capability, deterministic=False) is None
    assert device_capability(torch.device("cpu")) is None


def test_sdpa_is_told_the_order_and_forgets_it() -> None:
    before = torch._C._get_sdp_priority_order()
    with prefer_attention(None):
        assert torch._C._get_sdp_priority_order() == before
    with prefer_attention(CUDNN_FIRST):
        order = torch._C._get_sdp_priority_order()
        assert order[:4] == [int(getattr(SDPBackend, name)) for name in CUDNN_FIRST] != before[:4]
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before


def test_an_attempt_records_its_kernels(make_config: Callable[..., Config]) -> None:
    config = make_config("schedule.max_steps=1")
    train(config)
    run = json.loads((Path(config.run.output_dir) / config.run.name / "run.json").read_text())
    said = {"deterministic": True, "cudnn_benchmark": False, "attention": "as PyTorch orders"}
    assert run["attempts"][0]["kernels"] == said

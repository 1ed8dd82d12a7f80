"""What the backward pass computes again under each policy, and that it changes nothing but that."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from support.compute import inputs_of
from trainer.config.schema import MemoryConfig, MemoryPolicy, ModelConfig, PrecisionConfig
from trainer.model.base import find_base
from trainer.model.recompute import is_product
from trainer.model.sdxl import SDXL, build_sdxl, trained_parameters

ALL = ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True)
POLICIES: tuple[MemoryPolicy, ...] = ("none", "selective", "full")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Products(TorchDispatchMode):
    """Counts matrix products, convolutions and attention as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_product(func):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def build(base: Path, policy: MemoryPolicy, model: ModelConfig = ALL) -> SDXL:
    return build_sdxl(find_base(str(base)), model, PrecisionConfig("fp32", frozen="fp32"), MemoryConfig(policy))


def step(
    model: SDXL, compute: torch.dtype = torch.float32, *, cache: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Counter[str], Counter[str]]:
    """Loss, gradients, and what forward and backward dispatched."""
    cast = torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16, cache_enabled=cache)
    with cast, Products() as forward:
        prediction = model(**inputs_of(2, 64))
    loss = prediction.float().square().mean()
    with Products() as backward:
        loss.backward()
    gradients = {name: value.grad for name, value in trained_parameters(model).items() if value.grad is not None}
    return loss.detach(), gradients, forward.counts, backward.counts


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_policies_change_no_bit(tiny_base: Path, compute: torch.dtype) -> None:
    loss, gradients, *_ = step(build(tiny_base, "none"), compute)
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.9 * len(gradients) > 0
    for policy in ("selective", "full"):
        other_loss, other, *_ = step(build(tiny_base, policy), compute)
        assert torch.equal(loss, other_loss)
        assert [name for name in gradients if not torch.equal(gradients[name], other[name])] == []


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_only_full_computes_products_again(tiny_base: Path, compute: torch.dtype) -> None:
    counts = {policy: step(build(tiny_base, policy), compute)[2:] for policy in POLICIES}
    forward, backward = counts["none"]
    assert forward[ATTENTION] and forward["aten::convolution"] and forward["aten::addmm"] and forward["aten::mm"]
    assert all(counts[policy][0] == forward for policy in POLICIES)
    # gradients of products are products without a bias, and convolution_backward
    assert set(backward) == {"aten::mm"} and counts["selective"][1] == backward
    again = counts["full"][1] - backward
    # what lies outside of blocks, and what in a block nothing needs after it, is not computed again
    assert 0.9 * forward[ATTENTION] < again[ATTENTION] <= forward[ATTENTION]
    assert 0.5 * forward["aten::addmm"] < again["aten::addmm"] < forward["aten::addmm"]
    assert 0 < again["aten::convolution"] < forward["aten::convolution"] and again["aten::mm"] > 0


def test_through_a_frozen_unet_too(tiny_base: Path) -> None:
    model = dataclasses.replace(ALL, train_unet=False, train_text_encoder_2=False)
    made = {policy: step(build(tiny_base, policy, model)) for policy in POLICIES}
    assert made["selective"][3] == made["none"][3] and sum(made["full"][3].values()) > sum(made["none"][3].values())
    for policy in ("selective", "full"):
        assert all(torch.equal(value, made[policy][1][name]) for name, value in made["none"][1].items())


def test_the_more_is_computed_again_the_less_is_saved(tiny_base: Path) -> None:
    saved: dict[str, int] = {}
    for policy in ("none", "full"):  # what selective keeps lies with the checkpoints, not with autograd
        sizes: list[int] = []
        model = build(tiny_base, policy)
        pack: Callable[[torch.Tensor], torch.Tensor] = lambda x, sizes=sizes: sizes.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**inputs_of(2, 64))
        saved[policy] = sum(sizes)
    assert saved["full"] < saved["none"] / 2


def test_no_copies_of_weights_are_shared_within_a_forward(tiny_base: Path) -> None:
    """Autocast's cache of 16-bit weights would save nothing, and change nothing."""
    plain, cached = (step(build(tiny_base, "full"), torch.bfloat16, cache=cache) for cache in (False, True))
    assert torch.equal(plain[0], cached[0])
    assert all(torch.equal(value, cached[1][name]) for name, value in plain[1].items())


@pytest.mark.slow
def test_compiled_blocks_compute_no_product_again(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint lies inside of what is compiled: the backward's graph holds the products of gradients alone."""
    counts: dict[str, Counter[str]] = {}

    def counting(which: str) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
            nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
            counts[which].update(node._schema.name for node in nodes if is_product(node))
            return make_boxed_func(graph.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=counting("forward"), bw_compiler=counting("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend=backend))
    made: dict[str, tuple[Counter[str], Counter[str], int]] = {}
    for policy in ("none", "selective"):
        counts |= {"forward": Counter(), "backward": Counter()}
        torch._dynamo.reset()
        saved: list[int] = []
        model = build(tiny_base, policy, ModelConfig(pretrained="", compile=True))
        pack: Callable[[torch.Tensor], torch.Tensor] = lambda x, saved=saved: saved.append(x.nbytes) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**inputs_of(2, 64)).square().mean()
        loss.backward()
        made[policy] = (counts["forward"], counts["backward"], sum(saved))
    (forward, backward, all_saved), (other_forward, other_backward, fewer_saved) = made["none"], made["selective"]
    assert forward == other_forward and forward[ATTENTION] and forward["aten::addmm"]
    assert backward == other_backward and set(backward) == {"aten::mm"}
    assert fewer_saved < 0.8 * all_saved


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("mm", True), ("bmm", True), ("addmm", True), ("baddbmm", True), ("convolution", True),
        ("_scaled_dot_product_flash_attention", True), ("_scaled_dot_product_efficient_attention", True),
        ("_scaled_dot_product_cudnn_attention", True), ("_scaled_dot_product_flash_attention_for_cpu", True),
        ("_scaled_dot_product_fused_attention_overrideable", True),
        ("convolution_backward", False), ("_scaled_dot_product_flash_attention_backward", False), ("gelu", False),
        ("native_group_norm", False), ("add", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_product(name: str, kept: bool) -> None:
    packet = getattr(torch.ops.aten, name)
    assert is_product(getattr(packet, packet.overloads()[0])) is kept


def test_xformers_attention_is_a_product_by_its_name() -> None:
    """Not installed everywhere: as its operations are called on a GPU."""
    names = {"xformers::efficient_attention_forward_cutlass": True, "xformers_flash::flash_fwd": True,
             "xformers::efficient_attention_backward_cutlass": False, "xformers_flash::flash_bwd": False}  # fmt: skip
    for name, kept in names.items():
        assert is_product(SimpleNamespace(_schema=SimpleNamespace(name=name))) is kept
    assert not is_product(torch.ops.higher_order.cond)

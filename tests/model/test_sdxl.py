"""The model as one module: sizes, freezing, names, loading."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.config.schema import Config, MemoryConfig, ModelConfig, PrecisionConfig
from trainer.core.errors import UserError
from trainer.model.base import find_base, read_config, read_sdxl_config, read_state
from trainer.model.sdxl import (
    COMPONENTS,
    SDXL,
    build_empty,
    build_sdxl,
    classic_name,
    load_trained,
    trained_parameters,
    unused_layers,
)

FP32 = PrecisionConfig(compute="fp32", frozen="fp32", vae="fp32")
ALL = ModelConfig(pretrained="", train_text_encoder_1=True, train_text_encoder_2=True)


@pytest.fixture(scope="module")
def full_size() -> SDXL:
    return SDXL(**{part: build_empty(part, read_sdxl_config(name)) for part, name in COMPONENTS.items()})


def inputs(size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (3, 77), generator=generator)
    return {
        "noisy_latents": torch.randn(2, 4, size, size, generator=generator),
        "timesteps": torch.tensor([3, 700]),
        "input_ids_1": ids,
        "input_ids_2": ids,
        "chunk_map": torch.tensor([[0, 2], [1, 2]]),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [90, 60, 1, 2, 96, 64]]),
    }


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_size_has_the_recipes_parameters(full_size: SDXL) -> None:
    assert count(full_size.unet) == 2_567_463_684
    assert len(list(full_size.unet.parameters())) == 1_680
    assert count(full_size.text_encoder_1) == 123_060_480
    assert len(list(full_size.text_encoder_1.parameters())) == 196
    assert count(full_size.text_encoder_2) == 694_659_840
    assert sum(count(module) for module in unused_layers(full_size.text_encoder_1)) == 7_089_408


def test_checkpoint_names_are_classic_whatever_transformers_calls_them(full_size: SDXL) -> None:
    names = {classic_name(name) for name, _ in full_size.named_parameters()}
    assert "text_encoder_1.text_model.encoder.layers.0.self_attn.q_proj.weight" in names
    assert "text_encoder_2.text_model.encoder.layers.31.mlp.fc2.bias" in names
    assert "text_encoder_2.text_projection.weight" in names
    assert "unet.down_blocks.1.attentions.0.proj_in.weight" in names


def test_weights_are_those_of_the_base_bit_by_bit(tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    model = build_sdxl(base, ALL, FP32, MemoryConfig("none"))
    ours = {classic_name(name): value for name, value in model.named_parameters()}
    for part, component in COMPONENTS.items():
        state = read_state(base, component)
        assert {name.removeprefix(f"{part}.") for name in ours if name.startswith(f"{part}.")} == set(state)
        for name, tensor in state.items():
            assert torch.equal(ours[f"{part}.{name}"], tensor.float())


@pytest.mark.parametrize("trained", [{"unet"}, {"text_encoder_1"}, {"unet", "text_encoder_1", "text_encoder_2"}])
def test_exactly_the_trained_parts_get_gradients(tiny_base: Path, trained: set[str]) -> None:
    flags = {f"train_{part}": part in trained for part in COMPONENTS}
    model = build_sdxl(find_base(str(tiny_base)), ModelConfig(pretrained="", **flags), FP32, MemoryConfig("none"))
    model(**inputs()).square().mean().backward()
    with_gradient = {classic_name(name) for name, value in model.named_parameters() if value.grad is not None}
    assert with_gradient == set(trained_parameters(model))
    assert {name.split(".")[0] for name in with_gradient} == trained
    last = read_config(find_base(str(tiny_base)), "text_encoder")["num_hidden_layers"] - 1
    assert not any(f"text_encoder_1.text_model.encoder.layers.{last}." in name for name in with_gradient)
    assert not any("text_encoder_1.text_model.final_layer_norm" in name for name in with_gradient)


def test_frozen_parts_have_the_frozen_dtype_and_trained_ones_fp32(tiny_base: Path) -> None:
    precision = PrecisionConfig(compute="bf16", frozen="bf16")
    model = build_sdxl(find_base(str(tiny_base)), ModelConfig(pretrained=""), precision, MemoryConfig("none"))
    assert {p.dtype for p in model.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in model.text_encoder_1.parameters()} == {torch.bfloat16}
    assert model.unet.training and not model.text_encoder_1.training


def test_a_checkpoint_of_other_parameters_is_refused(tiny_base: Path) -> None:
    model = build_sdxl(find_base(str(tiny_base)), ALL, FP32, MemoryConfig("none"))
    tensors = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
    with pytest.raises(UserError, match=r"conv_in\.bias"):
        load_trained(model, {name: value for name, value in tensors.items() if name != "unet.conv_in.bias"})
    with pytest.raises(UserError, match=r"unet.conv_in.bias has shape"):
        load_trained(model, {**tensors, "unet.conv_in.bias": torch.zeros(3)})


def test_xformers_is_probed_by_a_real_call(make_config: Callable[..., Config], tiny_base: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; the refusal is for those without")
    model = dataclasses.replace(ALL, attention="xformers")
    with pytest.raises(UserError, match="xformers does not work here"):
        build_sdxl(find_base(str(tiny_base)), model, FP32, MemoryConfig("none"))


@pytest.mark.slow
def test_compiled_blocks_keep_their_names_and_compute_the_same(tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    plain = build_sdxl(base, ALL, FP32, MemoryConfig("none"))
    compiled = build_sdxl(base, dataclasses.replace(ALL, compile=True), FP32, MemoryConfig("none"))
    assert list(trained_parameters(plain)) == list(trained_parameters(compiled))
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs()), compiled(**inputs()), rtol=1e-3, atol=1e-4)

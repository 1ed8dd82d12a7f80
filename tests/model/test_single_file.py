"""Names and shapes of single files, both ways: the full-size layout without weights, and diffusers as witness."""

from collections.abc import Mapping

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_converters
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from support.tiny_model import TINY, Parts, build_parts, random_parts, read_assets
from trainer.core.errors import UserError
from trainer.model.single_file import (
    NAME_PREFIXES,
    ComponentConfig,
    check_layout,
    iterate_component,
    tensor_names,
    to_single_file,
)


def from_single_file(state: Mapping[str, torch.Tensor], configs: Mapping[str, ComponentConfig]) -> Parts:
    check_layout(state)
    return {component: dict(iterate_component(component, state, config)) for component, config in configs.items()}


@pytest.fixture(scope="module")
def full_parts() -> Parts:
    with torch.device("meta"):
        return build_parts(read_assets())


@pytest.fixture(scope="module")
def tiny_parts() -> Parts:
    return random_parts(seed=0)


def count(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def test_assets_build_sdxl(full_parts):
    """Recipe section 7."""
    assert count(full_parts["unet"]) == 2_567_463_684
    assert count(full_parts["text_encoder"]) == 123_060_480
    assert count(full_parts["text_encoder_2"]) == 694_659_840
    assert count(full_parts["vae"]) == 83_653_863
    assert len(full_parts["unet"]) == 1_680
    assert len(full_parts["text_encoder"]) == 196


def test_full_size_layout(full_parts):
    """Recipe section 8: counts by prefix, and names and shapes as they stand in sd_xl_base_1.0.safetensors."""
    state = to_single_file(full_parts, read_assets())
    assert len(state) == 2_515
    by_prefix = {
        component: sum(name.startswith(prefix) for name in state) for component, prefix in NAME_PREFIXES.items()
    }
    assert by_prefix == {"unet": 1_680, "text_encoder": 197, "text_encoder_2": 390, "vae": 248}
    known = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias": (1280,),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.1.proj_in.weight": (640, 640),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.time_embed.2.bias": (1280,),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.token_embedding.weight": (49408, 1280),
        "conditioner.embedders.1.model.logit_scale": (),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
        "first_stage_model.decoder.up.3.block.0.norm1.weight": (512,),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "first_stage_model.encoder.down.2.downsample.conv.bias": (512,),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in known} == known
    assert state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"].dtype == torch.int64


def test_full_size_round_trip(full_parts):
    configs = read_assets()
    parts = from_single_file(to_single_file(full_parts, configs), configs)
    for component, part in full_parts.items():
        shapes = {name: tensor.shape for name, tensor in part.items()}
        assert {name: tensor.shape for name, tensor in parts[component].items()} == shapes


def test_tiny_round_trip(tiny_parts):
    state = to_single_file(tiny_parts, TINY)
    parts = from_single_file(state, TINY)
    for component, part in tiny_parts.items():
        assert list(parts[component]) == list(tensor_names(component, TINY[component]))
        assert parts[component].keys() == part.keys()
        assert all(torch.equal(parts[component][name], tensor) for name, tensor in part.items())
    again = to_single_file(parts, TINY)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_diffusers_reads_the_same(tiny_parts):
    """Diffusers' own converters, the independent witness, find every tensor where it belongs."""
    state = to_single_file(tiny_parts, TINY)
    prefix = NAME_PREFIXES["text_encoder_2"]
    encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**TINY["text_encoder_2"]))
    read = {
        "unet": diffusers_converters.convert_ldm_unet_checkpoint(dict(state), TINY["unet"]),
        "vae": diffusers_converters.convert_ldm_vae_checkpoint(dict(state), TINY["vae"]),
        "text_encoder": diffusers_converters.convert_ldm_clip_checkpoint(dict(state)),
        "text_encoder_2": diffusers_converters.convert_open_clip_checkpoint(encoder_2, dict(state), prefix=prefix),
    }
    read["text_encoder"].pop("text_model.embeddings.position_ids")
    for component, part in tiny_parts.items():
        assert read[component].keys() == part.keys()
        assert all(torch.equal(read[component][name], tensor) for name, tensor in part.items())


def test_reads_only_what_is_asked_for(tiny_parts):
    class Guarded(dict):
        def __getitem__(self, name):
            assert name.startswith(NAME_PREFIXES["text_encoder"]), name
            return super().__getitem__(name)

    state = Guarded(to_single_file(tiny_parts, TINY))
    parts = from_single_file(state, {"text_encoder": TINY["text_encoder"]})
    assert list(parts) == ["text_encoder"]


def test_parts_have_memory_of_their_own(tiny_parts):
    state = to_single_file({"text_encoder_2": tiny_parts["text_encoder_2"]}, TINY)
    part = from_single_file(state, {"text_encoder_2": TINY["text_encoder_2"]})["text_encoder_2"]
    storages = {tensor.untyped_storage().data_ptr() for tensor in part.values()}
    assert len(storages) == len(part)


@pytest.mark.parametrize(
    "extra",
    ["v_pred", "ztsnr", "denoiser.sigmas", "model_ema.decay", "first_stage_model.loss.logvar", "alphas_cumprod"],
)
def test_well_known_extras_are_left_unread(tiny_parts, extra):
    state = to_single_file(tiny_parts, TINY)
    names = {component: list(part) for component, part in from_single_file(state, TINY).items()}
    state[extra] = torch.tensor([])
    for absent in (
        "conditioner.embedders.1.model.logit_scale",
        f"{NAME_PREFIXES['text_encoder']}text_model.embeddings.position_ids",
    ):
        del state[absent]
    assert {component: list(part) for component, part in from_single_file(state, TINY).items()} == names


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("model.diffusion_model.out.2.bias", "unet: 1 of .* missing: out.2.bias"),
        ("first_stage_model.encoder.mid.attn_1.q.bias", "vae: 1 of .* missing: encoder.mid.attn_1.q.bias"),
        ("conditioner.embedders.1.model.text_projection", "text_encoder_2: 1 of .* missing: text_projection"),
    ],
)
def test_missing_tensors_are_named(tiny_parts, gone, message):
    state = to_single_file(tiny_parts, TINY)
    del state[gone]
    with pytest.raises(UserError, match=message):
        from_single_file(state, TINY)


@pytest.mark.parametrize("name", ["lora_unet_mid.alpha", "model.diffusion_model.input_blocks.99.0.weight", "edm_mean"])
def test_unknown_tensors_are_named(tiny_parts, name):
    state = to_single_file(tiny_parts, TINY) | {name: torch.zeros(1)}
    with pytest.raises(UserError, match=name.removeprefix(NAME_PREFIXES["unet"])):
        from_single_file(state, TINY)


def test_a_file_without_vae_reads_when_none_is_asked(tiny_parts):
    state = to_single_file({name: part for name, part in tiny_parts.items() if name != "vae"}, TINY)
    with pytest.raises(UserError, match="vae"):
        from_single_file(state, TINY)
    assert "vae" not in from_single_file(state, {name: TINY[name] for name in TINY if name != "vae"})


def test_a_vae_file_has_no_prefix(tiny_parts):
    prefix = NAME_PREFIXES["vae"]
    state = {
        name.removeprefix(prefix): tensor for name, tensor in to_single_file({"vae": tiny_parts["vae"]}, TINY).items()
    }
    part = dict(iterate_component("vae", state | {"loss.logvar": torch.zeros(())}, TINY["vae"], prefix=""))
    assert all(torch.equal(part[name], tensor) for name, tensor in tiny_parts["vae"].items())


def test_writing_wants_whole_components(tiny_parts):
    part = dict(tiny_parts["unet"])
    part.pop("conv_in.weight")
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        to_single_file({"unet": part}, TINY)

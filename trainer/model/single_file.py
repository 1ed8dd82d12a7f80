"""Diffusers' tensor names <-> the names of Stability's single-file SDXL checkpoints, both ways.

The tables are spelled out from the component configs, so that they hold for any width and depth of SDXL's
architecture: ``tensor_names(component, config)`` lists every tensor once, under both of its names. Three kinds of
tensors also change their form: encoder 2 is stored in OpenCLIP's layout (q, k and v joined, the projection
transposed), and the attention of the VAE as 1x1 convolutions. Components are "unet", "text_encoder",
"text_encoder_2" and "vae"; diffusers' names are the classic ones, with ``text_model.`` in both encoders.
"""

import fnmatch
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.core.errors import UserError
from trainer.model.diffusion import MARKERS

State = dict[str, Tensor]
ComponentConfig = Mapping[str, Any]
Pairs = Iterator[tuple[str, str]]

NAME_PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
JOINED = ("in_proj_weight", "in_proj_bias")  # OpenCLIP's q, k and v
POSITION_IDS = "text_model.embeddings.position_ids"
LOGIT_SCALE = 4.6052  # ln 100, CLIP's ceiling: what OpenCLIP's bigG and hence Stability's files hold

# What other programs leave in files beside the model: buffers, markers, an average, a discriminator.
EXTRAS = [
    "*.position_ids", "*.logit_scale", "conditioner.embedders.0.transformer.text_projection.weight",
    *MARKERS, "denoiser.sigmas", "model_ema.*", "first_stage_model.model_ema.*", "first_stage_model.loss.*",
    "betas", "*alphas_cumprod*", "posterior_*", "logvar",
]  # fmt: skip


def to_single_file(parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, ComponentConfig]) -> State:
    """Whole components under diffusers' names -> one state dict in Stability's layout.

    Raises:
        ValueError: when a component's tensors are not exactly those of its config.
    """
    state: State = {}
    for component, part in parts.items():
        names = tensor_names(component, configs[component])
        if wrong := set(names) ^ set(part):
            raise ValueError(f"{component} does not fit its config: {some(wrong)}")
        state |= write_component(component, part, names, configs[component])
    return state


def check_layout(state: Collection[str]) -> None:
    """Refuse names that belong to no part of a single file.

    Raises:
        UserError: naming a few.
    """
    if strange := [name for name in state if not (name.startswith(tuple(NAME_PREFIXES.values())) or is_extra(name))]:
        raise UserError(f"not the layout of an SDXL single file; tensors that belong to no part of it: {some(strange)}")


def iterate_component(
    component: str,
    state: Mapping[str, Tensor],
    config: ComponentConfig,
    prefix: str | None = None,
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """One component out of a single file, (name, tensor), one at a time; only the ``wanted``, if given.

    ``prefix`` if not Stability's (files of a VAE alone have none).

    Raises:
        UserError: on tensors that are missing or unknown under the prefix, naming a few.
    """
    prefix = NAME_PREFIXES[component] if prefix is None else prefix
    names = tensor_names(component, config)
    present = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    singles = set(names.values())
    strange = {name for name in present - singles if not is_extra(NAME_PREFIXES[component] + name)}
    check_names(component, singles, present & singles | strange)
    joined: State = {}  # that k and v still come out of
    for name, single in names.items():
        if wanted is not None and name not in wanted:
            continue
        tensor = joined[single] if single in joined else state[prefix + single]
        if single.endswith(JOINED):
            joined[single] = tensor
            letter = name.rpartition("_proj.")[0][-1]
            tensor = tensor.chunk(3)["qkv".index(letter)].clone()  # with memory of its own
            if letter == "v":
                del joined[single]
        elif name == "text_projection.weight":
            tensor = tensor.t().contiguous()  # (hidden, projection) -> nn.Linear's (projection, hidden)
        elif component == "vae" and is_attention_matrix(name):
            tensor = tensor.reshape(tensor.shape[:2])  # (C, C, 1, 1) -> (C, C)
        yield name, tensor


def write_component(
    component: str, part: Mapping[str, Tensor], names: Mapping[str, str], config: ComponentConfig
) -> State:
    """One component under Stability's names, prefix included, with the extra tensors its files carry."""
    state: State = {}
    for name, single in names.items():
        tensor = part[name]
        if single in state:
            continue  # k and v, which were joined to q
        if single.endswith(JOINED):
            tensor = torch.cat([part[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])  # (3 C, C), (3 C)
        elif name == "text_projection.weight":
            tensor = tensor.t().contiguous()
        elif component == "vae" and is_attention_matrix(name):
            tensor = tensor[:, :, None, None]
        state[single] = tensor
    if component == "text_encoder":
        position_ids = torch.arange(config.get("max_position_embeddings", 77))
        state[POSITION_IDS] = position_ids[None].to(next(iter(part.values())).device)  # (1, 77), int64
    if component == "text_encoder_2":
        state["logit_scale"] = state["positional_embedding"].new_full((), LOGIT_SCALE)
    return {NAME_PREFIXES[component] + single: tensor for single, tensor in state.items()}


def check_names(what: str, wanted: Collection[str], present: Collection[str]) -> None:
    """Refuse tensors that are missing or unknown."""
    missing, unknown = set(wanted) - set(present), set(present) - set(wanted)
    if missing:
        raise UserError(f"{what}: {len(missing)} of {len(wanted)} tensors are missing: {some(missing)}")
    if unknown:
        raise UserError(f"{what}: {len(unknown)} tensors are not SDXL's: {some(unknown)}")


def is_extra(name: str) -> bool:
    """Whether a tensor beside the model may be left unread."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in EXTRAS)


def is_attention_matrix(name: str) -> bool:
    """Whether a diffusers name of the VAE is a linear layer that single files hold as a 1x1 convolution."""
    return ".attentions." in name and name.endswith(".weight") and ".group_norm." not in name


def some(names: Collection[str], count: int = 4) -> str:
    """A few names for a message."""
    listed = sorted(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


def tensor_names(component: str, config: ComponentConfig) -> dict[str, str]:
    """Every tensor of a component: diffusers' name -> name in the single file, without the prefix."""
    match component:
        case "unet":
            return dict(unet_pairs(config))
        case "vae":
            return dict(vae_pairs(config))
        case "text_encoder":
            return {name: name for name, _ in clip_pairs(config)}
        case "text_encoder_2":
            return dict([*clip_pairs(config), ("text_projection.weight", "text_projection")])
    raise ValueError(f"unknown component {component}")


def layers(prefix: str, single_prefix: str, table: Mapping[str, str]) -> Pairs:
    """Weight and bias of the layers in ``table``, after the two prefixes."""
    for name, single in table.items():
        for kind in ("weight", "bias"):
            yield f"{prefix}{name}.{kind}", f"{single_prefix}{single}.{kind}"


def unet_pairs(config: ComponentConfig) -> Pairs:
    """The UNet: input_blocks, middle_block and output_blocks are numbered through in the order of the forward pass."""
    ends = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for name, single in {"time_embedding": "time_embed", "add_embedding": "label_emb.0"}.items():
        ends |= {f"{name}.linear_1": f"{single}.0", f"{name}.linear_2": f"{single}.2"}
    yield from layers("", "", ends)
    channels = config["block_out_channels"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(channels) if isinstance(depths, int) else depths
    yield from unet_down_pairs(config, depths)
    yield from resnet_pairs("mid_block.resnets.0.", "middle_block.0.", False)
    yield from transformer_pairs("mid_block.attentions.0.", "middle_block.1.", depths[-1])
    yield from resnet_pairs("mid_block.resnets.1.", "middle_block.2.", False)
    yield from unet_up_pairs(config, depths[::-1])


def unet_down_pairs(config: ComponentConfig, depths: list[int]) -> Pairs:
    """The downward half of the UNet."""
    channels, number = config["block_out_channels"], 1
    for block, kind in enumerate(config["down_block_types"]):
        for layer in range(config["layers_per_block"]):
            changes = layer == 0 and channels[block] != channels[max(block - 1, 0)]
            yield from resnet_pairs(f"down_blocks.{block}.resnets.{layer}.", f"input_blocks.{number}.0.", changes)
            if "CrossAttn" in kind:
                attention = f"down_blocks.{block}.attentions.{layer}."
                yield from transformer_pairs(attention, f"input_blocks.{number}.1.", depths[block])
            number += 1
        if block < len(channels) - 1:
            yield from layers(f"down_blocks.{block}.downsamplers.0.", f"input_blocks.{number}.0.", {"conv": "op"})
            number += 1


def unet_up_pairs(config: ComponentConfig, depths: list[int]) -> Pairs:
    """The upward half of the UNet; a block's last entry also holds its upsampler."""
    channels, number = config["block_out_channels"][::-1], 0
    for block, kind in enumerate(config["up_block_types"]):
        attends = "CrossAttn" in kind
        for layer in range(config["layers_per_block"] + 1):
            is_last = layer == config["layers_per_block"]
            skip = channels[min(block + 1, len(channels) - 1)] if is_last else channels[block]
            before = channels[max(block - 1, 0)] if layer == 0 else channels[block]
            changes = before + skip != channels[block]
            yield from resnet_pairs(f"up_blocks.{block}.resnets.{layer}.", f"output_blocks.{number}.0.", changes)
            if attends:
                attention = f"up_blocks.{block}.attentions.{layer}."
                yield from transformer_pairs(attention, f"output_blocks.{number}.1.", depths[block])
            if is_last and block < len(channels) - 1:
                upsampler = f"output_blocks.{number}.{2 if attends else 1}."
                yield from layers(f"up_blocks.{block}.upsamplers.0.", upsampler, {"conv": "conv"})
            number += 1


def resnet_pairs(prefix: str, single_prefix: str, changes_channels: bool) -> Pairs:
    """A residual block of the UNet."""
    table = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
             "norm2": "out_layers.0", "conv2": "out_layers.3"}  # fmt: skip
    yield from layers(prefix, single_prefix, table | ({"conv_shortcut": "skip_connection"} if changes_channels else {}))


def transformer_pairs(prefix: str, single_prefix: str, depth: int) -> Pairs:
    """A spatial transformer of the UNet, which has the same names in both worlds."""
    names = ["norm", "proj_in", "proj_out"]
    for block in (f"transformer_blocks.{index}" for index in range(depth)):
        names += [f"{block}.{name}" for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")]
        names += [f"{block}.{attention}.to_out.0" for attention in ("attn1", "attn2")]
        for name in (f"{block}.{attention}.to_{letter}.weight" for attention in ("attn1", "attn2") for letter in "qkv"):
            yield prefix + name, single_prefix + name
    yield from layers(prefix, single_prefix, {name: name for name in names})


def clip_pairs(config: ComponentConfig) -> Pairs:
    """A CLIP text encoder: Hugging Face's name -> OpenCLIP's; q, k and v share one."""
    yield "text_model.embeddings.token_embedding.weight", "token_embedding.weight"
    yield "text_model.embeddings.position_embedding.weight", "positional_embedding"
    table = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    for number in range(config.get("num_hidden_layers", 12)):
        layer, block = f"text_model.encoder.layers.{number}.", f"transformer.resblocks.{number}."
        for letter in "qkv":
            for kind in ("weight", "bias"):
                yield f"{layer}self_attn.{letter}_proj.{kind}", f"{block}attn.in_proj_{kind}"
        yield from layers(layer, block, table)
    yield from layers("text_model.", "", {"final_layer_norm": "ln_final"})


def vae_pairs(config: ComponentConfig) -> Pairs:
    """The VAE; single files count the decoder's blocks from the picture's end."""
    channels, depth = config["block_out_channels"], config.get("layers_per_block", 1)
    last = len(channels) - 1
    for block in range(last + 1):
        yield from vae_resnet_pairs(
            f"encoder.down_blocks.{block}.resnets.", f"encoder.down.{block}.block.", depth,
            channels[block] != channels[max(block - 1, 0)],
        )  # fmt: skip
        deep = last - block  # the decoder's block of the same channels
        yield from vae_resnet_pairs(
            f"decoder.up_blocks.{deep}.resnets.", f"decoder.up.{block}.block.", depth + 1,
            channels[block] != channels[min(block + 1, last)],
        )  # fmt: skip
        if block < last:
            down, up = f"encoder.down_blocks.{block}.downsamplers.0.", f"decoder.up_blocks.{block}.upsamplers.0."
            yield from layers(down, f"encoder.down.{block}.downsample.", {"conv": "conv"})
            yield from layers(up, f"decoder.up.{deep}.upsample.", {"conv": "conv"})
    for half in ("encoder.", "decoder."):
        yield from layers(half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        for number in (0, 1):
            middle, single = f"{half}mid_block.resnets.{number}.", f"{half}mid.block_{number + 1}."
            yield from layers(middle, single, VAE_RESNET)
        if config.get("mid_block_add_attention", True):
            yield from layers(f"{half}mid_block.attentions.0.", f"{half}mid.attn_1.", VAE_ATTENTION)
    for name in ("quant_conv", "post_quant_conv"):
        if config.get(f"use_{name}", True):
            yield from layers("", "", {name: name})


VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_resnet_pairs(prefix: str, single_prefix: str, depth: int, changes_channels: bool) -> Pairs:
    """The residual blocks of one level of the VAE; the first may change the number of channels."""
    for layer in range(depth):
        shortcut = {"conv_shortcut": "nin_shortcut"} if changes_channels and layer == 0 else {}
        yield from layers(f"{prefix}{layer}.", f"{single_prefix}{layer}.", VAE_RESNET | shortcut)

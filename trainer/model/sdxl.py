"""One nn.Module: SDXL's UNet and both text encoders. Build it from a base, freeze, name its parameters, encode prompts.

Checkpoints name parameters as ``unet.<name>``, ``text_encoder_1.<name>`` and ``text_encoder_2.<name>`` with the
classic ``text_model.`` prefix in both encoders, whatever the installed transformers calls its modules.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.config.schema import Dtype, MemoryConfig, ModelConfig, PrecisionConfig
from trainer.core.errors import UserError, shorten
from trainer.model.base import Base, iterate_state, read_config
from trainer.model.recompute import use_policy
from trainer.model.single_file import some, tensor_names
from trainer.model.weights_file import check_each, check_finite

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
Put = Callable[[nn.Parameter, Tensor], None]  # sets a parameter
COMPONENTS = {"unet": "unet", "text_encoder_1": "text_encoder", "text_encoder_2": "text_encoder_2"}  # part -> folder


class SDXL(nn.Module):
    """UNet and text encoders as one module, so that it is prepared, wrapped and clipped once."""

    def __init__(self, unet: nn.Module, text_encoder_1: nn.Module, text_encoder_2: nn.Module):
        super().__init__()
        self.unet: Any = unet
        self.text_encoder_1 = text_encoder_1
        self.text_encoder_2 = text_encoder_2

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        input_ids_1: Tensor,
        input_ids_2: Tensor,
        chunk_map: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """The model's prediction (B, 4, H/8, W/8).

        ``noisy_latents`` (B, 4, H/8, W/8), ``timesteps`` (B,), ``input_ids`` (K, 77) of the distinct chunks,
        ``chunk_map`` (B, chunks), ``time_ids`` (B, 6).
        """
        prompt_embeds, pooled_prompt_embeds = encode_prompts(
            self.text_encoder_1, self.text_encoder_2, input_ids_1, input_ids_2, chunk_map
        )
        return self.unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids},
        ).sample


def encode_prompts(
    text_encoder_1: Any,
    text_encoder_2: Any,
    input_ids_1: Tensor,
    input_ids_2: Tensor,
    chunk_map: Tensor,
) -> tuple[Tensor, Tensor]:
    """Prompt embeddings (B, 2 + 75 chunks, 2048) and pooled embeddings (B, 1280), widths those of full SDXL.

    Recipe, section 4. Many chunks of a batch are identical, so each distinct one is encoded once: ``input_ids`` (K, 77)
    and ``chunk_map`` (B, chunks) with their rows. Hidden states before the last layer of each encoder, without final
    norm, concatenated over channels. Pooled: encoder 2, last layer, final norm, at the first EOS of the first chunk,
    times the text projection.
    """
    output_1 = text_encoder_1(input_ids_1, output_hidden_states=True)
    output_2 = text_encoder_2(input_ids_2, output_hidden_states=True)
    hidden = torch.cat([output_1.hidden_states[-2], output_2.hidden_states[-2]], dim=-1)  # (K, 77, 2048)
    eos_id = text_encoder_2.get_input_embeddings().num_embeddings - 1
    eos_places = (input_ids_2 == eos_id).int().argmax(dim=-1)  # (K,)
    at_eos = output_2.last_hidden_state[torch.arange(len(input_ids_2), device=eos_places.device), eos_places]
    pooled = text_encoder_2.text_projection(repeat_rows(at_eos, chunk_map[:, 0]))  # (B, 1280)
    return join_chunks(hidden, chunk_map), pooled


def join_chunks(hidden: Tensor, chunk_map: Tensor) -> Tensor:
    """(K, 77, D) and (B, chunks) -> (B, 2 + 75 chunks, D): one BOS first, one EOS last."""
    parts = repeat_rows(hidden, chunk_map.flatten()).unflatten(0, chunk_map.shape)  # (B, chunks, 77, D)
    return torch.cat([parts[:, 0, :1], parts[:, :, 1:-1].flatten(1, 2), parts[:, -1, -1:]], dim=1)


def repeat_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]``, (K, ...) and (N,) -> (N, ...), with a backward that gives the same bits each time.

    PyTorch's own backward of that indexing adds the gradients of repeated rows in any order, with several threads on
    the CPU and on GPUs alike.
    """
    return _RepeatRows.apply(values, rows)


class _RepeatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(values)
        return values[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        add = add_rows_in_order if gradient.device.type == "cpu" else add_rows_by_product
        return add(gradient, rows, ctx.count), None


def add_rows_in_order(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum of the gradients (N, ...) of each row, (count, ...), one after the other, in fp32."""
    total = torch.zeros(count, *gradient.shape[1:], dtype=torch.float32, device=gradient.device)
    return total.index_add_(0, rows, gradient.float()).to(gradient.dtype)


def add_rows_by_product(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    """The same sums as one matrix product, whose order is fixed: index_add_ on a GPU adds in any order."""
    chosen = torch.arange(count, device=rows.device)[:, None] == rows  # (count, N)
    return (chosen.to(gradient.dtype) @ gradient.flatten(1)).view(count, *gradient.shape[1:])


def build_sdxl(
    base: Base, model: ModelConfig, precision: PrecisionConfig, memory: MemoryConfig, device: torch.device = CPU
) -> SDXL:
    """The model with the base's weights on the device: trained parts in fp32, frozen ones in ``precision.frozen``."""
    sdxl = outline_sdxl(base, model, replace(precision, weights="autocast"), memory)
    give_memory(sdxl, device)
    load_base(sdxl, base)
    use_kernels(sdxl, model)
    return sdxl


def outline_sdxl(base: Base, model: ModelConfig, precision: PrecisionConfig, memory: MemoryConfig) -> SDXL:
    """The model on the meta device: what learns, the dtypes of weights, and what the backward pass computes again."""
    parts: dict[str, Any] = {}
    for part, component in COMPONENTS.items():
        empty = build_empty(part, read_config(base, component))
        narrow = precision.weights != "autocast"
        dtype = DTYPES[precision.compute] if narrow else part_dtype(part, model, precision)
        parts[part] = nn.Module.to(empty, "meta", dtype)  # diffusers' own says more
        set_part(parts[part], part, model, memory)
    sdxl = SDXL(**parts)
    for layer in unused_layers(sdxl.text_encoder_1):  # they get no gradient, and DDP fails on such parameters
        layer.requires_grad_(False)
    return sdxl


def give_memory(sdxl: SDXL, device: torch.device, trained: bool = True) -> None:
    """Memory on the device for the parameters of an outline, without values.

    Without ``trained`` those that learn get one element each, as the optimizer has memory for them.
    """
    for module in sdxl.modules():
        for name, outline in module.named_parameters(recurse=False):
            own = trained or not outline.requires_grad
            values = torch.empty(outline.shape if own else (), dtype=outline.dtype, device=device)
            setattr(module, name, nn.Parameter(values.expand(outline.shape), outline.requires_grad))
    for encoder in (sdxl.text_encoder_1, sdxl.text_encoder_2):
        number_positions(encoder, device)


def put_weights(parameter: nn.Parameter, values: Tensor) -> None:
    """Set a parameter."""
    parameter.copy_(values)


def load_base(sdxl: SDXL, base: Base, put: Put = put_weights, trained: bool = True) -> None:
    """Put the base's weights into place, one tensor at a time; ``put`` sets a parameter that learns.

    Without ``trained`` those that learn are left to a checkpoint, and not read.

    Raises:
        UserError: when names or shapes are not those of the base's config, or values not finite in a parameter's dtype.
    """
    own = {classic_name(name): value for name, value in sdxl.named_parameters()}
    for part, component in COMPONENTS.items():
        where = f"{component} of {base.reference}"
        parameters = {
            name.removeprefix(f"{part}."): value for name, value in own.items() if name.startswith(f"{part}.")
        }
        if differing := parameters.keys() ^ tensor_names(component, read_config(base, component)).keys():
            raise UserError(f"{where} does not fit its config: {some(differing)}")
        wanted = [name for name, value in parameters.items() if trained or not value.requires_grad]
        for name, tensor in iterate_state(base, component, wanted) if wanted else ():
            load_tensor(parameters[name], where, name, tensor, put)


@torch.no_grad()
def load_tensor(parameter: nn.Parameter, where: str, name: str, tensor: Tensor, put: Put) -> None:
    """Put one of the base's tensors into place."""
    if parameter.shape != tensor.shape:
        shapes = f"{name} has shape {tuple(tensor.shape)}, and by the config {tuple(parameter.shape)}"
        raise UserError(f"{where} does not fit its config: {shapes}")
    if parameter.requires_grad:
        put(parameter, tensor)
        return
    values = tensor.to(parameter.dtype)
    if values.dtype == torch.float16:  # bf16 and fp32 hold whatever the base does
        remedy = "it does not hold the base's values: set precision.frozen (--dtype in sampling) to bf16 or fp32"
        check_finite({name: values}, f"{where} in fp16", remedy)
    parameter.copy_(values)


def use_kernels(sdxl: SDXL, model: ModelConfig) -> None:
    """Which kernels the UNet runs on."""
    use_attention(sdxl.unet, model.attention)
    if model.compile:
        # block by block with free sizes: whole, the UNet would be compiled anew for each of 33 buckets
        sdxl.unet.compile_repeated_blocks(dynamic=True)


def part_dtype(part: str, model: ModelConfig, precision: PrecisionConfig) -> torch.dtype:
    """The format of a part's weights."""
    return torch.float32 if getattr(model, f"train_{part}") else DTYPES[precision.frozen]


def set_part(module: Any, part: str, model: ModelConfig, memory: MemoryConfig) -> None:
    """Whether a part learns, and what of it the backward pass computes again."""
    trained = getattr(model, f"train_{part}")
    module.requires_grad_(trained).train(trained)
    # through a frozen UNet gradients still flow to a trained encoder; nothing flows through a frozen encoder
    if trained or part == "unet":
        use_policy(module, memory.policy, compiled=model.compile)


def build_empty(part: str, config: dict[str, Any]) -> Any:
    """One part from its component config, its parameters on the meta device.

    Raises:
        UserError: where the library cannot build it.
    """
    builders: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel.from_config(config),
        "text_encoder_1": lambda: CLIPTextModel(CLIPTextConfig(**config)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    }
    try:
        with torch.device("meta"):
            module = builders[part]()
    except Exception as error:  # the libraries raise whatever their blocks and activations do
        raise UserError(f"the config of {COMPONENTS[part]} describes no model: {shorten(str(error))}") from error
    number_positions(module, CPU)
    return module


def number_positions(module: nn.Module, device: torch.device) -> None:
    """The encoders' position numbers, which are the only buffers and which no file holds."""
    for name, buffer in list(module.named_buffers()):
        assert name.endswith("position_ids"), name
        numbers = torch.arange(buffer.shape[-1], device=device)[None]
        module.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", numbers, persistent=False)


def classic_name(name: str) -> str:
    """The checkpoint's name of a parameter of SDXL."""
    prefix = "text_encoder_1."
    if name.startswith(prefix) and not name.startswith(prefix + "text_model."):
        return f"{prefix}text_model.{name.removeprefix(prefix)}"
    return name


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Classic name -> parameter, of all that is trained, in the module's order."""
    return {classic_name(name): value for name, value in model.named_parameters() if value.requires_grad}


def load_trained(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    put: Put = put_weights,
    where: str = "the checkpoint",
    remedy: str = "take a sound one",
) -> None:
    """Put a checkpoint's tensors into the trained parameters, one at a time, which may be read as they are asked for.

    Raises:
        UserError: when names or shapes differ, or values are not finite: see ``check_finite`` for the two last words.
    """
    parameters = trained_parameters(model)
    if differing := sorted(parameters.keys() ^ tensors.keys()):
        raise UserError(f"the checkpoint trains other parameters than this config: {', '.join(differing[:4])} ...")
    with torch.no_grad():
        for name, values in check_each(((name, tensors[name]) for name in parameters), where, remedy):
            if parameters[name].shape != values.shape:
                raise UserError(f"{name} has shape {tuple(values.shape)}, the model {tuple(parameters[name].shape)}")
            put(parameters[name], values)


def unused_layers(text_encoder_1: Any) -> Iterator[nn.Module]:
    """The last layer and the final norm, after the hidden state that SDXL uses: 7,089,408 parameters in full SDXL."""
    inner = getattr(text_encoder_1, "text_model", text_encoder_1)  # transformers 4 has one more level
    yield inner.encoder.layers[-1]
    yield inner.final_layer_norm


def use_attention(unet: Any, attention: str) -> None:
    """SDPA is the default of diffusers; xformers is probed by a real call, because it imports without kernels too."""
    if attention == "sdpa":
        return
    try:
        import xformers.ops

        probe = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda")
        xformers.ops.memory_efficient_attention(probe, probe, probe)
    except Exception as error:
        raise UserError(
            f"model.attention: xformers does not work here ({shorten(str(error))}); use sdpa, or, on a machine with an "
            "NVIDIA GPU, pip install --constraint constraints.txt xformers"
        ) from error
    unet.enable_xformers_memory_efficient_attention()

"""What a file or folder of weights is that is not an SDXL base: said from its tensors' names, before any is read.

Each kind is recognised by names that its format always has and an SDXL checkpoint never.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.layout import COMPONENT_FILE, MODEL_INDEX_FILE
from trainer.model.hub import STEMS, find_weights, read_json
from trainer.model.weights_file import LazyFile

UNET, ENCODERS, VAE = "model.diffusion_model.", "conditioner.embedders.", "first_stage_model."
ADAPTERS = ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up", "hada_w", "lokr_w", "oft_blocks")
SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8")
QUANTISED = (".quant_state", ".absmax", ".quant_map", ".qweight", ".qzeros", ".SCB", ".weight_format")
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "string_to_param", "t5xxl"}


def check_model_file(path: Path) -> None:
    """Refuse what is not SDXL's single-file layout, or not whole.

    Raises:
        UserError: saying what the file is.
    """
    if (what := explain_file(LazyFile(path))) is not None:
        raise UserError(f"{path} {what}")


def check_model_folder(folder: Path, parts: Sequence[str]) -> None:
    """Refuse what is not SDXL's diffusers layout with whole safetensors weights."""
    if not (folder / MODEL_INDEX_FILE).is_file():
        raise UserError(f"{folder} is not a diffusers folder: {explain_other_folder(folder)}")
    unet = folder / "unet" / COMPONENT_FILE
    index = read_json(folder / MODEL_INDEX_FILE)
    if what := explain_folder(folder, index, read_json(unet) if unet.is_file() else None):
        raise UserError(f"{folder} {what}")
    for component in parts:
        if not (folder / component / COMPONENT_FILE).is_file():
            if component == "vae":
                continue  # model.vae may name one
            raise UserError(f"{folder} is not an SDXL model: {component}/config.json is missing")
        for path in find_weights(folder / component, STEMS[component]):
            LazyFile(path)  # a Git LFS pointer, the half of a download


def explain_file(file: LazyFile) -> str | None:
    """What a single file is and what to do, where it is not an SDXL model with UNet and both text encoders."""
    return next(explain_tensor_names(file), None) or explain_shapes(file)


def explain_tensor_names(file: LazyFile) -> Iterator[str]:
    """What the names of a file's tensors say it is, the surest kind first."""
    names = list(file)

    def any_begins(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    def any_holds(parts: Sequence[str]) -> bool:
        return any(part in name for name in names for part in parts)

    if not names:
        yield "holds no tensors at all: download it again"
    if any_holds(ADAPTERS) and not any_begins(UNET):
        yield "is a LoRA, which changes a model and is none: name the checkpoint that it was made for, or merge both"
    if any_begins("unet.") and all(name.startswith(("unet.", "text_encoder_1.", "text_encoder_2.")) for name in names):
        yield "is a file of a training checkpoint, which is no model: python scripts/export.py CHECKPOINT makes one"
    if any_begins("control_model.", "controlnet_", "input_hint_block."):
        yield "is a ControlNet, which steers a model and is none: name an SDXL checkpoint"
    if any_begins("image_proj.", "ip_adapter.", "adapter.body."):
        yield "is an image adapter, which steers a model and is none: name an SDXL checkpoint"
    if set(names) and set(names) <= EMBEDDINGS:
        yield "is a textual inversion, a few words' embeddings: name an SDXL checkpoint"
    if any_holds(("double_blocks.", "single_transformer_blocks.")):
        yield "is a Flux model, another architecture than SDXL: only SDXL can be trained"
    if any_holds(("joint_blocks.",)):
        yield "is a Stable Diffusion 3 model, another architecture than SDXL: only SDXL can be trained"
    if any_begins("cond_stage_model."):
        version = "1" if any_begins("cond_stage_model.transformer.") else "2"
        yield f"is a Stable Diffusion {version} model, with one text encoder: only SDXL can be trained"
    if any_begins(f"{ENCODERS}0.model."):
        yield "is SDXL's refiner, which has another UNet and one text encoder: name an SDXL base model"
    if any_holds(EDM_MARKERS):
        yield (
            "is an EDM model (edm_ tensors say so), whose UNet is scaled by sigma and predicts neither epsilon nor v "
            "of SDXL's schedule: it cannot be trained here"
        )
    if any(name.endswith(SCALES) for name in names):
        yield "holds fp8 weights with scales of their own (scaled fp8): take the model in fp16, bf16 or fp32"
    if any_holds(QUANTISED):
        yield "holds quantised weights, which cannot be trained: take the model in fp16, bf16 or fp32"
    yield from explain_missing_parts(any_begins)


def explain_missing_parts(any_begins: Callable[..., bool]) -> Iterator[str]:
    """Parts of a model that lie alone, or in a layout that is not a single file's."""
    if any_begins(UNET) and not any_begins(f"{UNET}input_blocks."):
        yield "is a diffusion model of another architecture than SDXL's UNet: only SDXL can be trained"
    alone = "name the whole checkpoint, or a diffusers folder that this part lies in"
    bare_unet = any_begins("input_blocks.", "output_blocks.") or any_begins("down_blocks.", "up_blocks.")
    if bare_unet or (any_begins(UNET) and not any_begins(ENCODERS)):
        yield f"is a UNet without text encoders: {alone}"
    if not any_begins(UNET):
        if any_begins(VAE, "encoder.down.", "encoder.down_blocks.", "decoder.up.", "decoder.up_blocks."):
            yield f"is a VAE alone, which model.vae can name: {alone}"
        if any_begins(ENCODERS, "text_model.", "transformer.resblocks.", "text_encoders."):
            yield f"holds text encoders alone: {alone}"


def explain_shapes(file: LazyFile) -> str | None:
    """What the first convolution's channels say it is."""
    name = f"{UNET}input_blocks.0.0.weight"
    return explain_channels(file.shape(name)[1]) if name in file and len(file.shape(name)) == 4 else None


def explain_channels(channels: int) -> str | None:
    """A UNet that takes more than latents."""
    kinds = {9: "an inpainting model", 8: "a model that edits pictures by instructions"}
    if channels == 4:
        return None
    return f"is {kinds.get(channels, 'another model')}: its UNet takes {channels} channels, SDXL's takes 4"


def explain_folder(folder: Path, index: dict[str, Any], unet: dict[str, Any] | None) -> str | None:
    """What a diffusers folder holds, where it is not an SDXL base.

    ``index`` is model_index.json, ``unet`` the UNet's config, if there is one.
    """
    kind = index.get("_class_name", "pipeline without a name")
    if (folder / "transformer").is_dir():
        return f"is a {kind}, with a transformer in place of a UNet: only SDXL can be trained"
    if unet is None:
        return None
    if not (folder / "text_encoder" / COMPONENT_FILE).is_file() and (folder / "text_encoder_2").is_dir():
        return f"is SDXL's refiner ({kind} without a first text encoder): name an SDXL base model"
    if not (folder / "text_encoder_2" / COMPONENT_FILE).is_file() and unet.get("addition_embed_type") != "text_time":
        return f"is a {kind} with another UNet than SDXL's (Stable Diffusion 1 or 2): only SDXL can be trained"
    if "quantization_config" in unet:
        return "has a quantised UNet, which cannot be trained: take the model in fp16, bf16 or fp32"
    return explain_channels(unet.get("in_channels", 4))


def explain_other_folder(folder: Path) -> str:
    """What a folder without model_index.json may be."""
    if (folder / "adapter_config.json").is_file() or list(folder.glob("*lora*.safetensors")):
        return "it holds a LoRA, which changes a model and is none"
    if (folder / COMPONENT_FILE).is_file():
        return "it looks like one part of a model: name the folder around it"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if files:
        return f"it holds {', '.join(files[:4])}: name one of these files"
    return "it has no model_index.json"


def note_fp8(files: dict[str, LazyFile]) -> str | None:
    """That weights are stored in fp8, which loads, but has lost what fp16 would hold; None where none are.

    ``files`` by what messages call them.
    """
    counted = {
        where: sum(file.dtype(name).startswith("F8_") for name in file)
        for where, file in files.items()
    }  # fmt: skip
    parts = [f"{count} of {len(files[where])} tensors of {where}" for where, count in counted.items() if count]
    if not parts:
        return None
    return f"{', '.join(parts)} are stored in fp8, with 3 or 2 bits of mantissa: prefer the model in fp16, bf16 or fp32"

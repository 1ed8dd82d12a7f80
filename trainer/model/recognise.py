"""What a file or folder of weights is that is not an SDXL base: said from its tensors' names, before any is read.

Each kind is recognised by names that its format always has and an SDXL checkpoint never.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from trainer.core.errors import UserError, shorten
from trainer.core.json_text import read_json
from trainer.core.layout import COMPONENT_FILE, MODEL_INDEX_FILE
from trainer.model.component_configs import check_component
from trainer.model.hub import STEMS, find_weights
from trainer.model.weights_file import LazyFile

UNET, ENCODERS = r"^model\.diffusion_model\.", r"^conditioner\.embedders\."
WORDS = "(emb_params|clip_l|clip_g|string_to_param|t5xxl)$"
STEERS = "which steers a model and is none: name an SDXL checkpoint"
OTHER = "only SDXL can be trained"
DTYPES_WANTED = "take the model in fp16, bf16 or fp32"
ALONE = "name the whole checkpoint, or a diffusers folder that this part lies in"
NEVER = "^$"

# a pattern of a tensor's name, a second one that no tensor's name has, what the file is and what to do; the surest
# first, and last the parts of a model that lie alone or in a layout that is not a single file's
KINDS = (
    (r"lora_(down|up|A|B)|lora\.(down|up)|hada_w|lokr_w|oft_blocks", UNET,
     "is a LoRA, which changes a model and is none: name the checkpoint that it was made for, or merge both"),
    (r"^unet\.", r"^(?!unet\.|text_encoder_1\.|text_encoder_2\.)",
     "is a file of a training checkpoint, which is no model: python scripts/export.py CHECKPOINT makes one"),
    (r"^(control_model\.|controlnet_|input_hint_block\.)", NEVER, f"is a ControlNet, {STEERS}"),
    (r"^(image_proj|ip_adapter|adapter\.body)\.", NEVER, f"is an image adapter, {STEERS}"),
    (f"^{WORDS}", f"^(?!{WORDS})", "is a textual inversion, a few words' embeddings: name an SDXL checkpoint"),
    (r"(double|single_transformer)_blocks\.", NEVER, f"is a Flux model, another architecture than SDXL: {OTHER}"),
    (r"joint_blocks\.", NEVER, f"is a Stable Diffusion 3 model, another architecture than SDXL: {OTHER}"),
    (r"^cond_stage_model\.transformer\.", NEVER, f"is a Stable Diffusion 1 model, with one text encoder: {OTHER}"),
    (r"^cond_stage_model\.", NEVER, f"is a Stable Diffusion 2 model, with one text encoder: {OTHER}"),
    (rf"{ENCODERS}0\.model\.", NEVER,
     "is SDXL's refiner, which has another UNet and one text encoder: name an SDXL base model"),
    (r"edm_mean|edm_std|edm_vpred\.sigma_(max|min)", NEVER,
     "is an EDM model (edm_ tensors say so), whose UNet is scaled by sigma and predicts neither epsilon nor v of "
     "SDXL's schedule: it cannot be trained here"),
    (r"(\.scale_weight|\.weight_scale|\.scale_input|\.input_scale|scaled_fp8)$", NEVER,
     f"holds fp8 weights with scales of their own (scaled fp8): {DTYPES_WANTED}"),
    (r"\.(quant_state|absmax|quant_map|qweight|qzeros|SCB|weight_format)", NEVER,
     f"holds quantised weights, which cannot be trained: {DTYPES_WANTED}"),
    (UNET, rf"{UNET}input_blocks\.", f"is a diffusion model of another architecture than SDXL's UNet: {OTHER}"),
    (r"^(input|output|down|up)_blocks\.", NEVER, f"is a UNet without text encoders: {ALONE}"),
    (UNET, ENCODERS, f"is a UNet without text encoders: {ALONE}"),
    (r"^(first_stage_model|(encoder|decoder)\.(down|up)(_blocks)?)\.", UNET,
     f"is a VAE alone, which model.vae can name: {ALONE}"),
    (rf"{ENCODERS}|^(text_model|transformer\.resblocks|text_encoders)\.", UNET, f"holds text encoders alone: {ALONE}"),
)  # fmt: skip


def check_model_file(path: Path) -> None:
    """Refuse what is not SDXL's single-file layout with UNet and both text encoders, or not whole.

    Raises:
        UserError: saying what the file is and what to do.
    """
    file = LazyFile(path)
    if not len(file):
        raise UserError(f"{path} holds no tensors at all: download it again")
    names = "\n".join(file)
    for has, lacks, kind in KINDS:
        if re.search(has, names, re.MULTILINE) and not re.search(lacks, names, re.MULTILINE):
            raise UserError(f"{path} {kind}")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if first in file and len(file.shape(first)) == 4 and (what := explain_channels(file.shape(first)[1])):
        raise UserError(f"{path} {what}")


def check_model_folder(folder: Path, parts: Sequence[str]) -> None:
    """Refuse what is not SDXL's diffusers layout with whole safetensors weights."""
    if not (folder / MODEL_INDEX_FILE).is_file():
        raise UserError(f"{folder} is not a diffusers folder: {explain_other_folder(folder)}")
    if what := explain_folder(folder):
        raise UserError(f"{folder} {what}")
    check_component("model_index", read_json(folder / MODEL_INDEX_FILE), f"{folder}: {MODEL_INDEX_FILE}")
    for component in parts:
        if not (folder / component / COMPONENT_FILE).is_file():
            if component == "vae":
                continue  # model.vae may name one
            raise UserError(f"{folder} is not an SDXL model: {component}/config.json is missing")
        for path in find_weights(folder / component, STEMS[component]):
            LazyFile(path)  # a Git LFS pointer, the half of a download


def explain_channels(channels: int) -> str | None:
    """A UNet that takes more than latents."""
    kinds = {9: "an inpainting model", 8: "a model that edits pictures by instructions"}
    if channels == 4:
        return None
    return f"is {kinds.get(channels, 'another model')}: its UNet takes {channels} channels, SDXL's takes 4"


def explain_folder(folder: Path) -> str | None:
    """What a diffusers folder holds, where it is not an SDXL base."""
    kind = shorten(str(read_json(folder / MODEL_INDEX_FILE).get("_class_name", "pipeline without a name")), 80)
    if (folder / "transformer").is_dir():
        return f"is a {kind}, with a transformer in place of a UNet: {OTHER}"
    if not (folder / "unet" / COMPONENT_FILE).is_file():
        return None
    unet = read_json(folder / "unet" / COMPONENT_FILE)
    if not (folder / "text_encoder" / COMPONENT_FILE).is_file() and (folder / "text_encoder_2").is_dir():
        return f"is SDXL's refiner ({kind} without a first text encoder): name an SDXL base model"
    if not (folder / "text_encoder_2" / COMPONENT_FILE).is_file() and unet.get("addition_embed_type") != "text_time":
        return f"is a {kind} with another UNet than SDXL's (Stable Diffusion 1 or 2): {OTHER}"
    if "quantization_config" in unet:
        return f"has a quantised UNet, which cannot be trained: {DTYPES_WANTED}"
    channels = unet.get("in_channels", 4)
    return explain_channels(channels) if isinstance(channels, int) else None  # what it is instead is said by its check


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

"""What the configs of a base may say: for each component the keys that its class takes, with the kind of their values.

A base is somebody else's. What its configs say beyond these keys is left out wherever they are read, so that nothing of
it reaches a library or an export: keys by which programs run code of a model's own (``auto_map``), look for kernels on
the Hub (``attn_implementation``) or load weights otherwise. What would change the model is refused.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from trainer.core.errors import UserError, shorten
from trainer.core.json_text import check_object

ValueCheck = Callable[[Any], bool]
Table = dict[str, tuple[str, ...]]  # the name of a kind -> keys whose values are of it

WORD = re.compile(r"[\w.+-]{1,64}")
MAX_WIDTH, MAX_BLOCKS, MAX_TOKEN = 2**20, 16, 64
TOKEN_FLAGS = {"lstrip", "rstrip", "normalized", "single_word", "special"}


def is_whole(value: Any, first: int = -1, last: int = 2**31) -> bool:
    """Whether a value is a whole number within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and first <= value <= last


def is_word(value: Any) -> bool:
    """Whether a value is a name such as the libraries give, and no text, path or hub id."""
    return isinstance(value, str) and WORD.fullmatch(value) is not None


def is_token(value: Any) -> bool:
    """Whether a value is a token of a tokenizer, as a text or with its settings."""
    if isinstance(value, str):
        return 0 < len(value) <= MAX_TOKEN and value.isprintable()
    if not isinstance(value, dict) or not is_token(value.get("content")) or isinstance(value["content"], dict):
        return False
    more = {key: said for key, said in value.items() if key not in ("content", "id", "__type")}
    return more.keys() <= TOKEN_FLAGS and all(isinstance(said, bool) for said in more.values())


def or_list(kind: ValueCheck) -> ValueCheck:
    """Whether a value is of a kind, or a list of such, one for each block."""
    return lambda value: (
        kind(value) or (isinstance(value, list) and 0 < len(value) <= MAX_BLOCKS and all(kind(each) for each in value))
    )


def list_of(kind: ValueCheck) -> ValueCheck:
    """Whether a value is a list of such."""
    return lambda value: isinstance(value, list) and len(value) <= MAX_WIDTH and all(kind(each) for each in value)


def is_width(value: Any) -> bool:
    """Whether a value is a number of channels, heads or tokens."""
    return is_whole(value, 1, MAX_WIDTH)


def is_real(value: Any) -> bool:
    """Whether a value is a number; diffusers writes -Infinity where a scheduler clips nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


VALUE_KINDS: dict[str, tuple[ValueCheck, str]] = {
    "width": (is_width, f"a whole number from 1 to {MAX_WIDTH:,}"),
    "widths": (or_list(is_width), f"a whole number from 1 to {MAX_WIDTH:,}, or one for each block"),
    "blocks": (
        lambda value: isinstance(value, list) and or_list(is_width)(value),
        f"a list of whole numbers up to {MAX_WIDTH:,}",
    ),
    "layers": (lambda value: is_whole(value, 1, 10), "a whole number from 1 to 10"),
    "depth": (lambda value: is_whole(value, 1, 200), "a whole number from 1 to 200"),
    "depths": (or_list(lambda value: is_whole(value, 0, 64)), "a whole number up to 64, or one for each block"),
    "whole": (lambda value: is_whole(value), "a whole number"),
    "wholes": (lambda value: is_whole(value) or list_of(is_whole)(value), "a whole number, or a list of them"),
    "real": (is_real, "a number"),
    "reals": (list_of(is_real), "a list of numbers"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "word": (is_word, "a name"),
    "words": (lambda value: list_of(is_word)(value) and 0 < len(value) <= MAX_BLOCKS, "a list of names"),
    "length": (lambda value: is_whole(value, 1, 10**31), "a length"),
    "token": (is_token, "a token"),
    "tokens": (list_of(is_token), "a list of tokens"),
    "tokens by id": (
        lambda value: (
            isinstance(value, dict) and all(key.isdecimal() and is_token(each) for key, each in value.items())
        ),
        "tokens by their ids",
    ),
    "any": (lambda value: True, ""),  # model/latents.py has more to say of these
}

UNET_KEYS: Table = {
    "width": (
        "in_channels", "out_channels", "norm_num_groups", "cross_attention_dim", "encoder_hid_dim", "num_class_embeds",
        "addition_time_embed_dim", "addition_embed_type_num_heads", "projection_class_embeddings_input_dim",
        "time_embedding_dim", "time_cond_proj_dim", "conv_in_kernel", "conv_out_kernel",
    ),
    "blocks": ("block_out_channels",),
    "widths": ("attention_head_dim", "num_attention_heads", "sample_size"),
    "layers": ("layers_per_block",),
    "depths": ("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
    "real": (
        "freq_shift", "downsample_padding", "mid_block_scale_factor", "dropout", "norm_eps", "resnet_out_scale_factor",
    ),
    "flag": (
        "center_input_sample", "flip_sin_to_cos", "only_cross_attention", "dual_cross_attention", "upcast_attention",
        "use_linear_projection", "resnet_skip_time_act", "class_embeddings_concat", "mid_block_only_cross_attention",
    ),
    "word": (
        "mid_block_type", "act_fn", "encoder_hid_dim_type", "class_embed_type", "addition_embed_type",
        "resnet_time_scale_shift", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act",
        "attention_type", "cross_attention_norm",
    ),
    "words": ("down_block_types", "up_block_types"),
}  # fmt: skip
TEXT_ENCODER_KEYS: Table = {
    "width": (
        "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_attention_heads",
        "max_position_embeddings",
    ),
    "depth": ("num_hidden_layers",),
    "real": ("layer_norm_eps", "attention_dropout", "dropout", "initializer_range", "initializer_factor"),
    "wholes": ("pad_token_id", "bos_token_id", "eos_token_id"),
    "word": ("hidden_act", "model_type", "torch_dtype", "dtype", "transformers_version"),
    "words": ("architectures",),
}  # fmt: skip
VAE_KEYS: Table = {
    "width": ("in_channels", "out_channels", "latent_channels", "norm_num_groups"),
    "blocks": ("block_out_channels",),
    "widths": ("sample_size",),
    "layers": ("layers_per_block",),
    "flag": ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
    "word": ("act_fn",),
    "words": ("down_block_types", "up_block_types"),
    "any": ("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
}
SCHEDULER_KEYS: Table = {  # of all diffusers schedulers that know SDXL's noise schedule
    "width": ("num_train_timesteps", "original_inference_steps"),
    "wholes": ("steps_offset", "solver_order", "corrector_order", "predictor_order", "disable_corrector"),
    "real": (
        "beta_start", "beta_end", "sigma_min", "sigma_max", "sample_max_value", "clip_sample_range", "flow_shift",
        "dynamic_thresholding_ratio", "lambda_min_clipped", "timestep_scaling", "snr_shift_scale", "shift_terminal",
    ),
    "reals": ("trained_betas",),
    "flag": (
        "clip_sample", "thresholding", "set_alpha_to_one", "skip_prk_steps", "rescale_betas_zero_snr", "predict_x0",
        "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "use_lu_lambdas",
        "euler_at_final", "lower_order_final", "use_dynamic_shifting",
    ),
    "word": (
        "beta_schedule", "prediction_type", "timestep_spacing", "timestep_type", "interpolation_type", "solver_type",
        "final_sigmas_type", "algorithm_type", "variance_type", "time_shift_type",
    ),
}  # fmt: skip
TOKENIZER_KEYS: Table = {  # tokenizer_config.json and special_tokens_map.json
    "flag": ("add_prefix_space", "clean_up_tokenization_spaces", "do_lower_case", "add_bos_token", "add_eos_token"),
    "word": ("tokenizer_class", "errors", "padding_side", "truncation_side"),
    "length": ("model_max_length",),
    "token": ("bos_token", "eos_token", "pad_token", "unk_token"),
    "tokens": ("additional_special_tokens",),
    "tokens by id": ("added_tokens_decoder",),
}
COMPONENT_TABLES: dict[str, Table] = {
    "unet": UNET_KEYS, "text_encoder": TEXT_ENCODER_KEYS, "text_encoder_2": TEXT_ENCODER_KEYS, "vae": VAE_KEYS,
    "scheduler": SCHEDULER_KEYS,
    "model_index": {"flag": ("force_zeros_for_empty_prompt",)}, "tokenizer": TOKENIZER_KEYS,
}  # fmt: skip
CONFIG_KEYS: dict[str, dict[str, str]] = {
    component: {key: kind for kind, keys in table.items() for key in keys}
    | {"_class_name": "word", "_diffusers_version": "word"}
    for component, table in COMPONENT_TABLES.items()
}
NEEDED = {
    "unet": ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "cross_attention_dim"),
    "vae": ("block_out_channels",),
}
# what a key may say, where anything else is another model
CLASSES = {
    ("unet", "_class_name"): ("UNet2DConditionModel",),
    ("text_encoder", "model_type"): ("clip_text_model", "clip"),
    ("text_encoder_2", "model_type"): ("clip_text_model", "clip"),
}
CLASS_LIBRARIES = ("diffusers", "transformers", None)
PIPELINE_CLASSES = {  # a pipeline's classes, as model_index.json names them: others run code of the model's own
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "CLIPTextModel"),
}
PIPELINE_OTHERS = {"scheduler", "tokenizer", "tokenizer_2", "vae", "feature_extractor", "image_encoder",
                   "add_watermarker"}  # fmt: skip
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
HOOKS = {"auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation"}
MOST_KEYS = 6  # keys in a note
# notes of a maker's disk and of the libraries, which say nothing of the model and are not worth a word
UNREMARKED = {"_name_or_path", "name_or_path", "_commit_hash", "special_tokens_map_file", "tokenizer_file"}


def check_component(component: str, config: Any, where: str) -> dict[str, Any]:
    """Of a component's config the keys that its class takes, in their order; the others are left out.

    Args:
        component: a part of the pipeline, "scheduler", "model_index" or "tokenizer".
        where: what messages call the file.

    Raises:
        UserError: where it is no such config, or says that the model is another one than what is built from it.
    """
    said = check_object(config, where)
    if said.get("quantization_config"):
        raise UserError(
            f"{where} has a quantization_config: quantised weights cannot be trained; take the model in fp16, bf16 or "
            "fp32"
        )
    if absent := [key for key in NEEDED.get(component, ()) if said.get(key) is None]:
        raise UserError(f"{where} lacks {', '.join(absent)}")
    left_out = set(list_left_out(component, said))
    kept = {key: value for key, value in said.items() if key not in left_out}
    for key, value in kept.items():
        check_config_value(component, key, value, where)
    return kept


def check_config_value(component: str, key: str, value: Any, where: str) -> None:
    """Refuse a value that its key cannot have, or that stands for another class than SDXL's. Null is the default."""
    if component == "model_index" and key in PIPELINE_CLASSES:
        named = isinstance(value, list) and len(value) == 2 and value[0] in CLASS_LIBRARIES
        if value is not None and not (named and value[1] in (*PIPELINE_CLASSES[key], None)):
            raise UserError(
                f"{where}: its {key} is {shorten(repr(value), 80)}, which is none of the classes that SDXL has there "
                f"({', '.join(PIPELINE_CLASSES[key])})"
            )
        return
    fits, kind = VALUE_KINDS[CONFIG_KEYS[component].get(key, "any")]
    if value is not None and not fits(value):
        raise UserError(f"{where}: {key} must be {kind}, not {shorten(repr(value), 80)}")
    classes = CLASSES.get((component, key))
    if value is not None and classes is not None and value not in classes:
        raise UserError(f"{where}: {key} is {value}, which is another model than SDXL's ({' or '.join(classes)})")


def list_left_out(component: str, config: Mapping[str, Any]) -> list[str]:
    """The keys of a config that nothing here reads."""
    strange = [key for key in config if key not in CONFIG_KEYS[component]]
    match component:
        case "vae":  # what is not known may change latents: model/latents.py refuses it
            return [key for key in strange if key[:1] == "_" or not config[key] or key in HOOKS]
        case "model_index":
            return [key for key in strange if key not in PIPELINE_CLASSES]
        case "tokenizer" if config.get("tokenizer_class", CLIP_TOKENIZERS[0]) not in CLIP_TOKENIZERS:
            return [*strange, "tokenizer_class"]
    return strange


def describe_left_out(component: str, config: Mapping[str, Any]) -> str | None:
    """The left out keys that say something which is worth a word; None where there are none."""
    left_out = [key for key in list_left_out(component, config) if key not in UNREMARKED and config[key]]
    names = sorted(left_out, key=lambda key: (key not in HOOKS, key))
    if component == "model_index":
        names = [key for key in names if key not in PIPELINE_OTHERS or not is_class(config[key])]
    shown = ", ".join(shorten(key, 40) for key in names[:MOST_KEYS])
    return (shown + (" ..." if names[MOST_KEYS:] else "")) or None


def is_class(value: Any) -> bool:
    """Whether a pipeline's part is a class of the libraries, or none, or a setting."""
    if not isinstance(value, list):
        return isinstance(value, bool)
    return len(value) == 2 and value[0] in CLASS_LIBRARIES and (value[1] is None or is_word(value[1]))

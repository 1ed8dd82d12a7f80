"""Whether a model has SDXL's own shapes: other programs load a single file of these and of no others."""

from trainer.model.base import Base, read_config, read_sdxl_config

SHAPING = {  # what a component's config says of the shapes of its tensors
    "unet": ("in_channels", "block_out_channels", "layers_per_block", "transformer_layers_per_block",
             "cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    "text_encoder": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "text_encoder_2": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim"),
    "vae": ("latent_channels", "block_out_channels", "layers_per_block"),
}  # fmt: skip


def has_sdxl_shapes(base: Base) -> bool:
    """Whether all configs say what SDXL's say; what a config leaves out is as there."""
    for component, keys in SHAPING.items():
        own, known = read_config(base, component), read_sdxl_config(component)
        if any(own.get(key, known[key]) != known[key] for key in keys):
            return False
    return True

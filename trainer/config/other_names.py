"""What users of sd-scripts, diffusers' training scripts, OneTrainer and SimpleTuner type, and what it is called here.

The names are those of the programs' command lines and configs, as their documentation has them.
"""

import difflib
import re
from collections.abc import Iterable

from trainer.config.schema import Config
from trainer.config.yaml_text import field_types

# sections and fields that mean the same, in the order of the message; and how a value is meant where that differs
Counterpart = tuple[str, str]
RATES = "optim.unet_lr optim.text_encoder_1_lr optim.text_encoder_2_lr"
ACCUMULATION = "micro-batches are accumulated until data.global_batch_size samples make a step"
MADE_BEFORE = "latents are always made before, by scripts/build_shards.py: leave it out"
SAVED = "a checkpoint always holds what a resume needs; weights for use are made by scripts/export.py"
NO_LORA = "LoRAs are not trained here, only whole models"
UNTOUCHED = "images are never flipped, recoloured or cropped at random: leave it out"

OTHER_NAMES: dict[str, Counterpart] = {
    # rates, optimizer, schedule
    "lr": (RATES, "one for each part that is trained"),
    "learning_rate": (RATES, "one for each part that is trained"),
    "unet_learning_rate": ("optim.unet_lr", ""),
    "learning_rate_te": ("optim.text_encoder_1_lr optim.text_encoder_2_lr", "with model.train_text_encoder_1 and _2"),
    "learning_rate_te1": ("optim.text_encoder_1_lr", "with model.train_text_encoder_1: true"),
    "learning_rate_te2": ("optim.text_encoder_2_lr", "with model.train_text_encoder_2: true"),
    "text_encoder_lr": ("optim.text_encoder_1_lr optim.text_encoder_2_lr", "with model.train_text_encoder_1 and _2"),
    "text_encoder_learning_rate": ("optim.text_encoder_1_lr", "with model.train_text_encoder_1: true"),
    "text_encoder_2_learning_rate": ("optim.text_encoder_2_lr", "with model.train_text_encoder_2: true"),
    "train_text_encoder": ("model.train_text_encoder_1 model.train_text_encoder_2", "each with its rate in optim"),
    "network_train_unet_only": ("model.train_text_encoder_1 model.train_text_encoder_2", "false for both"),
    "optimizer_type": ("optim.name", "adamw, adamw8bit or adafactor"),
    "optimizer": ("optim.name", "adamw, adamw8bit or adafactor"),
    "use_8bit_adam": ("optim.name", "adamw8bit"),
    "optimizer_args": ("optim.betas optim.eps optim.weight_decay", "each a key of its own"),
    "optimizer_beta1": ("optim.betas", "a list of both, such as [0.9, 0.99]"),
    "optimizer_beta2": ("optim.betas", "a list of both, such as [0.9, 0.99]"),
    "adam_beta1": ("optim.betas", "a list of both, such as [0.9, 0.99]"),
    "adam_beta2": ("optim.betas", "a list of both, such as [0.9, 0.99]"),
    "beta1": ("optim.betas", "a list of both, such as [0.9, 0.99]"),
    "beta2": ("optim.betas", "a list of both, such as [0.9, 0.99]"),
    "adam_epsilon": ("optim.eps", ""),
    "adam_weight_decay": ("optim.weight_decay", ""),
    "clip_grad_norm": ("optim.max_grad_norm", "null: not clipped"),
    "lr_scheduler": ("schedule.lr", "constant, cosine or cosine_restarts; a warm-up is schedule.warmup_steps"),
    "learning_rate_scheduler": ("schedule.lr", "constant, cosine or cosine_restarts"),
    "lr_warmup_steps": ("schedule.warmup_steps", "in optimizer steps"),
    "learning_rate_warmup_steps": ("schedule.warmup_steps", "in optimizer steps"),
    "lr_scheduler_num_cycles": ("schedule.num_cycles", "with schedule.lr: cosine_restarts"),
    "lr_num_cycles": ("schedule.num_cycles", "with schedule.lr: cosine_restarts"),
    "learning_rate_cycles": ("schedule.num_cycles", "with schedule.lr: cosine_restarts"),
    "lr_scheduler_min_lr_ratio": ("schedule.min_lr_ratio", ""),
    "learning_rate_min_factor": ("schedule.min_lr_ratio", ""),
    "lr_end": ("schedule.min_lr_ratio", "as a share of the peak"),
    "max_train_steps": ("schedule.max_steps", "in optimizer steps; schedule.epochs is null then"),
    "max_train_epochs": ("schedule.epochs", "schedule.max_steps is null then"),
    "num_train_epochs": ("schedule.epochs", "schedule.max_steps is null then"),
    "scale_lr": ("", "rates are written as they are used: leave it out"),
    "use_ema": ("", "no average of the weights is kept: leave it out"),
    "ema": ("", "no average of the weights is kept: leave it out"),
    # batches
    "train_batch_size": ("data.micro_batch_size", f"of one process; {ACCUMULATION}"),
    "batch_size": ("data.micro_batch_size", f"of one process; {ACCUMULATION}"),
    "gradient_accumulation_steps": ("data.global_batch_size", f"samples of all processes; {ACCUMULATION}"),
    "vae_batch_size": ("data.encode_batch_size", ""),
    "max_data_loader_n_workers": ("data.loader_threads", ""),
    "dataloader_num_workers": ("data.loader_threads", ""),
    "dataloader_threads": ("data.loader_threads", ""),
    "persistent_data_loader_workers": ("", "threads stay as long as the run: leave it out"),
    # data
    "train_data_dir": ("data.images", "with data.posts: null where captions lie beside the images"),
    "instance_data_dir": ("data.images", "with data.posts: null where captions lie beside the images"),
    "in_json": ("data.sources", "an entry {kind: kohya, path: meta.json, images: folder}"),
    "dataset_name": ("data.sources", "an entry {kind: dataset, path: owner/name}"),
    "dataset_config": ("data.sources", "an entry for each folder"),
    "data_backend_config": ("data.sources", "an entry for each folder"),
    "concept_file_name": ("data.sources", "an entry for each folder"),
    "num_repeats": ("data.sources", "repeats of the entry; the number in a folder's name, as in 10_name, is not read"),
    "dataset_repeats": ("data.sources", "repeats of the entry"),
    "repeats": ("data.sources", "repeats of the entry"),
    "image_column": ("data.sources", "image_column of the entry"),
    "caption_column": ("data.sources", "caption_column of the entry"),
    "caption_extension": ("", "a caption beside an image is found by .txt, .caption or .tags: leave it out"),
    "reg_data_dir": ("", "there are no regularization images; another entry of data.sources adds images"),
    "masked_loss": ("", "there is no masked loss: leave it out"),
    "masked_training": ("", "there is no masked loss: leave it out"),
    "flip_aug": ("", UNTOUCHED),
    "random_flip": ("", UNTOUCHED),
    "color_aug": ("", UNTOUCHED),
    "random_crop": ("", UNTOUCHED),
    "center_crop": ("", "images are resized to cover their bucket and cropped in the middle: leave it out"),
    "cache_latents": ("", MADE_BEFORE),
    "cache_latents_to_disk": ("", MADE_BEFORE),
    "image_caching": ("", MADE_BEFORE),
    "cache_dir": ("", f"{MADE_BEFORE}; HF_HOME is where models of the hub are kept"),
    "cache_text_encoder_outputs": (
        "",
        "captions change in every pass, so that encoders run while training: leave it out",
    ),
    # buckets
    "resolution": ("buckets.base_resolution", "one side in pixels, such as 1024"),
    "enable_bucket": ("", "buckets are always used, see the section buckets: leave it out"),
    "aspect_ratio_bucketing": ("", "buckets are always used, see the section buckets: leave it out"),
    "min_bucket_reso": ("buckets.min_side", ""),
    "max_bucket_reso": ("buckets.max_side", ""),
    "bucket_reso_steps": ("buckets.step", ""),
    "bucket_no_upscale": ("buckets.upscale", "false"),
    # captions
    "shuffle_caption": ("captions.shuffle", ""),
    "caption_dropout_rate": ("captions.caption_dropout", ""),
    "caption_dropout_probability": ("captions.caption_dropout", ""),
    "proportion_empty_prompts": ("captions.caption_dropout", ""),
    "caption_tag_dropout_rate": ("captions.tag_dropout", ""),
    "tokenizer_max_length": ("captions.max_token_length", "75, 150, 225 and so on up to 450"),
    "clip_skip": ("", "SDXL reads the encoders' last layer but one, always: leave it out"),
    "caption_separator": ("", "tags are separated by commas, always: leave it out"),
    # model
    "pretrained_model_name_or_path": ("model.pretrained", ""),
    "base_model_name": ("model.pretrained", ""),
    "pretrained_vae_model_name_or_path": ("model.vae", ""),
    "vae_path": ("model.vae", ""),
    "sdpa": ("model.attention", "sdpa"),
    "xformers": ("model.attention", "xformers"),
    "mem_eff_attn": ("model.attention", "sdpa"),
    "enable_xformers_memory_efficient_attention": ("model.attention", "xformers"),
    "attention_mechanism": ("model.attention", "sdpa or xformers"),
    "torch_compile": ("model.compile", "true or false"),
    "v2": ("", "only SDXL is trained here"),
    "model_type": ("", "only SDXL is trained here"),
    "model_family": ("", "only SDXL is trained here"),
    "network_module": ("", NO_LORA),
    "network_dim": ("", NO_LORA),
    "network_alpha": ("", NO_LORA),
    "lora_rank": ("", NO_LORA),
    "rank": ("", NO_LORA),
    # diffusion
    "v_parameterization": ("diffusion.prediction_type", "v_prediction"),
    "force_v_prediction": ("diffusion.prediction_type", "v_prediction"),
    "snr_gamma": ("diffusion.min_snr_gamma", ""),
    "offset_noise_weight": ("diffusion.noise_offset", ""),
    "rescale_betas_zero_snr": ("diffusion.zero_terminal_snr", ""),
    "rescale_noise_scheduler_to_zero_terminal_snr": ("diffusion.zero_terminal_snr", ""),
    # precision and memory
    "mixed_precision": ("precision.compute", "fp16, bf16, or fp32 for no"),
    "train_dtype": ("precision.compute", "fp16, bf16 or fp32"),
    "save_precision": ("publish.dtype", "fp16, bf16, or fp32 for float"),
    "output_dtype": ("publish.dtype", "fp16, bf16 or fp32"),
    "no_half_vae": ("precision.vae", "fp32"),
    "allow_tf32": ("precision.tf32", "true or false"),
    "full_fp16": ("precision.weights", "master, with precision.compute=fp16"),
    "full_bf16": ("precision.weights", "stochastic, or master, with precision.compute=bf16"),
    # what a run writes
    "output_dir": ("run.output_dir", "the run's files lie in it under run.name"),
    "workspace_dir": ("run.output_dir", "the run's files lie in it under run.name"),
    "output_name": ("run.name", ""),
    "output_model_destination": ("run.name", "scripts/export.py writes the model into the run's folder"),
    "save_every_n_steps": ("checkpoint.every_steps", "in optimizer steps"),
    "save_every_n_epochs": ("checkpoint.every_steps", "in optimizer steps"),
    "checkpointing_steps": ("checkpoint.every_steps", "in optimizer steps"),
    "backup_after": ("checkpoint.every_steps", "in optimizer steps"),
    "save_last_n_steps": ("checkpoint.keep_last", "how many checkpoints are kept"),
    "checkpoints_total_limit": ("checkpoint.keep_last", "how many checkpoints are kept"),
    "rolling_backup_count": ("checkpoint.keep_last", "how many checkpoints are kept"),
    "resume": ("checkpoint.resume", "the same command resumes by itself"),
    "resume_from_checkpoint": ("checkpoint.resume", "the same command resumes by itself"),
    "continue_last_backup": ("checkpoint.resume", "the same command resumes by itself"),
    "save_state": ("", SAVED),
    "save_model_as": ("publish.formats", "single_file, diffusers, or both"),
    "output_model_format": ("publish.formats", "single_file, diffusers, or both"),
    "log_with": ("logging.trackers", "a list of wandb and tensorboard"),
    "report_to": ("logging.trackers", "a list of wandb and tensorboard"),
    "wandb": ("logging.trackers", "[wandb]"),
    "tensorboard": ("logging.trackers", "[tensorboard]"),
    "log_tracker_name": ("logging.project", ""),
    "tracker_project_name": ("logging.project", ""),
    "wandb_run_name": ("run.name", ""),
    "tracker_run_name": ("run.name", ""),
    "logging_dir": ("", "what is logged lies in the run's folder: leave it out"),
    # memory
    "gradient_checkpointing": ("memory.policy", "full, or none for none"),
    # samples and publishing
    "sample_prompts": ("sampling.prompts", "a list in the config; sampling.every_steps says how often"),
    "validation_prompt": ("sampling.prompts", "a list; sampling.every_steps says how often"),
    "validation_prompts": ("sampling.prompts", "a list; sampling.every_steps says how often"),
    "sample_every_n_steps": ("sampling.every_steps", "in optimizer steps"),
    "sample_every_n_epochs": ("sampling.every_steps", "in optimizer steps"),
    "validation_steps": ("sampling.every_steps", "in optimizer steps"),
    "sample_sampler": ("", "samples are drawn by Euler ancestral: leave it out"),
    "validation_guidance": ("sampling.guidance_scale", ""),
    "validation_num_inference_steps": ("sampling.num_inference_steps", ""),
    "validation_negative_prompt": ("sampling.negative_prompt", ""),
    "hub_model_id": ("publish.repo_id", "for scripts/publish.py"),
    "huggingface_repo_id": ("publish.repo_id", "for scripts/publish.py"),
    "push_to_hub": ("publish.repo_id", "scripts/publish.py --upload sends the model"),
    "metadata_title": ("publish.title", ""),
    "metadata_author": ("publish.author", ""),
    "config_file": ("", "config files are YAML and named without an option, as in train.py my.yaml; see extends"),
    "extends": ("", "it stands at the top of a config file; on the command line several files may be given"),
}


def explain_unknown(name: str, beside: Iterable[str]) -> str:
    """The end of a message about a key that is unknown where it stands; empty where nothing is like it.

    ``name`` is the key without its section, ``beside`` the names that are known in its place. Another program's name
    is answered with ours, one of another section with its key, and a misspelt one with the nearest beside it.
    """
    plain = re.sub(r"\W", "_", name.lstrip("-")).lower()
    if plain in OTHER_NAMES:
        keys, note = OTHER_NAMES[plain]
        if not keys:
            return f": {note}"
        listed = " and ".join(filter(None, [", ".join(keys.split()[:-1]), keys.split()[-1]]))
        return f", here it is {listed}{f' ({note})' if note else ''}"
    if elsewhere := [key for key in own_keys() if key.rpartition(".")[2] == plain]:
        return f", did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(name, beside, n=1)
    return f", did you mean {near[0]}?" if near else ""


def own_keys() -> list[str]:
    """Every ``section.field`` of a config."""
    return [f"{section}.{name}" for section, hint in field_types(Config).items() for name in field_types(hint)]

"""A checkpoint -> what others load: a single file in Stability's layout, a diffusers folder in the classic layout.

Frozen parts come from the base, the VAE is the one that made the latents; both are refused when they are not the ones
that the checkpoint names by hash, or say something else of themselves than they did in training. The same checkpoint
gives the same bytes, so that exporting twice changes nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor

from trainer.config.environment import hide_environment
from trainer.config.load import load_config
from trainer.config.schema import Config, DiffusionConfig, Dtype, Format
from trainer.core.errors import UserError
from trainer.core.files import write_file, write_json
from trainer.core.layout import CHECKPOINTS_FOLDER, CONFIG_FILE, EXPORT_FOLDER, LINEAGE_FILE, export_name
from trainer.core.progress import BYTES, Meter
from trainer.model.base import (
    CONFIGS_KEY,
    Base,
    VaeWeights,
    config_file,
    find_base,
    find_tokenizers,
    hash_base,
    read_config,
    read_predictions,
    read_sdxl_config,
    read_state,
    read_vae,
)
from trainer.model.checkpoint import check_fit_to_use, find_checkpoint, read_train_state, verify_checkpoint
from trainer.model.diffusion import (
    Prediction,
    marker_names,
    scheduler_prediction,
    spell,
    trained_prediction,
    write_scheduler,
)
from trainer.model.exports import find_recorded
from trainer.model.hub import STEMS
from trainer.model.latents import find_other_numbers
from trainer.model.lineage import LINEAGE_KEY, shorten_paths
from trainer.model.restore import open_weights
from trainer.model.sdxl import COMPONENTS, DTYPES
from trainer.model.single_file import some, to_single_file
from trainer.model.weights_file import save_tensors
from trainer.release.artefacts import put_whole, save_stamped, write_export_sums, write_tokenizer
from trainer.release.licence import FAIPL
from trainer.train.run import locate_from_run

RECIPE_KEY = "trainer.recipe"  # the config, as the user wrote it
SHAPING = {  # what a component's config says of the shapes of its tensors
    "unet": ("in_channels", "block_out_channels", "layers_per_block", "transformer_layers_per_block",
             "cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    "text_encoder": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "text_encoder_2": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "projection_dim"),
    "vae": ("latent_channels", "block_out_channels", "layers_per_block"),
}  # fmt: skip
Parts = dict[str, dict[str, Tensor]]
Configs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Export:
    """What is written, whatever the format."""

    name: str
    parts: Parts
    configs: Configs  # of the components, the scheduler and the pipeline ("model_index")
    metadata: dict[str, str]  # ModelSpec's keys and ours; without the hash
    lineage: dict[str, Any]
    tokenizers: tuple[Path, Path] | None  # only for a diffusers folder


def export(source: Path, out: Path | None = None, dtype: Dtype | None = None) -> list[Path]:
    """Write a run's newest checkpoint, or the given one, in the formats of ``publish.formats``; returns what is there.

    ``out`` is RUN/export unless given, ``dtype`` that of ``publish.dtype``. A checkpoint alone has its own config.

    Raises:
        UserError: for a damaged checkpoint, another base or VAE than it names, values that the dtype cannot hold, or
            where another export lies under the same name.
    """
    checkpoint, run_folder = find_run_checkpoint(source)
    if out is None and run_folder is None:
        raise UserError(f"{checkpoint} does not lie in a run's checkpoints/: say where to write with --out DIR")
    folder = out or Path(str(run_folder)) / EXPORT_FOLDER
    verify_checkpoint(checkpoint)
    state = read_train_state(checkpoint)
    check_fit_to_use(checkpoint, state)  # before its config is read
    file = run_folder / CONFIG_FILE if run_folder is not None else None
    config = load_config([file]) if file and file.is_file() else load_config([], values=state["config"])
    made = build_export(checkpoint, state, config, dtype or config.publish.dtype, run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_formats(made, config.publish.formats, folder / f"{made.name}.safetensors", folder / made.name)
    write_export_sums(written)
    return written


def write_formats(made: Export, formats: Sequence[Format], single: Path, folder: Path) -> list[Path]:
    """Write the formats that are asked for, each under its name."""
    written = []
    for form in formats:
        match form:
            case "single_file":
                written.append(write_single_file(single, made))
            case "diffusers":
                written.append(write_diffusers(folder, made))
            case _:
                assert_never(form)
    return written


def find_run_checkpoint(source: Path) -> tuple[Path, Path | None]:
    """The checkpoint that ``source`` means, and the run's folder, if it lies in one."""
    checkpoint = find_checkpoint(source)
    if checkpoint.parent.name != CHECKPOINTS_FOLDER:
        checkpoint = checkpoint.resolve()
    return checkpoint, checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS_FOLDER else None


def build_export(
    checkpoint: Path, state: Mapping[str, Any], config: Config, dtype: Dtype, run_folder: Path | None = None
) -> Export:
    """Collect all that is written: tensors in the export's dtype, configs, metadata.

    Relative paths of the config are looked for here and where ``run_folder`` says that training ran.
    """
    base = find_named_base(state["base"], config, run_folder)
    check_diffusion(checkpoint, state, config)
    vae = read_vae(config.model.vae and locate_from_run(run_folder, config.model.vae), base, config.model.vae_revision)
    check_vae(checkpoint, state, vae, config.model.vae or base.reference)
    trained = open_weights(checkpoint)
    if strange := [name for name in trained if name.partition(".")[0] not in COMPONENTS]:
        raise UserError(f"{checkpoint} holds tensors of no known part: {some(strange)}")
    parts = {component: overlay(part, base, trained, dtype) for part, component in COMPONENTS.items()}
    parts["vae"] = {name: cast(f"vae.{name}", tensor, dtype) for name, tensor in vae.state.items()}
    configs = build_configs(base, vae.config, config.diffusion, dtype)
    lineage = shorten_paths(state["lineage"])
    tokenizer = config.model.tokenizer and locate_from_run(run_folder, config.model.tokenizer)
    return Export(
        name=export_name(state["run"], state["step"], dtype),
        parts=parts,
        configs=configs,
        metadata=build_metadata(config, state, lineage, configs),
        lineage=lineage,
        tokenizers=find_tokenizers(base, tokenizer) if "diffusers" in config.publish.formats else None,
    )


def find_named_base(named: Mapping[str, Any], config: Config, run_folder: Path | None) -> Base:
    """The start weights that a checkpoint names, where it says or where the config says now.

    Raises:
        UserError: when they are other weights, or say that they predict something else than they did in training.
    """
    # what an environment variable held was not recorded
    reference = config.model.pretrained if "${" in named["reference"] else named["reference"]
    recorded, configured = (locate_from_run(run_folder, path) for path in (reference, config.model.pretrained))
    moved = not Path(recorded).expanduser().exists() and Path(configured).expanduser().exists()
    if moved:
        base = find_base(str(find_recorded(Path(configured).expanduser(), recorded) or configured))
    else:
        base = find_base(recorded, named["revision"])
    if (sha256 := hash_base(base)) != named["sha256"]:
        raise UserError(
            f"{base.reference} is not the model that this checkpoint was trained from: SHA-256 {sha256}, not "
            f"{named['sha256']}. Put that model back, or point model.pretrained in the run's config.yaml to it"
        )
    # a folder's hash is of its weights, and not of its scheduler's config; version 0.2 did not record what it says
    if then := named.get("prediction"):
        before, now = Prediction(**then), next(iter(read_predictions(base).values()))
        if before != now:
            raise UserError(
                f"{base.reference} says that it predicts {now}, and said {before} when this checkpoint was trained "
                "from it: put its scheduler's config back"
            )
    return base


def check_vae(checkpoint: Path, state: Mapping[str, Any], vae: VaeWeights, named: str) -> None:
    """Refuse another VAE than the one that made the latents; ``named`` is what messages call it.

    Raises:
        UserError: when its weights or its numbers are others; version 0.2 did not record the numbers.
    """
    if vae.sha256 != state["vae_sha256"]:
        raise UserError(
            f"the VAE of {named} is not the one that made the latents of {checkpoint}: "
            f"SHA-256 {vae.sha256}, not {state['vae_sha256']}. Set model.vae to that one"
        )
    if differing := find_other_numbers(state.get("vae_numbers", {}), vae.scale):
        raise UserError(
            f"the VAE of {named} has other numbers in its config than when {checkpoint} was trained: {differing}. "
            "Put its config.json back"
        )


def check_diffusion(checkpoint: Path, state: Mapping[str, Any], config: Config) -> None:
    """Refuse to write into an export that the model predicts something else than it was trained to.

    Raises:
        UserError: where the run's config.yaml was changed after the checkpoint was written.
    """
    then, now = state["config"]["diffusion"], config.written["diffusion"]
    for name in ("prediction_type", "zero_terminal_snr"):
        if then.get(name) != now.get(name):
            raise UserError(
                f"{checkpoint} was trained with diffusion.{name} {then.get(name)}, and the run's config.yaml says "
                f"{now.get(name)}: put it back"
            )


def overlay(part: str, base: Base, trained: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """A component of the base with the trained tensors in place of its own, in the export's dtype.

    One tensor at a time, so that the fp32 weights are never in memory as a whole.

    Raises:
        UserError: for a trained tensor that the base does not have in that shape.
    """
    component = COMPONENTS[part]
    state = read_state(base, component)
    own = {name.removeprefix(f"{part}.") for name in trained if name.startswith(f"{part}.")}
    if strange := own - set(state):
        raise UserError(f"the checkpoint's {part} has tensors that {base.reference} has not: {some(strange)}")
    with Meter(f"convert {component} to {dtype}", sum(tensor.nbytes for tensor in state.values()), BYTES) as meter:
        for name, before in state.items():
            tensor = trained[f"{part}.{name}"] if name in own else before
            if tensor.shape != before.shape:
                shapes = f"{tuple(tensor.shape)} in the checkpoint, {tuple(before.shape)} in {base.reference}"
                raise UserError(f"{part}.{name} has different shapes: {shapes}")
            state[name] = cast(f"{component}.{name}", tensor, dtype)
            meter.update(before.nbytes)
    return state


def cast(name: str, tensor: Tensor, dtype: Dtype) -> Tensor:
    """A tensor in another dtype.

    Raises:
        UserError: when it holds values that are not finite in it.
    """
    result = tensor.to(DTYPES[dtype]).contiguous()
    if not math.isfinite(result.sum(dtype=torch.float64)):  # a sum that finite values cannot overflow
        raise UserError(
            f"{name} holds values that are not finite in {dtype} (the largest is {float(tensor.abs().max()):g}): "
            "export with --dtype bf16 or fp32; if it is nan or inf already, the run has diverged"
        )
    return result


def build_configs(base: Base, vae_config: dict[str, Any], diffusion: DiffusionConfig, dtype: Dtype) -> Configs:
    """The configs of components, scheduler and pipeline, as transformers 4 and 5 and diffusers understand them."""
    configs = {component: dict(read_config(base, component)) for component in COMPONENTS.values()}
    architectures = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    for component, architecture in architectures.items():
        configs[component].pop("dtype", None)  # transformers 5's name for it
        name = str(DTYPES[dtype]).removeprefix("torch.")
        configs[component] |= {"architectures": [architecture], "model_type": "clip_text_model", "torch_dtype": name}
    configs["vae"] = dict(vae_config)
    said = read_config(base, "scheduler")
    scheduler_prediction(said)  # of a class of diffusers', which the index will name
    scheduler = write_scheduler(said, trained_prediction(diffusion))
    index = read_sdxl_config("model_index")
    index["force_zeros_for_empty_prompt"] = read_config(base, "model_index").get("force_zeros_for_empty_prompt", True)
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", "EulerDiscreteScheduler")]
    return shorten_paths(configs | {"scheduler": scheduler, "model_index": index})


def build_metadata(
    config: Config, state: Mapping[str, Any], lineage: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """What a single file's header says: ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec), and our own keys."""
    side = config.buckets.base_resolution
    described = (
        f"Stage {state['stage']} of {state['run']}: {state['step']} steps of {config.data.global_batch_size} samples "
        f"over {state['images']} images, from {lineage['base']['reference']}."
    )
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "description": described,
        "date": lineage["written_at"],  # of the checkpoint: exporting it again gives the same bytes
        "resolution": f"{side}x{side}",
        "prediction_type": spell(config.diffusion.prediction_type).modelspec[0],
    }
    ours = {LINEAGE_KEY: lineage, CONFIGS_KEY: configs, RECIPE_KEY: shorten_paths(state["config"])}
    return (
        {"format": "pt"}
        | {f"modelspec.{name}": value for name, value in spec.items()}
        | {key: value for key, value in publish_entries(config).items() if value is not None}
        | {name: json.dumps(value, ensure_ascii=False) for name, value in ours.items()}
    )


def publish_entries(config: Config) -> dict[str, str | None]:
    """The entries that publish.* may change after the training; None stands for no entry."""
    said = {"title": config.publish.title or config.run.name, "author": config.publish.author, "license": FAIPL}
    # a checkpoint's own config may ask for anything of the environment
    hidden = {name: value and hide_environment(value, config.written) for name, value in said.items()}
    return {f"modelspec.{name}": value for name, value in hidden.items()}


def single_file_tensors(made: Export) -> dict[str, Tensor]:
    """All tensors in Stability's layout, with the markers by which other programs know what the model predicts."""
    tensors = to_single_file(made.parts, made.configs)
    for name in marker_names(scheduler_prediction(made.configs["scheduler"])):
        tensors[name] = torch.tensor([])
    return tensors


def write_single_file(path: Path, made: Export) -> Path:
    """Stability's layout, whole or not at all: see :func:`put_whole`."""
    tensors = single_file_tensors(made)
    with put_whole(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        write_file(temporary, lambda file: save_stamped(tensors, file, made.metadata))
    return path


def write_diffusers(path: Path, made: Export) -> Path:
    """The classic diffusers layout, whole or not at all: see :func:`put_whole`."""
    needed = sum(tensor.nbytes for part in made.parts.values() for tensor in part.values())
    with put_whole(path, needed) as temporary:
        temporary.mkdir()
        for component, part in made.parts.items():
            # transformers refuses files that do not say format: pt
            save = partial(save_tensors, part, metadata={"format": "pt"})
            write_file(temporary / component / f"{STEMS[component]}.safetensors", save)
        for name, config in made.configs.items():
            write_json(temporary / config_file(name), config)
        write_json(temporary / LINEAGE_FILE, made.lineage)
        assert made.tokenizers is not None
        for name, folder in zip(("tokenizer", "tokenizer_2"), made.tokenizers, strict=True):
            write_tokenizer(temporary / name, folder, name)
    return path


def has_sdxl_shapes(base: Base) -> bool:
    """Whether all configs say what SDXL's say; what a config leaves out is as there."""
    compared = [(read_config(base, part), read_sdxl_config(part), keys) for part, keys in SHAPING.items()]
    return all(own.get(key, known[key]) == known[key] for own, known, keys in compared for key in keys)

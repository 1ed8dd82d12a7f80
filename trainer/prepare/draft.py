"""A first config for somebody's own images: what is chosen, and by which rule."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from trainer.config.extends import find_extended
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.core.disk import format_bytes
from trainer.core.progress import format_count
from trainer.data.buckets import Size
from trainer.data.plan import Plan
from trainer.prepare.data_guess import DataGuess
from trainer.prepare.draft_file import Draft, Written, as_yaml, read_name, write_source
from trainer.prepare.model_guess import ModelGuess

STAGE_FILES = {1: "configs/stage1_feature_alignment.yaml", 2: "configs/stage2_refine_unet.yaml"}
SMALL_FILES = {1: "configs/demo_stage1.yaml", 2: "configs/demo_stage2.yaml"}  # for a model of the demo's size
LEAST_STEPS = 500  # of a run: with fewer a model has hardly moved
STEPS_OF_AN_EPOCH = 10  # at least: a step holds a tenth of the images at most ...
LEAST_BATCH = 4  # ... but no fewer, as far as there are images
SHARE_OF_IMAGES = 0.9  # that lie in buckets which fill a unit
LEAST_UNIT = 8  # samples of one bucket at a time, where a forward takes as many and a step holds twice as many
PROMPTS = 3
MOST_SET_ASIDE = 0.25  # share of inputs that is left out with a comment; above it the preparation stops

# SDXL's parameters, and bytes for each of them: fp32 weights and gradients, and the optimizer's state
UNET_PARAMETERS, ENCODER_PARAMETERS = 2_567_463_684, 123_060_480 + 694_659_840
BYTES_OF = {"adamw": 16, "adamw8bit": 10, "adafactor": 8}
SHARE_OF_MEMORY = 0.85  # the rest is for activations, which have not been measured yet
MICRO_BATCHES = ((70e9, 16), (40e9, 4), (0, 1))  # (bytes of a GPU's memory from which, at most)


@dataclass(frozen=True)
class Machine:
    """What a run would find here."""

    gpu: str | None = None  # its name
    memory: int = 0  # bytes of the GPU
    gpus: int = 0  # how many there are
    has_bitsandbytes: bool = False


def look_at_machine() -> Machine:
    """The first GPU, and what is installed for it."""
    if not torch.cuda.is_available():
        return Machine()
    first, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    return Machine(first.name, first.total_memory, count, find_spec("bitsandbytes") is not None)


def make_draft(file: Path, stage: int, data: DataGuess, model: ModelGuess, machine: Machine) -> Draft:
    """All that the config ``file`` is to say beside what it extends."""
    base, name = load_config([find_extended(choose_extended(stage, model), file)], preparing=True), read_name(file)
    draft = Draft()
    draft.add("run", "name", name)
    if model.is_small:
        draft.add("run", "output_dir", "runs")
    choose_model(draft, model, base)
    choose_source(draft, name, data)
    if data.wordless > base.data.max_empty_captions * data.images:
        draft.said.append(
            f"warning: {data.wordless} of {format_count(data.images, 'post')} have neither a caption nor tags, so that "
            f"build_shards.py stops: mend them, or raise data.max_empty_captions {base.data.max_empty_captions}"
        )
    steps = choose_sizes(draft, data, base, machine, model.is_small)
    if model.is_small:
        choose_small(draft, choose_extended(stage, model), data, base, steps)
    else:
        choose_for_machine(draft, stage, base, machine)
        choose_samples(draft, data, base, machine)
    return draft


def choose_extended(stage: int, model: ModelGuess) -> str:
    """The file that the config extends."""
    return SMALL_FILES[stage] if model.is_small else STAGE_FILES[stage]


def choose_model(draft: Draft, model: ModelGuess, base: Config) -> None:
    """Base, VAE, tokenizers and what the base predicts."""
    draft.add("model", "pretrained", model.reference, model.said)
    if model.has_vae:
        draft.add("model", "vae", None, "the model's own, which lies here; a later stage takes its export's, the same")
        if not model.is_small and base.precision.vae != "fp32":
            draft.add("precision", "vae", "fp32", "SDXL's own VAE overflows in fp16")
        draft.said.append("VAE: the model's own, in fp32, because it lies here; nothing is fetched for it")
    elif base.model.vae is not None:
        draft.said.append(f"VAE: {base.model.vae}, the recipe's, which is fetched from the hub by the first command")
    if model.tokenizer is not None:
        draft.add("model", "tokenizer", model.tokenizer, "the model is a single file, which has none")
    if model.prediction is not None and model.prediction.prediction_type != base.diffusion.prediction_type:
        draft.add("diffusion", "prediction_type", model.prediction.prediction_type, "what the model predicts")
        if model.prediction.zero_terminal_snr:
            draft.add("diffusion", "zero_terminal_snr", True)


def choose_source(draft: Draft, name: str, data: DataGuess) -> None:
    """Where posts and images lie, and where their shards will."""
    source = data.source
    if source.kind == "folder":
        draft.add("data", "images", source.path, data.describe())
        draft.add("data", "posts", None, "captions or posts lie beside the images")
    elif source.kind == "posts":
        draft.add("data", "posts", source.path, data.describe())
        draft.add("data", "images", source.images)
    else:
        draft.add("data", "posts", None)
        draft.add("data", "images", None)
        draft.add("data", "sources", Written(write_source(source)), data.describe())
    draft.add("data", "shards", f"shards/{name}")
    share, aside = data.share_set_aside, data.set_aside.total()
    if 0 < share <= MOST_SET_ASIDE:
        allowed = math.ceil(share * 100) / 100
        draft.add("data", "max_bad_fraction", allowed, f"{aside} of {aside + data.images} are set aside")
        draft.said.append(f"set aside, and to be listed in shards/{name}/quarantine.jsonl: {aside}; the rest is used")
    elif share:
        draft.said.append(
            f"warning: {aside} of {format_count(aside + data.images, 'input')} would be set aside, so that "
            "build_shards.py stops: mend them, or raise data.max_bad_fraction"
        )


def choose_sizes(draft: Draft, data: DataGuess, base: Config, machine: Machine, is_small: bool) -> int:
    """The sizes of batches and the length, by the number of images and their buckets; returns the steps."""
    recipe, bounds = base.data, f"but {LEAST_BATCH} to {base.data.global_batch_size}"
    # a model made from nothing needs many views, of however few images
    batch = recipe.global_batch_size if is_small else choose_batch(data.images, recipe.global_batch_size)
    rule = "as in the demo" if is_small else f"a tenth of the images, {bounds}"
    buckets, no_limit = data.count_buckets(base.buckets), is_small or machine.gpu is None
    most = recipe.micro_batch_size
    most = most if no_limit else min(most, next(n for least, n in MICRO_BATCHES if machine.memory >= least))
    filled = choose_unit(buckets, batch, recipe.bucket_batch_size)
    unit = max(filled, choose_least_unit(batch, most))
    micro = max(size for size in divisors(unit) if size <= max(1, most))
    if batch != recipe.global_batch_size:
        draft.add("data", "global_batch_size", batch, f"samples of a step: {rule}")
    if unit != recipe.bucket_batch_size:
        why = "images of one size that follow each other"
        if unit == filled:
            why += ": nine images in ten find as many of their size"
        else:
            why += f", so that a forward takes {micro}: sizes with fewer images repeat some of them, with other noise"
        draft.add("data", "bucket_batch_size", unit, why)
    if micro != recipe.micro_batch_size:
        measured = "" if is_small or machine.gpu is None else "; not measured yet on this GPU"
        draft.add(
            "data", "micro_batch_size", micro, f"samples of one forward, {batch // micro} of them a step{measured}"
        )
    plan = Plan(np.repeat(list(buckets), list(buckets.values()), axis=0), seed=0, bucket_batch_size=unit,
                global_batch_size=batch)  # fmt: skip
    epochs, steps = choose_epochs(draft, plan, base, "" if data.images == len(data.sizes) else "about ")
    shared = "of one size at a time" if unit == filled else "of one size at a time, of which some repeat where few are"
    draft.said.append(
        f"sizes: {batch} samples a step ({rule}), {unit} {shared}, {epochs:,} epochs, {steps} steps "
        f"(10 epochs, or {LEAST_STEPS} steps where that is more)"
    )
    return plan.steps_for_epochs(epochs)


def choose_epochs(draft: Draft, plan: Plan, base: Config, about: str) -> tuple[int, str]:
    """The recipe's, or as many as make a run of some length; and its steps in words, ``about`` where not counted."""
    epochs = base.schedule.epochs or 10
    few = plan.steps_for_epochs(epochs) < LEAST_STEPS
    while plan.steps_for_epochs(epochs) < LEAST_STEPS:
        epochs += 1
    steps = f"{about}{plan.steps_for_epochs(epochs):,}"
    if few:
        draft.add("schedule", "epochs", epochs, f"{steps} steps: at least {LEAST_STEPS}, of so few images")
    elif base.schedule.epochs is None:
        draft.add("schedule", "epochs", epochs, f"{steps} steps")
    if base.schedule.max_steps is not None:
        draft.add("schedule", "max_steps", None)
    return epochs, steps


def choose_batch(images: int, most: int) -> int:
    """Samples of a step: the largest divisor of the recipe's that leaves an epoch ten steps, but four where it can."""
    return max(size for size in divisors(most) if size <= max(min(LEAST_BATCH, images), images // STEPS_OF_AN_EPOCH))


def choose_unit(buckets: Counter[Size], batch: int, most: int) -> int:
    """Samples that share a bucket: the most that nine images in ten find in their bucket, so that few repeat."""
    total = buckets.total()
    fitting = [
        size
        for size in divisors(batch)
        if size <= most and sum(n for n in buckets.values() if n >= size) >= SHARE_OF_IMAGES * total
    ]
    return max(fitting, default=1)


def choose_least_unit(batch: int, forward: int) -> int:
    """Samples that share a bucket however few images it holds, so that a step is not as many forwards as samples.

    A step still sees two buckets, and no more share one than a forward takes.
    """
    return max(size for size in divisors(batch) if size <= max(1, min(LEAST_UNIT, batch // 2, forward)))


def divisors(number: int) -> list[int]:
    """All whole numbers that divide one."""
    return [size for size in range(1, number + 1) if number % size == 0]


def choose_small(draft: Draft, extended: str, data: DataGuess, base: Config, steps: int) -> None:
    """Samples of a model of the demo's size, which was made from nothing."""
    if prompts := data.choose_prompts(base.captions, PROMPTS):
        draft.add("sampling", "every_steps", max(10, steps // 50 * 10))
        draft.add("sampling", "width", None, "null: buckets.base_resolution")
        draft.add("sampling", "height", None)
        draft.add("sampling", "guidance_scale", 1.0, "a model made from nothing has nothing to push away from")
        draft.add("sampling", "negative_prompt", "")
        add_prompts(draft, prompts)
    draft.said.append(f"a tiny model, as the demo's: rates, sizes of images and precision of {extended}, for trying")


def choose_samples(draft: Draft, data: DataGuess, base: Config, machine: Machine) -> None:
    """Some captions of the data's own, or no samples where they would take too long."""
    if machine.gpu is None:
        draft.add("sampling", "every_steps", None, "without a GPU an image takes many minutes")
        draft.add("sampling", "prompts", [])
    elif prompts := data.choose_prompts(base.captions, PROMPTS):
        add_prompts(draft, prompts)


def add_prompts(draft: Draft, prompts: list[str]) -> None:
    lines = "".join(f"\n    - {as_yaml(prompt)}" for prompt in prompts)
    draft.add("sampling", "prompts", Written(lines), "captions of the data, drawn while training: write your own")
    count = format_count(len(prompts), "caption")
    draft.said.append(f"samples while training: {count} of the data, see sampling.prompts")


def choose_for_machine(draft: Draft, stage: int, base: Config, machine: Machine) -> None:
    """Precision and optimizer for what is here."""
    if machine.gpu is None:
        draft.sections.pop("precision", None)
        for part in ("compute", "frozen", "vae"):
            draft.add("precision", part, "fp32", "no GPU here" if part == "compute" else "")
        draft.said.append("warning: no GPU here: fp32, which is for trying alone; SDXL takes minutes a step on a CPU")
        return
    encoders = base.model.train_text_encoder_1 or base.model.train_text_encoder_2
    parameters = UNET_PARAMETERS + (ENCODER_PARAMETERS if encoders else 0)
    frozen = 0 if encoders else 2 * ENCODER_PARAMETERS
    needed = {name: parameters * each + frozen for name, each in BYTES_OF.items()}
    usable = [name for name in BYTES_OF if name != "adamw8bit" or machine.has_bitsandbytes]
    fitting = [name for name in usable if needed[name] <= SHARE_OF_MEMORY * machine.memory]
    chosen = (fitting or usable[-1:])[0]
    draft.said += list(explain_memory(chosen, needed, machine, bool(fitting), stage))
    if chosen == base.optim.name:
        return
    why = (
        f"weights, gradients and its state take {format_bytes(needed[chosen])}, AdamW's {format_bytes(needed['adamw'])}"
    )
    draft.add("optim", "name", chosen, f"{why}; not measured yet")
    if chosen == "adafactor":
        draft.add("optim", "betas", None)
        draft.add("optim", "eps", None)
        draft.add("optim", "weight_decay", 0.0, "as 3.0 was trained")
        draft.add("optim", "max_grad_norm", None)
        draft.add("schedule", "warmup_steps", 100)


def explain_memory(name: str, needed: dict[str, int], machine: Machine, fits: bool, stage: int) -> Iterator[str]:
    """What is known of the GPU's memory."""
    gpu = f"{machine.gpu} with {format_bytes(machine.memory)}"
    state = f"weights, gradients and the state of {name} take {format_bytes(needed[name])}"
    if fits:
        yield f"GPU: {gpu}; {state}, activations have not been measured yet"
        return
    other = "; stage 2 trains the UNet alone and needs less" if stage == 1 else ""
    yield f"warning: {gpu} is not enough: {state} before any activation{other}"

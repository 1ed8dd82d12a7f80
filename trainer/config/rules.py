"""Rules between the values of a config. A field that would have no effect is an error, not a shrug."""

import math
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import assert_never

from trainer.config.column_rules import column_rules
from trainer.config.durations import parse_duration
from trainer.config.free_text import find_unfit
from trainer.config.precision_rules import precision_rules
from trainer.config.schema import RATINGS, CaptionsConfig, Config, SourceConfig
from trainer.config.template_rules import template_rules
from trainer.config.weight_rules import weight_rules
from trainer.core.layout import RUN_NAME

Broken = tuple[tuple[str, ...], str]  # the keys concerned, the first of which names the problem; the message


def find_broken_rules(config: Config, preparing: bool = False) -> Iterator[Broken]:
    """Every rule that a well-typed config breaks; a preparation needs neither rates nor a length."""
    rules = [
        range_rules, run_and_model_rules, source_rules, weight_rules, batch_rules, filter_rules, caption_rules,
        bucket_rules, template_rules, column_rules, diffusion_rules, optim_rules, precision_rules, schedule_rules,
        output_rules, publish_rules,
    ]  # fmt: skip
    for find_broken in rules if preparing else [training_rules, *rules]:
        yield from find_broken(config)


# (least, most, in words, keys) of numbers; null is within any range
RANGES = (
    (0, math.inf, "must be at least 0",
     "run.seed data.loader_threads data.decode_processes captions.keep_tokens captions.keep_underscore_max_length "
     "data.min_weight "
     "diffusion.min_timestep diffusion.noise_offset optim.unet_lr optim.text_encoder_1_lr optim.text_encoder_2_lr "
     "optim.weight_decay schedule.warmup_steps"),
    (1, math.inf, "must be at least 1",
     "run.num_processes run.max_nonfinite_in_a_row data.samples_per_shard data.encode_batch_size filters.min_side "
     "filters.first_year filters.last_year data.global_batch_size data.bucket_batch_size data.micro_batch_size "
     "data.prefetch_factor schedule.epochs schedule.max_steps schedule.num_cycles precision.max_skipped_steps "
     "checkpoint.every_steps checkpoint.keep_last checkpoint.keep_every_steps logging.every_steps sampling.every_steps "
     "sampling.num_inference_steps sampling.guidance_scale"),
    (0, 1, "must lie between 0 and 1",
     "data.max_bad_fraction data.max_substituted data.max_empty_captions captions.tag_dropout captions.caption_dropout "
     "captions.frequent_tag_dropout schedule.min_lr_ratio"),
    (math.ulp(0.0), math.inf, "must be above 0",
     "run.stop_if_loss_above data.max_weight diffusion.min_snr_gamma optim.eps optim.max_grad_norm "
     "schedule.cycle_gamma"),
)  # fmt: skip


def range_rules(config: Config) -> Iterator[Broken]:
    """Numbers within their ranges."""
    for least, most, words, keys in RANGES:
        for key in keys.split():
            section, name = key.split(".")
            number = getattr(getattr(config, section), name)
            if number is not None and not least <= number <= most:
                yield (key,), f"{words}, not {number}"


def training_rules(config: Config) -> Iterator[Broken]:
    """What only a training needs."""
    if config.schedule.epochs is None and config.schedule.max_steps is None:
        yield ("schedule.epochs", "schedule.max_steps"), "set exactly one of schedule.epochs and schedule.max_steps"
    for part in ("unet", "text_encoder_1", "text_encoder_2"):
        if getattr(config.model, f"train_{part}") and not getattr(config.optim, f"{part}_lr") > 0:
            yield (f"optim.{part}_lr", f"model.train_{part}"), f"must be above 0, because model.train_{part} is true"


def run_and_model_rules(config: Config) -> Iterator[Broken]:
    if not RUN_NAME.fullmatch(config.run.name):
        yield ("run.name",), "names a folder: letters, digits, . _ and - only, not beginning with . or -"
    for name in ("time_limit", "step_timeout"):
        if (text := getattr(config.run, name)) is not None and parse_duration(text) is None:
            yield (f"run.{name}",), f"must be a time such as 11h30m, 90m, 45s or 11:30:00, not {text}"
    model = config.model
    if not (model.train_unet or model.train_text_encoder_1 or model.train_text_encoder_2):
        yield ("model.train_unet", "model.train_text_encoder_1", "model.train_text_encoder_2"), "nothing is trained"
    if model.revision is not None and Path(model.pretrained).exists():
        yield ("model.revision", "model.pretrained"), "has no effect: model.pretrained is a local file or folder"
    if model.vae_revision is not None and (model.vae is None or Path(model.vae).expanduser().exists()):
        what = "null" if model.vae is None else "a local file or folder"
        yield ("model.vae_revision", "model.vae"), f"has no effect: model.vae is {what}"
    for part in ("unet", "text_encoder_1", "text_encoder_2"):
        if not getattr(model, f"train_{part}") and getattr(config.optim, f"{part}_lr") > 0:
            yield (f"optim.{part}_lr", f"model.train_{part}"), f"has no effect: model.train_{part} is false"


ONLY_FOR = {  # fields of a source that only some kinds have
    "images": ("posts", "kohya"),
    "strip_prefix": ("posts", "kohya"),
    "missing_images": ("posts", "kohya"),
    "split": ("dataset",),
    "revision": ("dataset",),
    "image_column": ("dataset",),
    "caption_column": ("dataset", "posts"),
    "more_caption_columns": ("dataset", "posts"),
    "follow_links": ("posts", "folder", "tars", "kohya"),
}


def source_rules(config: Config) -> Iterator[Broken]:
    data = config.data
    if data.sources is None:
        return
    if not data.sources:
        yield ("data.sources",), "name at least one source, or set it to null"
    if data.posts is not None or data.images is not None:
        keys = ("data.sources", "data.posts", "data.images")
        yield keys, "says all: set data.posts and data.images to null beside it"
    names: dict[str, int] = {}
    for number, source in enumerate(data.sources):
        key = f"data.sources.{number}"
        if source.repeats < 1:
            yield (f"{key}.repeats",), f"must be at least 1, not {source.repeats}"
        if not source.label:
            yield (f"{key}.name",), "must be some text: the source's path has no last part to call it by"
        elif source.label in names:
            other = names[source.label]
            yield (f"{key}.name",), f"{source.label} is the name of data.sources.{other} too: give each its own"
        names.setdefault(source.label, number)
        for field, kinds in ONLY_FOR.items():
            if getattr(source, field) != getattr(SourceConfig, field) and source.kind not in kinds:
                yield (f"{key}.{field}", f"{key}.kind"), f"has no effect: {source.kind} has no {field}"
        if source.kind in ONLY_FOR["images"] and source.images is None:
            yield (f"{key}.images", f"{key}.kind"), f"missing: {source.kind} needs the folder of its images"
        if source.strip_prefix == "":
            yield (f"{key}.strip_prefix",), "must be some text, or null"
        if source.kind == "dataset" and source.revision is not None and Path(source.path).exists():
            yield (f"{key}.revision", f"{key}.path"), "has no effect: the path is a local file or folder"


def batch_rules(config: Config) -> Iterator[Broken]:
    data = config.data
    if data.bucket_batch_size > 0 and data.global_batch_size % data.bucket_batch_size:
        keys = ("data.bucket_batch_size", "data.global_batch_size")
        yield keys, f"{data.bucket_batch_size} does not divide data.global_batch_size {data.global_batch_size}"
    if data.micro_batch_size > 0 and data.bucket_batch_size % data.micro_batch_size:
        keys = ("data.micro_batch_size", "data.bucket_batch_size")
        yield keys, f"{data.micro_batch_size} does not divide data.bucket_batch_size {data.bucket_batch_size}"
    if data.loader_threads == 0 and data.prefetch_factor is not None:
        yield ("data.prefetch_factor", "data.loader_threads"), "has no effect: data.loader_threads is 0"
    processes = config.run.num_processes
    if processes and data.micro_batch_size > 0 and data.global_batch_size % (data.micro_batch_size * processes):
        concerned = ("run.num_processes", "data.micro_batch_size", "data.global_batch_size")
        yield concerned, explain_processes(processes, data.micro_batch_size, data.global_batch_size)


def explain_processes(processes: int, micro_batch_size: int, global_batch_size: int) -> str:
    """The message for a number of processes that cannot share a step evenly."""
    return (
        f"{processes} processes x data.micro_batch_size {micro_batch_size} = {processes * micro_batch_size} "
        f"does not divide data.global_batch_size {global_batch_size}"
    )


def filter_rules(config: Config) -> Iterator[Broken]:
    filters = config.filters
    if filters.ratings is not None:
        if unknown := [rating for rating in filters.ratings if rating not in RATINGS]:
            yield ("filters.ratings",), f"a post's rating is g, s, q or e, never {unknown[0]}"
        if not filters.ratings:
            yield ("filters.ratings",), "an empty list removes everything; null keeps all ratings"
    first, last = filters.first_year, filters.last_year
    if first is not None and last is not None and first > last:
        yield ("filters.first_year", "filters.last_year"), "is after filters.last_year"
    required, forbidden = (
        {tag.replace("_", " ") for tag in tags} for tags in (filters.required_tags, filters.forbidden_tags)
    )
    if both := sorted(required & forbidden):
        yield ("filters.required_tags", "filters.forbidden_tags"), f"{both[0]} is required and forbidden"


def caption_rules(config: Config) -> Iterator[Broken]:
    captions = config.captions
    if not captions.keep_tokens_separator.strip() or "," in captions.keep_tokens_separator:
        yield ("captions.keep_tokens_separator",), "must be some text without commas"
    tags = [*captions.ratings.values(), *(rule.tag for rule in captions.quality)]
    tags += [*(rule.tag for rule in captions.years), *(rule.tag for rule in captions.columns)]
    if held := [tag for tag in tags if captions.keep_tokens_separator in tag]:
        yield ("captions.keep_tokens_separator",), f"occurs in the tag {held[0]!r}, which would cut captions there"
    if captions.keep_tokens and not captions.shuffle and not captions.tag_dropout:
        yield ("captions.keep_tokens", "captions.shuffle"), "has no effect without captions.shuffle or tag_dropout"
    if unknown := [rating for rating in captions.ratings if rating not in RATINGS]:
        yield ("captions.ratings",), f"a post's rating is g, s, q or e, never {unknown[0]}"
    yield from quality_rules(captions)
    if any(first.last >= second.first for first, second in zip(captions.years, captions.years[1:], strict=False)):
        yield ("captions.years",), "ranges must be in order and not overlap"
    if any(rule.first > rule.last for rule in captions.years):
        yield ("captions.years",), "a range ends before it begins"


def quality_rules(captions: CaptionsConfig) -> Iterator[Broken]:
    """Of several rules for one post the highest wins, so no two may be equal."""
    by_percentile = [rule for rule in captions.quality if rule.above_percentile is not None]
    if any(rule.min_score is not None for rule in captions.quality) and by_percentile:
        yield ("captions.quality",), "give either min_score or above_percentile, not both"
    columns = [rule for rule in captions.columns if rule.above_percentile is not None]
    if captions.thresholds_from is not None and not (by_percentile or columns):
        yield (
            ("captions.thresholds_from",),
            "has no effect: no rule of captions.quality or captions.columns goes by above_percentile",
        )
    if any(not 0 < (rule.above_percentile or 0) < 100 for rule in by_percentile):
        yield ("captions.quality",), "above_percentile must lie between 0 and 100"
    if any(
        (one.min_score, one.above_percentile) == (other.min_score, other.above_percentile)
        and (one.rating == other.rating or None in (one.rating, other.rating))  # a rule for all meets those of each
        for one, other in combinations(captions.quality, 2)
    ):
        yield ("captions.quality",), "two tags have the same min_score or above_percentile"


def bucket_rules(config: Config) -> Iterator[Broken]:
    buckets = config.buckets
    if buckets.step <= 0 or buckets.step % 32:
        # the VAE divides by 8, the UNet's two downsamplings by 4
        yield ("buckets.step",), f"must be a multiple of 32, not {buckets.step}"
        return
    for name in ("base_resolution", "min_side", "max_side"):
        side = getattr(buckets, name)
        if side <= 0 or side % buckets.step:
            yield (f"buckets.{name}", "buckets.step"), f"must be a multiple of buckets.step {buckets.step}, not {side}"
    if not buckets.min_side <= buckets.base_resolution <= buckets.max_side:
        keys = ("buckets.base_resolution", "buckets.min_side", "buckets.max_side")
        yield keys, "must lie between buckets.min_side and buckets.max_side"


def diffusion_rules(config: Config) -> Iterator[Broken]:
    diffusion = config.diffusion
    if diffusion.max_timestep > 1000:
        yield ("diffusion.max_timestep",), f"must be at most 1000, not {diffusion.max_timestep}"
    if diffusion.min_timestep >= diffusion.max_timestep:
        yield ("diffusion.min_timestep", "diffusion.max_timestep"), "must be below diffusion.max_timestep"
    match diffusion.prediction_type:
        case "epsilon" if diffusion.zero_terminal_snr:
            keys = ("diffusion.zero_terminal_snr", "diffusion.prediction_type")
            yield keys, "needs prediction_type v_prediction: pure noise says nothing about itself"
        case "epsilon" | "v_prediction":
            pass
        case other:
            assert_never(other)


def optim_rules(config: Config) -> Iterator[Broken]:
    optim = config.optim
    for name in ("betas", "eps"):
        value = getattr(optim, name)
        if optim.name == "adafactor" and value is not None:
            yield (f"optim.{name}", "optim.name"), "has no effect with adafactor; set it to null"
        if optim.name != "adafactor" and value is None:
            yield (f"optim.{name}", "optim.name"), f"{optim.name} needs it"
    if optim.betas is not None and (len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas)):
        yield ("optim.betas",), "must be two numbers from 0 to below 1"
    if not optim.decay_norms_and_biases and not optim.weight_decay:
        yield ("optim.decay_norms_and_biases", "optim.weight_decay"), "has no effect: optim.weight_decay is 0"


def schedule_rules(config: Config) -> Iterator[Broken]:
    schedule = config.schedule
    if schedule.epochs is not None and schedule.max_steps is not None:
        yield ("schedule.epochs", "schedule.max_steps"), "set exactly one of schedule.epochs and schedule.max_steps"
    if schedule.lr == "constant" and schedule.min_lr_ratio:
        yield ("schedule.min_lr_ratio", "schedule.lr"), "has no effect with a constant rate"
    if schedule.lr == "cosine_restarts" and schedule.num_cycles == 1 and schedule.cycle_gamma != 1:
        yield ("schedule.cycle_gamma", "schedule.num_cycles"), "has no effect: schedule.num_cycles is 1"
    if schedule.lr != "cosine_restarts":
        for name in ("num_cycles", "cycle_gamma"):
            if getattr(schedule, name) != 1:
                yield (f"schedule.{name}", "schedule.lr"), f"has no effect with schedule.lr {schedule.lr}"


def output_rules(config: Config) -> Iterator[Broken]:
    checkpoint, sampling = config.checkpoint, config.sampling
    if checkpoint.fork is not None and checkpoint.resume not in ("auto", "never"):
        yield ("checkpoint.fork", "checkpoint.resume"), "has no effect: checkpoint.resume names where to begin"
    if checkpoint.keep_every_steps and checkpoint.keep_every_steps % checkpoint.every_steps:
        keys = ("checkpoint.keep_every_steps", "checkpoint.every_steps")
        yield keys, f"must be a multiple of checkpoint.every_steps {checkpoint.every_steps}"
    if sampling.every_steps and not sampling.prompts:
        yield ("sampling.prompts", "sampling.every_steps"), "sampling.every_steps is set, but there are no prompts"
    if sampling.prompts and not sampling.every_steps:
        yield ("sampling.every_steps", "sampling.prompts"), "null, so that sampling.prompts have no effect"
    for name in ("width", "height"):
        side = getattr(sampling, name)
        if side is not None and (side <= 0 or side % 32):
            yield (f"sampling.{name}",), f"must be a multiple of 32, not {side}"


def publish_rules(config: Config) -> Iterator[Broken]:
    publish = config.publish
    if not publish.formats:
        yield ("publish.formats",), "name at least one of single_file and diffusers"
    if publish.repo_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", publish.repo_id):
        yield ("publish.repo_id",), f"must be owner/name on the Hub, not {publish.repo_id}"
    if not publish.private and publish.repo_id is None:
        yield ("publish.private", "publish.repo_id"), "has no effect: publish.repo_id is null"
    for name in ("source_url", "license_link"):
        address = getattr(publish, name)
        if address is not None and not re.fullmatch(r"https://[^\s/@]+\.[^\s@<>|()]+", address):
            yield (f"publish.{name}",), "must be an https address without a name or password in it"
    for name in ("notes", "acknowledgements"):
        if (text := getattr(publish, name)) is not None and (reason := find_unfit(text)):
            yield (f"publish.{name}",), f"{reason}: the rest of the card would suffer"

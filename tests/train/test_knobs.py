"""Every knob is turned: training's knobs change the numbers of a run, and every field is named in some test."""

import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.checkpoints import MODEL
from support.paths import REPOSITORY
from trainer.config.schema import Config
from trainer.data.index import open_index, read_raw_latents
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.prepare.prepare import prepare
from trainer.train.loop import train

ENCODER_1 = ["model.train_text_encoder_1=true", "optim.text_encoder_1_lr=1e-3"]
ENCODER_2 = ["model.train_text_encoder_2=true", "optim.text_encoder_2_lr=1e-3"]
BF16 = ["precision.compute=bf16", "precision.frozen=bf16"]
CONVERTED = ["diffusion.prediction_type=v_prediction", "diffusion.convert_prediction=true"]  # the base has epsilon
# what each knob that training's numbers depend on is turned to, last, and before it what that needs
KNOBS: dict[str, list[str]] = {
    "run.seed": ["run.seed=43"],
    "model.train_text_encoder_1": ENCODER_1,
    "optim.text_encoder_1_lr": [*ENCODER_1, "optim.text_encoder_1_lr=1e-4"],
    "model.train_text_encoder_2": ENCODER_2,
    "optim.text_encoder_2_lr": [*ENCODER_2, "optim.text_encoder_2_lr=1e-4"],
    "optim.unet_lr": ["optim.unet_lr=1e-4"],
    "data.global_batch_size": ["data.global_batch_size=8"],
    "data.bucket_batch_size": ["data.bucket_batch_size=4"],
    "data.subset_rules": ["data.subset_rules=[{tag: food, exclude: true}]"],
    "data.weights": ["data.weights=[{factor: 3, tag: food}, {factor: 0, tag: bird}]"],
    "data.min_weight": ["data.weights=[{factor: 0.01, tag: food}]", "data.min_weight=1"],
    "data.max_weight": ["data.weights=[{factor: 5, tag: food}]", "data.max_weight=2"],
    "captions.shuffle": ["captions.shuffle=false"],
    "captions.tag_dropout": ["captions.tag_dropout=0.5"],
    "captions.caption_dropout": ["captions.caption_dropout=1.0"],
    "captions.keep_underscore_max_length": ["captions.keep_underscore_max_length=99"],
    "captions.max_token_length": ["captions.max_token_length=150"],
    "captions.template": ["captions.template=[{tags: general}, {tags: copyright}]"],
    "captions.protected_tags": ["captions.tag_dropout=1", "captions.protected_tags=[bird, animals]"],
    "captions.frequent_tag_dropout": ["captions.frequent_tag_share=0.05", "captions.frequent_tag_dropout=1"],
    "captions.years": ["captions.years=[{first: 1990, last: 2050, tag: recent}]"],
    "diffusion.prediction_type": [*CONVERTED],
    "diffusion.min_timestep": ["diffusion.min_timestep=500"],
    "diffusion.max_timestep": ["diffusion.max_timestep=500"],
    "diffusion.timestep_sampling": ["diffusion.timestep_sampling=stratified"],
    "diffusion.noise_offset": ["diffusion.noise_offset=0.0357"],
    "diffusion.min_snr_gamma": ["diffusion.min_snr_gamma=5"],
    "diffusion.zero_terminal_snr": [*CONVERTED, "diffusion.zero_terminal_snr=true"],
    "optim.name": ["optim.name=adafactor", "optim.betas=null", "optim.eps=null"],
    "optim.betas": ["optim.betas=[0.5, 0.6]"],
    "optim.eps": ["optim.eps=1e-3"],
    "optim.weight_decay": ["optim.weight_decay=0.5"],
    "optim.decay_norms_and_biases": ["optim.decay_norms_and_biases=false"],
    "optim.max_grad_norm": ["optim.eps=1e-3", "optim.max_grad_norm=0.01"],  # Adam alone undoes a constant factor
    "schedule.lr": ["schedule.lr=cosine"],
    "schedule.warmup_steps": ["schedule.warmup_steps=5"],
    "schedule.min_lr_ratio": ["schedule.lr=cosine", "schedule.min_lr_ratio=0.5"],
    "schedule.num_cycles": ["schedule.lr=cosine_restarts", "schedule.num_cycles=2"],
    "schedule.cycle_gamma": ["schedule.lr=cosine_restarts", "schedule.num_cycles=2", "schedule.cycle_gamma=0.5"],
    "precision.compute": ["precision.compute=bf16"],
    "precision.frozen": ["precision.compute=bf16", "precision.frozen=bf16"],
    "precision.weights": [*BF16, "precision.weights=master"],
    "precision.gradients": [*BF16, "precision.weights=master", "precision.gradients=bf16"],
}


def run_hash(config: Config) -> str:
    train(config)
    newest = find_newest(Path(config.run.output_dir) / config.run.name)
    assert newest is not None
    return read_train_state(newest)["files"][MODEL]["sha256"]


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, ...], str]:
    """Hashes of runs already made: knobs without the one that is looked at often coincide."""
    return {}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_training_knob_changes_the_weights(
    make_config: Callable[..., Config], seen: dict[tuple[str, ...], str], knob: str
) -> None:
    turned = KNOBS[knob]
    # some knobs need words behind them to be allowed at all; they are compared with the plain run
    alone = knob.startswith("model.train_") or knob in (
        "optim.name", "diffusion.prediction_type", "captions.frequent_tag_dropout")  # fmt: skip
    without = [] if alone else turned[:-1]
    hashes = []
    for number, words in enumerate((turned, without)):
        name = tuple(words)
        if name not in seen:
            seen[name] = run_hash(make_config("schedule.max_steps=2", *words, f"run.name=knob{number}"))
        hashes.append(seen[name])
    assert hashes[0] != hashes[1]


def test_every_field_is_named_in_some_test() -> None:
    texts = "".join(file.read_text() for file in (REPOSITORY / "tests").rglob("*.py"))
    sections = typing.get_type_hints(Config)
    missing = [
        f"{section}.{field.name}"
        for section, hint in sections.items()
        if dataclasses.is_dataclass(hint)
        for field in dataclasses.fields(hint)
        if f"{section}.{field.name}" not in texts
    ]
    assert missing == []


def test_preparations_knobs_change_what_is_prepared(make_config: Callable[..., Config], tmp_path: Path) -> None:
    plain = open_index(make_config().data.shards)
    turned = {
        "small": ["buckets.upscale=false", "buckets.base_resolution=512", "buckets.max_side=1024"],
        "vae": ["precision.vae=bf16"],
    }
    for name, words in turned.items():
        prepare(make_config(*words, f"data.shards={tmp_path / name}"))
    kept = open_index(tmp_path / "small")
    # drawings of about 270 pixels are not enlarged to 512: their bucket is their own sides, floored
    for row in range(len(kept)):
        record = kept.row(row)
        assert record["bucket_width"] == record["original_width"] // 32 * 32
        assert record["bucket_height"] == record["original_height"] // 32 * 32
    in_bf16 = open_index(tmp_path / "vae")
    assert in_bf16.manifest["latents"]["vae_dtype"] == "bf16" and plain.manifest["latents"]["vae_dtype"] == "fp32"
    assert not np.array_equal(read_raw_latents(plain, 0), read_raw_latents(in_bf16, 0))

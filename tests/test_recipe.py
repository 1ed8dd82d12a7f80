"""The configs of all stages that the model cards describe, their sources, and what documents say of them."""

import dataclasses
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from support.paths import REPOSITORY
from trainer.config.caption_fields import default_quality
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.train.optim import build_optimizer

STAGES = ("stage1_feature_alignment", "stage2_refine_unet", "stage3_aesthetic")
PREDECESSOR = ("animagine_xl_2_stage1_alignment", "animagine_xl_2_stage2_aesthetic")
COMPLETE = STAGES + PREDECESSOR
ADAFACTOR = (
    "optim.name=adafactor optim.betas=null optim.eps=null optim.weight_decay=0 optim.max_grad_norm=null "
    "schedule.warmup_steps=100"
)


def read_text(file: str) -> str:
    """A document's words with one space between them, without a YAML file's marks of comments."""
    lines = (REPOSITORY / file).read_text().splitlines()
    return " ".join(" ".join(line.lstrip("# ") for line in lines).split())


def stage(name: str, *words: str) -> Config:
    return load_config([REPOSITORY / f"configs/{name}.yaml"], words)


@pytest.mark.parametrize("names", [STAGES, PREDECESSOR], ids=["3.0", "2.0"])
def test_each_stage_starts_from_the_run_before(names: tuple[str, ...]) -> None:
    configs = [stage(name) for name in names]
    assert [config.run.name for config in configs] == list(names)
    for before, after in pairwise(configs):
        assert after.model.pretrained == f"{before.run.output_dir}/{before.run.name}"
    shards = [config.data.shards for config in configs]
    assert len(set(shards)) == len(shards)


@pytest.mark.parametrize("name", ["stage3_aesthetic", *PREDECESSOR])
def test_each_value_has_its_source(name: str) -> None:
    text = (REPOSITORY / f"configs/{name}.yaml").read_text()
    values = [line for line in text.splitlines() if re.match(r"( +[a-z_0-9]+:|filters:)", line)]
    assert len(values) > 80
    assert [line for line in values if not re.search(r"# \[(card|3\.0|3\.1|inferred|ours)\b", line)] == []
    # and none is left to a default but the tables of tags and a constant rate's other numbers
    said = {line.split(":")[0].strip() for line in values} | {"quality", "ratings", "years", "columns", "people"}
    said |= {"keep_underscore_max_length", "sources", "min_lr_ratio", "num_cycles", "cycle_gamma"}
    first = {line.split(":")[0].strip() for line in (REPOSITORY / f"configs/{STAGES[0]}.yaml").read_text().splitlines()
             if re.match(r" +[a-z_0-9]+:", line)}  # fmt: skip
    assert first - said == set()


def test_the_table_holds_the_configs_values() -> None:
    first, second = stage(STAGES[0]), stage(STAGES[1])
    first_table = (REPOSITORY / "docs/recipe.md").read_text().partition("The original's optimizer")[0]
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]]
            for row in first_table.splitlines() if row.startswith("| ")}  # fmt: skip
    assert rows["samples per optimizer step"] == ["48 x 2 = 96", "48"]
    assert (first.data.global_batch_size, second.data.global_batch_size) == (96, 48)
    assert rows["UNet learning rate"] == ["7.5e-6", "2e-6"]
    assert (first.optim.unet_lr, second.optim.unet_lr) == (7.5e-6, 2e-6)
    assert rows["text encoder learning rate"] == ["3.75e-6, both encoders", "not trained"]
    assert first.optim.text_encoder_1_lr == first.optim.text_encoder_2_lr == 3.75e-6
    assert not (second.model.train_text_encoder_1 or second.model.train_text_encoder_2)
    assert rows["noise offset"] == ["none", str(second.diffusion.noise_offset)] and first.diffusion.noise_offset == 0
    assert rows["epochs"] == [str(first.schedule.epochs), str(second.schedule.epochs)]
    assert rows["token length"][0].startswith(str(first.captions.max_token_length))
    for config in (first, second):
        assert config.optim.name == "adamw" and config.optim.betas == [0.9, 0.99] and config.optim.weight_decay == 0.1
        assert config.schedule.lr == "constant" and config.optim.max_grad_norm == 1.0
        assert config.precision.compute == "fp16"


def test_the_third_stage_is_the_cards() -> None:
    second, third = stage("stage2_refine_unet"), stage("stage3_aesthetic")
    assert third.optim.unet_lr == 1e-6 and third.schedule.epochs == 10 and third.data.global_batch_size == 48
    assert not third.model.train_text_encoder_1 and not third.model.train_text_encoder_2
    assert third.precision.compute == "fp16" and third.diffusion.noise_offset == 0.0357
    for section in ("captions", "buckets", "diffusion", "schedule", "precision", "sampling"):
        assert getattr(third, section) == getattr(second, section), section
    assert second.publish.base_only and dataclasses.replace(second.publish, base_only=False) == third.publish


@pytest.mark.parametrize("name", PREDECESSOR)
def test_the_predecessors_stages_are_its_cards(name: str) -> None:
    config = stage(name)
    rates = config.optim
    assert rates.unet_lr == rates.text_encoder_1_lr == rates.text_encoder_2_lr == 1e-6
    assert config.data.global_batch_size == config.data.bucket_batch_size == 32 and config.schedule.epochs == 20 // 2
    captions = config.captions
    assert captions.quality == default_quality() and captions.years == [] and not captions.shuffle
    assert captions.ratings == {"q": "nsfw", "e": "nsfw"} and captions.caption_dropout == 0
    assert config.diffusion.noise_offset == 0 and config.precision.compute == "fp16"
    assert not {"nsfw", "artist name"} & set(config.sampling.negative_prompt.split(", "))


@pytest.mark.parametrize("name", COMPLETE)
def test_sample_prompts_begin_as_the_card_says_and_heed_its_caution(name: str) -> None:
    config = stage(name)
    for prompt in config.sampling.prompts:
        tags = prompt.split(", ")
        assert tags[:2] == ["masterpiece", "best quality"] and tags[2] in (*config.captions.people, "no humans"), prompt
        if name in STAGES:
            assert "rating: general" in tags
    if name in STAGES:
        assert {"nsfw", "rating: sensitive", "lowres"} <= set(config.sampling.negative_prompt.split(", "))


@pytest.mark.parametrize("file", ["docs/publishing.md", "docs/recipe.md", *(f"configs/{name}.yaml" for name in STAGES)])
def test_the_caution_is_stated(file: str) -> None:
    text = read_text(file)
    assert "caution" in text and "rating: general" in text and "nsfw, rating: sensitive" in text


@pytest.mark.parametrize("file", ["docs/training.md", "docs/recipe.md", *(f"configs/{name}.yaml" for name in COMPLETE)])
def test_the_originals_optimizer_is_stated_in_words_that_load(file: str) -> None:
    assert ADAFACTOR in read_text(file)
    # every mention of it has no weight decay
    assert len(re.findall("optim.name=adafactor", read_text(file))) == read_text(file).count(ADAFACTOR)


@pytest.mark.parametrize("name", COMPLETE)
def test_the_originals_optimizer_shrinks_no_weight(name: str) -> None:
    """With 3.1's weight decay left in, the UNet would lose 9.5 % over stage 1."""
    config = stage(name, *ADAFACTOR.split())
    assert config.optim.max_grad_norm is None and config.schedule.warmup_steps == 100
    assert one_step_without_gradient(config) == 1.0


def test_what_weight_decay_would_take_over_stage_1() -> None:
    config = stage(STAGES[0], *ADAFACTOR.replace("optim.weight_decay=0 ", "").split())
    assert config.optim.weight_decay == 0.1
    kept = one_step_without_gradient(config) ** 132_499
    assert 1 - kept == pytest.approx(0.0946, abs=5e-5)
    for file in ("docs/recipe.md", f"configs/{STAGES[0]}.yaml"):
        assert "9.5 %" in read_text(file), file


def one_step_without_gradient(config: Config) -> float:
    """The factor by which a step of the UNet's optimizer changes a weight that has no gradient."""
    model = nn.ModuleDict({"unet": nn.Linear(1, 1, bias=False, dtype=torch.float64)})
    (weight,) = model.parameters()
    nn.init.ones_(weight)
    weight.grad = torch.zeros_like(weight)
    build_optimizer(model, config.optim).step()
    return weight.item()

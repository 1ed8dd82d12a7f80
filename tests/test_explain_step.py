"""explain_step says what a step sees, and the loader makes exactly that."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from support.scripts import run_script
from trainer.config.schema import Config
from trainer.data.index import open_index
from trainer.data.loader import MicroBatches, draw_noise, draw_sample_noise, load_batches, make_time_ids
from trainer.data.plan import Plan, build_plan
from trainer.data.sample_weights import find_sample_weights
from trainer.data.tokens import load_tokenizers, tokenize_captions
from trainer.model.base import find_base, find_tokenizers, read_vocab_sizes
from trainer.report.explain import explain_step
from trainer.report.thresholds import find_caption_rules

MakeConfig = Callable[..., Config]


def explain(config: Config, folder: Path, step: int) -> list[dict[str, object]]:
    file = folder / f"{config.run.name}.yaml"
    file.write_text(OmegaConf.to_yaml(config.written))
    run = run_script("scripts/explain_step.py", "--config", file, "--step", step)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def open_batches(config: Config) -> MicroBatches:
    index = open_index(config.data.shards)
    base = find_base(config.model.pretrained)
    tokenizers = load_tokenizers(*find_tokenizers(base, None), read_vocab_sizes(base))
    rules = find_caption_rules(config, index.table)
    plan = build_plan(index, config.run.seed, config.data, find_sample_weights(index, config.data, rules.config))
    return MicroBatches(plan, index, tokenizers, rules, config.diffusion, config.data.micro_batch_size)


def test_the_lines_are_what_the_loader_makes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("diffusion.noise_offset=0.0357", "run.seed=5")
    lines = explain(config, tmp_path, 7)
    assert [list(line) for line in lines] == [
        [
            "step",
            "unit",
            "position",
            "key",
            "bucket",
            "epoch",
            "pass",
            "caption",
            "kind",
            "parts",
            "timestep",
            "noise_seed",
        ]
    ] * 4
    assert [line["position"] for line in lines] == [0, 1, 2, 3] and [line["unit"] for line in lines] == [0, 0, 1, 1]
    data = open_batches(config)
    batches = [data[7 * 2], data[7 * 2 + 1]]
    assert [line["key"] for line in lines] == [key for batch in batches for key in batch.keys]
    assert [line["timestep"] for line in lines] == [int(t) for batch in batches for t in batch.timesteps]
    for batch, part in zip(batches, (lines[:2], lines[2:]), strict=True):
        height, width = batch.raw_latents.shape[2:]
        assert {line["bucket"] for line in part} == {f"{width * 8}x{height * 8}"}
        chunks = tokenize_captions([str(line["caption"]) for line in part], data.tokenizers, 75)
        assert np.array_equal(chunks.input_ids_1, batch.input_ids_1.numpy())
        for line, noise in zip(part, batch.noise.numpy(), strict=True):
            generator = np.random.Generator(np.random.Philox(key=int(str(line["noise_seed"]), 16)))
            assert np.array_equal(draw_noise(noise.shape, 0.0357, generator), noise)


def test_the_lines_do_not_depend_on_processes_and_workers(make_config: MakeConfig, tmp_path: Path) -> None:
    first = explain(make_config("run.name=a"), tmp_path, 3)
    second = explain(make_config("run.name=b", "data.loader_threads=3", "data.micro_batch_size=1"), tmp_path, 3)
    assert first == second
    assert first != explain(make_config("run.name=c", "run.seed=43"), tmp_path, 3)


MIXED = [
    "diffusion.timestep_sampling=stratified", "data.weights=[{factor: 2.5, tag: food}, {factor: 0, tag: menu}]",
    "captions.mix={tags: 0.6, natural: 0.4}",
]  # fmt: skip


def test_weights_strata_and_mixes_are_explained_as_they_are_drawn(make_config: MakeConfig, tmp_path: Path) -> None:
    """The same for any size of micro-batches; the timesteps of a step lie in all parts of the range."""
    config = make_config(*MIXED, "data.global_batch_size=8", "diffusion.min_timestep=200")
    index = open_index(config.data.shards)
    timesteps: list[list[int]] = []
    for step in (0, 11):
        lines = list(explain_step(config, index, step))
        assert sorted(line["stratum"] for line in lines) == list(range(8))
        assert all(200 + 100 * line["stratum"] <= line["timestep"] < 300 + 100 * line["stratum"] for line in lines)
        for size in (2, 1):
            data = open_batches(make_config(*MIXED, "data.global_batch_size=8", "diffusion.min_timestep=200",
                                            f"data.micro_batch_size={size}"))  # fmt: skip
            batches = [data[step * data.per_step + number] for number in range(data.per_step)]
            assert [line["key"] for line in lines] == [key for batch in batches for key in batch.keys]
            assert [line["timestep"] for line in lines] == [int(t) for batch in batches for t in batch.timesteps]
        timesteps.append([line["stratum"] for line in lines])
    assert timesteps[0] != timesteps[1]
    assert all("stratum" not in line for line in explain_step(make_config(), index, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_the_ranks_batches_together_are_the_steps(make_config: MakeConfig, world: int, workers: int) -> None:
    config = make_config()
    data = open_batches(config)
    plan: Plan = data.plan
    streams = [
        list(
            load_batches(
                data, first_step=2, last_step=5, rank=rank, world=world, threads=workers, prefetch_factor=None,
                pin_memory=False,
            )
        )
        for rank in range(world)
    ]  # fmt: skip
    keys = [key for turn in zip(*streams, strict=True) for batch in turn for key in batch.keys]
    planned = [data.index.row(sample.row)["key"] for step in range(2, 5) for sample in plan.step_samples(step)]
    assert keys == planned


def test_size_conditions_are_height_first() -> None:
    record = {"original_width": 1000, "original_height": 1500, "crop_left": 0, "crop_top": 16,
              "bucket_width": 832, "bucket_height": 1216}  # fmt: skip
    assert make_time_ids(record) == [1500, 1000, 16, 0, 1216, 832]


def test_noise_is_a_function_of_the_sample() -> None:
    def draw(key: str, pass_: int, seed: int) -> np.ndarray:
        return draw_sample_noise((4, 8, 8), key, pass_, seed, 0.0)

    assert np.array_equal(draw("a", 0, 1), draw("a", 0, 1))
    for other in (draw("b", 0, 1), draw("a", 1, 1), draw("a", 0, 2)):
        assert not np.array_equal(draw("a", 0, 1), other)

"""Samples that were lost, because a run ended between the save and them, are drawn when it resumes: the very same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.ranks import train_ranks
from trainer.config.schema import Config
from trainer.train.loop import train
from trainer.train.samples import Samples

MakeConfig = Callable[..., Config]
WORDS = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", "sampling.every_steps=2",
         "sampling.prompts=[a cat, a dog]", "sampling.num_inference_steps=2",
         "sampling.width=64", "sampling.height=64"]  # fmt: skip
STOCHASTIC = ["precision.weights=stochastic", "precision.compute=bf16", "precision.frozen=bf16"]


def grids(config: Config) -> dict[str, bytes]:
    folder = Path(config.run.output_dir) / config.run.name / "samples"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


class Killed(BaseException):
    """Stands for SIGKILL: nothing is done after it."""


def kill_before_samples(monkeypatch: pytest.MonkeyPatch, of: int) -> Any:
    original = Samples.draw

    def draw(self: Samples, made: int) -> None:
        if made == of:
            raise Killed
        original(self, made)

    monkeypatch.setattr(Samples, "draw", draw)


@pytest.mark.parametrize("words", [[], STOCHASTIC], ids=["autocast", "stochastic"])
@pytest.mark.parametrize("step", [2, 4])
def test_the_picture_is_the_one_that_would_have_been_drawn(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str], words: list[str], step: int
) -> None:
    straight, config = (make_config(*WORDS, *words, f"run.name={name}") for name in ("straight", "killed"))
    train(straight)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_samples(patch, step)
        train(config)
    assert f"step-{step:08d}.png" not in grids(config)
    notes()
    result = train(config)
    assert result.facts["finished"] and f"the samples of step {step} were due" in notes()
    assert grids(config) == grids(straight) and len(grids(straight)) == 2
    assert "were due" not in notes() and "nothing to do" in train(config).said


def test_a_check_draws_nothing(make_config: MakeConfig) -> None:
    config = make_config(*WORDS, "schedule.max_steps=2")
    train(config)
    shutil.rmtree(Path(config.run.output_dir) / config.run.name / "samples")
    assert "nothing to do" in train(config, check=True).said and not grids(config)


def test_a_fork_draws_none_of_the_run_that_it_begins_with(make_config: MakeConfig) -> None:
    train(make_config(*WORDS, "run.name=first", "schedule.max_steps=2"))
    fork = make_config(*WORDS, "run.name=fork", "schedule.max_steps=3",
                       f"checkpoint.fork={make_config().run.output_dir}/first")  # fmt: skip
    train(fork)
    assert list(grids(fork)) == ["step-00000003.png"]


def test_two_processes_draw_it_together(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(*WORDS, "data.micro_batch_size=1")
    assert train_ranks([config] * 2, tmp_path / "first") == ["", ""]
    before = grids(config)
    (Path(config.run.output_dir) / config.run.name / "samples/step-00000004.png").unlink()
    assert train_ranks([config] * 2, tmp_path / "again") == ["", ""]
    assert grids(config) == before and len(before) == 2

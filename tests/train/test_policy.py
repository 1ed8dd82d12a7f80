"""memory.policy: auto: what it chooses, what it records, and when it chooses anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import Config
from trainer.model.base import find_base
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.train import loop, policy
from trainer.train.loop import train
from trainer.train.policy import FASTEST_FIRST, FITS, find_fitting, warn_of_memory

MakeConfig = Callable[..., Config]
AUTO = "memory.policy=auto"


def needs_of(config: Config, bucket: tuple[int, int] = (128, 64)) -> dict[str, int]:
    """Bytes by policy, where none fits."""
    chosen, needs = find_fitting(config, find_base(config.model.pretrained), bucket, 0)
    assert chosen == "full" and tuple(needs) == FASTEST_FIRST
    return needs


def chosen_by(config: Config) -> dict[str, Any]:
    """What the newest checkpoint records; run.json says the same."""
    folder = Path(config.run.output_dir) / config.run.name
    newest = find_newest(folder)
    assert newest is not None
    chosen: dict[str, Any] = read_train_state(newest)["memory"]
    assert json.loads((folder / "run.json").read_text())["memory"] == chosen
    return chosen


def pretend(monkeypatch: pytest.MonkeyPatch, memory: int | None) -> None:
    """As if the device had so many bytes."""
    monkeypatch.setattr(loop, "device_memory", lambda _: memory)


def test_the_first_that_fits_is_taken(make_config: MakeConfig) -> None:
    config = make_config(AUTO)
    base, needs = find_base(config.model.pretrained), needs_of(config)
    assert needs["none"] > needs["selective"] > needs["full"] > 0
    assert find_fitting(config, base, (128, 64), needs["none"])[0] == "none"
    assert find_fitting(config, base, (128, 64), needs["none"] - 1)[0] == "selective"
    for words in (["captions.max_token_length=225"], ["data.micro_batch_size=4", "data.bucket_batch_size=4"]):
        # what fits does not fit with more tokens or samples, or in a larger bucket
        assert find_fitting(make_config(AUTO, *words), base, (128, 64), needs["none"])[0] != "none"
    assert find_fitting(config, base, (192, 64), needs["none"])[0] != "none"


def test_on_the_cpu_it_is_what_was_done_before(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    config = make_config(AUTO, "schedule.max_steps=1")
    train(config)
    assert chosen_by(config)["policy"] == "full" and chosen_by(config)["needs"] == {}
    assert "policy full, chosen by auto for the CPU" in notes()
    plain = make_config("schedule.max_steps=1", "run.name=plain", "memory.policy=selective")
    train(plain)
    assert chosen_by(plain) == {"policy": "selective"} and "memory      policy selective\n" in notes()


def test_a_choice_is_kept_until_the_device_is_another(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    memory = int(max(needs_of(make_config(AUTO), (128, 128)).values()) / FITS) + 1
    pretend(monkeypatch, memory)
    train(make_config(AUTO, "schedule.max_steps=1"))
    config = make_config(AUTO, "schedule.max_steps=2")
    first = chosen_by(config)
    assert first["policy"] == "none" and first["needs"].keys() == {"none"}
    assert first["chosen_for"] == {"device_memory": memory, "processes": 1, "micro_batch_size": 2}
    assert "policy none, chosen by auto: about" in notes()

    with monkeypatch.context() as patch:
        patch.setattr(policy, "find_fitting", lambda *_: pytest.fail("counted again"))
        train(config)
    assert chosen_by(config) == first and "chosen anew" not in notes()

    pretend(monkeypatch, 1000)
    train(make_config(AUTO, "schedule.max_steps=3"))
    said = notes()
    assert chosen_by(config)["policy"] == "full"
    assert f"chosen anew for the device's memory (was {memory}, is 1000): full, before none" in said
    assert "memory.policy auto: none fits. Even full takes about" in said and "the GPU has 1.0 kB" in said
    assert "lower data.micro_batch_size (2)" in said and "optim.name=adamw8bit or adafactor" in said

    train(make_config(AUTO, "schedule.max_steps=4", "data.micro_batch_size=1"))
    assert "chosen anew for data.micro_batch_size (was 2, is 1)" in notes()


def test_nothing_is_warned_of_where_nothing_was_chosen(make_config: MakeConfig) -> None:
    assert list(warn_of_memory({"policy": "full"}, make_config())) == []
    chosen = {"policy": "full", "needs": {"full": 91}, "chosen_for": {"device_memory": 100}}
    assert list(warn_of_memory(chosen, make_config())) == []
    chosen["needs"] = {"full": 93}
    assert len(list(warn_of_memory(chosen, make_config()))) == 1

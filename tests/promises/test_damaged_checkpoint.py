"""P9: a damaged checkpoint is never trained on: automatic resume takes the one before it, a named one is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.checkpoints import MODEL, OPTIMIZER, flip_bit
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import (
    DamagedCheckpoint,
    find_newest,
    list_checkpoints,
    read_train_state,
    verify_checkpoint,
)
from trainer.model.run_records import read_run
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
Count = Callable[[str, bool], None]
WORDS = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]
RECORD = "checkpoint.json"


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    """A run that has made three steps, to be resumed to its fourth."""
    train(make_config(*WORDS, "schedule.max_steps=3"))
    return make_config(*WORDS)


@pytest.fixture(scope="module")
def straight() -> dict[str, Any]:
    """What the run's last checkpoint holds where nothing is damaged, as soon as one test has made it."""
    return {}


def checkpoints(config: Config) -> list[Path]:
    return list_checkpoints(run_path(config) / "checkpoints")


def files_after(config: Config) -> Any:
    return read_train_state(checkpoints(config)[-1])["files"]


def damage(checkpoint: Path, how: str) -> str:
    """Harm a checkpoint; the file's name that a message must hold."""
    if how in (MODEL, OPTIMIZER, RECORD):
        flip_bit(checkpoint / how, 100, 3)
        return how
    kind, _, name = how.partition(" ")
    match kind:
        case "without":
            (checkpoint / name).unlink()
        case "empty":
            (checkpoint / name).write_bytes(b"")
        case "half":
            whole = (checkpoint / name).read_bytes()
            (checkpoint / name).write_bytes(whole[: len(whole) // 2])
    return name


DAMAGES = [MODEL, OPTIMIZER, RECORD, f"without {MODEL}", f"half {OPTIMIZER}", f"empty {RECORD}", f"half {RECORD}"]


@pytest.mark.parametrize("how", DAMAGES)
def test_automatic_resume_takes_the_one_before(
    config: Config, straight: dict[str, Any], notes: Callable[[], str], count_try: Count, how: str
) -> None:
    bad = checkpoints(config)[-1]
    name = damage(bad, how)
    notes()
    train(config)
    said = [line for line in notes().splitlines() if line.startswith("warning: ")]
    count_try("a damaged newest checkpoint, resumed from the one before", name in said[0])
    assert name in said[0] and f"it lies in {bad}.damaged now" in said[0]
    assert read_run(run_path(config))["attempts"][-1]["first_step"] == 2
    assert bad.with_name(f"{bad.name}.damaged").is_dir()
    verify_checkpoint(bad)  # made again
    assert straight.setdefault("files", files_after(config)) == files_after(config)


def test_one_set_aside_before_is_never_overwritten(config: Config) -> None:
    bad = checkpoints(config)[-1]
    aside = bad.with_name(f"{bad.name}.damaged")
    shutil.copytree(bad, aside)
    (aside / "mine").write_text("kept")
    damage(bad, MODEL)
    damage(checkpoints(config)[-2], RECORD)
    train(config)
    assert read_run(run_path(config))["attempts"][-1]["first_step"] == 1
    names = sorted(path.name for path in bad.parent.iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000002.damaged", "step-00000003",
                     "step-00000003.damaged", "step-00000003.damaged-2", "step-00000004"]  # fmt: skip
    assert (aside / "mine").read_text() == "kept"


def test_a_named_one_is_refused_and_stays(config: Config, make_config: MakeConfig) -> None:
    bad = checkpoints(config)[-1]
    damage(bad, OPTIMIZER)
    for words in ("checkpoint.resume=3", f"checkpoint.resume={bad}", "checkpoint.resume=latest"):
        with pytest.raises(UserError, match=r"optimizer-00001\.safetensors is damaged"):
            train(make_config(*WORDS, words))
    with pytest.raises(UserError, match=r"optimizer-00001\.safetensors is damaged"):
        train(make_config(*WORDS, "run.name=fork", f"checkpoint.fork={bad}"))
    assert bad.is_dir() and not list(bad.parent.glob("*.damaged"))


def test_a_check_moves_nothing(config: Config, notes: Callable[[], str]) -> None:
    bad = checkpoints(config)[-1]
    damage(bad, MODEL)
    result = train(config, check=True)
    assert "can start at step 2" in result.said and "it would be set aside" in notes()
    assert bad.is_dir() and not list(bad.parent.glob("*.damaged"))


def test_a_run_does_not_begin_anew_because_all_are_damaged(config: Config) -> None:
    for path in checkpoints(config):
        damage(path, MODEL)
    with pytest.raises(UserError, match="has no checkpoint that is whole") as caught:
        train(config)
    assert str(caught.value).count("model-00001.safetensors is damaged") == 3
    assert len(checkpoints(config)) == 3


def test_a_folder_that_is_not_whole_is_named_and_blocks_nothing(config: Config, notes: Callable[[], str]) -> None:
    lost = checkpoints(config)[-1]
    (lost / RECORD).unlink()
    (lost / "mine").write_text("kept")
    (lost.parent / ".tmp-step-00000009-0123abcd").mkdir()
    notes()
    train(config)
    said = notes()
    assert f"note: {lost} is called like a checkpoint and is not whole" in said and "is in the way of one" in said
    assert find_newest(run_path(config)).name == "step-00000004"  # type: ignore[union-attr]
    assert (lost.with_name(f"{lost.name}.incomplete") / "mine").read_text() == "kept"
    assert not list(lost.parent.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("of_record", "of_tensors"), [(200, 5), pytest.param(3000, 30, marks=pytest.mark.faults)], ids=["some", "all"]
)
def test_flipped_bits(config: Config, count_try: Count, of_record: int, of_tensors: int) -> None:
    """Of the record any bit; of each kind of tensors, which take longer to hash, fewer."""
    path, rng = checkpoints(config)[-1], np.random.default_rng(0)
    for name, number in ((RECORD, of_record), (MODEL, of_tensors), (OPTIMIZER, of_tensors)):
        for _ in range(number):
            place, bit = int(rng.integers((path / name).stat().st_size)), int(rng.integers(8))
            flip_bit(path / name, place, bit)
            try:
                read_train_state(path) if name == RECORD else verify_checkpoint(path)
                held = False
            except DamagedCheckpoint:
                held = True
            count_try(f"a flipped bit of {name} is refused", held)
            assert held, (name, place, bit)
            flip_bit(path / name, place, bit)
    verify_checkpoint(path)

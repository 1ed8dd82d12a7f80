"""Trackers across resumes and errors: no step is shown twice or dropped, and every run is brought to an end."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.train import loop
from trainer.train.loop import train

MakeConfig = Callable[..., Config]
WORDS = ["schedule.max_steps=6", "checkpoint.every_steps=3", "sampling.every_steps=1", "sampling.prompts=[a cat]",
         "sampling.num_inference_steps=1"]  # fmt: skip


class FakeRun:
    """What of a wandb run is used; like the real one it drops what comes with a step below one that it has seen."""

    def __init__(self) -> None:
        self.defined: list[tuple[str, str | None]] = []
        self.history: list[dict[str, Any]] = []
        self.at = 0
        self.ended: list[int | None] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if step is not None and step < self.at:
            return
        self.at = self.at + 1 if step is None else step
        self.history.append(values)

    def finish(self, exit_code: int | None = None) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def wandb_run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """One run for all attempts, as its id makes it on the server."""
    import wandb

    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "config", type("Settings", (), {"update": lambda *_, **__: None})())
    return run


def die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """End the work at a step as a kill would."""
    step_once = loop.step_once

    def die(run: Any, batches: Any, number: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return step_once(run, batches, number)

    patch.setattr(loop, "step_once", die)


def train_killed_and_resumed(config: Config) -> Path:
    """Killed after the line of step 4; the checkpoint is of step 3, so that step 4 comes twice."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config)
    return Path(config.run.output_dir) / "run"


def split_log(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, which wandb's files have after 7 bytes: blocks of 32 KiB, parts in them."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):  # still being written
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part; 2 and 3 are the first and those between
            yield record
            record = b""


def read_offline(folder: Path, runs: int) -> list[Any]:
    """The records that real wandb runs wrote into their folder, without a network.

    wandb's own process may still be writing when ``finish`` has returned: a whole file ends with the exit's record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + 60
    while True:
        files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))  # named by their time
        records = [Record.FromString(data) for file in files for data in split_log(file.read_bytes())]
        ended = sum(record.WhichOneof("record_type") == "exit" for record in records)
        if ended == runs or time.monotonic() > until:
            return records
        time.sleep(0.1)


def test_a_real_run_of_both(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and resumed: the numbers, the config with its lists, and each picture with its prompt."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["logging.trackers=[wandb,tensorboard]", "logging.project=some-project", "sampling.every_steps=2",
             "sampling.prompts=[a cat, 'a dog, two']", "sampling.num_inference_steps=1"]  # fmt: skip
    folder = Path(make_config().run.output_dir) / "run"
    for steps in (2, 4):
        train(make_config(*words, f"schedule.max_steps={steps}"))
    run_id = json.loads((folder / "run.json").read_text())["tracker_run_id"]
    assert {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")} == {run_id}

    records = read_offline(folder, runs=2)
    settings = {
        item.key: json.loads(item.value_json)
        for record in records for item in (*record.config.update, *record.run.config.update)
    }  # fmt: skip
    assert settings["sampling"]["prompts"] == ["a cat", "a dog, two"] and settings["optim"]["betas"] == [0.9, 0.99]
    lines = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    captions = {line["step"]: line["samples.captions"] for line in lines if "samples.captions" in line}
    assert captions == {step: ["a cat", "a dog, two"] for step in (2, 4)}
    files = list(folder.glob("wandb/offline-run-*/files/media/images/samples*.png"))
    assert len(files) == 4

    events = EventAccumulator(str(folder / "trackers" / "some-project"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert sorted(events.Tags()["images"]) == ["samples/1 a cat", "samples/2 a dog, two"]
    for tag in events.Tags()["images"]:
        assert [(event.step, event.width, event.height) for event in events.Images(tag)] == [(2, 64, 64), (4, 64, 64)]
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("samples/")}
    assert {tag: [event.tensor_proto.string_val[0].decode() for event in found] for tag, found in texts.items()} == {
        "samples/1/text_summary": ["a cat"] * 2, "samples/2/text_summary": ["a dog, two"] * 2,
    }  # fmt: skip


def test_wandb_gets_every_step_that_a_resume_repeats(make_config: MakeConfig, wandb_run: FakeRun) -> None:
    train_killed_and_resumed(make_config(*WORDS, "logging.trackers=[wandb]"))
    assert wandb_run.defined == [("*", "step")] * 2  # our step is the axis of everything
    lines = [(line["step"], line["attempt"]) for line in wandb_run.history if "train/loss" in line]
    assert lines == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 2), (6, 2)]
    drawn = [line for line in wandb_run.history if "samples" in line]
    assert [line["step"] for line in drawn] == [1, 2, 3, 4, 5, 4, 5, 6]
    assert wandb_run.ended == [1, None]  # the first attempt failed, the second came to its end


def test_tensorboard_shows_each_step_once(make_config: MakeConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train_killed_and_resumed(make_config(*WORDS, "logging.trackers=[tensorboard]", "logging.project=p"))
    written = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert written == [1, 2, 3, 4, 4, 5, 6]
    events = EventAccumulator(str(folder / "trackers" / "p"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("samples/1 a cat")] == [1, 2, 3, 4, 5, 6]


def test_an_error_ends_the_trackers_too(
    make_config: MakeConfig, wandb_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any, made: int, ending: bool) -> None:
        raise UserError("the disk is full")

    def fail_too(exit_code: int | None = None) -> None:
        wandb_run.ended.append(exit_code)
        raise OSError("no space left for the tracker either")

    monkeypatch.setattr(loop, "save", fail)
    monkeypatch.setattr(wandb_run, "finish", fail_too)
    with pytest.raises(UserError, match="the disk is full"):
        train(make_config("schedule.max_steps=1", "logging.trackers=[wandb]"))
    assert wandb_run.ended == [1]

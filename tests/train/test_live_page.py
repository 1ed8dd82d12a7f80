"""runs/<name>/index.html of real runs: written as they go on, by the main process, and never in their way."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.html_reader import Reader
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.core import files
from trainer.core.errors import UserError
from trainer.model.checkpoint import read_train_state
from trainer.train import live_page, loop
from trainer.train.live_page import LivePage
from trainer.train.loop import train

MakeConfig = Callable[..., Config]
SAMPLES = ["sampling.every_steps=2", "sampling.prompts=['a cat', '<b>a dog</b>']", "sampling.num_inference_steps=1"]


def page_of(config: Config) -> Reader:
    return Reader((Path(config.run.output_dir) / config.run.name / "index.html").read_text(encoding="utf-8"))


def fail_at(step: int, patch: pytest.MonkeyPatch, error: BaseException) -> None:
    step_once = loop.step_once

    def fail(run: Any, batches: Any, number: int) -> Any:
        if number == step:
            raise error
        return step_once(run, batches, number)

    patch.setattr(loop, "step_once", fail)


def test_a_run_that_failed_and_was_resumed(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    config = make_config("schedule.max_steps=8", "checkpoint.every_steps=3", *SAMPLES)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(5, patch, UserError("step 5: <the loss> is not finite"))
        with pytest.raises(UserError, match="not finite"):
            train(config)
    failed = page_of(config)
    assert "Failed after 5 of 8 steps" in failed.text and "step 5: <the loss> is not finite" in failed.text
    assert "Last checkpoint: step-00000003, " in failed.text and "<b>a dog</b>" in failed.text
    folder = Path(config.run.output_dir) / "run"
    command = f"python train.py {folder}/config.yaml"
    assert command in failed.text and f"python scripts/export.py {folder}" in failed.text
    train(load_config([folder / "config.yaml"]))  # what that command does
    page = page_of(config)
    assert "Finished, all 8 steps made" in page.text and "to resume" not in page.text.lower()
    assert "Last checkpoint: step-00000008, " in page.text
    assert ["1", "0"] in [row[:2] for row in page.rows] and ["2", "3"] in [row[:2] for row in page.rows]
    sources = {value for tag, name, value in page.attributes if tag == "img" and name == "src"}
    assert sources == {"samples/step-00000002.png", "samples/step-00000008.png"}  # the first and the last
    assert all((folder / source).is_file() for source in sources)
    data = json.loads(re.findall(r'id="page-data">(.*?)</script>', (folder / "index.html").read_text(), re.S)[0])
    known = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: float(f"{line['train/loss']:.4g}") for line in known}  # the last attempt comes last
    assert data["charts"][0]["series"][0] == {"x": list(range(1, 9)), "y": [losses[step] for step in range(1, 9)]}
    assert data["steps"] == [2, 4, 6, 8] and len(data["charts"][0]["epochs"]) == 9
    assert "is not written" not in notes()


def test_an_interrupted_run_says_so(make_config: MakeConfig) -> None:
    config = make_config("schedule.max_steps=4")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(2, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert "Failed after 2 of 4 steps" in page_of(config).text and "interrupted" in page_of(config).text


def test_a_stopped_run_says_so(make_config: MakeConfig) -> None:
    config = make_config("schedule.max_steps=6")
    with pytest.MonkeyPatch.context() as patch:
        step_once = loop.step_once

        def signalled(run: Any, batches: Any, step: int) -> Any:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            return step_once(run, batches, step)

        patch.setattr(loop, "step_once", signalled)
        train(config)
    text = page_of(config).text
    assert re.search(r"Stopped at step 3 of 6, as it was asked to", text) and "To resume" in text


def test_it_is_written_at_the_start_at_each_checkpoint_and_at_the_end(make_config: MakeConfig) -> None:
    states: list[tuple[int, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        write = LivePage.write

        def note(page: LivePage, state: Any) -> None:
            states.append((page.made, state.kind))
            write(page, state)
            assert page.due >= live_page.SECONDS_BETWEEN

        patch.setattr(LivePage, "write", note)
        train(make_config("schedule.max_steps=5", "checkpoint.every_steps=2"))
        assert states == [(0, "running"), (2, "running"), (4, "running"), (5, "running"), (5, "finished")]
        states.clear()
        patch.setattr(live_page, "SECONDS_BETWEEN", -1e9)
        patch.setattr(live_page, "SHARE", 1e9)
        patch.setattr(LivePage, "write", lambda page, state: states.append((page.made, state.kind)))
        train(make_config("schedule.max_steps=3", "run.name=often"))
        assert [made for made, _ in states] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError("read-only"), ValueError("a bug")]
)
def test_a_page_that_cannot_be_written_stops_nothing(
    make_config: MakeConfig, notes: Callable[[], str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_bytes = files.write_bytes

    def fail(path: Path, content: bytes) -> None:
        if path.name == "index.html":
            raise error
        write_bytes(path, content)

    monkeypatch.setattr(files, "write_bytes", fail)
    config = make_config("schedule.max_steps=2", "checkpoint.every_steps=1")
    train(config)
    assert notes().count("warning: the run's page is not written, training goes on: ") == 1
    folder = Path(config.run.output_dir) / "run"
    assert (folder / "checkpoints/step-00000002/checkpoint.json").is_file() and not (folder / "index.html").exists()


def test_a_page_of_the_users_own_stays(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    config = make_config("schedule.max_steps=1")
    page = Path(config.run.output_dir) / "run/index.html"
    page.parent.mkdir(parents=True)
    page.write_text("mine")
    train(config)
    assert page.read_text() == "mine" and "is no page of train: move it away" in notes()


def test_the_page_changes_no_bit(make_config: MakeConfig) -> None:
    words = ["schedule.max_steps=3", *SAMPLES]
    train(make_config(*words, "run.name=with"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LivePage, "write", lambda *_: None)
        config = make_config(*words, "run.name=without")
        train(config)
    runs = Path(config.run.output_dir)
    one, other = (read_train_state(runs / name / "checkpoints/step-00000003") for name in ("with", "without"))
    assert one["files"] == other["files"]
    pictures = [(runs / name / "samples/step-00000003.png").read_bytes() for name in ("with", "without")]
    assert pictures[0] == pictures[1]


def test_what_an_environment_variable_holds_is_not_written(
    make_config: MakeConfig, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = next(word.partition("=")[2] for word in tiny_settings if word.startswith("data.shards="))
    monkeypatch.setenv("OUR_SECRET_SHARDS", shards)
    config = make_config("schedule.max_steps=2", "data.shards=${oc.env:OUR_SECRET_SHARDS}")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(1, patch, UserError(f"{shards}/shard-00000.tar is damaged"))
        with pytest.raises(UserError):
            train(config)
    page = page_of(config)
    assert "${oc.env:OUR_SECRET_SHARDS}/shard-00000.tar is damaged" in page.text
    assert shards not in (Path(config.run.output_dir) / "run/index.html").read_text()


def test_check_writes_no_page(make_config: MakeConfig) -> None:
    config = make_config("schedule.max_steps=2")
    train(config, check=True)
    assert not (Path(config.run.output_dir) / "run/index.html").exists()

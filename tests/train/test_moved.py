"""A run and its data may move: to another folder, another disk, another working directory."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.release.export import export
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
WORDS = ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "run.name=run"]


def files_of(folder: Path) -> dict[str, Any]:
    newest = find_newest(folder)
    assert newest is not None
    return read_train_state(newest)["files"]


def test_a_run_and_its_data_move_to_a_bigger_disk(make_config: MakeConfig, tmp_path: Path) -> None:
    straight = make_config(*WORDS, "run.name=straight", "schedule.max_steps=2")
    train(straight)
    began = make_config(*WORDS, "schedule.max_steps=1")
    train(began)
    disk = tmp_path / "bigger disk"
    shutil.move(run_path(began), disk / "runs" / "run")
    for name, source in (("set", began.data.shards), ("base", began.model.pretrained)):
        shutil.copytree(source, disk / name)
    moved = make_config(
        *WORDS, "schedule.max_steps=2", f"run.output_dir={disk / 'runs'}", f"data.shards={disk / 'set'}",
        "run.stage=renamed",
        f"model.pretrained={disk / 'base'}", "data.images=gone", "data.posts=[gone.jsonl]", "data.max_bad_fraction=0.5",
    )  # fmt: skip
    train(moved)
    assert files_of(run_path(moved)) == files_of(run_path(straight))


def test_other_data_at_the_same_place_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(*WORDS, "schedule.max_steps=1")
    train(config)
    for name in ("vocab.json", "merges.txt"):
        assert (Path(config.model.pretrained) / "tokenizer" / name).is_file()
    tokenizers = Path(shutil.copytree(config.model.pretrained, tmp_path / "other"))
    merges = tokenizers / "tokenizer_2" / "merges.txt"
    merges.write_text("".join(merges.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="was made with another pair of tokenizers"):
        train(make_config(*WORDS, "schedule.max_steps=2", f"model.tokenizer={tokenizers}"))


def test_a_second_stage_resumes_from_the_base_it_recorded(make_config: MakeConfig) -> None:
    first = make_config("run.name=first", "schedule.max_steps=1", "publish.formats=[diffusers]")
    train(first)
    export(run_path(first), dtype="fp32")
    second = make_config("run.name=second", "schedule.max_steps=1", f"model.pretrained={run_path(first)}")
    train(second)
    export(run_path(first), dtype="fp16")  # from now on the run has two exports of its newest step
    train(make_config("run.name=second", "schedule.max_steps=2", f"model.pretrained={run_path(first)}"))
    newest = find_newest(run_path(second))
    assert newest is not None and read_train_state(newest)["step"] == 2
    # its subfolders, and a fork, mean the same one
    exports = run_path(first) / "export"
    train(make_config("run.name=second", "schedule.max_steps=3", f"model.pretrained={exports}"))
    train(make_config("run.name=fork", "schedule.max_steps=4", f"model.pretrained={run_path(first)}",
                      f"checkpoint.fork={run_path(second)}"))  # fmt: skip
    # a longer first stage changes what its folder means, too
    train(make_config("run.name=first", "schedule.max_steps=2", "publish.formats=[diffusers]"))
    export(run_path(first), dtype="fp32")
    train(make_config("run.name=second", "schedule.max_steps=4", f"model.pretrained={run_path(first)}"))


def test_a_relative_base_is_found_from_where_training_ran(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    base = shutil.copytree(make_config().model.pretrained, tmp_path / "here" / "base")
    shutil.move(base / "vae", tmp_path / "here" / "vae")
    monkeypatch.chdir(tmp_path / "here")
    config = make_config("schedule.max_steps=1", "model.pretrained=base", "model.vae=vae")
    train(config)
    monkeypatch.chdir(tmp_path / "elsewhere")
    (single, folder) = export(run_path(config))
    assert single.is_file() and (folder / "tokenizer" / "vocab.json").is_file()
    (tmp_path / "here" / "base").rename(tmp_path / "here" / "renamed")
    with pytest.raises(UserError, match="base"):
        export(run_path(config), out=tmp_path / "out")

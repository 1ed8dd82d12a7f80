"""Keys of older versions: carried over with a note, in files and on the command line, and never over a new key."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from trainer.config.load import load_config
from trainer.core.errors import UserError

REST = "run: {name: a, stage: '1'}\nmodel: {pretrained: b}\noptim: {unet_lr: 1.0e-5}\nschedule: {epochs: 1}\n"


def write(folder: Path, data: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(REST + f"data: {{shards: s, {data}}}\n")
    return path


def test_workers_of_version_0_2_are_threads_and_processes(tmp_path: Path, notes: Callable[[], str]) -> None:
    config = load_config([write(tmp_path, "num_workers: 7")])
    assert (config.data.loader_threads, config.data.decode_processes) == (7, 7)
    assert "num_workers" not in config.written["data"]
    noted = notes()
    assert noted == (
        "note: data.num_workers is data.loader_threads and data.decode_processes now: write these in its place"
    )


def test_a_new_key_wins_over_an_old_one_of_the_same_layer(tmp_path: Path) -> None:
    config = load_config([write(tmp_path, "loader_threads: 2, num_workers: 7")])
    assert (config.data.loader_threads, config.data.decode_processes) == (2, 7)


def test_later_layers_win_whichever_key_they_have(tmp_path: Path) -> None:
    file = write(tmp_path, "loader_threads: 2, decode_processes: 3")
    config = load_config([file], ["data.num_workers=5"])
    assert (config.data.loader_threads, config.data.decode_processes) == (5, 5)
    config = load_config([file], ["data.num_workers=5", "data.decode_processes=6"])
    assert (config.data.loader_threads, config.data.decode_processes) == (5, 6)


def test_what_is_written_again_needs_no_note(tmp_path: Path, notes: Callable[[], str]) -> None:
    first = load_config([write(tmp_path, "num_workers: 7")])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(first.written))
    notes()
    assert load_config([again]) == first and notes() == ""


def test_the_licences_name_can_only_be_one(tmp_path: Path, notes: Callable[[], str]) -> None:
    today = load_config([write(tmp_path, "loader_threads: 2")])
    old = tmp_path / "old.yaml"
    old.write_text("publish: {license_name: faipl-1.0-sd, title: a}\n")
    config = load_config([tmp_path / "config.yaml", old])
    assert config.publish.title == "a" and config.written.keys() == today.written.keys()
    assert "license_name" not in config.written["publish"]
    assert notes() == "note: publish.license_name is always faipl-1.0-sd: leave it out"
    for other in ("openrail++", "null", "[faipl-1.0-sd]"):
        with pytest.raises(UserError, match=r"publish\.license_name: can only be faipl-1\.0-sd, which"):
            load_config([tmp_path / "config.yaml"], [f"publish.license_name={other}"])


def test_gradient_checkpointing_is_a_policy(tmp_path: Path, notes: Callable[[], str]) -> None:
    for old, new in (("true", "full"), ("false", "none")):
        config = load_config([write(tmp_path, "loader_threads: 2")], [f"memory.gradient_checkpointing={old}"])
        assert config.memory.policy == new and config.written["memory"] == {"policy": new}
        assert notes() == (
            f"note: memory.gradient_checkpointing: {old} is memory.policy: {new} now: write that in its place"
        )
    file = tmp_path / "old.yaml"
    file.write_text("memory: {gradient_checkpointing: false, policy: selective}\n")
    assert load_config([tmp_path / "config.yaml", file]).memory.policy == "selective"
    assert load_config([tmp_path / "config.yaml"]).memory.policy == "full"  # as it was without a word
    for other in ("some", "null", "1"):
        with pytest.raises(UserError, match=r"memory\.gradient_checkpointing: unknown key, here it is memory\.policy"):
            load_config([tmp_path / "config.yaml"], [f"memory.gradient_checkpointing={other}"])

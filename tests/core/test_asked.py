"""What a launch was asked for: accelerate's command line and config file, the environment, the run's own number."""

import json
from pathlib import Path

import pytest

from trainer.core import asked
from trainer.core.asked import check_asked, find_asked
from trainer.core.errors import UserError
from trainer.core.processes import Launcher


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def accelerate(*words: str) -> Launcher:
    return Launcher("accelerate launch", 1, "1", (*words, "train.py", "my.yaml"))


def numbers(launcher: Launcher | None, stated: int | None = None) -> list[int]:
    return [number for number, _ in find_asked(stated, launcher)]


@pytest.mark.parametrize(
    "words",
    [("--num_processes", "2"), ("--num_processes=2",), ("--num-processes", "2"), ("--cpu", "--num-processes=2")],
)
def test_the_command_line_asks(words: tuple[str, ...]) -> None:
    assert numbers(accelerate(*words)) == [2]


@pytest.mark.parametrize("name", ["default_config.yaml", "default_config.json"])
def test_the_users_own_config_asks_unless_the_command_line_does(tmp_path: Path, name: str) -> None:
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    (tmp_path / "hf" / "accelerate" / name).write_text(json.dumps({"num_processes": 2, "distributed_type": "NO"}))
    assert numbers(accelerate()) == [2]
    assert numbers(accelerate("--num_processes", "1")) == [1]
    assert numbers(accelerate("--cpu")) == []  # accelerate does not read it then
    assert numbers(Launcher("torchrun", 1, "1", ("train.py",))) == numbers(None) == []


@pytest.mark.parametrize("text", ["", "[]", "num_processes: many", "num_processes: -1", "a: [", "num_processes: true"])
def test_a_config_that_says_nothing_asks_for_nothing(tmp_path: Path, text: str) -> None:
    file = tmp_path / "named.yaml"
    file.write_text(text)
    assert numbers(accelerate("--config_file", str(file))) == []
    file.write_text("num_processes: 3")
    assert numbers(accelerate(f"--config-file={file}")) == [3]
    assert numbers(accelerate("--config_file", str(tmp_path / "nowhere"))) == []


def test_the_run_and_the_environment_ask_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert numbers(None, stated=4) == [4, 2]


def test_a_refusal_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(asked, "find_launcher", lambda: accelerate("--cpu", "--num_processes", "2"))
    monkeypatch.setattr("sys.argv", ["train.py", "my.yaml", "optim.unet_lr=1e-5"])
    with pytest.raises(UserError) as error:
        check_asked(1, None)
    assert "2 processes were asked for, but 1 run" in str(error.value)
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 " in str(error.value)
    assert "train.py my.yaml optim.unet_lr=1e-5" in str(error.value)
    check_asked(2, None)
    with pytest.raises(UserError, match=r"torchrun --nproc_per_node 2 \S*scripts/build_shards\.py my\.yaml"):
        check_asked(1, None, "scripts/build_shards.py")

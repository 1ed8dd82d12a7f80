"""Every command that takes a run takes its name and its config, and says which runs there are."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.exported_run import make_run, moved_weights
from support.paths import REPOSITORY

Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run a script in the test's folder; what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(command: Command, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(name: str, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            command(name, *words)
        assert caught.value.code == 2
        return capsys.readouterr().err

    return run


def test_a_run_is_named_by_its_name_or_its_config(command: Command, tiny_base: Path, tmp_path: Path) -> None:
    make_run(Path("runs/mine"), tiny_base, moved_weights(tiny_base))
    (tmp_path / "runs/mine/run.json").write_text("{}")
    lineage = command("lineage.py", "mine")  # of its checkpoint
    assert "mine" in lineage
    exported = command("export.py", "mine")
    assert "diffusers folder: runs/mine/export/mine-step-00000020-fp32" in exported
    config = tmp_path / "my.yaml"
    config.write_text(
        f"extends: configs/stage1_feature_alignment.yaml\nrun: {{name: mine}}\nmodel: {{pretrained: {tiny_base}}}\n"
    )
    assert re.sub("took .*\n", "", command("export.py", "my.yaml")) == re.sub("took .*\n", "", exported)
    assert command("lineage.py", "mine") == command("lineage.py", "my.yaml")
    drawn = command("sample.py", "mine", "--prompt", "1girl", "--size", "64x64", "--steps", "2", "--compare", "my.yaml")
    assert "2 images" in drawn
    assert list((tmp_path / "runs/mine/export").glob("*/*.png"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export.py", "mnie"], "mnie names neither a checkpoint nor a run. Runs with checkpoints are: runs/mine"),
        (["lineage.py", "mnie"], "mnie does not exist, and no run is called so: runs are: mine"),
        (["publish.py", "mnie"], "mnie is not a run: it has no config.yaml. Runs are: runs/mine"),
        (["sample.py", "mnie", "--prompt", "a"], "mnie does not exist, and is not a hub id (owner/name) either"),
    ],
)
def test_an_unknown_name_is_answered_with_the_runs(
    refused: Command, tmp_path: Path, words: list[str], said: str
) -> None:
    folder = tmp_path / "runs/mine"
    (folder / "checkpoints/step-00000020").mkdir(parents=True)
    for file in ("run.json", "config.yaml", "checkpoints/step-00000020/train_state.json"):
        (folder / file).write_text("{}")
    message = refused(*words)
    assert said in message and "mine" in message.replace("mnie", "")

"""What is understood as a run's model, and what is said of words and folders that are none."""

import shutil
from pathlib import Path

import pytest

from support.tiny_model import random_parts, write_folder
from trainer.core.errors import UserError
from trainer.model.base import find_base


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at steps 900 and 1000, of which 900 was exported."""
    run = tmp_path / "runs" / "tiny"
    for step in (900, 1000):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:08d}" / "train_state.json").write_text("{}")
    (run / "run.json").write_text("{}")
    write_folder(run / "export" / "tiny-step-00000900-fp16", random_parts(seed=5))
    return run


def test_a_checkpoint_stands_for_the_export_of_its_step(run: Path) -> None:
    assert find_base(str(run / "checkpoints" / "step-00000900")).path.name == "tiny-step-00000900-fp16"
    with pytest.raises(UserError) as caught:
        find_base(str(run / "checkpoints" / "step-00001000"))
    message = str(caught.value)
    assert "step-00001000 is a checkpoint, which holds trained parameters only" in message
    assert f"python scripts/export.py {run / 'checkpoints' / 'step-00001000'}" in message
    assert str(run / "export" / "tiny-step-00000900-fp16") in message


@pytest.mark.parametrize("inner", ["checkpoints", "export", "latest", "newest"])
def test_folders_within_a_run_stand_for_it(run: Path, inner: str) -> None:
    assert find_base(str(run / inner)).path.name == "tiny-step-00000900-fp16"


def test_single_files_of_a_run_are_listed(run: Path) -> None:
    shutil.rmtree(run / "export" / "tiny-step-00000900-fp16")
    (run / "export" / "tiny-step-00000900-fp16.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"without an exported diffusers folder.*tiny-step-00000900-fp16\.safetensors"):
        find_base(str(run))


@pytest.mark.parametrize("word", ["latest", "newest", "step-00001000", "checkpoints/latest"])
def test_words_that_name_nothing_are_told_what_there_is(run: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        find_base(word, runs=run.parent)
    assert f"exported are: {run / 'export' / 'tiny-step-00000900-fp16'}" in str(caught.value)


def test_a_runs_bare_name_is_told_its_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"; {run} is a run's folder, which stands for its newest export"):
        find_base("tiny", runs=run.parent)
    shutil.rmtree(run / "export")
    with pytest.raises(UserError, match=r"no run in .* has an export yet: python scripts/export\.py RUN"):
        find_base("latest", runs=run.parent)
    with pytest.raises(UserError, match=r"not a hub id .* either$"):
        find_base("latest", runs=tmp_path / "none")

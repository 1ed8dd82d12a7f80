"""A checkpoint of somebody else, with a right digest: its names and its config are not to be trusted."""

import shutil
from pathlib import Path

import pytest

from support.checkpoints import change_record
from support.published_run import parts, run, stages
from trainer.core.errors import UserError
from trainer.model.checkpoint import read_train_state
from trainer.release.export import export

__all__ = ["parts", "run", "stages"]  # fixtures


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "", "a/b", None, 5])
def test_a_runs_name_leads_nowhere_else(run: Path, tmp_path: Path, name: object) -> None:
    checkpoint = Path(shutil.copytree(run / "checkpoints/step-00000030", tmp_path / "c/step-00000030"))
    change_record(checkpoint, run=name)
    with pytest.raises(UserError, match="run is not what a run writes"):
        export(checkpoint, tmp_path / "c/out")
    assert not list(tmp_path.rglob("*evil*"))


def test_an_environment_variable_gets_into_no_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "s3cr3t-value")
    checkpoint = Path(shutil.copytree(run / "checkpoints/step-00000030", tmp_path / "c/step-00000030"))
    state = read_train_state(checkpoint)
    state["config"]["publish"] |= {"title": "${oc.env:MY_SECRET}", "author": "x ${oc.env:MY_SECRET}"}
    change_record(checkpoint, config=state["config"])
    for path in export(checkpoint, tmp_path / "out"):
        for file in [path, *path.rglob("*")]:
            assert file.is_dir() or b"s3cr3t" not in file.read_bytes()

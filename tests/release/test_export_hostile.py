"""A checkpoint of somebody else, with a right digest: its names and its config are not to be trusted."""

import shutil
from pathlib import Path

import pytest
import yaml

from support.checkpoints import change_record
from support.published_run import parts, run, stages
from trainer.core.errors import UserError
from trainer.model.checkpoint import read_train_state
from trainer.release.export import export
from trainer.release.request import WRITTEN_WORDS, read_publish_config

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


@pytest.mark.parametrize("name", WRITTEN_WORDS)
def test_words_for_others_are_not_taken_from_the_environment(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What others get to read is set without one."""
    monkeypatch.setenv("MY_SECRET", "https://example.org/s3cr3t")
    config = run / "config.yaml"
    written = yaml.safe_load(config.read_text())
    written["publish"][name] = "${oc.env:MY_SECRET}"
    config.write_text(yaml.safe_dump(written))
    with pytest.raises(UserError, match=f"publish.{name} comes from an environment variable"):
        read_publish_config(run, [])
    assert read_publish_config(run, [f"publish.{name}=https://example.org/mine"]).publish is not None

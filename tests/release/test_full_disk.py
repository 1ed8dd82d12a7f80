"""Exporting and publishing onto a full disk: a message with the sizes, and nothing left of what was begun."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.published_run import SOURCE, parts, request_of, run, stages, stand_in
from trainer.core.errors import UserError
from trainer.release import artefacts
from trainer.release.export import export
from trainer.release.publish import Request, publish

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_export_that_cannot_fit_is_not_begun(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"fp16\.safetensors could not be written.* needs \d+\.\d MB, 1\.0 MB are free"):
        export(run, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_an_export_onto_a_disk_that_fills_up_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(_: Any, path: Path, *__: Any, **___: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "save_tensors", fill_up)
        with pytest.raises(UserError, match="could not be written: the disk is full"):
            export(run, tmp_path / "single")
    assert names(tmp_path / "single") == []
    monkeypatch.setattr("trainer.release.export.save_tensors", fill_up)
    with pytest.raises(UserError, match=r"stage2-step-00000030-fp16 could not be written: the disk is full\. It needs"):
        export(run, tmp_path / "both")
    assert names(tmp_path / "both") == ["stage2-step-00000030-fp16.safetensors"]  # which was whole before


def test_publishing_onto_a_full_disk(run: Path, request_of: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
        with pytest.raises(
            UserError, match=r"published/stage2 could not be written.* needs \d+\.\d MB, 1\.0 MB are free"
        ):
            publish(request_of, [SOURCE])

    def fill_up(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.release.publish.copy_rest", fill_up)
    with pytest.raises(UserError, match="published/stage2 could not be written: the disk is full"):
        publish(request_of, [SOURCE])
    assert names(run / "published") == []

"""What is said at publishing stands in the folder, and is not asked for again."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from support.published_run import OURS, SOURCE, change, parts, request_of, run, stages, stand_in
from trainer.model.base import Base, LazyFile, find_base, read_sdxl_config
from trainer.release.artefacts import check_stamp
from trainer.release.export import SHAPING, export, has_sdxl_shapes
from trainer.release.publish import Request, publish

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures

NEW = ["publish.title=Mine, 木 #2", "publish.author=Someone"]


def test_a_title_given_at_publishing_is_written_into_the_copy(run: Path, request_of: Request, tmp_path: Path) -> None:
    fresh, _ = publish(change(request_of, out=tmp_path / "from_checkpoint"), [SOURCE, *NEW])
    file, _ = export(run)
    before = file.read_bytes()
    copied, _ = publish(change(request_of, out=tmp_path / "from_export"), [SOURCE, *NEW])
    single = copied / "stage2.safetensors"
    said, exported = LazyFile(single).metadata, LazyFile(file).metadata
    assert (said["modelspec.title"], said["modelspec.author"]) == ("Mine, 木 #2", "Someone")
    assert "modelspec.author" not in exported and exported["modelspec.title"] == "stage2"
    changed = {key for key in said.keys() | exported.keys() if said.get(key) != exported.get(key)}
    assert changed == {"modelspec.title", "modelspec.author"} and file.read_bytes() == before
    check_stamp(single)
    # an export that lies there makes no difference, to the last byte
    assert (copied / "SHA256SUMS").read_bytes() == (fresh / "SHA256SUMS").read_bytes()
    # what was said can be taken back, and neither needs the checkpoint
    shutil.rmtree(run / "checkpoints")
    again, _ = publish(change(request_of, out=tmp_path / "again"), [SOURCE, *NEW])
    assert (again / "SHA256SUMS").read_bytes() == (fresh / "SHA256SUMS").read_bytes()
    shutil.copyfile(single, file)
    file.with_suffix(".sha256").unlink()  # which would call it changed
    plain, _ = publish(change(request_of, out=tmp_path / "plain"), [SOURCE])
    assert (plain / "stage2.safetensors").read_bytes() == before


# --- what is told at the end


@pytest.fixture
def told(run: Path, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run scripts/publish.py with some words more; what it printed."""

    def publish_with(*words: str) -> str:
        given = [str(run), SOURCE, "--license-file", str(stand_in), "--acknowledge-base-terms", OURS, *words]
        monkeypatch.setattr(sys, "argv", ["publish.py", *given])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(REPOSITORY / "scripts/publish.py"), run_name="__main__")
        return out.getvalue()

    return publish_with


def test_what_was_given_is_not_asked_for(told: Callable[..., str], tiny_base: Path) -> None:
    printed = told()
    assert printed.endswith("nothing was uploaded; to do that, add publish.repo_id=owner/name --upload\n")
    assert "offers them at https://example.org/source;" in printed and "--base owner/name says so" in printed
    printed = told("publish.repo_id=owner/name", "--base", str(tiny_base), "--out", str(tiny_base.parent / "given"))
    assert printed.endswith("nothing was uploaded; to do that, add --upload\n")
    assert "--base owner/name" not in printed and "--base names one too" in printed


# --- who can load it


def test_only_sdxls_own_shapes_are_for_other_programs(
    run: Path, request_of: Request, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_sdxl_shapes(find_base(str(tiny_base)))
    file, _ = export(run)
    assert not has_sdxl_shapes(find_base(str(file)))
    folder, _ = publish(change(request_of, out=tmp_path / "tiny"), [SOURCE])
    assert "in one fp16 file\n" in (folder / "README.md").read_text()
    monkeypatch.setattr("trainer.release.publish.has_sdxl_shapes", lambda _: True)
    folder, _ = publish(change(request_of, out=tmp_path / "full"), [SOURCE])
    assert "in one fp16 file, for ComfyUI, Forge and others\n" in (folder / "README.md").read_text()


def test_the_export_command_names_other_programs_for_sdxls_shapes_only(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", str(run)])
    runpy.run_path(str(REPOSITORY / "scripts/export.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "single file: " in printed and "ComfyUI" not in printed


@pytest.mark.parametrize("other", [None, *((component, key) for component, keys in SHAPING.items() for key in keys)])
def test_one_other_number_makes_other_shapes(tmp_path: Path, other: tuple[str, str] | None) -> None:
    for component, keys in SHAPING.items():
        config = read_sdxl_config(component)
        assert set(keys) <= config.keys()
        changed = {other[1]: 5} if other and other[0] == component else {}
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps(config | changed))
    assert has_sdxl_shapes(Base("SDXL", tmp_path, None)) == (other is None)

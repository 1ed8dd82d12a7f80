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
import torch
from safetensors.torch import save_file

from support.paths import REPOSITORY
from support.published_run import OURS, SOURCE, change, parts, request_of, run, stages, stand_in, write_png
from trainer.core.errors import UserError
from trainer.model.base import Base, LazyFile, find_base, read_sdxl_config
from trainer.release.artefacts import check_stamp, hash_files, write_sums
from trainer.release.export import SHAPING, export, has_sdxl_shapes
from trainer.release.folder import check_fit, check_published, weights_file_name, weights_file_names
from trainer.release.publish import Request, publish
from trainer.release.request import read_publish_config

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures

NEW = ["publish.title=Mine, 木 #2", "publish.author=Someone"]
LISTED = {"modelspec.usage_hint", "modelspec.tags", "modelspec.thumbnail"}


def test_a_title_given_at_publishing_is_written_into_the_copy(run: Path, request_of: Request, tmp_path: Path) -> None:
    write_png(run / "export/samples/a.png", prompt="1girl")
    fresh, _ = publish(change(request_of, out=tmp_path / "from_checkpoint"), [SOURCE, *NEW])
    file, _ = export(run)
    before = file.read_bytes()
    copied, _ = publish(change(request_of, out=tmp_path / "from_export"), [SOURCE, *NEW])
    single = copied / "mine-2-fp16.safetensors"
    said, exported = LazyFile(single).metadata, LazyFile(file).metadata
    assert (said["modelspec.title"], said["modelspec.author"]) == ("Mine, 木 #2", "Someone")
    assert "modelspec.author" not in exported and exported["modelspec.title"] == "stage2"
    changed = {key for key in said.keys() | exported.keys() if said.get(key) != exported.get(key)}
    assert changed == {"modelspec.title", "modelspec.author", *LISTED} and file.read_bytes() == before
    assert not LISTED & exported.keys()
    check_stamp(single)
    # an export that lies there makes no difference, to the last byte
    assert (copied / "SHA256SUMS").read_bytes() == (fresh / "SHA256SUMS").read_bytes()
    # what was said can be taken back, and neither needs the checkpoint
    plain, _ = publish(change(request_of, out=tmp_path / "plain"), [SOURCE])
    shutil.rmtree(run / "checkpoints")
    again, _ = publish(change(request_of, out=tmp_path / "again"), [SOURCE, *NEW])
    assert (again / "SHA256SUMS").read_bytes() == (fresh / "SHA256SUMS").read_bytes()
    shutil.copyfile(single, file)
    file.with_suffix(".sha256").unlink()  # which would call it changed
    back, _ = publish(change(request_of, out=tmp_path / "back"), [SOURCE])
    assert (back / "SHA256SUMS").read_bytes() == (plain / "SHA256SUMS").read_bytes()


def test_what_lists_of_models_show(run: Path, request_of: Request, tmp_path: Path) -> None:
    """ModelSpec's usage_hint, tags and thumbnail, in every single file of the folder."""
    folder, _ = publish(change(request_of, full_precision=True), [SOURCE, "publish.base_only=true"])
    for path in (folder / "stage2-fp16.safetensors", folder / "stage2-fp32.safetensors"):
        said = LazyFile(path).metadata
        assert said["modelspec.usage_hint"].startswith("Prompt with tags: masterpiece, best quality, 1girl, character,")
        assert len(said["modelspec.usage_hint"]) < 250  # it "should be short"
        assert said["modelspec.usage_hint"].endswith("28 steps, guidance 7. A base to build on, not for inference.")
        assert said["modelspec.tags"] == "anime, text-to-image, stable-diffusion, stable-diffusion-xl"
        assert "modelspec.thumbnail" not in said
    # a thumbnail's letters may read like anything; what else a file says is still looked at
    write_png(tmp_path / "drawn/a.png", prompt="x")
    folder, release = publish(change(request_of, samples=tmp_path / "drawn", out=tmp_path / "out"), [SOURCE])
    (single,) = folder.glob("*.safetensors")
    assert LazyFile(single).metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,/9j/")
    for text, fits in (
        ("data:image/jpeg;base64,+/home/someone/x", True),
        ("data:image/jpeg;base64,: /home/someone/x", False),
    ):
        save_file({"x": torch.zeros(1)}, single, {"modelspec.thumbnail": text})
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="an absolute path"):
            check_fit(folder, weights_file_names(release.config))


@pytest.mark.parametrize(
    ("title", "repo_id", "name"),
    [
        (None, None, "stage2-fp16"),
        (None, "Owner/My-Anime_1.0", "My-Anime_1.0-fp16"),
        ("My Anime Base", None, "my-anime-base-fp16"),
        ("Élan: 3.0 (beta)", "owner/name", "elan-3.0-beta-fp16"),
        ("木", "owner/name", "name-fp16"),
        ("木", None, "stage2-fp16"),
        ("../../etc/x", None, "etc-x-fp16"),
        ("...", None, "stage2-fp16"),
        ("a\\b|c*?", None, "a-b-c-fp16"),
        ("x" * 300, None, "x" * 80 + "-fp16"),
    ],
)
def test_names_of_files(run: Path, title: str | None, repo_id: str | None, name: str) -> None:
    words = [f"publish.title='{title}'"] * (title is not None) + [f"publish.repo_id={repo_id}"] * (repo_id is not None)
    config = read_publish_config(run, words)
    assert weights_file_name(config, "fp16") == f"{name}.safetensors"
    assert {f"{name}.safetensors", "stage2.safetensors", "stage2-fp32.safetensors"} <= weights_file_names(config)


def test_a_folder_of_an_older_version_is_still_verified(run: Path, request_of: Request) -> None:
    """Version 0.2 called the single file by the run's name."""
    folder, release = publish(request_of, [SOURCE])
    (folder / "stage2-fp16.safetensors").rename(folder / "stage2.safetensors")
    found = hash_files(folder)
    del found["SHA256SUMS"]
    write_sums(folder / "SHA256SUMS", found)
    check_published(folder, release.config)
    (folder / "stage2.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors is not a file that is published"):
        check_published(folder, release.config)


def test_the_folder_of_a_repository_has_its_name(run: Path, request_of: Request) -> None:
    """Its card names the repository, so that it is another folder than the one built without."""
    first, _ = publish(request_of, [SOURCE])
    second, _ = publish(request_of, [SOURCE, "publish.repo_id=owner/name"])
    assert (first, second) == (run / "published/stage2", run / "published/name")
    assert 'model = "owner/name"' in (second / "README.md").read_text() and (second / "name-fp16.safetensors").is_file()
    assert 'model = "OWNER/NAME"' in (first / "README.md").read_text()


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
    assert "\nto upload it:\n" in printed and printed.endswith("publish.repo_id=owner/name --upload\n")
    assert "offers them at https://example.org/source;" in printed and "--base owner/name says so" in printed
    printed = told("publish.repo_id=owner/name", "--base", str(tiny_base), "--out", str(tiny_base.parent / "given"))
    assert "publish.repo_id=owner/name" in printed and printed.endswith(" --upload\n")
    assert "--base owner/name" not in printed and "--base names one too" in printed


def test_what_the_card_says_for_you_is_told(told: Callable[..., str], tiny_base: Path) -> None:
    printed = told()
    assert "does not call it a base to build on: publish.base_only=true does" in printed
    assert "names no repository: publish.repo_id=owner/name builds a folder whose card does" in printed
    printed = told("publish.base_only=true", "publish.repo_id=owner/name", "--out", str(tiny_base.parent / "base_only"))
    assert "the card calls it a base to build on, not for inference: publish.base_only is true" in printed
    assert "names no repository" not in printed


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
        changed = {}
        if other and other[0] == component:
            changed[other[1]] = [5] if isinstance(config[other[1]], list) else 5
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps(config | changed))
    assert has_sdxl_shapes(Base("SDXL", tmp_path, None)) == (other is None)

"""A file is there as a whole or not at all; hashes are those of the standard tools."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.core import files
from trainer.core.files import sha256_file, sha256_json, temporary_path, write_bytes, write_file, write_json, write_text


def test_a_writer_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_text(target, "old")

    def fail(path: Path) -> None:
        path.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(target, fail)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_writer_that_fails_on_a_new_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "new", lambda path: (path.write_text("half"), (_ for _ in ()).throw(KeyboardInterrupt)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):  # a writer that wrote nothing
        write_file(tmp_path / "new", lambda path: None)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_whole_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    seen: list[tuple[str, str, str]] = []
    real_file, real_folder = files.sync_file, files.sync_folder

    def watch_file(path: Path) -> None:
        real_file(path)
        seen.append(("file", path.read_text(), target.read_text()))

    def watch_folder(path: Path) -> None:
        real_folder(path)
        seen.append(("folder", path.name, target.read_text()))

    monkeypatch.setattr(files, "sync_file", watch_file)
    monkeypatch.setattr(files, "sync_folder", watch_folder)
    write_text(target, "new")
    # first the temporary file's bytes, then, the rename done, the folder's entry
    assert seen == [("file", "new", "old"), ("folder", tmp_path.name, "new")]


def test_a_rename_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail(_path: Path, _target: Path) -> Path:
        raise PermissionError("not here")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(PermissionError):
        write_text(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_syncing_forces_the_bytes_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_text(tmp_path / "a", "a")
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


def test_temporary_names_lie_beside_the_target_and_differ(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    some = {temporary_path(target) for _ in range(100)}
    assert len(some) == 100
    assert {path.parent for path in some} == {tmp_path}
    assert all(path.name.startswith(files.TEMPORARY_PREFIX) for path in some)


def test_modes_and_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.safetensors"
    write_file(target, lambda path: save_file({"x": torch.ones(3)}, path))
    assert target.stat().st_mode & 0o777 == 0o644  # safetensors alone writes 0600
    assert load_file(target)["x"].tolist() == [1, 1, 1]


def test_bytes_text_and_json(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"\x00\xff")
    write_text(tmp_path / "b", "ä|||^_^\n")
    write_json(tmp_path / "c", {"z": "ä", "a": [1, None]})
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "ä|||^_^\n".encode()
    text = (tmp_path / "c").read_text(encoding="utf-8")
    assert json.loads(text) == {"z": "ä", "a": [1, None]}
    assert "ä" in text and text.count("\n") > 2 and text.endswith("}\n")  # for people to read


def test_sha256_of_files_and_values(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").touch()
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_json({"b": [1, 2.5], "a": "ä"}) == hashlib.sha256('{"a":"ä","b":[1,2.5]}'.encode()).hexdigest()
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert len({sha256_json(value) for value in (1, 1.0, "1", [1], None, True)}) == 6

"""A full disk: refused before where the size is known, explained where it fills up meanwhile, and nothing is left."""

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from trainer.core.disk import FullDisk, disk_space, format_bytes, free_bytes
from trainer.core.errors import UserError, run_command
from trainer.core.files import write_file, write_text


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "there"
    with pytest.raises(UserError) as error, disk_space(folder, "a checkpoint", 40_600_000_000):
        raise AssertionError("something was written")
    assert f"needs 40.6 GB, 3.0 GB are free in {folder}" in str(error.value)
    assert asked[0] == tmp_path  # of the file system on which the folder will lie


@pytest.mark.parametrize(
    "error",
    [full(), OSError(errno.EDQUOT, "Disk quota exceeded"),
     # what safetensors raises on a full disk: it has no errno
     SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_disk_that_fills_up_is_explained(tmp_path: Path, error: Exception) -> None:
    message = r"export of x could not be written: the disk is full\. It needs 5\.0 kB"
    with pytest.raises(FullDisk, match=message), disk_space(tmp_path, "export of x", 5000):
        raise error


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="strange"), disk_space(tmp_path, "x", 1):
        raise SafetensorError("a strange header")
    with pytest.raises(PermissionError), disk_space(tmp_path, "x", 1):
        raise PermissionError(errno.EACCES, "no")


def test_the_message_that_knows_the_size_of_the_whole_wins(tmp_path: Path) -> None:
    whole, part = "the whole could not be written", "a part could not be written"
    with pytest.raises(FullDisk, match=whole), disk_space(tmp_path, "the whole", 5000), disk_space(tmp_path, "a part"):
        raise full()
    with pytest.raises(FullDisk, match=part), disk_space(tmp_path, "the whole"), disk_space(tmp_path, "a part", 5000):
        raise full()


def test_every_file_that_is_written_whole_says_so(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_text(target, "old")

    def fail(path: Path) -> None:
        path.write_text("half of the n")
        raise full()

    with pytest.raises(FullDisk, match=r"state\.json could not be written: the disk is full"):
        write_file(target, fail)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_command_never_shows_a_traceback_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        Path("/dev/full").write_text("x" * 100_000)

    with pytest.raises(SystemExit) as ended:
        run_command(write)
    assert ended.value.code == 2 and "error: the disk is full" in capsys.readouterr().err


def test_sizes_for_people(tmp_path: Path) -> None:
    assert [format_bytes(size) for size in (1500, 31.94e6, 40.6e9, 2e12)] == ["1.5 kB", "31.9 MB", "40.6 GB", "2.0 TB"]
    assert free_bytes(tmp_path / "a" / "b") > 0

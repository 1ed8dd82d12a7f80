"""P5: a full, read-only or failing disk costs what could not be written, and no more: training goes on and tries again.

Where this process may mount one, as root may, the disk is a real one of some megabytes; anybody may set a limit of file
sizes, at which the system refuses in the midst of a file.
"""

import builtins
import errno
import io
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.metrics import read_metrics
from support.ranks import train_ranks
from trainer.config.schema import Config
from trainer.core import disk
from trainer.core.errors import UserError
from trainer.model.checkpoint import list_checkpoints, measure_checkpoint, read_train_state, verify_checkpoint
from trainer.train import loop, samples, save, saver
from trainer.train.loop import train
from trainer.train.metrics import MetricsFile
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
Count = Callable[[str, bool], None]
FREE = disk.free_bytes
TROUBLES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE]


def checkpoints(config: Config) -> list[str]:
    return [path.name for path in list_checkpoints(run_path(config) / "checkpoints")]


def orphans(config: Config) -> list[Path]:
    return list(run_path(config).rglob(".tmp-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a disk of so many bytes."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def each_step(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> None:
    """Do something before each step, when the save under way has come to its end."""
    step_once = loop.step_once

    def watched(run: Any, batches: Any, number: int) -> Any:
        if run.saver.writing is not None:
            run.saver.writing.exception(60)
        before(number)
        return step_once(run, batches, number)

    monkeypatch.setattr(loop, "step_once", watched)


@pytest.fixture
def size(make_config: MakeConfig) -> int:
    """Bytes of a checkpoint of the tiny run."""
    config = make_config("run.name=measured", "schedule.max_steps=1")
    train(config)
    return measure_checkpoint(run_path(config) / "checkpoints/step-00000001")


@pytest.mark.parametrize("seen", ["before", "while it is written"])
def test_a_disk_that_is_full_for_a_while(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str], count_try: Count, seen: str,
    small_disk: Callable[[int], Path], size: int,
) -> None:  # fmt: skip
    words = ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "schedule.max_steps=5"]
    folder = small_disk(4 * size + 5 * save.OVERHEAD)
    config = make_config(*words, f"run.output_dir={folder}")
    ballast = folder / "ballast"

    def fill_and_empty(number: int) -> None:
        if number == 1:
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, FREE(folder) - size // 2)
        elif number == 3:
            ballast.unlink()

    each_step(monkeypatch, fill_and_empty)
    if seen != "before":
        monkeypatch.setattr(disk, "free_bytes", lambda path: FREE(path) + 10 * size + 10 * save.OVERHEAD)
    train(config)
    said = [line for line in notes().splitlines() if "could not be written: the disk is full" in line]
    held = checkpoints(config) == ["step-00000001", "step-00000004", "step-00000005"]
    count_try("a disk that is full for a while costs the checkpoints of that while", held)
    assert held and len(said) == 2 and all(line.endswith("and the next save tries again") for line in said)
    assert orphans(config) == [] and "start again" not in "".join(said)
    monkeypatch.undo()
    straight = make_config(*words, "run.name=straight")
    train(straight)
    files = [read_train_state(run_path(one) / "checkpoints/step-00000005")["files"] for one in (config, straight)]
    assert files[0] == files[1]


def test_a_limit_of_file_sizes_for_a_while(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str], count_try: Count, size: int
) -> None:
    """The system's own refusal in the midst of a file, which every user may ask for: as a quota's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = {1: (size // 8, before[1]), 3: before}
    each_step(
        monkeypatch, lambda number: number in limits and resource.setrlimit(resource.RLIMIT_FSIZE, limits[number])
    )
    config = make_config("checkpoint.every_steps=1", "checkpoint.keep_last=9", "schedule.max_steps=5")
    try:
        train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    held = checkpoints(config) == ["step-00000001", "step-00000004", "step-00000005"]
    count_try("a limit of file sizes for a while costs the checkpoints of that while", held)
    assert held and notes().count("File too large") == 2 and orphans(config) == []


def test_several_processes_go_on_where_the_disk_of_the_first_refuses(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config("checkpoint.every_steps=1", "checkpoint.keep_last=9", "schedule.max_steps=3",
                         "data.micro_batch_size=1")  # fmt: skip
    write = saver.write_checkpoint

    def refuse(folder: Path, files: Any, state: Any, size: int) -> Path:
        if state["step"] == 2:
            raise OSError(errno.EROFS, "Read-only file system", str(folder))
        return write(folder, files, state, size)

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    assert train_ranks([config] * 2, tmp_path / "said") == ["", ""]
    assert checkpoints(config) == ["step-00000001", "step-00000003"]


def test_a_disk_that_is_full_at_the_end_says_what_is_lost(
    make_config: MakeConfig, small_disk: Callable[[int], Path], size: int
) -> None:
    folder = small_disk(2 * size + save.OVERHEAD // 2)
    words = [f"run.output_dir={folder}", "checkpoint.every_steps=2", "schedule.max_steps=4"]
    with pytest.raises(UserError) as caught:
        train(make_config(*words))
    told, config = str(caught.value), make_config(*words)
    assert "step-00000004 could not be written: the disk is full" in told and "Steps 3 to 4 are lost" in told
    assert f"The newest checkpoint is {run_path(config) / 'checkpoints/step-00000002'}" in told
    assert checkpoints(config) == ["step-00000002"] and orphans(config) == []
    verify_checkpoint(run_path(config) / "checkpoints/step-00000002")


@pytest.mark.parametrize("number", TROUBLES)
def test_a_checkpoint_that_a_disk_refuses_is_tried_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str], count_try: Count, number: int
) -> None:
    config = make_config("checkpoint.every_steps=1", "checkpoint.keep_last=9", "schedule.max_steps=4")
    write = saver.write_checkpoint

    def refuse(folder: Path, files: Any, state: Any, size: int) -> Path:
        if state["step"] in (2, 3):
            raise OSError(number, os.strerror(number), str(folder))
        return write(folder, files, state, size)

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    train(config)
    held = checkpoints(config) == ["step-00000001", "step-00000004"]
    count_try(f"a checkpoint refused with {errno.errorcode[number]} is tried again", held)
    assert held and notes().count(os.strerror(number)) == 2


def test_a_stop_on_a_disk_that_refuses_is_an_error(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("checkpoint.every_steps=2", "schedule.max_steps=9")
    write, step_once = saver.write_checkpoint, loop.step_once

    def refuse(folder: Path, files: Any, state: Any, size: int) -> Path:
        if state["step"] > 2:
            raise OSError(errno.EROFS, "Read-only file system", str(folder))
        return write(folder, files, state, size)

    def stop(run: Any, batches: Any, number: int) -> Any:
        run.stops.signal = 15 if number == 4 else None
        return step_once(run, batches, number)

    monkeypatch.setattr(saver, "write_checkpoint", refuse)
    monkeypatch.setattr(loop, "step_once", stop)
    with pytest.raises(UserError, match=r"Read-only file system.*Steps 3 to 5 are lost: the same command makes them"):
        train(config)


def test_samples_that_a_disk_refuses_are_left_out(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    def refuse(path: Path, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(samples, "write_png", refuse)
    words = ["sampling.every_steps=1", "sampling.prompts=[a]", "sampling.num_inference_steps=1", "schedule.max_steps=2"]
    config = make_config(*words)
    train(config)
    assert notes().count("samples are not written, training goes on") == 2
    assert checkpoints(config) == ["step-00000002"]


def test_lines_of_metrics_that_a_disk_refuses_are_lost_and_counted(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    write = MetricsFile.write

    def refuse(self: MetricsFile, step: int, values: Any) -> None:
        if step in (2, 3):
            raise OSError(errno.EROFS, "Read-only file system", str(self.path))
        write(self, step, values)

    monkeypatch.setattr(MetricsFile, "write", refuse)
    config = make_config("schedule.max_steps=5")
    train(config)
    said = notes()
    assert said.count("training goes on without lines of metrics") == 1
    assert "metrics are written again; 2 lines of them are lost" in said
    assert sorted(read_metrics(run_path(config) / "metrics.jsonl")) == [1, 4, 5]


def test_a_line_that_was_cut_off_spoils_no_other(small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(64 * 1024)
    file, step = MetricsFile(folder / "metrics.jsonl", 1), 0
    (folder / "ballast").write_bytes(b"x" * 40 * 1024)
    with pytest.raises(UserError, match="the disk is full"):
        while True:
            step += 1
            file.write(step, {"train/loss": 1.0})
    for number in (1, 2):
        with pytest.raises(UserError, match="the disk is full"):
            file.write(step + number, {"train/loss": 1.0})
    (folder / "ballast").unlink()
    file.write(step + 3, {"train/loss": 2.0})
    assert sorted(read_metrics(folder / "metrics.jsonl")) == [*range(1, step), step + 3]


def test_what_is_no_trouble_of_a_disk_still_ends_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(saver, "write_checkpoint", fail)
    with pytest.raises(OSError, match="Invalid argument"):
        train(make_config("checkpoint.every_steps=1", "schedule.max_steps=20"))


def test_a_disk_that_turns_read_only_for_a_while(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str], count_try: Count
) -> None:
    """All that a run writes is refused: checkpoint, page, samples, log and records.

    The system's functions refuse: no mount can be turned so while a file on it is open.
    """
    sampled = ["sampling.every_steps=1", "sampling.prompts=[a]", "sampling.num_inference_steps=1"]
    config = make_config("checkpoint.every_steps=1", "checkpoint.keep_last=9", "schedule.max_steps=5", *sampled)
    run, now = str(run_path(config)), [0]

    def refusing(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *words: Any, **more: Any) -> Any:
            if now[0] in (1, 2) and str(path).startswith(run) and writes(*words, **more):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *words, **more)

        return call

    def opens_for_writing(mode: Any = "r", *_: Any, **__: Any) -> bool:
        return (
            any(letter in mode for letter in "wax+")
            if isinstance(mode, str)
            else bool(mode & (os.O_WRONLY | os.O_RDWR))
        )

    for owner, name in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(owner, name, refusing(getattr(owner, name), opens_for_writing))
    for name in ("mkdir", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), lambda *_, **__: True))
    write = MetricsFile.write
    monkeypatch.setattr(
        MetricsFile, "write", lambda self, *words: refusing(lambda path: write(self, *words), lambda: True)(self.path)
    )
    each_step(monkeypatch, lambda number: now.__setitem__(0, number))
    train(config)
    held = checkpoints(config) == ["step-00000001", "step-00000004", "step-00000005"]
    count_try("a disk that turns read-only for a while costs what could not be written then", held)
    assert held and orphans(config) == [], notes()
    assert not {2, 3} & {int(path.stem[-8:]) for path in run_path(config).glob("samples/*.png")}

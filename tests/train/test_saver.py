"""Saving beside training: the bits of the step that was saved, one save at a time, errors that end a run, memory."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.checkpoints import save_checkpoint
from support.paths import REPOSITORY
from support.ranks import train_ranks
from trainer.config.schema import CheckpointConfig, Config, OptimConfig
from trainer.core.memory import free_memory
from trainer.model.checkpoint import find_newest, list_checkpoints, read_train_state, verify_checkpoint
from trainer.train import loop, saver
from trainer.train.loop import train
from trainer.train.optim import build_optimizer
from trainer.train.pace import Pace
from trainer.train.run import run_path
from trainer.train.saver import Saver
from trainer.train.stops import ENDING, Stops

MakeConfig = Callable[..., Config]
Gate = tuple[threading.Event, threading.Event]  # set when a write has begun; set to let it go on


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = nn.Linear(16, 16)


def stepped() -> tuple[nn.Module, Any]:
    model = Part()
    optimizer = build_optimizer(model, OptimConfig(unet_lr=1e-2))
    step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: Any) -> None:
    model.unet(torch.ones(1, 16)).sum().backward()
    optimizer.step()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Writes wait within the thread until they may go on."""
    begun, go_on = threading.Event(), threading.Event()
    write = saver.write_checkpoint

    def slow(*words: Any) -> Path:
        begun.set()
        assert go_on.wait(60)
        return write(*words)

    monkeypatch.setattr(saver, "write_checkpoint", slow)
    return begun, go_on


def test_what_is_saved_is_the_step_that_was_saved(tmp_path: Path, gate: Gate) -> None:
    model, optimizer = stepped()
    straight = save_checkpoint(tmp_path / "straight", model, optimizer, {"step": 1})
    with Saver(tmp_path, model, optimizer, CheckpointConfig(), Pace()) as saving:
        saving.save({"step": 1}, ending=False)
        assert gate[0].wait(60) and not list_checkpoints(tmp_path / "checkpoints")
        for _ in range(3):
            step(model, optimizer)  # while it is written
        gate[1].set()
        saving.settle()
        files = read_train_state(tmp_path / "checkpoints/step-00000001")["files"]
        assert files == read_train_state(straight)["files"]
        saving.save({"step": 4}, ending=True)
    now = save_checkpoint(tmp_path / "now", model, optimizer, {"step": 4})
    assert read_train_state(now)["files"] == read_train_state(tmp_path / "checkpoints/step-00000004")["files"]


def test_one_save_is_under_way_and_the_end_waits_for_it(tmp_path: Path, gate: Gate) -> None:
    model, optimizer = stepped()
    with Saver(tmp_path, model, optimizer, CheckpointConfig(), Pace()) as saving:
        saving.save({"step": 1}, ending=False)
        second = threading.Thread(target=lambda: saving.save({"step": 2}, ending=False))
        second.start()
        second.join(0.3)
        assert second.is_alive()  # it waits for the first
        gate[1].set()
        second.join(60)
        saving.finish(2, finished=True)
        assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000001", "step-00000002"]


def test_a_time_limit_leaves_room_for_the_save_under_way_and_another(tmp_path: Path, gate: Gate) -> None:
    model, optimizer = stepped()
    stops = Stops(None, None, None)
    stops.pace.note("checkpoint", 1000.0)
    assert stops.ahead() == 1500.0 + ENDING
    with Saver(tmp_path, model, optimizer, CheckpointConfig(), stops.pace) as saving:
        saving.save({"step": 1}, ending=False)
        assert 2900.0 + ENDING < stops.ahead() < 3000.0 + ENDING
        gate[1].set()
        saving.settle()
        assert stops.ahead() == 1500.0 + ENDING


def test_an_error_of_the_run_lets_the_save_come_to_its_end(tmp_path: Path, gate: Gate) -> None:
    model, optimizer = stepped()
    with (
        pytest.raises(RuntimeError, match="elsewhere"),
        Saver(tmp_path, model, optimizer, CheckpointConfig(), Pace()) as saving,
    ):
        saving.save({"step": 1}, ending=False)
        threading.Timer(0.2, gate[1].set).start()
        raise RuntimeError("elsewhere")
    verify_checkpoint(tmp_path / "checkpoints/step-00000001")


def test_without_room_for_a_copy_training_waits_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    model, optimizer = stepped()
    monkeypatch.setattr(saver, "free_memory", lambda: saver.RESERVE + 100)
    monkeypatch.setattr(Saver, "copy_files", lambda self: pytest.fail("it was copied"))
    with Saver(tmp_path, model, optimizer, CheckpointConfig(), Pace()) as saving:
        for number in (1, 2):
            saving.save({"step": number}, ending=False)
            verify_checkpoint(tmp_path / f"checkpoints/step-0000000{number}")  # it is there at once
    assert notes().count("note: training waits while checkpoints are written") == 1


def test_a_gpus_copies_go_on_a_stream_of_their_own_and_the_next_update_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """With stand-ins that note what is asked of them: no GPU is here."""
    asked: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            asked.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: "Event") -> None:
            asked.append(f"{self.name} waits for event {event.number}")

    class Event:
        count = 0

        def __init__(self, blocking: bool) -> None:
            Event.count += 1
            self.number = Event.count

        def record(self, stream: Stream) -> None:
            asked.append(f"event {self.number} on {stream.name}")

        def synchronize(self) -> None:
            asked.append(f"the thread waits for event {self.number}")

    empty = torch.empty
    pinned: list[int] = []

    def empty_pinned(*size: int, pin_memory: bool = False, **kind: Any) -> torch.Tensor:
        pinned.extend(size if pin_memory else ())
        return empty(*size, **kind)

    monkeypatch.setattr(saver.torch, "empty", empty_pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    model, optimizer = stepped()
    straight = save_checkpoint(tmp_path / "straight", model, optimizer, {"step": 1})
    with Saver(tmp_path, model, optimizer, CheckpointConfig(), Pace()) as saving:
        saving.stream = Stream("copying")  # type: ignore[assignment]
        saving.save({"step": 1}, ending=False)
        saving.guard()
        saving.guard()  # of later steps none waits
        assert asked == ["copying waits for training", "event 1 on copying", "event 2 on copying",
                         "training waits for event 2"]  # fmt: skip
        gate[1].set()
        saving.settle()
        assert asked[4:] == ["the thread waits for event 1", "the thread waits for event 2"]
        files = read_train_state(tmp_path / "checkpoints/step-00000001")["files"]
        assert files == read_train_state(straight)["files"]
        saving.save({"step": 2}, ending=False)
        saving.settle()
    assert len(pinned) == 2  # kept for the second save


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_free_memory_is_the_least_of_the_machine_and_its_groups(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write_files(proc, {"meminfo": "MemTotal: 99 kB\nMemAvailable:    2000 kB\n", "self/cgroup": "0::/job/step\n"})
    assert free_memory(proc, groups) == 2_048_000
    write_files(groups, {"job/memory.max": "900000", "job/memory.current": "800000",
                         "job/memory.stat": "anon 5\ninactive_file 100000\n",
                         "job/step/memory.max": "max", "job/step/memory.current": "7"})  # fmt: skip
    assert free_memory(proc, groups) == 200_000  # the parent's limit, whose file cache gives way
    write_files(proc, {"self/cgroup": "9:memory:/job\n3:cpu:/\n"})
    write_files(groups / "memory", {"job/memory.limit_in_bytes": "500000", "job/memory.usage_in_bytes": "450000",
                                    "job/memory.stat": "total_inactive_file 10000\n"})  # fmt: skip
    assert free_memory(proc, groups) == 60_000
    assert free_memory(tmp_path / "none", groups) is None
    assert (free_memory() or 0) > 10**8  # this machine


def test_training_in_the_background_has_the_bits_of_waiting(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["schedule.max_steps=5", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    copied: list[int] = []
    copy_files = Saver.copy_files
    monkeypatch.setattr(Saver, "copy_files", lambda self: copied.append(self.step) or copy_files(self))
    train(make_config(*words, "run.name=beside"))
    assert copied == [1, 2, 3, 4]  # at the end nothing is trained beside it
    monkeypatch.setattr(saver, "free_memory", lambda: 0)
    train(make_config(*words, "run.name=waiting"))
    for number in range(1, 6):
        beside, waiting = (
            run_path(make_config(f"run.name={name}")) / f"checkpoints/step-0000000{number}"
            for name in ("beside", "waiting")
        )
        assert read_train_state(beside)["files"] == read_train_state(waiting)["files"]


def failing_write(*_: Any) -> None:
    raise RuntimeError("a bug in the thread")


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_in_the_thread_ends_all_processes_at_the_next_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: int
) -> None:
    monkeypatch.setattr(saver, "write_checkpoint", failing_write)
    steps: list[int] = []
    step_once = loop.step_once

    def watched(run: Any, batches: Any, number: int) -> Any:
        deadline = time.monotonic() + 20
        while number == 3 and run.saver.writing is not None and not run.saver.broken and time.monotonic() < deadline:
            time.sleep(0.01)
        steps.append(number)
        (tmp_path / f"steps-{os.environ.get('RANK', 0)}").write_text(str(number))
        return step_once(run, batches, number)

    monkeypatch.setattr(loop, "step_once", watched)
    config = make_config("schedule.max_steps=50", "checkpoint.every_steps=2", "data.micro_batch_size=1")
    if world == 1:
        with pytest.raises(RuntimeError, match="a bug in the thread"):
            train(config)
    else:
        said = train_ranks([config] * 2, tmp_path / "said")
        assert said[0] == "RuntimeError: a bug in the thread"
        assert said[1] == "UserError: the main process: RuntimeError('a bug in the thread')"
    assert all(int(path.read_text()) <= 4 for path in tmp_path.glob("steps-*"))
    assert find_newest(run_path(config)) is None


KILLED = """
import sys, time
from trainer.config.load import load_config
from trainer.train import loop, save

write = save.write_tensors
def slow(path, tensors, metadata=None):
    result = write(path, tensors, metadata)
    print("writing", path.parent.name, flush=True)
    time.sleep(60)
    return result

save.write_tensors = slow
loop.train(load_config([], sys.argv[1:]))
"""


def test_a_kill_while_the_thread_writes_leaves_a_temporary_folder_that_goes(
    tiny_settings: list[str], tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    words = [f"run.output_dir={tmp_path}", "run.name=run", "schedule.max_steps=3", "checkpoint.every_steps=1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, *tiny_settings, *words], cwd=REPOSITORY, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert process.stdout is not None and "writing .tmp-step-00000001" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name[:18] for path in (tmp_path / "run/checkpoints").iterdir()] == [".tmp-step-00000001"]
    train(make_config(*words))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]

"""Saving does not stop training: tensors are copied to the host, and a thread writes, hashes and prunes.

A GPU's tensors are copied on a stream of their own beside the next step's forward and backward; an event keeps that
step's update from them. One save is under way at most: the next one, a stop and the end of the run wait for it. The
memory of the copies, which is pinned, is kept for the next save. Nothing here is a collective: only the main process
saves.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.schema import CheckpointConfig
from trainer.core.console import log
from trainer.core.disk import format_bytes, is_disk_trouble, say_trouble
from trainer.core.errors import UserError
from trainer.core.layout import CHECKPOINTS_FOLDER
from trainer.core.memory import free_memory
from trainer.model.checkpoint import list_checkpoints, step_of
from trainer.model.weights_file import find_broken
from trainer.train.pace import Pace
from trainer.train.progress import OTHER_SETTINGS
from trainer.train.run import note_saved
from trainer.train.save import TensorFile, list_tensor_files, measure_state, retain_checkpoints, write_checkpoint

RESERVE = 2_000_000_000  # bytes of the host's memory that a copy leaves free
ALIGNED = 64  # bytes: where a tensor begins in a buffer


class Saver:
    """A run's checkpoints, on the main process."""

    def __init__(self, run: Path, model: nn.Module, optimizer: Optimizer, keep: CheckpointConfig, pace: Pace) -> None:
        self.run, self.folder = run, run / CHECKPOINTS_FOLDER
        self.model, self.optimizer, self.keep, self.pace = model, optimizer, keep, pace
        self.begun = time.monotonic()
        self.step, self.good = 0, False  # of the last save; whether a step was made with its weights
        self.device = next(model.parameters()).device
        self.worker = Worker()
        self.writing: Future[None] | None = None
        self.copied: torch.cuda.Event | None = None  # when the tensors may change again
        self.buffers: dict[str, Tensor] = {}  # of the copies, by the file's name
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.lost: str | None = None  # why the last save was not written; the next one is tried
        self.unpruned = True  # older checkpoints than are kept may lie there
        self.said = False

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let what is under way come to its end, but for a second Ctrl-C; the run's own error matters more than its."""
        self.worker.end(wait=kind is None or not issubclass(kind, KeyboardInterrupt))

    @property
    def broken(self) -> bool:
        """Whether the save under way has failed in a way that must end the run."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def save(self, train_state: dict[str, Any], ending: bool) -> None:
        """Save what there is now; where the run goes on, without waiting until it is written.

        Raises:
            UserError: for weights or states that are not finite: nothing is written.
            Exception: what the save before failed with, if the run cannot go on after it.
        """
        self.settle()
        self.prune(0)
        begun, self.step, self.good = time.monotonic(), train_state["step"], False
        self.check_finite(train_state["step"])
        size = measure_state(self.model, self.optimizer)
        if ending or not self.has_room(size):  # nothing is trained meanwhile
            self.worker.catch_up()
            self.write(list_tensor_files(self.model, self.optimizer), train_state, size, begun)
        else:
            self.pace.saving_since = begun
            copies = list(self.copy_files())
            self.writing = self.worker.start(lambda: self.write(wait_for_each(copies), train_state, size, begun))

    def finish(self, step: int, finished: bool) -> None:
        """At the end of this attempt, after so many steps: wait until all is written.

        Raises:
            UserError: when the last save could not be written, saying what is lost.
        """
        self.settle()
        self.worker.catch_up()
        if self.lost is not None:
            raise UserError(f"{self.lost}. {self.describe_loss(step)}")
        if finished and self.unpruned:
            self.retain()

    def settle(self) -> None:
        """Wait for the save under way, if any.

        Raises:
            Exception: what it failed with, if the run cannot go on after it.
        """
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def guard(self) -> None:
        """Before an update: let the device wait until its tensors are copied."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.copied = None

    def check_finite(self, step: int) -> None:
        """Refuse to write what no run can begin with.

        Raises:
            UserError: naming tensors, and the checkpoint that stays the newest.
        """
        files = list_tensor_files(self.model, self.optimizer)
        broken = [name for file in files for name in find_broken(file.tensors.items())]
        if broken:
            more = f" and {len(broken) - 1:,} more tensors" if len(broken) > 1 else ""
            raise UserError(
                f"step {step - 1}: after its update {broken[0]}{more} hold values that are not finite, although loss "
                f"and gradients were: nothing of it is saved. {self.describe_newest()}. {OTHER_SETTINGS}"
            )

    def describe_newest(self) -> str:
        """The checkpoint to which a run can go back."""
        found = list_checkpoints(self.folder)
        return f"The newest checkpoint is {found[-1]}" if found else "There is no checkpoint yet"

    def describe_loss(self, step: int) -> str:
        """What a save that failed costs."""
        found = list_checkpoints(self.folder)
        kept = step_of(found[-1]) if found else 0
        return f"Steps {kept + 1:,} to {step:,} are lost: the same command makes them again. {self.describe_newest()}"

    def has_room(self, size: int) -> bool:
        """Whether a copy of so many bytes fits into the host's memory; said once where it does not."""
        held, free = sum(buffer.nbytes for buffer in self.buffers.values()), free_memory()
        fits = free is None or size - held + RESERVE <= free
        if not fits and not self.said:
            copy, left = format_bytes(size), format_bytes(free or 0)
            log.info("note: training waits while checkpoints are written: a copy of %s does not fit into the host's "
                     "memory, of which %s are free", copy, left)  # fmt: skip
            self.said = True
        return fits

    def copy_files(self) -> Iterator[tuple[TensorFile, torch.cuda.Event | None]]:
        """Copies of all that a checkpoint holds, each with the event after which it is whole."""
        if self.stream is None:
            for file in list_tensor_files(self.model, self.optimizer):
                yield self.copy(file), None
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):  # what is computed for a copy lives in this stream's memory
            for file in list_tensor_files(self.model, self.optimizer):
                copy, event = self.copy(file), torch.cuda.Event(blocking=True)
                event.record(self.stream)
                self.copied = event
                yield copy, event

    def copy(self, file: TensorFile) -> TensorFile:
        """A file's tensors, on their way into its buffer."""
        places, size = {}, 0
        for name, tensor in file.tensors.items():
            places[name] = size
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        if (buffer := self.buffers.get(file.name)) is None or buffer.nbytes < size:
            pinned = self.stream is not None
            buffer = self.buffers[file.name] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        copies = {}
        for name, tensor in file.tensors.items():
            part = buffer[places[name] : places[name] + tensor.nbytes]
            copies[name] = part.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        return TensorFile(file.name, copies, file.metadata)

    def write(self, files: Iterable[TensorFile], train_state: dict[str, Any], size: int, begun: float) -> None:
        """Write a checkpoint; what is wrong with the disk is said, and training goes on."""
        try:
            write_checkpoint(self.folder, files, train_state, size)
        except Exception as error:
            if not is_disk_trouble(error):
                raise
            self.lost = say_trouble(error)
            log.warning("warning: %s. Training goes on, and the next save tries again", self.lost)
        else:
            self.lost, self.unpruned = None, True
            self.pace.note("checkpoint", time.monotonic() - begun)
            note_saved(self.run, train_state["step"], begun - self.begun)
        finally:
            self.pace.saving_since = None

    def prune(self, step: int) -> None:
        """Remove older checkpoints once the step after the newest one, made with its weights, is seen to be good.

        So the last checkpoint before an anomaly is there when it is seen.
        """
        self.good = self.good or step >= self.step
        if self.good and self.unpruned and (self.writing is None or self.writing.done()):
            self.unpruned = False
            self.worker.start(self.retain)

    def retain(self) -> None:
        """Remove all but those that are kept; what is wrong with the disk is said."""
        try:
            retain_checkpoints(self.folder, self.keep.keep_last, self.keep.keep_every_steps)
        except OSError as error:
            log.warning("warning: an old checkpoint could not be removed: %s", error)


def wait_for_each(copies: list[tuple[TensorFile, torch.cuda.Event | None]]) -> Iterator[TensorFile]:
    """The copies as they become whole; each is let go when the next is asked for."""
    while copies:
        file, event = copies.pop(0)
        if event is not None:
            event.synchronize()
        yield file


class Worker:
    """A thread that does one thing after the other; it does not keep the process from ending."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()
        self.thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> "Future[None]":
        """Do this when all before it is done."""
        if self.thread is None:
            self.thread = threading.Thread(target=self.serve, name="saver", daemon=True)
            self.thread.start()
        future: Future[None] = Future()
        self.tasks.put((work, future))
        return future

    def serve(self) -> None:
        """The thread."""
        while (task := self.tasks.get()) is not None:
            work, future = task
            try:
                work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
            del task, work, future  # and with them the copies

    def catch_up(self) -> None:
        """Wait until all is done, such as the removal of what takes room."""
        if self.thread is not None:
            self.start(lambda: None).result()

    def end(self, wait: bool) -> None:
        """Do what is left, and nothing more."""
        self.tasks.put(None)
        if wait and self.thread is not None:
            self.thread.join()

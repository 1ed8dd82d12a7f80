"""Images looked at ahead of the VAE, in processes of their own, and handed back in order.

What is wrong with one image is an outcome, not an error: it is set aside, even where it kills the process that decodes
it. The processes import this module, and therefore nothing here imports PyTorch.
"""

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import forkserver, get_context, parent_process, resource_tracker

import numpy as np
from PIL import Image

from trainer.config.schema import BucketsConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_bytes
from trainer.data.buckets import Fit, Size, fit_image
from trainer.data.images import BadImage, has_frames, read_bytes, read_image_header, read_pixels
from trainer.data.post import ImagePlace
from trainer.data.sources.records import Reject

AHEAD = 4  # images that each process has ready or in work
# in order; the last is what build_shards.py imports, which each process runs again under another name
PRELOADED = ["trainer.prepare.single_thread", __name__, "trainer.config.load"]


@dataclass(frozen=True)
class Task:
    """One image to look at."""

    key: str
    origin: str
    place: ImagePlace
    known_hash: str | None  # of the bytes that its latents were made from, if there are some
    min_side: int | None
    buckets: BucketsConfig


@dataclass(frozen=True)
class Decoded:
    """One image on its way into the VAE."""

    size: Size
    fit: Fit
    pixels: np.ndarray  # uint8 (H, W, 3)
    content_hash: str
    several_frames: bool = False  # of which pixels are the first


@dataclass(frozen=True)
class Unchanged:
    """The file has another time, but its bytes are those that were encoded."""


@dataclass(frozen=True)
class Filtered:
    """Removed by a filter that has to see the image."""

    name: str


Outcome = Decoded | Unchanged | Filtered | Reject


def look(task: Task) -> Outcome:
    """One image's bucket and pixels, or why there are none. The file is read once."""
    try:
        data = read_bytes(task.place)
        content_hash = sha256_bytes(data)
        if content_hash == task.known_hash:
            return Unchanged()
        size = read_image_header(data)
        if task.min_side is not None and min(size) < task.min_side:
            return Filtered("min_side")
        fit = fit_image(size, **asdict(task.buckets))
        return Decoded(size, fit, read_pixels(data, fit), content_hash, has_frames(data))
    except BadImage as error:
        return Reject(task.key, task.origin, error.reason, error.detail)
    except UserError as error:
        return Reject(task.key, task.origin, "too_small", str(error))
    except MemoryError:
        return Reject(task.key, task.origin, "out_of_memory", "decoding it needs more memory than there is")


@contextmanager
def decoders(processes: int) -> Iterator["Decoders"]:
    """Processes that look at images; with 0 the calling one does."""
    with warnings.catch_warnings(), closing(Decoders(processes)) as pool:
        silence_pillow()
        yield pool


def silence_pillow() -> None:
    """Pillow's warnings: what is wrong with an image is its outcome, which says more."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", module="PIL")  # damaged metadata around an image that is good or set aside


class Decoders:
    """Looks at images in order, a few ahead. One that kills its process is set aside, whatever it is."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.pool: Executor | None = start_pool(processes) if processes else None

    def close(self) -> None:
        """End the processes; what they have in work is dropped."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def look_at(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """The outcome of each task, in order."""
        if self.pool is None:
            yield from map(look, tasks)
            return
        waiting: deque[tuple[Task, Future[Outcome]]] = deque()
        for task in tasks:
            waiting.append((task, self.submit(task)))
            if len(waiting) > AHEAD * self.processes:
                yield settle(*waiting.popleft())
        while waiting:
            yield settle(*waiting.popleft())

    def submit(self, task: Task) -> Future[Outcome]:
        """The outcome to come, of a new pool where an image has killed the old one."""
        assert self.pool is not None
        try:
            return self.pool.submit(look, task)
        except BrokenProcessPool:
            self.close()
            self.pool = start_pool(self.processes)
            return self.pool.submit(look, task)


def settle(task: Task, future: Future[Outcome]) -> Outcome:
    """An outcome. A pool dies as a whole: all its images are then looked at one by one, each in a pool of one."""
    try:
        return future.result()
    except BrokenProcessPool:
        pass
    with start_pool(1) as pool:
        try:
            return pool.submit(look, task).result()
        except BrokenProcessPool:
            detail = "the process that decoded it died: a fault of the decoder, or too little memory"
            return Reject(task.key, task.origin, "killed_decoder", detail)


def start_pool(processes: int) -> ProcessPoolExecutor:
    """Forked from a process of their own that has no threads: a fork of this one could inherit a lock that is held.

    That process imports what they need once, so that they start at once; it ends after this one.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # else the next does it, and lets go of the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: stopping is the parent's
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(processes, context, initializer=begin_process)


def begin_process() -> None:
    """Leave stopping to the parent, and end when it does, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    silence_pillow()
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

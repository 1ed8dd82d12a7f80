"""A preparation, or a training, in several processes of this machine, which are killed or waited for."""

import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from support.posts_on_disk import run
from trainer.config.schema import Config
from trainer.prepare.decode import start_pool
from trainer.train.loop import train


def add_posts(folder: Path, *posts: dict[str, Any]) -> None:
    with (folder / "posts.jsonl").open("a") as file:
        file.writelines(json.dumps(post) + "\n" for post in posts)


def fork(work: Callable[[], object], **environment: str) -> int:
    """Start ``work`` in a process of its own, with everything imported already; its id."""
    start_pool(
        1
    ).shutdown()  # starts what decoders are forked from, which only the process that started it may wait for
    child = os.fork()
    if child:
        return child
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    try:
        os.environ |= environment
        work()
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_ranks(config: Config, world: int) -> list[int]:
    """One preparation by several processes, as a launcher starts them."""
    port = free_port()
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [fork(lambda: run(config), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(world)]


def wait_for(children: list[int]) -> None:
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def train_ranks(configs: list[Config], folder: Path, before: Callable[[int], object] = lambda rank: None) -> list[str]:
    """One training by several processes, each with a config of its own; what each of them ended with, "" for well."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    shared = {"WORLD_SIZE": str(len(configs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip

    def work(rank: int) -> None:
        said = ""
        try:
            AcceleratorState._reset_state(reset_partial_state=True)  # what the parent trained with
            before(rank)
            train(configs[rank])
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        (folder / f"rank-{rank}").write_text(said)

    children = [
        fork(functools.partial(work, rank), RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(len(configs))
    ]
    deadline = time.monotonic() + 120
    while any(not (folder / f"rank-{rank}").exists() for rank in range(len(configs))) and time.monotonic() < deadline:
        time.sleep(0.1)
    if time.monotonic() >= deadline:
        kill(children)
    else:
        wait_for(children)
    return [(folder / f"rank-{rank}").read_text() for rank in range(len(configs))]

"""A preparation in several processes of this machine, which are killed or waited for."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from support.posts_on_disk import run
from trainer.config.schema import Config
from trainer.prepare.decode import start_pool


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


def start_ranks(config: Config, world: int) -> list[int]:
    """One preparation by several processes, as a launcher starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
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

"""How ``interrupted.unfinished`` was made: one preparation of three posts, and one of all, each killed before its end.

Kept as documentation, like ``make.py``, and run by no test. In a copy of this folder, with the code of commit f02ee99:

    PYTHONPATH=../f02ee99 ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 python interrupt.py
"""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from trainer import prepare
from trainer.config import load_config

HERE = Path(__file__).parent


def run_and_kill(posts: int, chunks: int) -> None:
    """Prepare the first so many posts, in a process that ends once so many chunks are done."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    lines = (HERE / "posts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("some.jsonl").write_text("".join(islice(lines, posts)), encoding="utf-8")
    encode: Callable[..., Any] = prepare.encode_chunk
    done = []

    def encode_and_count(*arguments: Any) -> Any:
        done.append(encode(*arguments))
        if len(done) == chunks:
            os._exit(1)
        return done[-1]

    prepare.encode_chunk = encode_and_count
    words = ["data.shards=interrupted", "data.samples_per_shard=2", "data.posts=[some.jsonl]"]
    prepare.prepare(load_config([HERE / "tiny.yaml"], words))


if __name__ == "__main__":
    os.chdir(HERE)
    run_and_kill(3, chunks=2)
    run_and_kill(9, chunks=1)
    Path("some.jsonl").unlink()

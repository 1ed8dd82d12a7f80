"""What several tests need: a tiny base model of SDXL's architecture, and shards of demo drawings made with it."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.core.console import log
from trainer.prepare.prepare import prepare


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two test processes of one thread each finish sooner on two cores than one of two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of SDXL's architecture in diffusers layout."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    subprocess.run([sys.executable, "scripts/make_tiny_base.py", str(folder)], cwd=REPOSITORY, check=True)
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[str]:
    """``key=value`` words of a run on 24 drawings in a few buckets, without the run's own name and length."""
    folder = tmp_path_factory.mktemp("data")
    posts = [json.loads(line) for line in (REPOSITORY / "demo/posts.jsonl").read_text().splitlines()]
    chosen = posts[::6][:24]
    (folder / "images").mkdir()
    for post in chosen:
        shutil.copy(REPOSITORY / "demo/images" / post["file"], folder / "images" / post["file"])
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in chosen))
    words = [
        f"run.output_dir={folder / 'runs'}", "run.stage=test", f"model.pretrained={tiny_base}",
        f"data.posts=[{folder / 'posts.jsonl'}]", f"data.images={folder / 'images'}",
        f"data.shards={folder / 'shards'}",
        "data.global_batch_size=4", "data.bucket_batch_size=2", "data.micro_batch_size=2",
        "data.loader_threads=0", "data.decode_processes=0",
        "buckets.base_resolution=64", "buckets.min_side=32", "buckets.max_side=128", "buckets.step=32",
        "optim.unet_lr=1e-3", "precision.compute=fp32", "precision.frozen=fp32", "memory.policy=none",
        "captions.max_token_length=75", "logging.every_steps=1", "checkpoint.every_steps=1000",
    ]  # fmt: skip
    prepare(load_config([], [*words, "run.name=prepare", "schedule.max_steps=1"]))
    return words


@pytest.fixture
def make_config(tiny_settings: list[str], tmp_path: Path) -> Iterator[Callable[..., Config]]:
    """A function that makes a config of the tiny run in the test's own folder from more ``key=value`` words."""

    def make(*words: str, **options: Any) -> Config:
        base = [*tiny_settings, f"run.output_dir={tmp_path / 'runs'}", "run.name=run", "schedule.max_steps=4"]
        return load_config([], [*base, *words], **options)

    yield make


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """A function that gives what was said since it was last called: notes and warnings, a line each."""
    caplog.set_level(logging.INFO, log.name)

    def read() -> str:
        text = "\n".join(record.getMessage() for record in caplog.records)
        caplog.clear()
        return text

    return read


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the life of a process; every test has its own."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)

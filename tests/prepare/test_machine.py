"""What a machine cannot do is said: fp16 without a GPU before the work, a full disk where it is met."""

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.posts_on_disk import make_base, make_config, make_posts, run
from trainer.config.schema import PrecisionConfig
from trainer.core.errors import UserError
from trainer.data import shards
from trainer.prepare import prepare as module


@pytest.mark.parametrize("gpu", [False, True])
def test_fp16_on_a_cpu_is_warned_of_before_hours_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str], gpu: bool
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    def stop(*_: object) -> None:
        raise UserError("no VAE")

    monkeypatch.setattr(module, "read_vae_alone", stop)
    base = make_base(tmp_path / "base")
    make_posts(tmp_path / "posts", 1)
    shown = {}
    for name, precision in {
        "fp16": PrecisionConfig(),
        "fp32": PrecisionConfig(compute="fp32", frozen="fp32"),
        "vae": PrecisionConfig(compute="bf16", frozen="bf16", vae="fp16"),
    }.items():
        with pytest.raises(UserError, match="no VAE"):  # before anything is loaded
            run(replace(make_config(base, tmp_path / "posts"), precision=precision))
        shown[name] = notes()
    assert ("precision.compute is fp16, and there is no GPU here" in shown["fp16"]) is not gpu
    assert ("precision.vae is fp16, and there is no GPU here" in shown["vae"]) is not gpu
    assert "fp16" not in shown["fp32"]


def test_a_full_disk_stops_the_preparation_and_what_is_encoded_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_posts(tmp_path / "posts", 5)
    config = make_config(make_base(tmp_path / "base"), tmp_path / "posts")

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "finish", full)
        with pytest.raises(UserError, match=r"shard 0 of .* could not be written: the disk is full"):
            run(config)
    assert run(config).samples == 5

"""What a launch refuses, and what it says, before anything is loaded: packages, and ways to train that are not ours."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import MODEL
from support.paths import REPOSITORY
from trainer.config.schema import Config
from trainer.core.allocator import use_expandable_segments
from trainer.core.errors import UserError
from trainer.model import lineage
from trainer.model.checkpoint import list_checkpoints, read_train_state
from trainer.train import launch, launch_checks, loop
from trainer.train.loop import train

MakeConfig = Callable[..., Config]


def hide(monkeypatch: pytest.MonkeyPatch, packages: list[str]) -> None:
    """As if they were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        launch_checks, "find_spec", lambda name: None if name in packages else find_spec(name), raising=False
    )


@pytest.mark.parametrize(
    ("words", "absent", "said"),
    [
        (["logging.trackers=[wandb]"], ["wandb"], "logging.trackers: wandb needs a package that is not installed: make "
         "setup brings it, and so does pip install --constraint constraints.txt wandb"),
        (["logging.trackers=[wandb,tensorboard]"], ["tensorboard", "tensorboardX"], "constraints.txt tensorboard"),
        (["optim.name=adamw8bit"], ["bitsandbytes"], "adamw8bit needs .* where there is an NVIDIA GPU, .*bitsandbytes"),
        (["model.attention=xformers"], ["xformers"], "model.attention: xformers needs .* xformers"),
    ],
)  # fmt: skip
def test_what_is_not_installed_is_refused_before_anything_is_loaded(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, words: list[str], absent: list[str], said: str
) -> None:
    hide(monkeypatch, absent)
    monkeypatch.setattr(launch, "open_chosen", lambda _: pytest.fail("something was read before"))
    with pytest.raises(UserError, match=said):
        train(make_config(*words))


@pytest.mark.parametrize("mode", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER"])
def test_other_ways_to_share_a_model_out_are_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{mode}", "true")
    with pytest.raises(UserError, match=rf"ACCELERATE_USE_{mode} is true.*accelerate launch --multi_gpu"):
        train(make_config())
    monkeypatch.setenv(f"ACCELERATE_USE_{mode}", "false")
    launch_checks.check_environment()


def weights(config: Config) -> str:
    newest = list_checkpoints(Path(config.run.output_dir) / config.run.name / "checkpoints")[-1]
    return read_train_state(newest)["files"][MODEL]["sha256"]


def test_what_the_config_says_itself_is_taken_from_there_with_a_note(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, notes: Callable[[], str]
) -> None:
    plain = make_config("run.name=plain", "schedule.max_steps=2")
    train(plain)
    assert "note:" not in notes()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told = make_config("run.name=told", "schedule.max_steps=2")
    train(told)
    said = notes()
    assert "dynamo backend INDUCTOR is not used" in said and "model.compile says" in said
    assert "4 gradient accumulation steps are not used" in said
    assert weights(told) == weights(plain)


@pytest.mark.slow
def test_accelerates_own_config_file_does_not_decide(tiny_settings: list[str], tmp_path: Path) -> None:
    """As ``accelerate config`` writes it, for a person who once said yes to dynamo and bf16."""
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(
        'compute_environment: LOCAL_MACHINE\ndistributed_type: "NO"\nmixed_precision: bf16\nnum_processes: 1\n'
        "num_machines: 1\nuse_cpu: true\ndynamo_config:\n  dynamo_backend: INDUCTOR\n"
    )
    words = [*tiny_settings, f"run.output_dir={tmp_path}", "run.name=run", "schedule.max_steps=1"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "tests/support/launch_driver.py", *words],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dynamo backend INDUCTOR is not used" in done.stderr


def test_commit_and_versions_are_those_of_the_launch(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody commits, or upgrades a library, while the run goes on: what runs is what was there when it began."""
    asked: list[str] = []

    def commit() -> dict[str, Any]:
        asked.append("commit")
        return {"version": "1", "commit": f"commit {len(asked)}", "dirty": False}

    monkeypatch.setattr(lineage, "describe_code", commit)
    monkeypatch.setattr("trainer.train.run.describe_code", commit, raising=False)
    config = make_config("schedule.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    save = loop.save

    def upgrade_and_save(run: Any, made: int, ending: bool) -> None:
        monkeypatch.setattr(lineage, "read_versions", lambda: {"torch": "another"})
        save(run, made, ending)

    monkeypatch.setattr(loop, "save", upgrade_and_save)
    train(config)
    states = [read_train_state(path) for path in list_checkpoints(Path(config.run.output_dir) / "run/checkpoints")]
    assert [state["lineage"]["code"]["commit"] for state in states] == ["commit 1"] * 3
    assert all(state["lineage"]["versions"]["torch"] != "another" for state in states)
    assert asked == ["commit"]


def test_the_allocators_segments_grow_unless_the_user_set_it() -> None:
    environment: dict[str, str] = {}
    use_expandable_segments(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:64"}
        use_expandable_segments(environment)
        assert environment == {name: "max_split_size_mb:64"}


def test_training_sets_the_allocator_before_torch_is_imported() -> None:
    text = (REPOSITORY / "train.py").read_text(encoding="utf-8")
    assert text.index("    use_expandable_segments()") < text.index("from trainer.core.distributed import uses_cpu")


def test_autocast_keeps_no_copies_of_weights(make_config: MakeConfig) -> None:
    accelerator = launch.build_accelerator(make_config("precision.compute=bf16"))

    class Seeing(torch.nn.Module):
        def forward(self) -> bool:
            return torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()  # PyTorch's default
    assert accelerator.prepare_model(Seeing())() is True

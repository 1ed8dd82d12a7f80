"""What a run says before its first step and after its last; and train.py --check."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.checkpoints import MODEL, OPTIMIZER
from support.scripts import run_script
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.plan import Plan
from trainer.model.checkpoint import find_newest
from trainer.train.announce import warn_of_data, warn_of_gpus
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]


def test_start_and_end_are_told(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    config = make_config("schedule.max_steps=3", "checkpoint.every_steps=2", "checkpoint.keep_every_steps=2")
    result = train(config)
    said = notes() + result.said
    folder = Path(config.run.output_dir) / "run"
    for text in (
        "run, stage test", f"{folder}, a new run", "24 images in", config.data.shards, "0 to 3, epochs 0.00 to 0.",
        "4 samples a step = 1 process x 2 in a micro-batch x 2 accumulated", "parameters of unet, "
        "fp32 over fp32 weights, on cpu",
        "every 2 steps and at the end, the last 2 and those at multiples of 2 kept, about",
        "run: 3 steps in 0:0", "3 of 3 made (all)", f"last checkpoint: {folder}/checkpoints/step-00000003, ",
    ):  # fmt: skip
        assert text in said, text
    newest = folder / "checkpoints/step-00000003"
    assert list(result.paths) == [newest] and (result.facts["step"], result.facts["finished"]) == (3, True)
    (step,) = result.next
    assert step.to == "export it" and step.command.endswith(f"scripts/export.py {folder}")
    result = train(make_config("schedule.max_steps=4"))
    said = notes()
    assert f"resumed from {newest}" in said and "3 to 4, epochs 0." in said
    assert "run: 1 step in" in result.said and "4 of 4 made" in result.said
    result = train(make_config("schedule.max_steps=4"))
    assert "nothing to do" in result.said and result.next[0].command.endswith(f"scripts/export.py {folder}")


def test_the_parameters_are_those_that_train(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    words = ["model.train_unet=false", "optim.unet_lr=0", "model.train_text_encoder_2=true",
             "optim.text_encoder_2_lr=1e-3"]  # fmt: skip
    config = make_config("schedule.max_steps=1", *words)
    train(config)
    newest = find_newest(Path(config.run.output_dir) / "run")
    assert newest is not None
    from safetensors import safe_open

    with safe_open(newest / MODEL, "np") as file:
        count = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    assert f"{count:,} parameters of text_encoder_2, fp32" in notes()


def test_warnings_of_the_data() -> None:
    sizes = np.array([[64, 64]] * 40 + [[64, 96]] * 3)
    plan = Plan(sizes, seed=1, bucket_batch_size=4, global_batch_size=8)
    steps = plan.steps_for_epochs(1)
    (repeats,) = warn_of_data(plan, 43, 8, steps)
    assert "1 of 2 buckets holds fewer images than data.bucket_batch_size 4" in repeats and "64x96" in repeats
    few, _ = warn_of_data(plan, 43, 64, steps)
    assert "43 images are fewer than data.global_batch_size 64" in few
    _, short = warn_of_data(plan, 43, 8, 3)
    assert "ends at 0.55 of its first epoch" in short
    assert list(warn_of_data(Plan(sizes[:40], seed=1, bucket_batch_size=4, global_batch_size=8), 40, 8, 5)) == []


def test_gpus_that_nothing_uses_are_named() -> None:
    (said,) = warn_of_gpus(1, 4, None)
    assert "4 GPUs are here" in said and "accelerate launch --num_processes 4 " in said
    assert not [*warn_of_gpus(1, 4, 1), *warn_of_gpus(1, 1, None), *warn_of_gpus(1, 0, None), *warn_of_gpus(4, 4, None)]


def test_a_check_stops_before_the_first_step(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    config = make_config("schedule.max_steps=2", "logging.trackers=[tensorboard]")
    folder = Path(config.run.output_dir) / "run"
    assert "checked: the run can start at step 0" in train(config, check=True).said
    assert "0 to 2, epochs" in notes()
    assert [path.name for path in folder.iterdir()] == [".lock"]
    train(config)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "can start at step 2" in train(make_config("schedule.max_steps=4"), check=True).said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert len(json.loads((folder / "run.json").read_text())["attempts"]) == 1


def test_a_resume_says_what_it_changes(make_config: MakeConfig, notes: Callable[[], str]) -> None:
    """As where a value of the first command line is not given again."""
    words = ["run.stage=x"]
    train(make_config("schedule.max_steps=1", "checkpoint.keep_last=7", *words))
    assert "changed since" not in notes()
    config = make_config("schedule.max_steps=2", *words)
    train(config, check=True)
    keep = config.checkpoint.keep_last
    said = f"note: changed since the last attempt: schedule.max_steps 1 -> 2, checkpoint.keep_last 7 -> {keep}"
    assert said in notes().splitlines()
    train(config)
    assert "changed since the last attempt" in notes()
    train(make_config("schedule.max_steps=2", *words), check=True)
    assert "changed since" not in notes()
    train(make_config("schedule.max_steps=3", "run.name=other", "checkpoint.fork=" + str(run_path(config)), *words))
    assert "changed since" not in notes()


def test_a_check_refuses_as_a_run_does(make_config: MakeConfig) -> None:
    train(make_config("schedule.max_steps=1"))
    newest = find_newest(Path(make_config().run.output_dir) / "run")
    assert newest is not None
    with pytest.raises(UserError, match=r"run\.seed"):
        train(make_config("run.seed=1"), check=True)
    (newest / OPTIMIZER).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"optimizer-00001\.safetensors is damaged"):
        train(make_config(), check=True)


def test_the_command_has_the_option(tiny_settings: list[str], tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    words = [*tiny_settings, f"run.output_dir={tmp_path}", "run.name=run", "schedule.max_steps=1"]
    done = run_script("train.py", "--check", "--config", tmp_path / "empty.yaml", *words)
    assert done.returncode == 0 and "checked: the run can start at step 0" in done.stdout, done.stderr
    assert not (tmp_path / "run" / "run.json").exists() and " train.py " in done.stdout
    train(make_config(f"run.output_dir={tmp_path}", "schedule.max_steps=1"))
    done = run_script("train.py", "--check", "--config", tmp_path / "empty.yaml", *words)
    assert "has made all of its 1 step; nothing to do" in done.stdout, done.stderr
    assert "train.py" not in done.stdout and f"scripts/export.py {tmp_path}/run" in done.stdout

"""train(config) in one process: what it writes, what it refuses, how it stops."""

import json
import shutil
import signal
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.checkpoints import MODEL, OPTIMIZER, change_record, flip_bit
from support.locks import held_by_another_process
from support.metrics import read_metrics
from support.scripts import run_script
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.layout import RUN_LOCK_FILE
from trainer.data import substitutes
from trainer.data.index import count_fields, open_index
from trainer.data.manifest import seal_manifest
from trainer.data.plan import build_plan
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.train import loop
from trainer.train.loop import train

MakeConfig = Callable[..., Config]


def folder_of(config: Config) -> Path:
    return Path(config.run.output_dir) / config.run.name


def weights_hash(config: Config) -> str:
    newest = find_newest(folder_of(config))
    assert newest is not None
    return read_train_state(newest)["files"][MODEL]["sha256"]


def test_a_run_writes_what_the_design_says(make_config: MakeConfig) -> None:
    config = make_config("schedule.max_steps=3", "checkpoint.every_steps=2", "run.seed=7")
    train(config)
    folder = folder_of(config)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    metrics = read_metrics(folder / "metrics.jsonl")
    assert sorted(metrics) == [1, 2, 3]
    assert {
        "train/loss", "train/grad_norm", "lr/unet", "lr/text_encoder_1", "lr/text_encoder_2",
        "perf/images_per_second", "perf/mfu", "progress/samples_seen", "step", "attempt",
    } <= set(metrics[3])  # fmt: skip
    assert metrics[3]["progress/samples_seen"] == 12 and metrics[3]["lr/unet"] == 1e-3
    assert metrics[3]["perf/images_per_second"] > 0
    state = read_train_state(folder / "checkpoints" / "step-00000003")
    assert state["step"] == 3 and state["seed"] == 7 and state["stage"] == "test"
    assert state["index_fingerprint"] and state["base"]["sha256"] and state["lineage"]["step"] == 3
    counts = count_fields(open_index(config.data.shards).table)
    records = json.loads((folder / "run.json").read_text())
    assert state["caption_fields"] == state["lineage"]["caption_fields"] == records["caption_fields"] == counts
    assert counts["tags_general"] > 0 and counts["caption"] < state["images"]
    run = json.loads((folder / "run.json").read_text())
    assert run["base"] == state["base"] and run["attempts"][0]["first_step"] == 0
    assert run["attempts"][0]["versions"]["torch"] == metadata.version("torch") and run["attempts"][0]["processes"] == 1
    assert run["attempts"][0]["code"]["version"] and run["attempts"][0]["device"]
    assert "has made all of its 3 steps; nothing to do" in train(config).said


def test_logging_and_retention_follow_their_knobs(make_config: MakeConfig) -> None:
    config = make_config(
        "schedule.max_steps=6", "logging.every_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=1",
        "checkpoint.keep_every_steps=2",
    )  # fmt: skip
    train(config)
    assert sorted(read_metrics(folder_of(config) / "metrics.jsonl")) == [4, 6]
    names = sorted(path.name for path in (folder_of(config) / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]


def test_epochs_give_the_plans_steps(make_config: MakeConfig) -> None:
    config = make_config("schedule.max_steps=null", "schedule.epochs=1", "logging.every_steps=1")
    train(config)
    newest = find_newest(folder_of(config))
    assert newest is not None and read_train_state(newest)["step"] in (6, 7)


def test_resume_never_refuses_what_is_there(make_config: MakeConfig) -> None:
    train(make_config("schedule.max_steps=1", "checkpoint.resume=never"))
    with pytest.raises(UserError, match=r"checkpoint\.resume is never"):
        train(make_config("schedule.max_steps=2", "checkpoint.resume=never"))


def test_resume_from_a_named_checkpoint(make_config: MakeConfig) -> None:
    first = make_config("schedule.max_steps=2", "checkpoint.every_steps=1")
    train(first)
    chosen = folder_of(first) / "checkpoints" / "step-00000001"
    for name in (chosen, "step-00000001", "1"):  # a word alone is about this run
        with pytest.raises(UserError, match="newer checkpoints"):
            train(make_config("schedule.max_steps=3", f"checkpoint.resume={name}"))
    other = make_config("run.name=run", f"run.output_dir={first.run.output_dir}")
    moved = folder_of(other).with_name("kept")
    folder_of(other).rename(moved)
    train(make_config("schedule.max_steps=2", f"checkpoint.resume={moved / 'checkpoints' / 'step-00000001'}"))
    straight = read_train_state(moved / "checkpoints" / "step-00000002")["files"]
    again = read_train_state(folder_of(first) / "checkpoints" / "step-00000002")["files"]
    assert straight == again
    train(make_config("schedule.max_steps=3", "checkpoint.resume=latest"))
    assert find_newest(folder_of(first)).name == "step-00000003"
    with pytest.raises(UserError, match="nowhere names neither a checkpoint nor a run"):
        train(make_config("schedule.max_steps=9", "checkpoint.resume=nowhere"))


def test_a_damaged_checkpoint_stops_the_resume(make_config: MakeConfig) -> None:
    train(make_config("schedule.max_steps=1"))
    newest = find_newest(folder_of(make_config()))
    assert newest is not None
    flip_bit(newest / OPTIMIZER, -1)
    with pytest.raises(UserError, match=r"optimizer-00001\.safetensors is damaged"):
        train(make_config("schedule.max_steps=2"))


@pytest.mark.parametrize("fact", ["index_fingerprint", "vae_sha256"])
def test_other_inputs_stop_the_resume(make_config: MakeConfig, fact: str) -> None:
    train(make_config("schedule.max_steps=1"))
    newest = find_newest(folder_of(make_config()))
    assert newest is not None
    change_record(newest, **{fact: "other"})
    with pytest.raises(UserError, match=r"another (data set|VAE) .*: other there"):
        train(make_config("schedule.max_steps=2"))


def test_latents_of_another_vae_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in Path(config.data.shards).iterdir():
        (shards / file.name).symlink_to(file)
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["latents"]["vae_sha256"] = "0" * 64
    (shards / "manifest.json").unlink()
    (shards / "manifest.json").write_text(json.dumps(seal_manifest(manifest)))
    with pytest.raises(UserError, match="made by another VAE"):
        train(make_config(f"data.shards={shards}"))


def test_a_folder_is_trained_into_by_one_process(make_config: MakeConfig) -> None:
    config = make_config()
    folder_of(config).mkdir(parents=True)
    busy = pytest.raises(UserError, match="in use by another process")
    with held_by_another_process(folder_of(config) / RUN_LOCK_FILE), busy:
        train(config)


def poison(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Make one sample's latents infinite, as a broken shard that passes its checksum would."""
    read = substitutes.read_latents_into

    def read_poisoned(raw_latents: np.ndarray, index: Any, record: Any) -> None:
        read(raw_latents, index, record)
        if record["key"] == key:
            raw_latents += np.float16("inf")

    monkeypatch.setattr(substitutes, "read_latents_into", read_poisoned)


def test_a_non_finite_loss_stops_and_names_step_and_sample(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("schedule.max_steps=6", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    index = open_index(config.data.shards)
    key = index.row(build_plan(index, config.run.seed, config.data).step_samples(2)[3].row)["key"]
    poison(monkeypatch, key)
    with pytest.raises(UserError) as error:
        train(config)
    assert str(error.value).startswith(f"step 2: the loss of {key} is not finite")
    newest = find_newest(folder_of(config))
    assert newest is not None and newest.name == "step-00000002"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_stops_and_continues(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    straight = make_config("run.name=straight", "schedule.max_steps=6")
    train(straight)
    config, step_once, sent = make_config("run.name=stopped", "schedule.max_steps=6"), loop.step_once, []

    def signalled(run: Any, batches: Any, step: int) -> Any:
        if step == 1 and not sent:
            sent.append(step)
            signal.raise_signal(number)
        return step_once(run, batches, step)

    monkeypatch.setattr(loop, "step_once", signalled)
    before = signal.signal(number, signal.default_int_handler)  # nohup lets SIGHUP be ignored, which a run respects
    try:
        result = train(config)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert "the same command resumes there" in result.said and not result.facts["finished"]
    newest = find_newest(folder_of(config))
    assert newest is not None and read_train_state(newest)["step"] == 2  # asked within step 1, which is made
    assert result.code == 75 and result.facts["stopped_by"] == signal.Signals(number).name
    train(config)
    assert weights_hash(config) == weights_hash(straight)


def test_a_stop_asked_for_at_a_checkpoints_step_is_not_lost(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step_once = make_config("schedule.max_steps=9", "checkpoint.every_steps=1"), loop.step_once

    def signalled(run: Any, batches: Any, step: int) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a launcher passes on what the process already got
        return step_once(run, batches, step)

    monkeypatch.setattr(loop, "step_once", signalled)
    train(config)
    newest = find_newest(folder_of(config))
    assert newest is not None and read_train_state(newest)["step"] == 2


def test_a_damaged_shard_is_told_in_one_message_from_a_worker(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("data.loader_threads=1", f"data.shards={tmp_path / 'damaged'}")
    shutil.copytree(make_config().data.shards, config.data.shards)
    shard = next(Path(config.data.shards).glob("*.tar"))
    content = bytearray(shard.read_bytes())
    for place in range(0, len(content), 97):
        content[place] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError) as error:
        train(config)
    assert "the bytes are damaged" in str(error.value) and "Traceback" not in str(error.value)


def test_names_in_files_do_not_come_from_the_environment(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    with pytest.raises(UserError, match=r"run\.stage: must not come from an environment variable"):
        make_config("run.stage=${oc.env:A_SECRET}")
    for title in ("${oc.env:A_SECRET}", "${publish.author}"):  # by way of other fields
        with pytest.raises(UserError, match=r"run\.name: must not come from an environment variable"):
            make_config("run.name=${publish.title}", f"publish.title={title}", "publish.author=${oc.env:A_SECRET}")
    assert make_config("run.name=${publish.title}", "publish.title=mine").run.name == "mine"
    pretrained = make_config().model.pretrained
    monkeypatch.setenv("A_BASE", pretrained)
    config = make_config("model.pretrained=${oc.env:A_BASE}", "schedule.max_steps=1")
    train(config)
    for file in folder_of(config).rglob("*.json"):
        assert pretrained not in file.read_text()


def test_samples_are_drawn_and_change_nothing(make_config: MakeConfig) -> None:
    plain = make_config("run.name=plain")
    train(plain)
    words = ["sampling.every_steps=2", "sampling.prompts=[a cat, 'a dog, two']", "sampling.num_inference_steps=2",
             "sampling.width=96", "sampling.height=64"]  # fmt: skip
    sampled = make_config("run.name=sampled", *words)
    train(sampled)
    assert weights_hash(plain) == weights_hash(sampled)
    grids = sorted((folder_of(sampled) / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-00000002.png", "step-00000004.png"]
    with Image.open(grids[0]) as grid:
        assert grid.width > 2 * 96 and grid.height > 64
    again = make_config("run.name=again", *words)
    train(again)
    assert (folder_of(again) / "samples" / grids[1].name).read_bytes() == grids[1].read_bytes()
    guided = make_config("run.name=guided", *words, "sampling.guidance_scale=3", "sampling.negative_prompt=x")
    train(guided)
    assert (folder_of(guided) / "samples" / grids[1].name).read_bytes() != grids[1].read_bytes()


def test_no_secret_is_written(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2hunter2")
    config = make_config("publish.author=${oc.env:A_SECRET}", "logging.trackers=[tensorboard]")
    assert config.publish.author == "hunter2hunter2"
    train(config)
    for file in folder_of(config).rglob("*"):
        if file.is_file():
            assert b"hunter2" not in file.read_bytes(), file
    assert "${oc.env:A_SECRET}" in (folder_of(config) / "config.yaml").read_text()


def test_bf16_trains(make_config: MakeConfig) -> None:
    config = make_config("precision.compute=bf16", "precision.frozen=bf16", "schedule.max_steps=2")
    train(config)
    metrics = read_metrics(folder_of(config) / "metrics.jsonl")
    assert 0 < metrics[2]["train/loss"] < 5


def test_fp16_asks_for_a_gpu(make_config: MakeConfig) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"precision\.compute fp16 needs a GPU"):
        train(make_config("precision.compute=fp16"))


def test_the_number_of_processes_is_checked(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="2 processes were asked for, but 1 run"):
        train(make_config("run.num_processes=2"))


def test_deterministic_and_tf32_reach_the_kernels(make_config: MakeConfig) -> None:
    try:
        train(make_config("precision.deterministic=true", "precision.tf32=false", "schedule.max_steps=1"))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32
        train(make_config("precision.tf32=true", "run.name=tf32", "schedule.max_steps=1"))
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_command_line_tells_problems_with_exit_code_2() -> None:
    words = ["--config", "configs/stage2_refine_unet.yaml", "data.micro_batchsize=3", "optim.unet_lr=0"]
    run = run_script("train.py", *words)
    assert run.returncode == 2
    assert "data.micro_batchsize: unknown key, did you mean micro_batch_size?" in run.stderr
    assert "optim.unet_lr: must be above 0" in run.stderr
    assert "Traceback" not in run.stderr

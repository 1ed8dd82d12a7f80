"""Several processes begin with the same checkpoint, whatever each of them sees of the disk; or all refuse at once."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.checkpoints import MODEL, change_record
from support.ranks import train_ranks
from trainer.config.schema import Config
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.run_records import read_run
from trainer.train import beginning, loop
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
EVERY = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]


@pytest.fixture
def started(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run that has made two steps, to be resumed to its third."""
    monkeypatch.setattr(beginning, "SEE_SECONDS", 3.0)
    train(make_config(*EVERY, "schedule.max_steps=2"))
    return make_config(*EVERY, "schedule.max_steps=3")


def elsewhere(make_config: MakeConfig, started: Config, folder: Path) -> Config:
    """The same run, as a host with a disk of its own sees it."""
    shutil.copytree(started.run.output_dir, folder)
    return make_config(*EVERY, "schedule.max_steps=3", f"run.output_dir={folder}")


@pytest.mark.parametrize("lost", ["the newest", "a file", "everything"])
def test_a_process_that_sees_other_checkpoints_ends_all(
    make_config: MakeConfig, started: Config, tmp_path: Path, lost: str
) -> None:
    other = elsewhere(make_config, started, tmp_path / "other")
    newest = find_newest(run_path(other))
    assert newest is not None
    shutil.rmtree(
        {"the newest": newest, "everything": run_path(other)}.get(lost, tmp_path / "none"), ignore_errors=True
    )
    if lost == "a file":
        (newest / MODEL).unlink()
    # rank 1 looks where its own disk says
    seen = train_ranks([started, started], tmp_path / "said", before=lambda rank: look_under(rank, other))
    for said in seen:
        assert "not every process sees that checkpoint" in said and "process 1 on " in said, seen
        assert (
            f"All processes must see the same {run_path(started)}" in said and "copy the main process's folder" in said
        )
    assert find_newest(run_path(started)).name == "step-00000002"  # type: ignore[union-attr]


def look_under(rank: int, other: Config) -> None:
    """Let rank 1 find under the main process's path what lies on its own disk."""
    if rank == 1:
        found = beginning.wait_until_seen

        def on_own_disk(resumed: beginning.Resumed, seconds: float) -> str | None:
            own = run_path(other) / "checkpoints" / resumed.folder.name
            return found(beginning.Resumed(own, resumed.state, resumed.fork, resumed.record), seconds)

        beginning.wait_until_seen = on_own_disk  # in a process that was forked


def test_the_main_process_decides_and_a_late_listing_is_waited_for(
    make_config: MakeConfig, started: Config, tmp_path: Path
) -> None:
    """Rank 1 sees an older listing: it begins where rank 0 does, as soon as the checkpoint is there."""
    newest = find_newest(run_path(started))
    assert newest is not None

    def stale(rank: int) -> None:
        if rank == 1:
            beginning.list_checkpoints = lambda folder: []
            look, begun = beginning.hash_record, time.monotonic()
            late = lambda folder: look(folder) if time.monotonic() > begun + 1 else ""  # noqa: E731
            beginning.hash_record = late

    assert train_ranks([started, started], tmp_path / "said", before=stale) == ["", ""]
    assert read_run(run_path(started))["attempts"][-1]["first_step"] == 2
    state = read_train_state(run_path(started) / "checkpoints/step-00000003")
    assert state["num_processes"] == 2 and not list(newest.parent.glob("*.damaged"))


def test_another_checkpoint_of_the_same_step_is_not_the_same(
    make_config: MakeConfig, started: Config, tmp_path: Path
) -> None:
    other = elsewhere(make_config, started, tmp_path / "other")
    newest = find_newest(run_path(other))
    assert newest is not None
    change_record(newest, seed=7)
    seen = train_ranks([started, started], tmp_path / "said", before=lambda rank: look_under(rank, other))
    assert all("it is another one" in said for said in seen), seen


def test_weights_that_differ_after_all_end_all(started: Config, tmp_path: Path) -> None:
    def other_weights(rank: int) -> None:
        load = loop.load_model

        def spoilt(*words: object) -> object:
            model, sdxl, optimizer = load(*words)  # type: ignore[arg-type]
            state = next(iter(optimizer.state.values()))
            state["exp_avg"].view(-1)[0] += rank * 1e-6
            return model, sdxl, optimizer

        loop.load_model = spoilt  # type: ignore[assignment]

    seen = train_ranks([started, started], tmp_path / "said", before=other_weights)
    assert all("weights or optimizer state of process 1 (on " in said for said in seen), seen


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("vae_numbers", "was made with another VAE config"),
        ("index_fingerprint", "VAE or tokenizers of process 1"),
    ],
)
def test_what_one_process_alone_reads_otherwise_ends_all(started: Config, tmp_path: Path, fact: str, said: str) -> None:
    def other_data(rank: int) -> None:
        if rank == 1:
            settle, other = loop.settle_resumed, {fact: {"scaling_factor": 7.0}}
            loop.settle_resumed = lambda inputs, check: settle(replace(inputs, facts=inputs.facts | other), check)

    seen = train_ranks([started, started], tmp_path / "said", before=other_data)
    assert all(said in text for text in seen), seen


def test_several_processes_fall_back_together(started: Config, tmp_path: Path) -> None:
    newest = find_newest(run_path(started))
    assert newest is not None
    (newest / MODEL).write_bytes(b"damaged")
    assert train_ranks([started, started], tmp_path / "said") == ["", ""]
    assert read_run(run_path(started))["attempts"][-1]["first_step"] == 1
    assert newest.with_name(f"{newest.name}.damaged").is_dir()

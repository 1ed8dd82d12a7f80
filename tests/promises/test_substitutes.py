"""P4, second part: with data.on_bad_sample: substitute others stand in for bad samples, the same in any launch.

Not promised: the same bits where a sample can be read by one process and not by another, or now and then.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import MODEL
from support.metrics import read_metrics
from support.paths import REPOSITORY
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.index import Index, open_index
from trainer.data.loader import MicroBatches, load_batches
from trainer.data.plan import build_plan
from trainer.data.substitutes import Substitutes, iterate_next
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.lineage_rows import list_stages, stage_rows
from trainer.report.explain import explain_step
from trainer.train.launch import build_accelerator, open_inputs
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
Count = Callable[[str, bool], None]
SUBSTITUTE = ["data.on_bad_sample=substitute", "data.max_substituted=0.2"]
STEPS = 6
WHAT = "bad samples are substituted: the same bits by any number of processes, micro-batches and threads, and resumed"


@pytest.fixture
def shards(tiny_settings: list[str], tmp_path: Path) -> Path:
    """The tiny set, in a folder of the test's own."""
    (words,) = (word for word in tiny_settings if word.startswith("data.shards="))
    return Path(shutil.copytree(words.partition("=")[2], tmp_path / "shards"))


def flip(index: Index, key: str) -> None:
    """Damage a sample, or mend what this has damaged."""
    record = next(row for row in map(index.row, range(len(index))) if row["key"] == key)
    path = index.folder / record["shard"]
    content = bytearray(path.read_bytes())
    content[record["offset"] + record["length"] - 3] ^= 0x55
    path.write_bytes(content)


def seen_in(config: Config, index: Index, step: int) -> list[str]:
    return [sample["key"] for sample in explain_step(config, index, step)]


def damage(config: Config, shards: Path, *places: tuple[int, int]) -> list[str]:
    """Damage the samples at these steps and positions, and what would be the first one's substitute."""
    index = open_index(shards)
    plan = build_plan(index, config.run.seed, config.data)
    keys = [seen_in(config, index, step)[position] for step, position in places]
    step, position = places[0]
    following = next(iterate_next(plan, plan.step_samples(step)[position]), None)
    if following is not None:
        keys.append(index.row(following)["key"])
    keys = list(dict.fromkeys(keys))
    for key in keys:
        flip(index, key)
    return keys


def break_half(index: Index) -> list[str]:
    """Damage half of each bucket's samples, rounded down, so that something can stand in; their keys."""
    buckets: dict[tuple[int, int], list[str]] = {}
    for row in map(index.row, range(len(index))):
        buckets.setdefault((row["bucket_width"], row["bucket_height"]), []).append(row["key"])
    keys = [key for members in buckets.values() for key in members[: len(members) // 2]]
    for key in keys:
        flip(index, key)
    assert len(keys) > 5
    return keys


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The bits of the newest checkpoint's weights, and what it says of bad samples."""
    newest = find_newest(run)
    assert newest is not None
    state = read_train_state(newest)
    return state["files"][MODEL]["sha256"], state.get("substituted", [])


def test_a_bad_sample_is_substituted_recorded_counted_and_shown(
    make_config: MakeConfig, shards: Path, notes: Callable[[], str], count_try: Count
) -> None:
    words = [f"data.shards={shards}", *SUBSTITUTE, f"schedule.max_steps={STEPS}", "logging.every_steps=2"]
    config = make_config(*words)
    bad = damage(config, shards, (1, 2))
    with pytest.raises(UserError, match="the bytes are damaged"):
        train(make_config(*words, "data.on_bad_sample=stop", "run.name=stops"))
    notes()
    result = train(config)
    said = notes()
    records = outcome(run_path(config))[1]
    assert records and {record["key"] for record in records} <= set(bad)
    first = next(record for record in records if (record["step"], record["position"]) == (1, 2))
    assert first["key"] == bad[0] and first["substitute"] not in bad and first["passed"] == bad[1:2]
    assert f"step 1: {first['substitute']} stands in for a bad sample: " in said and "the bytes are damaged" in said
    assert f"{len(records)} bad samples substituted" in str(result) or "1 bad sample substituted" in str(result)
    newest = find_newest(run_path(config))
    assert newest is not None
    state = read_train_state(newest)
    assert "reason" not in first and str(shards) not in str(records)
    assert state["lineage"]["substituted"] == len(records)
    row = stage_rows(list_stages(state["lineage"])[-1])["bad samples"]
    assert row == f"{len(records):,}, for which others stood in"
    lines = read_metrics(run_path(config) / "metrics.jsonl")
    assert lines[STEPS]["data/substituted"] == len(records)
    shown = list(explain_step(config, open_index(shards), 1))[2]
    assert (shown["key"], shown["instead_of"]) == (first["substitute"], first["key"])
    count_try(WHAT, True)


def batches_of(config: Config, micro: int, world: int, threads: int) -> tuple[list[torch.Tensor], list[Any]]:
    """All samples of a run's steps in their order, as its ranks make them, and what was substituted."""
    inputs = open_inputs(config, build_accelerator(config))
    data, known, made = inputs.data, [], {}
    for rank in range(world):
        own = MicroBatches(data.plan, data.index, data.tokenizers, data.captions, data.diffusion, micro, Substitutes())
        numbers = range(rank, STEPS * own.per_step, world)
        loaded = load_batches(own, first_step=0, last_step=STEPS, rank=rank, world=world, threads=threads,
                              prefetch_factor=None, pin_memory=False)  # fmt: skip
        made |= dict(zip(numbers, loaded, strict=True))
        assert own.substitutes is not None
        known += own.substitutes.before(STEPS)
    rows = [torch.cat([batch.raw_latents[i].float().ravel(), batch.noise[i].ravel(), batch.timesteps[i].float()[None],
                       batch.time_ids[i]])
            for _, batch in sorted(made.items()) for i in range(micro)]  # fmt: skip
    return rows, sorted(known, key=lambda each: (each["step"], each["position"]))


def test_the_same_batches_by_any_number_of_processes_micro_batches_and_threads(
    make_config: MakeConfig, shards: Path, count_try: Count
) -> None:
    config = make_config(f"data.shards={shards}", *SUBSTITUTE, f"schedule.max_steps={STEPS}")
    damage(config, shards, (0, 1), (2, 3))
    expected, records = batches_of(config, 2, 1, 0)
    assert len(records) >= 2
    for micro, world, threads in [(1, 1, 0), (2, 2, 0), (1, 4, 0), (1, 2, 3), (2, 1, 2)]:
        rows, found = batches_of(config, micro, world, threads)
        held = found == records and all(map(torch.equal, rows, expected)) and len(rows) == len(expected)
        count_try(WHAT, held)
        assert held, (micro, world, threads)


@pytest.mark.parametrize("healed", [False, True])
def test_a_resume_substitutes_the_same(make_config: MakeConfig, shards: Path, healed: bool, count_try: Count) -> None:
    """Also where the sample can be read again by then: bad once, bad for the whole run."""
    words = [f"data.shards={shards}", *SUBSTITUTE]
    config = make_config(*words, "run.name=straight", "schedule.max_steps=14")
    bad = damage(config, shards, (1, 2))
    train(config)
    straight = outcome(run_path(config))
    assert any(record["step"] >= 3 for record in straight[1]), "a bad sample has its turn after the resume too"
    train(make_config(*words, "run.name=resumed", "schedule.max_steps=3"))
    if healed:
        for key in bad:
            flip(open_index(shards), key)
    resumed = make_config(*words, "run.name=resumed", "schedule.max_steps=14")
    train(resumed)
    held = outcome(run_path(resumed)) == straight
    count_try(WHAT, held)
    assert held
    if healed:  # another run reads what was mended
        other = make_config(*words, "run.name=other", "schedule.max_steps=3")
        train(other)
        assert outcome(run_path(other))[1] == []


def test_a_set_that_is_mostly_broken_stops_the_run(make_config: MakeConfig, shards: Path, count_try: Count) -> None:
    words = [f"data.shards={shards}", "data.on_bad_sample=substitute", "schedule.max_steps=20"]
    config = make_config(*words)
    index = open_index(shards)
    keys = break_half(index)
    with pytest.raises(UserError, match=r"of 24 images cannot be read, above data\.max_substituted 0\.001 \(at most 1"):
        train(config)
    with pytest.raises(UserError, match=r"images cannot be read, above data\.max_substituted 0\.2 \(at most 4"):
        train(make_config(*words, "data.max_substituted=0.2", "run.name=more"))
    for number in range(len(index)):
        if index.row(number)["key"] not in keys:
            flip(index, index.row(number)["key"])
    with pytest.raises(UserError, match=r"the bytes are damaged.* Nothing can stand in for it: none of the \d+ other"):
        train(make_config(*words, "data.max_substituted=1", "run.name=all"))
    count_try("a set that is mostly broken stops the run", True)


def launch_two(folder: Path, *words: str) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "tests/support/launch_driver.py", *words, f"run.output_dir={folder}", "run.name=two"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "two"


@pytest.mark.faults
def test_two_processes_substitute_as_one_does_and_resume_with_the_same_bits(
    tiny_settings: list[str], make_config: MakeConfig, shards: Path, tmp_path: Path, count_try: Count
) -> None:
    words = [*tiny_settings, f"data.shards={shards}", *SUBSTITUTE, "data.loader_threads=2"]
    config = make_config(*words, f"schedule.max_steps={STEPS}")
    bad = damage(config, shards, (0, 1), (0, 3))
    train(config)
    records = outcome(run_path(config))[1]
    straight = outcome(launch_two(tmp_path / "straight", *words, f"schedule.max_steps={STEPS}"))
    count_try(WHAT, straight[1] == records)
    assert straight[1] == records and records
    launch_two(tmp_path / "resumed", *words, "schedule.max_steps=2")
    for key in bad:
        flip(open_index(shards), key)  # they can be read again
    resumed = outcome(launch_two(tmp_path / "resumed", *words, f"schedule.max_steps={STEPS}"))
    count_try(WHAT, resumed == straight)
    assert resumed == straight


@pytest.mark.faults
def test_two_processes_count_together_and_stop_together(
    tiny_settings: list[str], make_config: MakeConfig, shards: Path, tmp_path: Path, count_try: Count
) -> None:
    words = [*tiny_settings, f"data.shards={shards}", "data.on_bad_sample=substitute", "schedule.max_steps=20"]
    index = open_index(shards)
    break_half(index)
    with pytest.raises(AssertionError, match=r"images cannot be read, above data\.max_substituted"):
        launch_two(tmp_path / "runs2", *words)
    count_try("a set that is mostly broken stops the run", True)

"""verify_resume: which trials there are, what it compares, and that it sees what differs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.config.schema import Config, DataConfig
from trainer.core.files import write_bytes
from trainer.model.checkpoint import find_newest, list_checkpoints, seal
from trainer.model.step_records import StepRecord
from trainer.train.loop import train
from trainer.train.run import run_path
from trainer.train.trial_comparison import compare_trials, find_fault, table_row
from trainer.train.trials import SeenStep, Trial, TrialResult, join_ranks, plan_trials, read_result

MakeConfig = Callable[..., Config]


def sizes(global_: int, bucket: int, micro: int) -> DataConfig:
    return DataConfig(shards="s", global_batch_size=global_, bucket_batch_size=bucket, micro_batch_size=micro)


@pytest.mark.parametrize(
    ("data", "processes", "others", "expected"),
    [
        (sizes(96, 48, 16), 1, [2], [("micro-batch", 1, 12), ("processes", 2, 16)]),
        (sizes(96, 48, 1), 1, [], [("micro-batch", 1, 2)]),
        (sizes(4, 1, 1), 4, [3, 2, 1], [("processes", 2, 1)]),
        (sizes(4, 1, 1), 1, [], []),
        (sizes(8, 8, 8), 1, [2], [("micro-batch", 1, 4), ("processes", 2, 4)]),
    ],
)
def test_the_trials_follow_from_batch_sizes_and_hardware(
    data: DataConfig, processes: int, others: list[int], expected: list[tuple[str, int, int]]
) -> None:
    first, second, *more = plan_trials(data, processes, others)
    assert not first.killed and second.killed and second.exact and second.processes == processes
    found = [(trial.name, trial.processes, int(trial.words[0].split("=")[1])) for trial in more]
    assert found == expected and not any(trial.exact for trial in more)


def test_ranks_are_joined_in_the_order_of_the_global_batch() -> None:
    def record(attempt: int, rank: int, keys: str, world: int = 2) -> StepRecord:
        return StepRecord(
            attempt, 3, rank, world, 0.0, 0.0, batches=[1, 1], keys=list(keys), captions=list(keys.upper()), loss=1.0,
            losses=[float(ord(key)) for key in keys], grad_norm=2.0,
        )  # fmt: skip

    killed = dataclasses.replace(record(1, 0, "xy"), losses=None, loss=None)
    steps = join_ranks([killed, record(1, 1, "uv"), record(2, 0, "ac"), record(2, 1, "bd")])
    assert steps[3].keys == ["a", "b", "c", "d"] and steps[3].captions == ["A", "B", "C", "D"]
    assert steps[3].losses == [97.0, 98.0, 99.0, 100.0]
    assert join_ranks([record(1, 0, "ac")]) == {}  # a rank is missing


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> TrialResult:
    """Two steps and two checkpoints, made up."""
    return write_result(tmp_path_factory.mktemp("straight"), Trial("straight", "straight"), [0.0, 1.0, 2.0])


def write_result(
    folder: Path, trial: Trial, weights: list[float], losses: tuple[float, ...] = (0.5, 0.25)
) -> TrialResult:
    """A trial whose only weight was so at step 0, 1 and 2."""
    for step in (1, 2):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        save_file({"w": torch.tensor([weights[step]])}, checkpoint / "model-00001.safetensors")
        files = {f"{kind}-00001.safetensors": {"sha256": "", "size": 1} for kind in ("model", "optimizer")}
        content = {"format_version": 2, "name": checkpoint.name, "step": step, "files": files}
        write_bytes(checkpoint / "checkpoint.json", seal(content))
    steps = {number: SeenStep(["a", "b"], ["x", "y"], [loss, loss], loss, 1.0) for number, loss in enumerate(losses)}
    sums = {"model-00001.safetensors": str(weights), "optimizer-00001.safetensors": "same"}
    return TrialResult(trial, steps, sums, list_checkpoints(folder / "checkpoints")[-1], 1, 2.0)


RESUMED = Trial("resumed", "killed and resumed", killed=True)
SPLIT = Trial("micro-batch", "micro-batches of 4", exact=False)


def test_the_same_is_the_same(straight: TrialResult, tmp_path: Path) -> None:
    found = compare_trials(straight, write_result(tmp_path, RESUMED, [0.0, 1.0, 2.0]))
    assert found.same_bits and find_fault(straight, found, deterministic=True) is None
    assert table_row(straight, found)[1:6] == ("same", "same", "same bits", "same bits", "same bits")


def test_other_bits_are_a_fault_where_kernels_are_deterministic(straight: TrialResult, tmp_path: Path) -> None:
    resumed = write_result(tmp_path, RESUMED, [0.0, 1.0, 2.1])
    found = compare_trials(straight, resumed)
    assert found.weights_apart == pytest.approx(0.1, rel=1e-3)  # the last step moved the weight by 1
    assert found.first == "in the last checkpoint: weights"
    assert "not the same bits, first at in the last checkpoint: weights" in str(find_fault(resumed, found, True))
    assert find_fault(resumed, found, deterministic=False) is None


def test_losses_may_be_apart_only_as_far_as_sums_explain(straight: TrialResult, tmp_path: Path) -> None:
    near = write_result(tmp_path / "near", SPLIT, [0.0, 1.0, 2.0], (0.5, 0.2501))
    found = compare_trials(straight, near)
    assert find_fault(near, found, deterministic=True) is None and found.first.startswith(
        "step 1, sample 0 (a): losses"
    )
    far = write_result(tmp_path / "far", SPLIT, [0.0, 1.0, 2.0], (0.5, 0.26))
    assert "a step's loss is 3.85% apart" in str(find_fault(far, compare_trials(straight, far), deterministic=False))


@pytest.mark.parametrize("what", ["keys", "captions"])
def test_other_samples_and_captions_are_a_fault_whatever_the_kernels(
    straight: TrialResult, tmp_path: Path, what: str
) -> None:
    other = write_result(tmp_path, SPLIT, [0.0, 1.0, 2.0])
    other.steps[1] = dataclasses.replace(other.steps[1], **{what: ["a", "z"] if what == "keys" else ["x", "z"]})
    fault = find_fault(other, compare_trials(straight, other), deterministic=False)
    assert fault is not None and f"other samples or captions, first at step 1, sample 1 (b): {what}" in fault


def test_a_real_run_is_read(make_config: MakeConfig) -> None:
    config = make_config("schedule.max_steps=2")
    train(config)
    result = read_result(Trial("run", "straight"), run_path(config), 2, 1.0)
    assert sorted(result.steps) == [0, 1] and all(len(step.keys) == 4 for step in result.steps.values())
    assert result.checkpoint == find_newest(run_path(config))

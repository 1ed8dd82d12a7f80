"""Short runs of a user's own config, to be compared: straight, killed and resumed, and with the work split anew."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import trainer
from trainer.config.schema import DataConfig
from trainer.core.errors import UserError
from trainer.core.processes import POLL_SECONDS, kill_family
from trainer.model.checkpoint import find_newest, list_sums, measure_checkpoint, read_train_state, step_of
from trainer.model.step_records import StepRecord, read_black_box

LINES_SHOWN = 15  # of the output of a trial that fails
# a trial is short, writes nothing but its own folder, and asks nobody
TRIAL_WORDS = (
    "schedule.epochs=null", "checkpoint.resume=auto", "checkpoint.fork=null", "checkpoint.keep_every_steps=null",
    "sampling.every_steps=null", "logging.trackers=[]", "logging.every_steps=1", "run.time_limit=null",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One short run."""

    name: str  # of its folder
    shows: str  # what is different about it, for people
    words: tuple[str, ...] = ()  # what it changes of the config
    processes: int = 1
    killed: bool = False  # and resumed
    exact: bool = True  # whether the same bits are promised, where kernels are deterministic
    kept: int = 1  # checkpoints


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a config have in common."""

    words: tuple[str, ...]  # the command line that gave the config
    folder: Path  # a run for each lies in it
    steps: int
    on_cpu: bool

    @property
    def saved(self) -> int:
        """The step of the checkpoint after which one is killed."""
        return self.steps // 2


@dataclass(frozen=True)
class SeenStep:
    """What one step saw and gave, whatever the number of processes: in the order of the global batch."""

    keys: list[str]
    captions: list[str]
    losses: list[float]  # of the samples
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class TrialResult:
    """What a trial leaves to be compared."""

    trial: Trial
    steps: dict[int, SeenStep]  # by the number of completed steps before each
    files: dict[str, str]  # SHA-256 by name of the last checkpoint's files of tensors
    checkpoint: Path
    size: int  # bytes of a checkpoint
    seconds: float


def plan_trials(data: DataConfig, processes: int, other_processes: list[int]) -> Iterator[Trial]:
    """The trials that batch sizes and hardware allow; the first is what the others are compared with."""
    straight = Trial("straight", "straight", processes=processes, kept=2)
    yield straight
    yield Trial("resumed", "killed and resumed", processes=processes, killed=True)
    micro = find_other_micro_batch(data, processes)
    if micro is not None:
        shows = f"micro-batches of {micro}, not {data.micro_batch_size}"
        yield Trial("micro-batch", shows, (f"data.micro_batch_size={micro}",), processes, exact=False)
    for other in other_processes:
        candidates = (data.micro_batch_size, micro)
        sizes = [size for size in candidates if size and not data.global_batch_size % (size * other)]
        if sizes:
            shows = f"{other} process{'es' if other > 1 else ''}, not {processes}"
            yield Trial("processes", shows, (f"data.micro_batch_size={sizes[0]}",), other, exact=False)
            return


def find_other_micro_batch(data: DataConfig, processes: int) -> int | None:
    """The largest smaller micro-batch that the other sizes allow, else the next larger one; None for neither."""
    allowed = [
        size for size in range(1, data.bucket_batch_size + 1)
        if data.bucket_batch_size % size == 0 and data.global_batch_size % (size * processes) == 0
    ]  # fmt: skip
    smaller = [size for size in allowed if size < data.micro_batch_size]
    larger = [size for size in allowed if size > data.micro_batch_size]
    return max(smaller, default=min(larger, default=None))


def run_trial(settings: TrialSettings, trial: Trial) -> TrialResult:
    """Run a trial in processes of its own, and read what it left.

    Raises:
        UserError: when a process fails, with the end of what it said and where the whole is.
    """
    run, begun = settings.folder / trial.name, time.monotonic()
    if trial.killed:
        launch(settings, trial, kill=True)
        found = find_newest(run)
        if found is None or step_of(found) >= settings.steps:
            raise UserError(
                f"the run was over before it could be killed, after {settings.steps} steps: give it more by --steps"
            )
    launch(settings, trial)
    return read_result(trial, run, settings.steps, time.monotonic() - begun)


def trial_words(settings: TrialSettings, trial: Trial) -> list[str]:
    """The config of a trial, as a command line."""
    return [
        *settings.words, *TRIAL_WORDS, *trial.words, f"run.output_dir={settings.folder}", f"run.name={trial.name}",
        f"run.num_processes={trial.processes}", f"schedule.max_steps={settings.steps}",
        f"checkpoint.every_steps={settings.saved}", f"checkpoint.keep_last={trial.kept}",
    ]  # fmt: skip


def launch(settings: TrialSettings, trial: Trial, *, kill: bool = False) -> None:
    """Train to the end; or until its checkpoint is whole and a step after it under way: then SIGKILL to all processes.

    Raises:
        UserError: when it fails by itself.
    """
    folder = settings.folder
    script = Path(trainer.__file__).parent.parent / "train.py"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(trial.processes)]
    command = [sys.executable, *(several if trial.processes > 1 else []), str(script), *trial_words(settings, trial)]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if settings.on_cpu else {})
    said, run = folder / f"{trial.name}.log", folder / trial.name
    with said.open("ab") as log_file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                if kill and is_past(run, settings.saved):
                    kill_family(process)
                    return
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:  # we are interrupted, and so is the trial
                kill_family(process)
    if process.returncode:
        last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
        raise UserError(
            f"the trial '{trial.shows}' ended with exit code {process.returncode}; all that it said lies in {said}:\n"
            + "\n".join(last)
        )


def is_past(run: Path, step: int) -> bool:
    """Whether the checkpoint of a step is whole and a step after it has begun."""
    found = find_newest(run)
    return found is not None and any(record.step >= step_of(found) >= step for record in read_black_box(run))


def read_result(trial: Trial, run: Path, steps: int, seconds: float) -> TrialResult:
    """What the trial left.

    Raises:
        UserError: where a step is not recorded.
    """
    checkpoint = find_newest(run)
    seen = join_ranks(read_black_box(run))
    lacking = [step for step in range(steps) if step not in seen]
    if checkpoint is None or step_of(checkpoint) != steps or lacking:
        raise UserError(f"the trial '{trial.shows}' has not recorded all of its {steps} steps: {run}")
    files = {name: each.sha256 for name, each in list_sums(read_train_state(checkpoint)).items()}
    return TrialResult(trial, seen, files, checkpoint, measure_checkpoint(checkpoint), seconds)


def join_ranks(records: list[StepRecord]) -> dict[int, SeenStep]:
    """Step -> what its ranks saw in its last attempt: micro-batch by micro-batch, in each rank by rank."""
    last: dict[int, dict[int, StepRecord]] = {}
    for record in records:  # by attempt, step and rank
        if record.losses is None:
            continue
        ranks = last.setdefault(record.step, {})
        if any(other.attempt != record.attempt for other in ranks.values()):
            ranks.clear()
        ranks[record.rank] = record
    return {step: join_step(ranks) for step, ranks in last.items() if len(ranks) == next(iter(ranks.values())).world}


def join_step(ranks: dict[int, StepRecord]) -> SeenStep:
    """One step's ranks."""
    places = dict.fromkeys(ranks, 0)
    whole = SeenStep([], [], [], loss=ranks[0].loss or 0.0, grad_norm=ranks[0].grad_norm or 0.0)
    for number in range(len(ranks[0].batches)):
        for rank, record in sorted(ranks.items()):
            begin, end = places[rank], places[rank] + record.batches[number]
            whole.keys.extend(record.keys[begin:end])
            whole.captions.extend(record.captions[begin:end])
            whole.losses.extend((record.losses or [])[begin:end])
            places[rank] = end
    return whole


def repeat_trial(trial: Trial) -> Trial:
    """The same once more: whether it gives the same bits says whether the kernels are deterministic."""
    return replace(trial, name="again", shows="straight, once more", kept=1)

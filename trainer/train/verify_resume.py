"""Whether a run of this config, on these data and this machine, can be killed and resumed, and split in other ways."""

import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.core.console import Result, format_duration, format_table, log
from trainer.core.disk import format_bytes, free_bytes
from trainer.core.errors import UserError
from trainer.train.trial_comparison import HEADER, Comparison, compare_trials, find_fault, table_row
from trainer.train.trials import Trial, TrialResult, TrialSettings, plan_trials, repeat_trial, run_trial

CHECKPOINTS_AT_ONCE = 3  # that a trial's folder holds: of two steps, and the one that is written
UNTRIED = {
    "micro-batch": "another micro-batch: data.bucket_batch_size and data.global_batch_size allow no other",
    "processes": "another number of processes: this machine or the batch sizes allow no other",
}


@dataclass(frozen=True)
class Checked:
    """A trial beside the straight one; and, where its bits differ, the straight one once more beside itself."""

    result: TrialResult
    comparison: Comparison
    repeated: tuple[TrialResult, Comparison] | None = None

    @property
    def deterministic(self) -> bool:
        """Whether kernels give the same bits each time, as far as this trial shows."""
        return self.repeated is None or self.repeated[1].same_bits

    @property
    def fault(self) -> str | None:
        """What breaks a promise."""
        return find_fault(self.result, self.comparison, self.deterministic)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Its lines of the table."""
        more = [] if self.repeated is None else [table_row(*self.repeated)]
        return [table_row(self.result, self.comparison), *more]

    @property
    def facts(self) -> dict[str, Any]:
        """For programs."""
        found = self.comparison
        return {
            "trial": self.result.trial.name, "seconds": round(self.result.seconds, 1),
            "same_samples": found.samples is None, "same_captions": found.captions is None,
            "same_bits": found.same_bits, "first_difference": None if found.same_bits else found.first,
            "loss_apart": found.loss_apart, "weights_apart": found.weights_apart,
        }  # fmt: skip


def verify_resume(
    config: Config, words: list[str], *, steps: int, processes: int, others: list[int], on_cpu: bool, keep: bool
) -> Result:
    """Run all trials and say what they have in common; the result's code is 1 where a promise is broken.

    ``words`` are the command line that gave the config; ``others`` the numbers of processes that may be tried beside
    ``processes``. The trials write into a new folder in the config's ``run.output_dir``, which is deleted where all is
    as promised, unless it is to be kept.

    Raises:
        UserError: when a trial cannot be run, or the disk has no room for it.
    """
    output = Path(config.run.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=output))
    settings = TrialSettings(tuple(words), folder, steps, on_cpu)
    trials = list(plan_trials(config.data, processes, others))
    try:
        straight, checked = run_all(settings, trials)
    except BaseException:
        log.info("note: what the trials wrote is kept in %s", folder)
        raise
    faults = [check.fault for check in checked if check.fault]
    if keep or faults:
        log.info("note: what the trials wrote is kept in %s", folder)
    else:
        shutil.rmtree(folder)
    lines = [
        format_table([HEADER, table_row(straight, None), *(row for check in checked for row in check.rows)]),
        *(say_whether_exact(check) for check in checked if check.result.trial.exact),
        *(f"not tried: {why}" for name, why in UNTRIED.items() if name not in {trial.name for trial in trials}),
        *(f"broken: {fault}" for fault in faults),
        describe_verdict(trials, broken=bool(faults)),
    ]
    facts = {"trials": [check.facts for check in checked], "faults": faults, "steps": steps}
    return Result("\n".join(lines), [folder] if keep or faults else [], facts, code=1 if faults else 0)


def run_all(settings: TrialSettings, trials: list[Trial]) -> tuple[TrialResult, list[Checked]]:
    """The straight trial, and each of the others beside it; a compared one's checkpoints are deleted at once."""
    first, *others = trials
    straight = start(settings, first, f"1 of {len(trials)}")
    needed, free = CHECKPOINTS_AT_ONCE * straight.size, free_bytes(settings.folder)
    log.info(
        "a checkpoint has %s, and up to %d more are written at once (%s are free); the other trials will take about %s",
        format_bytes(straight.size), CHECKPOINTS_AT_ONCE, format_bytes(free),
        format_duration(straight.seconds * (len(others) + 1)),
    )  # fmt: skip
    if free < needed:
        raise UserError(
            f"{settings.folder} has {format_bytes(free)} left, and the trials need {format_bytes(needed)} more for "
            "checkpoints: choose another run.output_dir"
        )
    checked = []
    for number, trial in enumerate(others, 2):
        run = partial(start, settings, where=f"{number} of {len(trials)}")
        result = run(trial)
        comparison = compare_trials(straight, result)
        repeated = None
        if trial.exact and not comparison.same_bits:  # a fault of the resume, or of kernels that always differ?
            repetition = run(repeat_trial(first))
            repeated = repetition, compare_trials(straight, repetition)
            shutil.rmtree(repetition.checkpoint.parent)
        checked.append(Checked(result, comparison, repeated))
        shutil.rmtree(result.checkpoint.parent)
    return straight, checked


def start(settings: TrialSettings, trial: Trial, where: str) -> TrialResult:
    """Run one, and say so."""
    log.info("trial %s: %s", where, trial.shows)
    return run_trial(settings, trial)


def say_whether_exact(check: Checked) -> str:
    """Whether the kernels are deterministic, for people."""
    if check.repeated is None:
        return "kernels: they gave the same bits in both runs, so a resumed run is the run that was not stopped"
    _, repetition = check.repeated
    if repetition.same_bits:
        return "kernels: deterministic, the straight run gives the same bits again"
    return (
        f"kernels: not deterministic; the straight run itself, once more, first differs at {repetition.first}. "
        "precision.deterministic: true makes it possible to compare bits, and costs speed"
    )


def describe_verdict(trials: list[Trial], *, broken: bool) -> str:
    """The last line."""
    if broken:
        return "do not begin a long run: what is broken is named above, and worth an issue"
    shown = ", ".join(trial.shows for trial in trials[1:])
    return f"as promised: {shown}"

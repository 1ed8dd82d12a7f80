"""runs/<name>/index.html, rewritten as the run goes on: after some time, and when something was made.

It reads what the run has written anyway, on the host, after the steps were read: it waits for no device.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config.fixed import INTERPOLATION
from trainer.config.load import resolved_values
from trainer.config.run_names import name_run
from trainer.config.schema import Config
from trainer.core.commands import command, training_command
from trainer.core.console import log
from trainer.core.distributed import uses_cpu
from trainer.core.errors import UserError
from trainer.core.layout import CONFIG_FILE, METRICS_FILE, RUN_PAGE_FILE
from trainer.model.run_records import read_run
from trainer.report.curves import Curves
from trainer.report.pages import write_html
from trainer.report.run_page import RUN_GENERATOR, RunState, RunView, first_steps, render_run
from trainer.report.sheets import Sheets
from trainer.train.launch import RunInputs
from trainer.train.run import run_path

SECONDS_BETWEEN = 30.0
SHARE = 0.01  # of the time that writing pages may take


class LivePage:
    """The page of an attempt; only the main process writes one. Around the steps, so that it sees how they end."""

    def __init__(self, inputs: RunInputs, warnings: Sequence[str]) -> None:
        self.inputs, self.warnings, self.made = inputs, warnings, inputs.first
        self.folder = run_path(inputs.config)
        self.records = read_run(self.folder) if inputs.accelerator.is_main_process else {}
        self.curves, self.sheets = Curves(first_steps(self.records)), Sheets(self.folder)
        self.failed, self.due = False, 0.0

    def __enter__(self) -> "LivePage":
        self.write(RunState("running"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.write(RunState("finished" if self.made == self.inputs.last else "stopped"))
        else:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".removesuffix(": ")
            self.write(RunState("failed", "interrupted" if isinstance(error, KeyboardInterrupt) else said))

    def update(self, made: int, at_once: bool) -> None:
        """So many steps are made; the page follows at once, or when it is time."""
        self.made = made
        if at_once or time.monotonic() >= self.due:
            self.write(RunState("running"))

    def write(self, state: RunState) -> None:
        """Write the page as it is now. Whatever is wrong with it is said once, and never stops a run."""
        if not self.inputs.accelerator.is_main_process:
            return
        begun = time.monotonic()
        try:
            view = self.view(state)
            write_html(view.page, render_run(view), RUN_GENERATOR)
        except Exception as error:
            if not self.failed:
                log.warning("warning: the run's page is not written, training goes on: %r", error)
            self.failed = True
        now = time.monotonic()
        self.due = now + max(SECONDS_BETWEEN, (now - begun) / SHARE)

    def view(self, state: RunState) -> RunView:
        """What the page is made of, now."""
        config, sampling = self.inputs.config, self.inputs.config.sampling
        self.curves.read(self.folder / METRICS_FILE)
        side = config.buckets.base_resolution
        sheets = self.sheets.read(sampling.prompts, (sampling.width or side, sampling.height or side))
        return RunView(
            page=self.folder / RUN_PAGE_FILE,
            written=config.written,
            records=self.records,
            curves=self.curves,
            sheets=[sheet for sheet in sheets if sheet.step <= self.made],  # later ones will be drawn again
            unreadable=self.sheets.unreadable,
            made=self.made,
            last=self.inputs.last,
            state=RunState(state.kind, hide_values(state.message, config)),
            written_at=time.time(),
            warnings=[hide_values(warning, config) for warning in self.warnings],
            resume=hide_values(self.resume_command(), config),
            export=hide_values(command("scripts/export.py", name_run(self.folder)), config),
            shards=Path(config.data.shards) if "oc.env" not in str(config.written["data"]["shards"]) else None,
        )

    def resume_command(self) -> str:
        """The command that resumes this run: its own config, on as many processes."""
        words = [str(self.folder / CONFIG_FILE)]
        words += [] if self.inputs.config.checkpoint.resume == "auto" else ["checkpoint.resume=auto"]
        return training_command(words, self.inputs.accelerator.num_processes, uses_cpu())


def hide_values(text: str, config: Config) -> str:
    """A text without what interpolations stand for, such as an environment variable: it goes to a file."""
    pairs = set(find_hidden(config.written, resolved_values(config)))
    for resolved, written in sorted(pairs, key=lambda pair: -len(pair[0])):
        text = text.replace(resolved, written)
    return text


def find_hidden(written: Any, resolved: Any) -> Iterator[tuple[str, str]]:
    """(what it stands for, what was written) of every text that holds an interpolation."""
    if isinstance(written, dict) and isinstance(resolved, dict):
        for key, value in written.items():
            yield from find_hidden(value, resolved.get(key))
    elif isinstance(written, list) and isinstance(resolved, list):
        for one, other in zip(written, resolved, strict=False):
            yield from find_hidden(one, other)
    elif isinstance(written, str) and INTERPOLATION in written and isinstance(resolved, str) and resolved:
        yield resolved, written

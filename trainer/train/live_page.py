"""runs/<name>/index.html, rewritten as the run goes on: after some time, and when something was made.

It reads what the run has written anyway, on the host, after the steps were read: it waits for no device.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trainer.config.environment import hide_environment
from trainer.config.run_names import name_run
from trainer.core.commands import command, training_command
from trainer.core.console import log
from trainer.core.distributed import uses_cpu
from trainer.core.layout import CONFIG_FILE, METRICS_FILE, RUN_PAGE_FILE
from trainer.model.checkpoint import find_newest, step_of
from trainer.model.exports import export_step, list_exports
from trainer.model.run_records import read_run
from trainer.report.curves import Curves
from trainer.report.pages import write_html
from trainer.report.run_page import RUN_GENERATOR, RunState, RunView, first_steps, render_run
from trainer.report.sheets import Sheets
from trainer.sample.sampling import training_size
from trainer.train.launch import RunInputs
from trainer.train.outcome import describe_error
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
        self.failed, self.due, self.every = False, 0.0, SECONDS_BETWEEN

    def __enter__(self) -> "LivePage":
        self.write(RunState("running"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self.write(RunState("finished" if self.made == self.inputs.last else "stopped"))
        else:
            said = "interrupted" if isinstance(error, KeyboardInterrupt) else describe_error(error)
            self.write(RunState("failed", said))

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
        self.every = max(SECONDS_BETWEEN, (now - begun) / SHARE)
        self.due = now + self.every

    def view(self, state: RunState) -> RunView:
        """What the page is made of, now."""
        config, sampling = self.inputs.config, self.inputs.config.sampling
        self.curves.read(self.folder / METRICS_FILE)
        size, hide = (
            training_size(sampling, config.buckets.base_resolution),
            partial(hide_environment, written=config.written),
        )
        sheets = self.sheets.read([hide(prompt) for prompt in sampling.prompts], size)
        return RunView(
            page=self.folder / RUN_PAGE_FILE,
            written=config.written,
            records=self.records,
            curves=self.curves,
            sheets=[sheet for sheet in sheets if sheet.step <= self.made],  # later ones will be drawn again
            unreadable=self.sheets.unreadable,
            made=self.made,
            last=self.inputs.last,
            state=RunState(state.kind, hide(state.message)),
            written_at=time.time(),
            warnings=[hide(warning) for warning in self.warnings],
            resume=hide(self.resume_command()),
            export=hide(command("scripts/export.py", name_run(self.folder))),
            onward=[hide(line) for line in self.list_onward()],
            every_seconds=self.every,
            shards=Path(config.data.shards) if "oc.env" not in str(config.written["data"]["shards"]) else None,
        )

    def list_onward(self) -> list[str]:
        """The commands after an export, where the newest checkpoint has one."""
        newest, run = find_newest(self.folder), name_run(self.folder)
        if newest is None or step_of(newest) not in map(export_step, list_exports(self.folder)):
            return []
        prompts = self.inputs.config.sampling.prompts
        drawing = ["--prompt", prompts[0]] if prompts else ["--prompt", "1girl, solo, smile"]
        publishing = ["publish.source_url=https://...", "--license-file", "faipl-1.0-sd.md"]
        return [command("scripts/sample.py", run, *drawing), command("scripts/publish.py", run, *publishing)]

    def resume_command(self) -> str:
        """The command that resumes this run: its own config, on as many processes."""
        words = [str(self.folder / CONFIG_FILE)]
        words += [] if self.inputs.config.checkpoint.resume == "auto" else ["checkpoint.resume=auto"]
        return training_command(words, self.inputs.accelerator.num_processes, uses_cpu())

"""train(config): the whole of training on one screen; its verbs are below and in the modules underneath.

Progress is one integer, the step. Errors come before harm: all that can be refused is refused before the first step.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.optim import Optimizer

from trainer.config.schema import Config
from trainer.core.console import Result, log
from trainer.core.distributed import describe_device, device_memory
from trainer.core.progress import format_count
from trainer.data.loader import Batch, load_batches
from trainer.model.diffusion import alphas_cumprod
from trainer.model.sdxl import COMPONENTS, DTYPES, SDXL
from trainer.report.run_page import RunState
from trainer.train.announce import describe_end, describe_start, expect_size, find_warnings, make_result
from trainer.train.black_box import BlackBox, open_black_box
from trainer.train.kernels import choose_attention, prefer_attention, record_kernels
from trainer.train.launch import RunInputs, build_accelerator, open_inputs
from trainer.train.live_page import LivePage
from trainer.train.load import load_model
from trainer.train.metrics import find_peak_flops, training_flops
from trainer.train.optim import lr_factor, set_learning_rates
from trainer.train.outcome import noting_outcome
from trainer.train.policy import choose_policy
from trainer.train.progress import Progress
from trainer.train.resume import check_same, describe_changes, hash_state, settle_resumed
from trainer.train.run import Attempt, begin_attempt, is_due, lock_run, run_path
from trainer.train.samples import Samples, is_grid_lost
from trainer.train.saver import Saver
from trainer.train.state import build_train_state
from trainer.train.step import Objective, PendingStep, settle_gradient_buckets, training_step
from trainer.train.stops import Stops, stop_requests
from trainer.train.watchdog import Watchdog, open_watchdog


def train(config: Config, check: bool = False) -> Result:
    """Train from the newest checkpoint, or from the base, to the end of the schedule; ``check`` stops before step 0.

    Raises:
        UserError: whatever the user has to mend, before anything is harmed.
    """
    inputs = open_inputs(config, build_accelerator(config))
    locked = lock_run(run_path(config), inputs.accelerator.is_main_process)
    attention = prefer_attention(choose_attention(inputs.accelerator.device, config.precision))
    with locked, attention, stop_requests(config.run.time_limit) as stops:
        inputs = settle_resumed(inputs, check)
        first, last = inputs.first, inputs.last
        lost = is_grid_lost(inputs)
        if first >= last and (check or not lost):
            return make_result(
                inputs, f"{run_path(config)} has made all of its {format_count(last, 'step')}; nothing to do", first
            )
        inputs = settle_memory(inputs)
        model, sdxl, optimizer = load_model(inputs)
        if inputs.processes.world > 1:
            check_same(inputs.processes, "weights or optimizer state", hash_state(sdxl, optimizer))
        stops.expect_saves(expect_size(inputs, sdxl))
        log.info(describe_start(inputs, sdxl))
        if changes := describe_changes(inputs):
            log.info("note: %s", changes)
        for warning in find_warnings(inputs, sdxl):
            log.warning("warning: %s", warning)
        if check:
            return Result(f"checked: the run can start at step {first:,}; nothing was trained")
        run = build_run(inputs, model, sdxl, optimizer, stops)
        pending: PendingStep | None = None
        with (
            run.progress, run.page, run.noting, run.black_box, run.saver, run.watchdog,
            closing(start_loading(run)) as batches,
        ):  # fmt: skip
            if lost:
                run.samples.draw_lost()
                run.page.update(first, at_once=True)
            for step in range(first, last):
                ready = wait_for_batches(run, batches)
                if stops.agree():
                    break
                set_learning_rates(run.optimizer, lr_factor(step, last, config.schedule))
                before, pending = pending, step_once(run, ready, step)
                # while the device works on this step, the host waits for the one before
                if before is not None and run.progress.read(before.wait()):
                    run.saver.prune(before.step)
                if saving := is_due(step + 1, config.checkpoint.every_steps, last):
                    save_made(run, pending, ending=step + 1 == last)
                    pending = None
                if sampling := is_due(step + 1, config.sampling.every_steps, last):
                    run.samples.draw(step + 1)
                run.page.update(step + 1, at_once=saving or sampling)
            if pending is not None:  # stopped between two saves
                save_made(run, pending, ending=True)
            finish_saving(run)
        said = describe_end(inputs, run.page.made, run.progress.seconds, run.progress.skipped["all"], stops.reason)
        if count := run.progress.bad_samples.count:
            said += f", {format_count(count, 'bad sample')} substituted"
        return make_result(inputs, said, run.page.made, stops.reason)


@dataclass(frozen=True)
class Run:
    """All that a step needs."""

    inputs: RunInputs
    model: Any  # SDXL, under Accelerate's wrappers
    sdxl: SDXL  # without them
    optimizer: Optimizer
    objective: Objective
    progress: Progress
    page: LivePage
    noting: AbstractContextManager[None]  # how the steps end
    stops: Stops
    black_box: BlackBox
    watchdog: Watchdog
    samples: Samples
    saver: Saver  # the main process's is the one that saves
    attempt: Attempt


def settle_memory(inputs: RunInputs) -> RunInputs:
    """With the policy that all processes train by among the facts that are recorded."""
    accelerator = inputs.accelerator
    memory = device_memory(accelerator.device)
    smallest = None if memory is None else min(gather_object([memory]))
    chosen = [choose_policy(inputs, smallest) if accelerator.is_main_process else None]
    return replace(inputs, facts=inputs.facts | {"memory": broadcast_object_list(chosen)[0]})


def build_run(inputs: RunInputs, model: Any, sdxl: SDXL, optimizer: Optimizer, stops: Stops) -> Run:
    """What makes and reads the steps of this attempt; with it the attempt is written down."""
    config, accelerator = inputs.config, inputs.accelerator
    device = describe_device(accelerator.device)
    resumed = inputs.resumed
    attempt = Attempt(0, "", "")  # the trackers are the main process's too
    if accelerator.is_main_process:
        attempt = begin_attempt(
            config, inputs.facts, resumed.tracker_run_id if resumed else None, resumed.attempt if resumed else 0,
            first_step=inputs.first, last_step=inputs.last, processes=accelerator.num_processes, device=device,
            kernels=record_kernels(choose_attention(accelerator.device, config.precision)),
            **inputs.software,
        )  # fmt: skip
    black_box = open_black_box(inputs, attempt.number)
    peak = find_peak_flops(device, config.precision.compute)
    side, chunks = config.buckets.base_resolution, config.captions.max_token_length // 75
    trained = {part: getattr(config.model, f"train_{part}") for part in COMPONENTS}
    counts = peak is not None and accelerator.is_main_process  # which alone writes the share of the peak
    flops = training_flops(inputs.base, side, side, chunks, trained) if counts else None
    progress = Progress(
        inputs, attempt.number, attempt.tracker_run_id, black_box=black_box, flops_per_sample=flops, peak_flops=peak
    )
    cumulative = alphas_cumprod(config.diffusion.zero_terminal_snr).to(accelerator.device)
    cast = torch.float32 if config.precision.weights == "autocast" else DTYPES[config.precision.compute]
    objective = Objective(config.diffusion, cumulative, inputs.vae.scale, cast)
    page = LivePage(inputs, find_warnings(inputs, sdxl))
    noting = noting_outcome(
        run_path(config), is_main=accelerator.is_main_process, last=inputs.last, written=config.written, stops=stops,
        made=lambda: page.made,
    )  # fmt: skip
    watchdog = open_watchdog(inputs, stops, black_box, lambda said: page.write(RunState("failed", said)))
    samples = Samples(inputs, sdxl, progress, stops)
    saver = Saver(run_path(config), sdxl, optimizer, config.checkpoint, stops.pace)
    stops.failed = lambda: saver.broken
    return Run(
        inputs, model, sdxl, optimizer, objective, progress, page, noting, stops, black_box, watchdog, samples, saver,
        attempt,
    )  # fmt: skip


def start_loading(run: Run) -> Generator[Batch, None, None]:
    """This rank's batches; with several processes, DDP's gradient buckets are settled with the first of them."""
    inputs, data = run.inputs, run.inputs.config.data
    rank, world = inputs.accelerator.process_index, inputs.accelerator.num_processes
    batches = load_batches(
        inputs.data, first_step=inputs.first, last_step=inputs.last, rank=rank, world=world,
        threads=data.loader_threads, prefetch_factor=data.prefetch_factor,
        pin_memory=inputs.accelerator.device.type == "cuda", stopped=run.stops.asked,
    )  # fmt: skip
    if run.model is not run.sdxl and world > 1:
        batch = inputs.data[inputs.first * inputs.data.per_step + rank]
        settle_gradient_buckets(run.model, batch, run.objective, run.optimizer)
    return batches


def wait_for_batches(run: Run, batches: Iterator[Batch]) -> list[Batch]:
    """This rank's micro-batches of the next step; fewer where it was asked to stop while it waited.

    All of them before the step, so that a rank whose files do not come can still agree with the others to stop.
    """
    run.black_box.ask()
    run.stops.pace.mark("the wait for its batches")
    return list(islice(batches, run.inputs.data.per_step // run.inputs.accelerator.num_processes))


def step_once(run: Run, batches: Sequence[Batch], step: int) -> PendingStep:
    """One optimizer step on all ranks."""
    config, accelerator = run.inputs.config, run.inputs.accelerator
    pace = run.stops.pace
    run.black_box.begin(step, batches)
    pace.mark("the first forward of a step")

    def all_mean(value: Tensor) -> Tensor:
        pace.mark("a mean over all ranks")
        return accelerator.reduce(value, "mean")

    pending = training_step(
        run.model, batches, run.optimizer, run.objective, step=step,
        micro_steps=run.inputs.data.per_step // accelerator.num_processes,
        max_grad_norm=config.optim.max_grad_norm, scaler=accelerator.scaler,
        no_sync=lambda: accelerator.no_sync(run.model), all_mean=all_mean if accelerator.num_processes > 1 else None,
        arrive=pace.mark, before_update=run.saver.guard,
    )  # fmt: skip
    pace.mark("the numbers of the step before")
    return pending


def save_made(run: Run, pending: PendingStep | None, ending: bool) -> None:
    """Read the last step that was launched, and save what it made."""
    assert pending is not None
    if run.progress.read(pending.wait()):
        run.saver.prune(pending.step)
    with run.progress.timed("checkpoint"), run.stops.pace.apart("checkpoint"):
        save(run, pending.step + 1, ending)


def save(run: Run, made: int, ending: bool) -> None:
    """Save on the main process; all go on when the tensors may change again, or at the end when it is written."""
    run.progress.bad_samples.gather(made)
    state = build_train_state(run.inputs, run.attempt, run.progress, made)
    run.inputs.processes.decide(lambda: run.saver.save(state, ending))


def finish_saving(run: Run) -> None:
    """At the end of this attempt, wait until all is written."""
    with run.stops.pace.apart("checkpoint"):
        run.inputs.processes.decide(lambda: run.saver.finish(run.page.made, run.page.made == run.inputs.last))

"""train(config): the whole of training on one screen; its verbs are below and in the modules underneath.

Progress is one integer, the step. Errors come before harm: all that can be refused is refused before the first step.
"""

import json
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.optim import Optimizer

from trainer.config.environment import hide_environment
from trainer.config.schema import Config, MemoryConfig
from trainer.core.console import Result, log
from trainer.core.distributed import describe_device, device_memory
from trainer.core.layout import CHECKPOINTS_FOLDER, SAMPLES_FOLDER, checkpoint_name
from trainer.core.progress import Meter, format_count
from trainer.data.loader import Batch, load_batches
from trainer.model.checkpoint import restore_checkpoint
from trainer.model.diffusion import alphas_cumprod, trained_prediction
from trainer.model.lineage import build_lineage
from trainer.model.sdxl import COMPONENTS, DTYPES, SDXL, build_sdxl, put_weights
from trainer.model.vae import build_vae
from trainer.sample.pictures import SHEET_PROMPTS, SHEET_SIZE, lay_out_sheet, write_png
from trainer.sample.sampling import LoadedModel, build_pipeline, draw_image, make_grid, training_size
from trainer.train.announce import describe_end, describe_start, find_warnings, make_result
from trainer.train.launch import RunInputs, build_accelerator, open_inputs
from trainer.train.live_page import LivePage
from trainer.train.metrics import find_peak_flops, training_flops
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import build_optimizer, lr_factor, set_learning_rates
from trainer.train.policy import choose_policy
from trainer.train.progress import Progress
from trainer.train.resume import check_resumed, describe_changes, restore_scaler
from trainer.train.run import begin_attempt, find_resumed, lock_run, read_work, run_path
from trainer.train.save import retain_checkpoints, save_checkpoint, scaler_state
from trainer.train.step import Objective, PendingStep, settle_gradient_buckets, training_step


def train(config: Config, check: bool = False) -> Result:
    """Train from the newest checkpoint, or from the base, to the end of the schedule; ``check`` stops before step 0.

    Raises:
        UserError: whatever the user has to mend, before anything is harmed.
    """
    inputs = open_inputs(config, build_accelerator(config))
    with lock_run(run_path(config), inputs.accelerator.is_main_process), stop_requests() as stop_requested:
        inputs.accelerator.wait_for_everyone()
        inputs = replace(inputs, resumed=find_resumed(config))  # another process may have saved before the lock
        check_resumed(inputs)
        first, last = inputs.first, inputs.last
        if first >= last:
            return make_result(
                inputs, f"{run_path(config)} has made all of its {format_count(last, 'step')}; nothing to do", first
            )
        inputs = settle_memory(inputs)
        model, sdxl, optimizer = load_model(inputs)
        log.info(describe_start(inputs, sdxl))
        if changes := describe_changes(inputs):
            log.info("note: %s", changes)
        for warning in find_warnings(inputs, sdxl):
            log.warning("warning: %s", warning)
        if check:
            return Result(f"checked: the run can start at step {first:,}; nothing was trained")
        run = build_run(inputs, model, sdxl, optimizer)
        pending: PendingStep | None = None
        with run.progress, run.page, closing(start_loading(run)) as batches:
            for step in range(first, last):
                set_learning_rates(run.optimizer, lr_factor(step, last, config.schedule))
                before, pending = pending, step_once(run, batches, step, stop_requested.is_set())
                # while the device works on this step, the host waits for the numbers of the one before
                stopping = before is not None and run.progress.read(before.wait())
                made = step + 1
                done = made == last
                saving = due(made, config.checkpoint.every_steps) or done or stopping
                if saving:
                    stopping = run.progress.read(pending.wait()) or stopping
                    pending = None
                    with run.progress.timed("checkpoint"):
                        save(run, made)
                if sampling := due(made, config.sampling.every_steps) or (done and config.sampling.every_steps):
                    with run.progress.timed("sample"):
                        sample(run, made)
                run.page.update(made, at_once=bool(saving or sampling))
                if stopping:
                    break
        return make_result(inputs, describe_end(inputs, made, run.progress.seconds, run.progress.skipped["all"]), made)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


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
    vae: Any  # for samples; None where none are drawn
    tracker_run_id: str


def settle_memory(inputs: RunInputs) -> RunInputs:
    """With the policy that all processes train by among the facts that are recorded."""
    accelerator = inputs.accelerator
    memory = device_memory(accelerator.device)
    smallest = None if memory is None else min(gather_object([memory]))
    chosen = [choose_policy(inputs, smallest) if accelerator.is_main_process else None]
    return replace(inputs, facts=inputs.facts | {"memory": broadcast_object_list(chosen)[0]})


def load_model(inputs: RunInputs) -> tuple[Any, SDXL, Optimizer]:
    """The model with Accelerate's wrappers and without, and the optimizer, as the base or a checkpoint has them."""
    config, accelerator = inputs.config, inputs.accelerator
    memory = MemoryConfig(inputs.facts["memory"]["policy"])
    model = sdxl = build_sdxl(inputs.base, config.model, config.precision, memory)
    if config.precision.weights == "autocast":
        model = accelerator.prepare_model(sdxl)
        sdxl = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        optimizer = build_optimizer(sdxl, config.optim)
    else:  # neither autocast nor DDP: what is 16-bit is so, and the optimizer averages the gradients
        optimizer = NarrowOptimizer(sdxl, config.optim, config.precision, config.run.seed, accelerator.device)
    if inputs.resumed is not None:
        put = optimizer.weights.put if isinstance(optimizer, NarrowOptimizer) else put_weights
        restore_checkpoint(inputs.resumed.folder, sdxl, optimizer, put)
        restore_scaler(accelerator.scaler, inputs.resumed.state["loss_scaler"])
    return model, sdxl, optimizer


def build_run(inputs: RunInputs, model: Any, sdxl: SDXL, optimizer: Optimizer) -> Run:
    """What makes and reads the steps of this attempt; with it the attempt is written down."""
    config, accelerator = inputs.config, inputs.accelerator
    device = describe_device(accelerator.device)
    attempt, tracker_run_id = 0, ""  # the trackers are the main process's too
    if accelerator.is_main_process:
        attempt, tracker_run_id = begin_attempt(
            config, inputs.facts, inputs.resumed.tracker_run_id if inputs.resumed else None,
            first_step=inputs.first, last_step=inputs.last, processes=accelerator.num_processes, device=device,
            **inputs.software,
        )  # fmt: skip
    peak = find_peak_flops(device, config.precision.compute)
    side, chunks = config.buckets.base_resolution, config.captions.max_token_length // 75
    trained = {part: getattr(config.model, f"train_{part}") for part in COMPONENTS}
    counts = peak is not None and accelerator.is_main_process  # which alone writes the share of the peak
    flops = training_flops(inputs.base, side, side, chunks, trained) if counts else None
    progress = Progress(inputs, attempt, tracker_run_id, flops_per_sample=flops, peak_flops=peak)
    cumulative = alphas_cumprod(config.diffusion.zero_terminal_snr).to(accelerator.device)
    cast = torch.float32 if config.precision.weights == "autocast" else DTYPES[config.precision.compute]
    objective = Objective(config.diffusion, cumulative, inputs.vae.scale, cast)
    page = LivePage(inputs, find_warnings(inputs, sdxl), progress.timed)
    vae = None
    if config.sampling.every_steps:
        vae = build_vae(inputs.vae.config, inputs.vae.state, DTYPES[config.precision.vae]).to(accelerator.device)
    return Run(inputs, model, sdxl, optimizer, objective, progress, page, vae, tracker_run_id)


def start_loading(run: Run) -> Generator[Batch, None, None]:
    """This rank's batches; with several processes, DDP's gradient buckets are settled with the first of them."""
    inputs, data = run.inputs, run.inputs.config.data
    rank, world = inputs.accelerator.process_index, inputs.accelerator.num_processes
    batches = load_batches(
        inputs.data, first_step=inputs.first, last_step=inputs.last, rank=rank, world=world,
        threads=data.loader_threads, prefetch_factor=data.prefetch_factor,
        pin_memory=inputs.accelerator.device.type == "cuda",
    )  # fmt: skip
    if run.model is not run.sdxl and world > 1:
        batch = inputs.data[inputs.first * inputs.data.per_step + rank]
        settle_gradient_buckets(run.model, batch, run.objective, run.optimizer)
    return batches


def step_once(run: Run, batches: Iterator[Batch], step: int, stop_requested: bool) -> PendingStep:
    """One optimizer step on all ranks."""
    config, accelerator = run.inputs.config, run.inputs.accelerator
    micro_steps = run.inputs.data.per_step // accelerator.num_processes
    return training_step(
        run.model, islice(batches, micro_steps), run.optimizer, run.objective, step=step, micro_steps=micro_steps,
        max_grad_norm=config.optim.max_grad_norm, scaler=accelerator.scaler, stop_requested=stop_requested,
        keep_gradients=accelerator.num_processes > 1, no_sync=lambda: accelerator.no_sync(run.model),
        all_mean=lambda value: accelerator.reduce(value, "mean"),
    )  # fmt: skip


def save(run: Run, made: int) -> None:
    """Write a checkpoint on the main process, then prune."""
    config, accelerator = run.inputs.config, run.inputs.accelerator
    folder = run_path(config) / CHECKPOINTS_FOLDER
    if accelerator.is_main_process:
        work = read_work(run_path(config), made)
        state = {
            "run": config.run.name,
            "stage": config.run.stage,
            "step": made,
            "epoch": run.inputs.data.plan.step_units(made - 1)[-1].epoch,
            "seed": config.run.seed,
            "global_batch_size": config.data.global_batch_size,
            "bucket_batch_size": config.data.bucket_batch_size,
            "micro_batch_size": config.data.micro_batch_size,
            "num_processes": accelerator.num_processes,
            **run.inputs.facts,
            "config": config.written,
            "fixed": run.inputs.fixed,
            "loss_scaler": scaler_state(accelerator.scaler),
            "skipped_steps": run.progress.skipped,
            "tracker_run_id": run.tracker_run_id,
            **({"fork": run.inputs.fork} if run.inputs.fork else {}),
            "lineage": build_lineage(
                config, run.inputs.facts, made, fork=run.inputs.fork, software=run.inputs.software, **vars(work)
            ),
        }
        save_checkpoint(folder, run.sdxl, run.optimizer, state)
        retain_checkpoints(folder, config.checkpoint.keep_last, config.checkpoint.keep_every_steps)
    accelerator.wait_for_everyone()


def sample(run: Run, made: int) -> None:
    """Draw the fixed prompts, shared out over the ranks, as one grid."""
    config, accelerator = run.inputs.config, run.inputs.accelerator
    sampling, size = config.sampling, training_size(config.sampling, config.buckets.base_resolution)
    pipeline = build_pipeline(run.sdxl, run.vae, trained_prediction(config.diffusion))
    length, compute = config.captions.max_token_length, DTYPES[config.precision.compute]
    model = LoadedModel(run.sdxl, pipeline, run.inputs.data.tokenizers, length, compute)
    numbers = range(accelerator.process_index, len(sampling.prompts), accelerator.num_processes)
    with Meter("sample", len(numbers) * sampling.num_inference_steps, "denoising step") as meter:
        own = {  # each by itself, so that an image does not depend on which rank draws what
            number: draw_image(model, sampling.prompts[number], sampling, size=size, seed=(config.run.seed, number),
                               advance=meter.update)
            for number in numbers
        }  # fmt: skip
    images = dict(sorted(gather_object(list(own.items()))))
    prompts = [hide_environment(prompt, config.written) for prompt in sampling.prompts]
    if accelerator.is_main_process:
        columns = lay_out_sheet(size, len(images)).columns
        grid = make_grid(list(images.values()), prompts, columns=columns)
        texts = {SHEET_PROMPTS: json.dumps(prompts), SHEET_SIZE: f"{size[0]}x{size[1]}"}
        write_png(run_path(config) / SAMPLES_FOLDER / f"{checkpoint_name(made)}.png", grid, texts)
        run.progress.show_samples(list(images.values()), prompts, made)
    accelerator.wait_for_everyone()


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C ask for a checkpoint and a stop; a second Ctrl-C ends the process at once.

    SIGTERM may come again, from a launcher that passes on what this process already got, and changes nothing.
    """
    event = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT and event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    for number in numbers:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        for number in numbers:
            signal.signal(number, before[number])

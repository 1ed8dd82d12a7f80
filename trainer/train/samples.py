"""The samples of a run: its fixed prompts, always with the same noise, shared out over the ranks, as one grid a time.

A grid that was due and is not there, because the run was killed between the save and its samples, is drawn on resume.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from trainer.config.environment import hide_environment
from trainer.config.schema import Config
from trainer.core.console import log
from trainer.core.disk import bearing_disk
from trainer.core.layout import SAMPLES_FOLDER, checkpoint_name
from trainer.core.progress import Meter
from trainer.model.diffusion import trained_prediction
from trainer.model.sdxl import DTYPES, SDXL
from trainer.model.vae import build_vae
from trainer.sample.pictures import SHEET_PROMPTS, SHEET_SIZE, lay_out_sheet, write_png
from trainer.sample.sampling import LoadedModel, build_pipeline, draw_image, make_grid, training_size
from trainer.train.launch import RunInputs
from trainer.train.progress import Progress
from trainer.train.run import is_due, run_path
from trainer.train.stops import StopAsked, Stops


class Samples:
    """Draws those of a run; all ranks draw together."""

    def __init__(self, inputs: RunInputs, sdxl: SDXL, progress: Progress, stops: Stops) -> None:
        self.inputs, self.config, self.progress, self.stops = inputs, inputs.config, progress, stops
        self.sdxl = sdxl
        self.size = training_size(self.config.sampling, self.config.buckets.base_resolution)
        if self.config.sampling.every_steps is None:
            return
        vae = build_vae(inputs.vae.config, inputs.vae.state, DTYPES[self.config.precision.vae])
        self.vae = vae.to(inputs.accelerator.device)

    def draw_lost(self) -> None:
        """Draw what was lost, before the first step: the weights are those that it would have been drawn with."""
        log.info(
            "note: the samples of step %s were due when the run ended, and are drawn now", f"{self.inputs.first:,}"
        )
        self.draw(self.inputs.first)

    def draw(self, made: int) -> None:
        """Draw the grid of so many steps; none where a rank was asked to stop."""
        with self.progress.timed("sample"), self.stops.pace.timed("sample"):
            images = self.draw_images()
            if len(images) == len(self.config.sampling.prompts) and self.inputs.processes.is_main:
                with bearing_disk("samples are not written, training goes on"):
                    self.show(images, made)
            self.inputs.accelerator.wait_for_everyone()

    def draw_images(self) -> list[Image.Image]:
        """The images of the prompts, on all ranks; fewer where one was asked to stop."""
        sampling, processes = self.config.sampling, self.inputs.processes
        pipeline = build_pipeline(self.sdxl, self.vae, trained_prediction(self.config.diffusion))
        length, compute = self.config.captions.max_token_length, DTYPES[self.config.precision.compute]
        model = LoadedModel(self.sdxl, pipeline, self.inputs.data.tokenizers, length, compute)
        numbers = range(processes.rank, len(sampling.prompts), processes.world)
        own: dict[int, Image.Image] = {}
        steps = len(numbers) * sampling.num_inference_steps
        with Meter("sample", steps, "denoising step") as meter, suppress(StopAsked):

            def advance() -> None:
                meter.update()
                self.stops.pace.go_on()
                self.stops.raise_if_asked()

            for number in numbers:  # each by itself, so that an image does not depend on which rank draws what
                self.stops.raise_if_asked()
                seed = (self.config.run.seed, number)
                own[number] = draw_image(
                    model, sampling.prompts[number], sampling, size=self.size, seed=seed, advance=advance
                )
        together = {number: image for images in processes.gather(own) for number, image in images.items()}
        return [image for _, image in sorted(together.items())]

    def show(self, images: Sequence[Image.Image], made: int) -> None:
        """Write the grid of a step, and give the images to the trackers."""
        config = self.config
        prompts = [hide_environment(prompt, config.written) for prompt in config.sampling.prompts]
        grid = make_grid(list(images), prompts, columns=lay_out_sheet(self.size, len(images)).columns)
        texts = {SHEET_PROMPTS: json.dumps(prompts), SHEET_SIZE: f"{self.size[0]}x{self.size[1]}"}
        write_png(grid_path(config, made), grid, texts)
        self.progress.show_samples(images, prompts, made)


def is_grid_lost(inputs: RunInputs) -> bool:
    """Whether the grid of the step at which this run resumes was due, and is not there."""
    if inputs.resumed is None or inputs.resumed.begins_fork:
        return False
    if not is_due(inputs.first, inputs.config.sampling.every_steps, inputs.last):
        return False
    return inputs.processes.share(not grid_path(inputs.config, inputs.first).is_file())


def grid_path(config: Config, made: int) -> Path:
    """Where the samples of a step lie."""
    return run_path(config) / SAMPLES_FOLDER / f"{checkpoint_name(made)}.png"

"""How fast images become pixels on the CPU, per core, beside the same work in plain Pillow. Prints two tables.

``python benchmarks/preparing.py [--images 60] [--rounds 5]``

The images are the demo's drawings, enlarged to sides of 1000 to 3500 on a ground that changes slowly and with a grain,
so that decoders have something to decode; how much is printed in bytes a pixel. Buckets are the recipe's. All is
measured in turn, round after round, in seconds of CPU (of the decoding processes too), which other programs disturb
less than the clock; the tables have medians, and medians of each round's ratio to plain Pillow. Pixels are compared
first: the script fails if one differs. No VAE runs.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.config.schema import BucketsConfig
from trainer.core.files import sha256_bytes
from trainer.data.buckets import Fit, fit_image
from trainer.data.images import open_image, read_bytes, read_image_header, read_orientation, to_rgb
from trainer.data.post import ImagePlace
from trainer.prepare.decode import Decoded, Task, decoders, look, start_pool

DRAWINGS = Path(__file__).parent.parent / "demo" / "images"
# extension, the options of Pillow's save, and the grain's standard deviation of 255
FORMATS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("jpg", {"quality": 92}, 6.0), ("jpg", {"quality": 85}, 6.0), ("png", {}, 2.0), ("jpg", {"quality": 95}, 4.0),
    ("png", {}, 1.0), ("webp", {"quality": 90}, 6.0),
)  # fmt: skip
STAGES = ("read", "hash", "header", "decode", "to RGB", "resize", "crop", "hand over")

Work = Callable[[list[Task]], object]


def make_image(drawing: Path, number: int, grain: float, size: tuple[int, int] | None = None) -> Image.Image:
    """A drawing of this or some size, on a ground and with a grain of its own."""
    generator = np.random.default_rng(number)
    width, height = size or (int(side) for side in generator.integers(1000, 3501, 2))
    with Image.open(drawing) as small:
        layer = small.convert("RGBA").resize((width, height), Image.Resampling.LANCZOS)
    ground = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    ground.paste(layer, mask=layer.getchannel("A").point(lambda value: value * 3 // 4))
    noise = generator.standard_normal((height, width, 3), dtype=np.float32) * grain
    return Image.fromarray((np.asarray(ground) + noise).clip(0, 255).astype(np.uint8))


def make_tasks(folder: Path, count: int) -> list[Task]:
    """Images on disk, as the preparation looks at them."""
    drawings, tasks = sorted(DRAWINGS.iterdir()), []
    measured: dict[str, list[int]] = {}
    for number in range(count):
        name, options, grain = FORMATS[number % len(FORMATS)]
        path, image = folder / f"{number}.{name}", make_image(drawings[number % len(drawings)], number, grain)
        image.save(path, **options)
        for place, value in enumerate((1, path.stat().st_size, image.width * image.height)):
            measured.setdefault(name, [0, 0, 0])[place] += value
        tasks.append(Task(path.stem, path.name, ImagePlace(path), None, None, BucketsConfig()))
    for name, (files, size, pixels) in measured.items():
        megapixels = pixels / files / 1e6
        print(f"{files} {name}: {megapixels:.1f} megapixels each, {size / files / 1e6:.1f} MB, "
              f"{size / pixels:.2f} bytes a pixel")  # fmt: skip
    return tasks


def find_fit(task: Task, size: tuple[int, int]) -> Fit:
    return fit_image(size, **asdict(task.buckets))


def plain_pillow(task: Task) -> np.ndarray:
    """What one would write without a thought for what an image can be."""
    image = Image.open(task.place.path)
    fit = find_fit(task, image.size)
    rgb = image.convert("RGB")
    shrinks = fit.resized[0] < rgb.width or fit.resized[1] < rgb.height
    rgb = rgb.resize(fit.resized, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    width, height = fit.bucket
    return np.asarray(rgb.crop((fit.left, fit.top, fit.left + width, fit.top + height)))


def look_in_stages(task: Task, spent: dict[str, float]) -> np.ndarray:
    """``look``, taken apart, with the CPU's seconds of each stage."""
    last = time.process_time()

    def note(stage: str) -> None:
        nonlocal last
        now = time.process_time()
        spent[stage] = spent.get(stage, 0.0) + now - last
        last = now

    data = read_bytes(task.place)
    note("read")
    sha256_bytes(data)
    note("hash")
    fit = find_fit(task, read_image_header(data))
    note("header")
    with open_image(data) as image:
        read_orientation(image, data)
        note("header")
        image.load()
        note("decode")
        rgb = to_rgb(image)
    note("to RGB")
    shrinks = fit.resized[0] < rgb.width or fit.resized[1] < rgb.height
    rgb = rgb.resize(fit.resized, Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)
    note("resize")
    width, height = fit.bucket
    pixels = np.asarray(rgb.crop((fit.left, fit.top, fit.left + width, fit.top + height)))
    note("crop")
    return pixels


def hand_over(images: int) -> float:
    """Seconds of CPU, of both sides, to hand the pixels of so many images from a decoding process to the main one."""
    spent = []
    for shape in ((1024, 1024, 3), (1,)):
        began = cpu_seconds()
        with start_pool(1) as pool:
            for _ in range(images):
                pool.submit(np.ones, shape, np.uint8).result()
        spent.append(cpu_seconds() - began)
    return spent[0] - spent[1]


def check_pixels(tasks: list[Task]) -> None:
    """Ours, ours taken apart and ours through a process, against plain Pillow's."""
    with decoders(1) as pool:
        for task, outcome in zip(tasks, pool.look_at(tasks), strict=True):
            expected = plain_pillow(task)
            assert isinstance(outcome, Decoded)
            for pixels in (outcome.pixels, look_in_stages(task, {})):
                if not np.array_equal(pixels, expected):
                    raise SystemExit(f"{task.origin}: other pixels than Pillow's")
    print(f"{len(tasks)} images: all pixels as Pillow's")


def list_work() -> dict[str, Work]:
    """What is measured, by name, plain Pillow first."""

    def in_processes(processes: int) -> Work:
        def do(tasks: list[Task]) -> None:
            with decoders(processes) as pool:
                for _ in pool.look_at(tasks):
                    pass

        return do

    def in_threads(threads: int) -> Work:
        def do(tasks: list[Task]) -> None:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(look, tasks):
                    pass

        return do

    return {
        "plain Pillow: open, convert, resize, crop": lambda tasks: [plain_pillow(task) for task in tasks],
        "ours: look()": lambda tasks: [look(task) for task in tasks],
        "ours, 1 process": in_processes(1),
        "ours, 2 processes": in_processes(2),
        "ours, 1 thread": in_threads(1),
        "ours, 2 threads": in_threads(2),
    }


def cpu_seconds() -> float:
    """Of this process and of all that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(tasks: list[Task], rounds: int) -> Iterator[str]:
    """The lines of both tables."""
    spent: dict[str, list[tuple[float, float]]] = {}  # (CPU, clock) of each round, milliseconds an image
    stages: list[dict[str, float]] = []
    for turn in range(rounds):
        for name, do in list_work().items():
            cpu, clock = cpu_seconds(), time.perf_counter()
            do(tasks)
            both = cpu_seconds() - cpu, time.perf_counter() - clock
            spent.setdefault(name, []).append((both[0] * 1e3 / len(tasks), both[1] * 1e3 / len(tasks)))
        stages.append({})
        for task in tasks:
            look_in_stages(task, stages[turn])
        stages[turn]["hand over"] = hand_over(len(tasks))
    plain = next(iter(spent.values()))
    yield "| | CPU, ms an image | ratio | clock, ms an image | ratio |\n|---|---|---|---|---|"
    for name, own in spent.items():
        columns = []
        for kind in (0, 1):
            ratio = statistics.median(a[kind] / b[kind] for a, b in zip(own, plain, strict=True))
            columns += [f"{statistics.median(each[kind] for each in own):.1f}", f"{ratio:.2f}"]
        yield f"| {name} | {' | '.join(columns)} |"
    yield "\n| stage of look() | CPU, ms an image | share |\n|---|---|---|"
    for stage in STAGES:
        share = statistics.median(each[stage] / sum(each.values()) for each in stages)
        cost = statistics.median(each[stage] for each in stages) * 1e3 / len(tasks)
        yield f"| {stage} | {cost:.2f} | {share:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second and core, on their way to the VAE.")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        tasks = make_tasks(Path(name), arguments.images)
        check_pixels(tasks)
        for line in measure(tasks, arguments.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()

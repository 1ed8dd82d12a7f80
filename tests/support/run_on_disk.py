"""A run's folder as training leaves it, without training: records, metrics, samples."""

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.core.layout import checkpoint_name
from trainer.report.curves import Curves
from trainer.report.run_page import RunState, RunView, first_steps
from trainer.report.sheets import Sheets
from trainer.sample.pictures import write_png
from trainer.sample.sampling import make_grid

STARTED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SIZE = (32, 48)  # of a sample


def write_run(
    folder: Path, lines: Iterable[dict[str, Any]], *words: str, firsts: Sequence[int] = (0,), **records: Any
) -> Path:
    """``lines`` are of metrics.jsonl and lack what they do not say of attempt and time; ``words`` are the config's."""
    folder.mkdir(parents=True)
    attempts = [
        {"attempt": number, "first_step": first, "started_at": (STARTED + datetime.timedelta(hours=number)).isoformat(),
         "processes": 1, "device": "cpu", "last_step": 1000}
        for number, first in enumerate(firsts, start=1)
    ]  # fmt: skip
    facts = {"base": {"reference": "base", "revision": None, "sha256": "ab"}, "images": 24, "index_fingerprint": "cd"}
    (folder / "run.json").write_text(json.dumps({**facts, "attempts": attempts, **records}))
    texts = [json.dumps({"attempt": 1, "time": 1.8e9 + line["step"], **line}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config_of(folder, *words).written))
    return folder


def config_of(folder: Path, *words: str) -> Any:
    """Stage 1 under the folder's name."""
    recipe = REPOSITORY / "configs/stage1_feature_alignment.yaml"
    return load_config([recipe], [f"run.output_dir={folder.parent}", f"run.name={folder.name}", *words])


def write_sheet(folder: Path, step: int, prompts: Sequence[str], says: bool = True) -> None:
    """A file of samples, in which the image of a prompt has the colour of its place and of the step."""
    images = [Image.new("RGB", SIZE, (40 * place + 40, step % 256, 0)) for place in range(len(prompts))]
    grid = make_grid(images, [""] * len(prompts), columns=min(4, len(prompts)))
    texts = {"prompts": json.dumps(list(prompts)), "size": f"{SIZE[0]}x{SIZE[1]}"} if says else {}
    write_png(folder / "samples" / f"{checkpoint_name(step)}.png", grid, texts)


def view_of(folder: Path, *words: str, state: RunState | None = None, **changes: Any) -> RunView:
    """What the page of a run's folder is made of."""
    config, records = config_of(folder, *words), json.loads((folder / "run.json").read_text())
    curves, sheets = Curves(first_steps(records)), Sheets(folder)
    curves.read(folder / "metrics.jsonl")
    found = sheets.read(config.sampling.prompts, SIZE)
    values: dict[str, Any] = {
        "page": folder / "index.html", "written": config.written, "records": records, "curves": curves,
        "sheets": found, "unreadable": sheets.unreadable, "made": max(curves.steps, default=0), "last": 1000,
        "state": state or RunState("running"), "written_at": 1.8e9, "warnings": [], "resume": "resume it",
        "export": "export it", "onward": [], "every_seconds": 30.0, "shards": None,
    }  # fmt: skip
    return RunView(**values | changes)

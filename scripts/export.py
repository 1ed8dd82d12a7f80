"""A checkpoint -> a single file in Stability's layout and a diffusers folder.

    python scripts/export.py NAME [--out DIR] [--dtype fp16|bf16|fp32]
    python scripts/export.py runs/NAME/checkpoints/step-00001000

NAME is runs/NAME where no such path lies here; a config, such as my.yaml, stands for its run.
Writes the formats of the config's publish.formats into RUN/export, and overwrites nothing there.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.config.fixed import INTERPOLATION
from trainer.config.run_names import find_run_path, name_run
from trainer.core.commands import command
from trainer.core.console import CommandParser, NextStep, Result
from trainer.core.disk import format_bytes
from trainer.core.errors import run_command
from trainer.core.files import home_path
from trainer.core.layout import EXPORT_FOLDER, RUN_FILE

PROMPT = "masterpiece, best quality, 1girl, solo, smile, rating: general"  # where the run has none


def main() -> Result:
    parser = CommandParser("Export a run's newest checkpoint, or the given one.")
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's name, folder or config, or a checkpoint")
    parser.add_argument("--out", type=home_path, metavar="DIR", help="where to write; default: RUN/export")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: the config's publish.dtype")
    arguments = parser.parse_args()
    source = Path(find_run_path(arguments.source))
    from trainer.release.export import export  # torch takes seconds to import

    paths = export(source, arguments.out, arguments.dtype)
    sizes = {str(path): measure(path) for path in paths}
    said = "\n".join(describe(path, sizes[str(path)]) for path in paths)
    return Result(said, paths, {"bytes": sizes}, list(suggest(paths)))


def measure(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def describe(path: Path, size: int) -> str:
    """What an export is, and what it is for."""
    from trainer.model.base import find_base
    from trainer.release.export import has_sdxl_shapes

    if path.is_dir():
        use = f'\n  for StableDiffusionXLPipeline.from_pretrained("{path}"), or model.pretrained of the next stage'
        return f"diffusers folder: {path}, {format_bytes(size)}{use}"
    fits = has_sdxl_shapes(find_base(str(path)))
    use = "\n  for ComfyUI, Forge and others: put it into their checkpoints folder" if fits else ""
    return f"single file: {path}, {format_bytes(size)}{use}"


def suggest(paths: Sequence[Path]) -> Iterator[NextStep]:
    """To draw with the export, and after a first stage to refine it on other data."""
    from trainer.model.lineage import read_lineage

    made = read_lineage(paths[0]) or {}
    prompts = made.get("config", {}).get("sampling", {}).get("prompts")
    prompt = prompts[0] if isinstance(prompts, list) and prompts and INTERPOLATION not in prompts[0] else PROMPT
    run, folders = paths[0].parent.parent, [path for path in paths if path.is_dir()]
    own = paths[0].parent.name == EXPORT_FOLDER and (run / RUN_FILE).is_file()
    model = run if own and folders else (folders or paths)[0]
    word = name_run(run) if model == run else str(model)
    yield NextStep("draw with it", command("scripts/sample.py", word, "--prompt", prompt))
    if str(made.get("stage", "")).startswith("1") and folders:
        words = [f"{made['run']}2.yaml", "--stage", "2", "--data", "CURATED_IMAGES", "--model", str(model)]
        yield NextStep("refine it on a curated set (stage 2)", command("scripts/new_run.py", *words))


if __name__ == "__main__":
    run_command(main, "nothing is half written; the same command starts again")

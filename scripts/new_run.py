"""Write a first config for your own images, after a look at them, at the model and at this machine.

    python scripts/new_run.py my.yaml --data FOLDER_OR_FILE --model NAME [--stage 1|2]

What was found and chosen is printed, and stands in the file with its reasons. No file is overwritten.
"""

from collections.abc import Iterator
from pathlib import Path

from trainer.config.load import load_config
from trainer.config.yaml_text import YAML_ENDINGS
from trainer.core.commands import command, training_command
from trainer.core.console import CommandParser, NextStep, Result, log
from trainer.core.errors import UserError, run_command
from trainer.core.files import home_path
from trainer.core.layout import INDEX_FILE, RUN_FILE


def main() -> Result:
    parser = CommandParser("Write a first config for your own images, after a look at them.")
    parser.add_argument("file", type=home_path, metavar="my.yaml", help="the config to write; it names the run")
    parser.add_argument("--data", type=home_path, required=True, metavar="FOLDER_OR_FILE",
                        help="images with captions or posts, a posts file, tars, or sd-scripts' metadata")  # fmt: skip
    parser.add_argument("--images", type=home_path, metavar="FOLDER", help="of a posts file, where it is not found")
    parser.add_argument("--model", required=True, help="what to start from: folder, file, run or hub id")
    parser.add_argument("--stage", type=int, choices=[1, 2], default=1,
                        help="1 teaches UNet and text encoders, 2 refines the UNet on a curated set")  # fmt: skip
    arguments = parser.parse_args()
    check_file(arguments.file)
    from trainer.prepare.data_guess import IN_WORDS, guess_data  # torch takes seconds to import
    from trainer.prepare.draft import choose_extended, look_at_machine, make_draft
    from trainer.prepare.draft_file import read_name, write_draft
    from trainer.prepare.model_guess import guess_model

    name = read_name(arguments.file)
    if (run := Path("runs") / name / RUN_FILE).is_file():
        raise UserError(f"{run.parent} is a run already, which would be resumed: give the file another name")
    model = guess_model(arguments.model)
    data = guess_data(arguments.data, arguments.images)
    machine = look_at_machine()
    draft = make_draft(arguments.file, arguments.stage, data, model, machine)
    text = write_draft(draft, choose_extended(arguments.stage, model), data.source.path)
    write_new(arguments.file, text)
    source = data.source
    where = source.path if source.images in (None, source.path) else f"{source.path}, {source.images}"
    log.info("data: %s: %s; %s", where, IN_WORDS[source.kind], data.describe())
    log.info("model: %s: %s", model.reference, model.said)
    for line in [*data.list_notes(), *model.notes, *draft.said]:
        log.info("%s", line)
    if Path("shards", name, INDEX_FILE).is_file():
        log.info("shards/%s is there already: build_shards.py adds what is new to it", name)
    steps = list(suggest(arguments.file, arguments.stage, machine.gpus))
    return Result(f"written: {arguments.file}", [arguments.file], next=steps)


def check_file(file: Path) -> None:
    """Refuse a file that is there, or that commands would not take for a config."""
    if file.suffix not in YAML_ENDINGS:
        raise UserError(f"{file}: a config's name ends in .yaml")
    if file.exists() or file.is_symlink():
        raise UserError(f"{file} is there already, and nothing is overwritten: choose another name")
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is not a folder")


def write_new(file: Path, text: str) -> None:
    """Write a file that is not there, and read it as every command will."""
    with file.open("x", encoding="utf-8") as opened:
        opened.write(text)
    try:
        load_config([file])
    except UserError:
        file.unlink()
        raise


def suggest(file: Path, stage: int, gpus: int) -> Iterator[NextStep]:
    """The commands that follow, one after the other."""
    yield NextStep("prepare the images", command("scripts/build_shards.py", file))
    yield NextStep("look at the set", command("scripts/inspect_shards.py", file))
    yield NextStep("train", training_command([str(file)], max(gpus, 1)))
    yield NextStep("export what was trained", command("scripts/export.py", file))
    yield NextStep("draw with it", command("scripts/sample.py", file, "--prompt", "TEXT"))
    yield NextStep("build the folder that others get", command("scripts/publish.py", file))
    if stage == 1:
        words = [f"{file.with_suffix('')}2.yaml", "--stage", "2", "--data", "CURATED_IMAGES", "--model", str(file)]
        yield NextStep("refine it later on a small curated set (stage 2)", command("scripts/new_run.py", *words))


if __name__ == "__main__":
    run_command(main)

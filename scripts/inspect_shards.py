"""Look before you train: write one HTML page about a set of shards and what a config makes of it, and print a table.

    python scripts/inspect_shards.py my.yaml [key=value ...] [--out FILE.html]

The page needs no network. Without --out it is report.html beside the shards; an earlier page is replaced.
"""

from pathlib import Path

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.commands import config_words, training_command
from trainer.core.console import NextStep, Result
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> Result:
    parser = config_parser("Write a page about a set of shards and what a config makes of it, and print a short table.")
    parser.add_argument("--out", type=home_path, metavar="FILE.html", help="default: report.html beside the shards")
    arguments = finish_command_line(parser)
    config = load_config(arguments.config, arguments.overrides)
    from trainer.core.distributed import suggest_processes, uses_cpu
    from trainer.core.layout import PAGE_FILE
    from trainer.report.data_page import DATA_GENERATOR, make_report, render_data, summarise
    from trainer.report.pages import check_page_path, write_html

    path = arguments.out or Path(config.data.shards) / PAGE_FILE
    check_page_path(path, DATA_GENERATOR)  # before the work
    report = make_report(config)
    write_html(path, render_data(report), DATA_GENERATOR)
    words = config_words(arguments.config, arguments.overrides)
    facts = {
        "images": len(report.index), "steps": report.run.steps, "epochs": report.run.epochs,
        "buckets": len(report.buckets), "duplicates": report.duplicates.images,
    }  # fmt: skip
    processes = suggest_processes(config.run.num_processes, config.data.global_batch_size, config.data.micro_batch_size)
    return Result(
        f"{summarise(report)}\npage: {path}",
        [path],
        facts,
        [NextStep("train", training_command(words, processes, uses_cpu()))],
    )


if __name__ == "__main__":
    run_command(main)

"""Look before you train: write one HTML page about a set of shards and what a config makes of it, and print a table.

    python scripts/inspect_shards.py my.yaml [key=value ...] [--out FILE.html]

The page needs no network. Without --out it is report.html beside the shards; an earlier page is replaced.
"""

from pathlib import Path

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> None:
    parser = config_parser("Write a page about a set of shards and what a config makes of it, and print a short table.")
    parser.add_argument("--out", type=home_path, metavar="FILE.html", help="default: report.html beside the shards")
    arguments = finish_command_line(parser)
    config = load_config(arguments.config, arguments.overrides)
    from trainer.core.layout import PAGE_FILE
    from trainer.report.data_page import DATA_GENERATOR, make_report, render_data, summarise
    from trainer.report.pages import check_page_path, write_html

    path = arguments.out or Path(config.data.shards) / PAGE_FILE
    check_page_path(path, DATA_GENERATOR)  # before the work
    report = make_report(config)
    write_html(path, render_data(report), DATA_GENERATOR)
    print(summarise(report))
    print(f"page: {path}")


if __name__ == "__main__":
    run_command(main)

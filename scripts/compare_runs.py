"""Put runs side by side: one HTML page with curves, differences of config, data and code, and samples; and a table.

    python scripts/compare_runs.py RUN RUN... [--out FILE.html]

RUN is a run's folder, its name or its config. The page needs no network, and shows the pictures in the runs' folders.
Without --out it is compare.html here; an earlier page is replaced.
"""

from pathlib import Path

from trainer.config.run_names import find_run_path
from trainer.core.console import CommandParser, Result
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> Result:
    parser = CommandParser("Put runs side by side, as a page and as a short table.")
    parser.add_argument("run", type=find_run_path, metavar="RUN", help="a run's folder, name or config")
    parser.add_argument("others", nargs="+", type=find_run_path, metavar="RUN", help="those beside it")
    parser.add_argument("--out", type=home_path, default=Path("compare.html"), metavar="FILE.html",
                        help="default: compare.html here")  # fmt: skip
    arguments = parser.parse_args()
    from trainer.report.comparison import COMPARISON_GENERATOR, read_runs, render_comparison, summarise_runs
    from trainer.report.pages import check_page_path, write_html

    check_page_path(arguments.out, COMPARISON_GENERATOR)  # before the work
    runs = read_runs([Path(run) for run in (arguments.run, *arguments.others)])
    write_html(arguments.out, render_comparison(runs, arguments.out), COMPARISON_GENERATOR)
    return Result(f"{summarise_runs(runs)}\npage: {arguments.out}", [arguments.out])


if __name__ == "__main__":
    run_command(main)

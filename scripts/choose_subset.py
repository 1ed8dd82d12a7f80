"""Choose images of a set of shards by rules: write their keys to a file, and show some of them on a page.

    python scripts/choose_subset.py my.yaml data.subset_rules='[{tag: masterpiece}]' [key=value ...] [--out KEYS.txt]

Nothing is copied: data.subset names the file, and a run reads the shards where they lie. Rules by percentile count over
the whole set. The page lies beside the file, as KEYS.html, and needs no network. Earlier ones are replaced.
"""

from pathlib import Path

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.commands import config_words, training_command
from trainer.core.console import NextStep, Result
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> Result:
    parser = config_parser("Choose images of a set of shards by rules, as a file of keys and a page of thumbnails.")
    parser.add_argument("--out", type=home_path, default=Path("subset.txt"), metavar="KEYS.txt",
                        help="default: subset.txt here")  # fmt: skip
    arguments = finish_command_line(parser)
    config = load_config(arguments.config, arguments.overrides)
    from trainer.core.distributed import suggest_processes, uses_cpu
    from trainer.data.subset import check_keys_path, write_subset
    from trainer.report.pages import check_page_path, write_html
    from trainer.report.subset_page import SUBSET_GENERATOR, make_subset_report, render_subset, summarise_subset

    keys, page = arguments.out, arguments.out.with_suffix(".html")
    check_keys_path(keys, Path(config.data.shards))  # both before the work
    check_page_path(page, SUBSET_GENERATOR)
    report = make_subset_report(config)
    write_subset(keys, report.index)
    write_html(page, render_subset(report, keys.name, str(keys)), SUBSET_GENERATOR)
    others = [word for word in arguments.overrides if not word.startswith(("data.subset=", "data.subset_rules="))]
    words = [*config_words(arguments.config, others), f"data.subset={keys}", "data.subset_rules=[]"]
    processes = suggest_processes(config.run.num_processes, config.data.global_batch_size, config.data.micro_batch_size)
    return Result(
        f"{summarise_subset(report)}\nkeys: {keys}\npage: {page}",
        [keys, page],
        {"images": len(report.index)},
        [NextStep("train on them", training_command(words, processes, uses_cpu()))],
    )


if __name__ == "__main__":
    run_command(main)

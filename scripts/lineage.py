"""Show what made a file, from the file alone: run, data, code and base, what made that base, back to the first one.

    python scripts/lineage.py FILE_OR_RUN [--config] [--seal]

FILE is a single file, a diffusers folder, a checkpoint or a published folder; a run, by its name, folder or config,
stands for its newest export, or else its newest checkpoint. --config prints each stage's whole config.
--seal is for a checkpoint in whose checkpoint.json you have changed a text: its digest is written anew.
"""

from pathlib import Path

from trainer.config.run_names import find_run_path, say_runs
from trainer.core.console import CommandParser, Result
from trainer.core.errors import UserError, run_command


def main() -> Result:
    parser = CommandParser("Show what made a file, from the file alone, back to the first base.")
    parser.add_argument(
        "file", metavar="FILE_OR_RUN", help="single file, diffusers folder, checkpoint, published folder or run"
    )
    parser.add_argument("--config", action="store_true", help="print each stage's whole config too")
    parser.add_argument("--seal", action="store_true", help="of a checkpoint whose texts you changed: its digest anew")
    arguments = parser.parse_args()
    file = Path(find_run_path(arguments.file))
    if not file.exists():
        raise UserError(f"{arguments.file} does not exist, and no run is called so: {say_runs()}")
    if arguments.seal:
        from trainer.model.checkpoint import seal_again

        seal_again(file)
    from trainer.model.lineage import find_lineage
    from trainer.model.lineage_rows import format_tree

    lineage = find_lineage(file)
    return Result(format_tree(lineage, arguments.config).rstrip("\n"), facts={"lineage": lineage})


if __name__ == "__main__":
    run_command(main)

"""Show what made a file, from the file alone: run, data, code and base, what made that base, back to the first one.

    python scripts/lineage.py FILE [--config]

FILE is a single file, a diffusers folder, a checkpoint or a published folder. --config prints each stage's
whole config.
"""

import argparse

from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what made a file, from the file alone, back to the first base.")
    parser.add_argument(
        "file", type=home_path, metavar="FILE", help="single file, diffusers folder, checkpoint or published folder"
    )
    parser.add_argument("--config", action="store_true", help="print each stage's whole config too")
    arguments = parser.parse_args()
    from trainer.model.lineage import find_lineage
    from trainer.model.lineage_rows import format_tree

    print(format_tree(find_lineage(arguments.file), arguments.config), end="")


if __name__ == "__main__":
    run_command(main)

"""Write docs/config.md, the reference of every field of a config, from trainer/config/schema.py.

    python scripts/write_config_reference.py

A test checks that the page is what the schema says now.
"""

from trainer.config.extends import PROGRAM_FOLDER
from trainer.config.reference import write_reference
from trainer.core.console import CommandParser, Result
from trainer.core.errors import run_command
from trainer.core.files import write_text


def main() -> Result:
    CommandParser("Write docs/config.md from trainer/config/schema.py.").parse_args()
    page = PROGRAM_FOLDER / "docs/config.md"
    write_text(page, write_reference())
    return Result(f"written: {page}", [page])


if __name__ == "__main__":
    run_command(main)

"""Check every byte of a set of shards against its manifest, and name each shard and sample that differs.

    python scripts/verify_shards.py my.yaml [key=value ...]
    python scripts/verify_shards.py data/stage1/shards

The set is a config's data.shards, or the folder. Reads everything once and writes nothing. Exit code 0: no
difference. Exit code 2: all problems, one per line.
"""

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.console import Result
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> Result:
    parser = config_parser("Check every byte of a set of shards against its manifest. FOLDER may stand for a config.")
    arguments = finish_command_line(parser, other="the folder of a set")
    shards = arguments.other or load_config(arguments.config, arguments.overrides, preparing=True).data.shards
    folder = home_path(shards)
    from trainer.prepare.verify import verify_shards

    return verify_shards(folder)


if __name__ == "__main__":
    run_command(main, "nothing was changed")

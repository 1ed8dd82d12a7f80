"""Check every byte of a set of shards against its manifest, and name each shard and sample that differs.

    python scripts/verify_shards.py data/stage1/shards

Reads everything once and writes nothing. Exit code 0: no difference. Exit code 2: all problems, one per line.
"""

import argparse

from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Check every byte of a set of shards against its manifest.")
    parser.add_argument("folder", type=home_path, help="the folder of the set: data.shards")
    folder = parser.parse_args().folder
    from trainer.prepare.verify import verify_shards

    print(verify_shards(folder))


if __name__ == "__main__":
    run_command(main)

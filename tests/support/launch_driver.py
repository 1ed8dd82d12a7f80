"""What tests launch in place of train.py: it trains the config that the ``key=value`` words make."""

import sys
from functools import partial

from trainer.core.console import Result
from trainer.core.errors import run_command
from trainer.core.processes import follow_launcher


def main(words: list[str]) -> Result:
    follow_launcher()
    from trainer.config.load import load_config
    from trainer.train.loop import train

    return train(load_config([], words))


if __name__ == "__main__":
    run_command(partial(main, sys.argv[1:]))

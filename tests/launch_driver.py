"""Run under torchrun by test_launches: train each config given, one after the other."""

import sys

from accelerate.state import AcceleratorState

from trainer.config import load_config
from trainer.errors import run_command
from trainer.loop import train


def main() -> None:
    # configs are separated by "--"; each is a list of key=value words
    groups: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    for words in groups:
        train(load_config([], words))
        # the run ended its process group; the next one makes its own
        AcceleratorState._reset_state(reset_partial_state=True)


run_command(main)

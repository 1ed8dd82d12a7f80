"""Run under torchrun by test_launches: train the config that the ``key=value`` words make."""

import sys

from trainer.config.load import load_config
from trainer.core.errors import run_command
from trainer.train.loop import train

run_command(lambda: train(load_config([], sys.argv[1:])))

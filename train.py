"""Train one stage: ``accelerate launch train.py --config configs/stage1_feature_alignment.yaml [key=value ...]``.

Starting the same command again continues from the newest checkpoint.
"""

from trainer.config.load import load_config, parse_command_line
from trainer.core.errors import run_command
from trainer.train.loop import train


def main() -> None:
    arguments = parse_command_line("Train one stage of SDXL fine-tuning.")
    train(load_config(arguments.config, arguments.overrides))


if __name__ == "__main__":
    run_command(main)

"""Train one stage: ``accelerate launch train.py my.yaml [key=value ...]``.

Starting the same command again continues from the newest checkpoint. With ``--check`` everything is read, loaded and
refused as for a run, and it ends before the first step.
"""

import dataclasses
import os

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.allocator import use_expandable_segments
from trainer.core.commands import config_words, training_command
from trainer.core.console import NextStep, Result
from trainer.core.errors import run_command
from trainer.core.processes import follow_launcher


def main() -> Result:
    follow_launcher()
    parser = config_parser("Train one stage of SDXL fine-tuning.")
    parser.add_argument("--check", action="store_true", help="stop before the first step: say what would be trained")
    arguments = finish_command_line(parser)
    config = load_config(arguments.config, arguments.overrides)
    use_expandable_segments()
    from trainer.core.distributed import uses_cpu
    from trainer.train.loop import train  # after what can be refused at once: torch takes seconds to import

    result = train(config, check=arguments.check)
    if result.facts.get("finished"):
        return result
    words = config_words(arguments.config, arguments.overrides)
    line = training_command(words, int(os.environ.get("WORLD_SIZE", "1")), uses_cpu())
    if arguments.check:
        return dataclasses.replace(result, next=[NextStep("train", line)])
    return dataclasses.replace(result, next=[NextStep("resume it", line), *result.next])


if __name__ == "__main__":
    run_command(main, "the same command resumes from the last checkpoint")

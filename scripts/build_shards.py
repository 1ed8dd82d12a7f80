"""Posts and images -> shards of raw latents, and the index that training reads.

    python scripts/build_shards.py my.yaml [key=value ...]
    accelerate launch --num_processes 8 scripts/build_shards.py my.yaml

Started again after an interruption, with any number of processes, it keeps the shards that are complete and makes the
rest. Started again with more posts, it encodes the new ones and adds them to the set.
"""

import dataclasses

from trainer.config.command_line import parse_command_line
from trainer.config.load import load_config
from trainer.core.commands import command, config_words, training_command
from trainer.core.console import NextStep, Result
from trainer.core.errors import run_command
from trainer.core.processes import follow_launcher


def main() -> Result:
    follow_launcher()
    arguments = parse_command_line(
        "Encode the images of data.posts and data.images, or of data.sources, into data.shards."
    )
    config = load_config(arguments.config, arguments.overrides, preparing=True)
    # after what can be refused at once: torch takes seconds to import
    from trainer.core.distributed import suggest_processes, uses_cpu
    from trainer.prepare.prepare import prepare

    summary, words = prepare(config), config_words(arguments.config, arguments.overrides)
    facts = dataclasses.asdict(summary) | {"folder": str(summary.folder)}
    processes = suggest_processes(config.run.num_processes, config.data.global_batch_size, config.data.micro_batch_size)
    steps = [
        NextStep("look at the set", command("scripts/inspect_shards.py", *words)),
        NextStep("train", training_command(words, processes, uses_cpu())),
    ]
    return Result(str(summary), [summary.folder], facts, steps)


if __name__ == "__main__":
    run_command(main, "the same command keeps the shards that are complete, and makes the rest")

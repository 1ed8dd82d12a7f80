"""Posts and images -> shards of raw latents, and the index that training reads.

    python scripts/build_shards.py my.yaml [key=value ...]
    accelerate launch --num_processes 8 scripts/build_shards.py my.yaml

Started again after an interruption, with any number of processes, it keeps the shards that are complete and makes the
rest. Started again with more posts, it encodes the new ones and adds them to the set.
"""

import os

from trainer.config.command_line import parse_command_line
from trainer.config.load import load_config
from trainer.core.errors import run_command


def main() -> None:
    arguments = parse_command_line(
        "Encode the images of data.posts and data.images, or of data.sources, into data.shards."
    )
    config = load_config(arguments.config, arguments.overrides, preparing=True)
    from trainer.prepare.prepare import prepare  # after what can be refused at once: torch takes seconds to import

    summary = prepare(config)
    if os.environ.get("RANK", "0") == "0":
        print(summary)
        print("next: python scripts/inspect_shards.py or accelerate launch train.py, with the same config")


if __name__ == "__main__":
    run_command(main)

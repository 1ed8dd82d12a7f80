"""Posts and images -> shards of raw latents, and the index that training reads.

    python scripts/build_shards.py --config configs/stage1_feature_alignment.yaml [key=value ...]

Start it again after an interruption: it goes on behind the last complete shard.
"""

from trainer.config import load_config, parse_command_line
from trainer.errors import run_command
from trainer.prepare import prepare


def main() -> None:
    arguments = parse_command_line(
        "Encode the images of data.posts and data.images, or of data.sources, into data.shards."
    )
    config = load_config(arguments.config, arguments.overrides)
    print(prepare(config))
    print("next: python scripts/inspect_shards.py or accelerate launch train.py, with the same --config")


if __name__ == "__main__":
    run_command(main)

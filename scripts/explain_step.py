"""Show what one step sees, without a model: one JSON line per sample.

    python scripts/explain_step.py my.yaml [key=value ...] --step N

N counts from 0. The lines are the same whatever the number of processes and threads.
"""

import json

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.console import Result
from trainer.core.errors import UserError, run_command


def main() -> Result:
    parser = config_parser("Show what one step sees, without a model: one JSON line per sample.")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="which step, counted from 0")
    arguments = finish_command_line(parser)
    if arguments.step < 0:
        raise UserError(f"--step {arguments.step}: steps are counted from 0")
    config = load_config(arguments.config, arguments.overrides)
    from trainer.data.index import open_index
    from trainer.report.explain import explain_step

    index = open_index(config.data.shards)
    samples = list(explain_step(config, index, arguments.step))
    return Result("\n".join(json.dumps(each, ensure_ascii=False) for each in samples), facts={"samples": samples})


if __name__ == "__main__":
    run_command(main)

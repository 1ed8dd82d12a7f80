"""Say what one step sees, without a model: one JSON line a sample.

``scripts/explain_step.py --config FILE --step N``; N counts from 0. The lines are the same whatever the number of
processes and workers.
"""

import json
from collections.abc import Iterator
from typing import Any

from trainer.config.load import config_parser, finish_command_line, load_config
from trainer.config.schema import Config
from trainer.core.errors import UserError, run_command
from trainer.core.rng import philox_key
from trainer.data.draws import draw_sample_caption, draw_sample_timestep
from trainer.data.index import Index, open_index
from trainer.data.plan import Plan, build_plan
from trainer.report.thresholds import find_thresholds


def explain_step(config: Config, index: Index, plan: Plan, step: int) -> Iterator[dict[str, Any]]:
    """What each sample of a step is and draws, in the order of its position in the global batch."""
    seed, captions = config.run.seed, find_thresholds(config, index.table).captions
    for sample in plan.step_samples(step):
        record = index.row(sample.row)
        key, width, height = record["key"], record["bucket_width"], record["bucket_height"]
        yield {
            "step": step,
            "unit": sample.position // plan.unit_size,
            "position": sample.position,
            "key": key,
            "bucket": f"{width}x{height}",
            "epoch": sample.unit.epoch,
            "pass": sample.pass_,
            "caption": draw_sample_caption(record, sample.pass_, seed, captions),
            "timestep": draw_sample_timestep(key, sample.pass_, seed, config.diffusion),
            "noise_seed": f"{philox_key('noise', seed, sample.pass_, key):032x}",
        }


def main() -> None:
    parser = config_parser("Say what one step sees, one JSON line a sample.")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="counts from 0")
    arguments = finish_command_line(parser)
    if arguments.step < 0:
        raise UserError(f"--step {arguments.step}: steps count from 0")
    config = load_config(arguments.config, arguments.overrides)
    index = open_index(config.data.shards)
    for line in explain_step(config, index, build_plan(index, config.run.seed, config.data), arguments.step):
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    run_command(main)

"""What one step sees, without a model: a line a sample, for scripts/explain_step.py."""

from collections.abc import Iterator
from typing import Any

from trainer.config.schema import Config
from trainer.core.rng import philox_key
from trainer.data.caption_draws import draw_record, explain_parts, join_drawn
from trainer.data.index import Index
from trainer.data.loader import draw_sample_timestep
from trainer.data.plan import build_plan
from trainer.data.sample_weights import find_sample_weights
from trainer.report.thresholds import find_caption_rules


def explain_step(config: Config, index: Index, step: int) -> Iterator[dict[str, Any]]:
    """What each sample of a step is and draws, in the order of its position in the global batch."""
    seed, captions = config.run.seed, find_caption_rules(config, index.table)
    plan = build_plan(index, seed, config.data, find_sample_weights(index, config.data, captions.config))
    for sample in plan.step_samples(step):
        record = index.row(sample.row)
        key, width, height = record["key"], record["bucket_width"], record["bucket_height"]
        drawn = draw_record(record, sample.pass_, seed, captions)
        yield {
            "step": step,
            "unit": sample.position // plan.unit_size,
            "position": sample.position,
            "key": key,
            "bucket": f"{width}x{height}",
            "epoch": sample.unit.epoch,
            "pass": sample.pass_,
            "caption": join_drawn(drawn),
            "kind": drawn.kind,
            "parts": explain_parts(drawn),
            "timestep": draw_sample_timestep(key, sample.pass_, seed, config.diffusion),
            "noise_seed": f"{philox_key('noise', seed, sample.pass_, key):032x}",
        }

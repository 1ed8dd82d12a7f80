"""What one step sees, or what the black box says that it saw: a line a sample, for scripts/explain_step.py."""

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.layout import BLACK_BOX_FOLDER
from trainer.core.rng import philox_key
from trainer.data.caption_draws import draw_record, explain_parts, join_drawn
from trainer.data.index import Index
from trainer.data.loader import draw_sample_timestep, draw_strata
from trainer.data.plan import build_plan
from trainer.data.sample_weights import find_sample_weights
from trainer.data.substitutes import substitute_pass
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.model.step_records import StepRecord, read_black_box
from trainer.report.thresholds import find_caption_rules


def explain_step(config: Config, index: Index, step: int) -> Iterator[dict[str, Any]]:
    """What each sample of a step is and draws, in the order of its position in the global batch."""
    seed, captions = config.run.seed, find_caption_rules(config, index.table)
    plan = build_plan(index, seed, config.data, find_sample_weights(index, config.data, captions.config))
    strata, substituted = draw_strata(plan, step, config.diffusion), find_substituted(config, step)
    for sample in plan.step_samples(step):
        record, pass_, instead = index.row(sample.row), sample.pass_, {}
        if (stands_in := substituted.get(sample.position)) is not None and stands_in["key"] == record["key"]:
            instead = {"instead_of": record["key"]}
            row = pc.index(index.table["key"], stands_in["substitute"]).as_py()
            record, pass_ = index.row(row), substitute_pass(plan, step, sample.position)
        key, width, height = record["key"], record["bucket_width"], record["bucket_height"]
        stratum = strata[sample.position]
        drawn = draw_record(record, pass_, seed, captions)
        yield {
            "step": step,
            "unit": sample.position // plan.unit_size,
            "position": sample.position,
            "key": key,
            **instead,
            "bucket": f"{width}x{height}",
            "epoch": sample.unit.epoch,
            "pass": pass_,
            "caption": join_drawn(drawn),
            "kind": drawn.kind,
            "parts": explain_parts(drawn),
            "timestep": draw_sample_timestep(key, pass_, seed, config.diffusion, stratum),
            **({} if stratum is None else {"stratum": stratum.number}),
            "noise_seed": f"{philox_key('noise', seed, pass_, key):032x}",
        }


def find_substituted(config: Config, step: int) -> dict[int, dict[str, Any]]:
    """What the run's newest checkpoint says of bad samples of a step, by position; empty where there is none."""
    newest = find_newest(Path(config.run.output_dir) / config.run.name)
    records = read_train_state(newest).get("substituted", []) if newest is not None else []
    return {record["position"]: record for record in records if record["step"] == step}


def show_black_box(run: str, step: int | None) -> Iterator[dict[str, Any]]:
    """Each sample of the recorded steps, or of one of them, in the order of attempts, steps and ranks.

    Raises:
        UserError: where there is nothing of it.
    """
    records = read_black_box(Path(run))
    if not records:
        raise UserError(
            f"{Path(run) / BLACK_BOX_FOLDER}: nothing is recorded there; name a run's folder, or its config"
        )
    chosen = [record for record in records if step in (None, record.step)]
    if not chosen:
        first, last = records[0].step, records[-1].step
        raise UserError(f"step {step} is not recorded in {run}: its black box has steps {first:,} to {last:,}")
    for record in chosen:
        yield from show_record(record)


def show_record(record: StepRecord) -> Iterator[dict[str, Any]]:
    """A step's samples; numbers that JSON has not stand as text."""

    def shown(value: float | None) -> float | str | None:
        return str(value) if value is not None and not math.isfinite(value) else value

    for key, caption, loss in zip_longest(record.keys, record.captions, record.losses or ()):
        yield {
            "attempt": record.attempt,
            "step": record.step,
            "rank": record.rank,
            "key": key,
            "caption": caption,
            "loss": shown(loss),
            "step_loss": shown(record.loss),
            "grad_norm": shown(record.grad_norm),
            "withheld": record.withheld,
            "waited": round(record.waited, 3),
            "seconds": None if record.seconds is None else round(record.seconds, 3),
        }

"""How often each row of an index is seen in a pass: the rules of ``data.weights``, and the sources' repeats.

Weights are whole numbers of parts, ``ONE`` of which make 1, so that what follows from them is the same everywhere.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config.schema import CaptionsConfig, DataConfig
from trainer.core.errors import UserError
from trainer.core.progress import format_count, waiting
from trainer.core.rng import hash_keys
from trainer.data.conditions import find_images_of
from trainer.data.index import Index

BITS = 16
ONE = 1 << BITS  # parts of a weight of 1


@dataclass(frozen=True)
class SampleWeights:
    """The weights of an index's rows."""

    values: np.ndarray | None  # int64 (n,), in parts of ONE, repeats included; None: all are seen once in a pass
    record: dict[str, Any] | None  # what is recorded, and must be the same on resume; None without rules and repeats


def find_sample_weights(index: Index, data: DataConfig, captions: CaptionsConfig | None = None) -> SampleWeights:
    """The weights that a config gives the rows of an index.

    Args:
        captions: rules by score, by which a rule of weights knows quality and year tags. Needed where there are rules.

    Raises:
        UserError: where no image is left to be seen, or the index has samples of a source that no source is called.
    """
    repeats = find_repeats(index, data)
    values = None if repeats is None else repeats * ONE
    if not data.weights:
        return SampleWeights(values, None if values is None else record_sample_weights(data, [], values))
    assert captions is not None
    with waiting("weigh the images"):
        table = index.table
        holds = [find_images_of(table, rule, captions) for rule in data.weights]
        own = multiply_factors(data, holds)
    if not own.any():
        raise UserError("data.weights: every image has weight 0, so that there is nothing to train on")
    values = own if repeats is None else own * repeats
    return SampleWeights(None if (values == ONE).all() else values, record_sample_weights(data, holds, values))


def multiply_factors(data: DataConfig, holds: list[np.ndarray]) -> np.ndarray:
    """The weights that rules make, within their limits, int64 (n,) in parts of ONE; none but 0 is rounded to 0."""
    product = np.ones(len(holds[0]))
    for rule, here in zip(data.weights, holds, strict=True):
        product[here] *= rule.factor
    limited = np.clip(product, data.min_weight, data.max_weight)
    parts = np.maximum(np.rint(limited * ONE).astype(np.int64), 1)
    return np.where(product == 0, 0, parts)


def record_sample_weights(data: DataConfig, holds: list[np.ndarray], values: np.ndarray) -> dict[str, Any]:
    """What is recorded of weights: the rules with the images of each, what they come to, and a hash of them all."""
    rules = [
        {name: value for name, value in dataclasses.asdict(rule).items() if value is not None}
        | {"images": int(here.sum())}
        for rule, here in zip(data.weights, holds, strict=True)
    ]
    return {
        "rules": rules,
        "sum": round(float(values.sum()) / ONE, 3),
        "least": round(float(values[values > 0].min()) / ONE, 6),
        "most": round(float(values.max()) / ONE, 6),
        "never_seen": int((values == 0).sum()),
        "sha256": hashlib.sha256(values.astype("<i8").tobytes()).hexdigest(),
    }


def describe_sum(record: dict[str, Any], images: int) -> str:
    """Recorded weights in a line."""
    never = f", {record['never_seen']:,} of them never seen (weight 0)" if record["never_seen"] else ""
    return f"weights: an epoch sees {record['sum']:,.0f} samples of {format_count(images, 'image')}{never}"


def draw_phases(keys: pa.ChunkedArray, seed: int, values: np.ndarray) -> np.ndarray:
    """Where each row's views begin, from 0 to below ONE, so that not all rows of weight 0.5 are seen in the same pass.

    Int32 (n,); 0 where a weight is whole, which has no use of it.
    """
    phases = np.zeros(len(values), dtype=np.int32)
    places = np.flatnonzero(values % ONE)
    if len(places):
        chosen = keys if len(places) == len(values) else keys.take(places)
        with waiting("draw which pass sees which image"):
            phases[places] = hash_keys(chosen.to_pylist(), "weight", seed) >> np.uint64(64 - BITS)
    return phases


def find_repeats(index: Index, data: DataConfig) -> np.ndarray | None:
    """How often each row is seen in a pass, by its source, int64 (n,); None where that is once for all.

    Raises:
        UserError: when the index has samples of a source that the config does not name.
    """
    if data.sources is None or all(source.repeats == 1 for source in data.sources):
        return None
    labels = [source.label for source in data.sources]
    places = pc.index_in(index.table["source"], pa.array(labels))
    if places.null_count:
        strange = pc.unique(index.table["source"].filter(pc.is_null(places))).to_pylist()
        raise UserError(
            f"data.sources: {index.folder} holds samples of {', '.join(strange[:4])}, and no source is called so, "
            "which leaves its repeats unknown: name it as when it was prepared, or run scripts/build_shards.py again"
        )
    return np.array([source.repeats for source in data.sources])[places.to_numpy()]

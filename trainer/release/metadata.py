"""What the header of a single file says of it: ModelSpec's keys and ours."""

import json
from collections.abc import Mapping
from typing import Any

from trainer.config.schema import Config
from trainer.model.base import CONFIGS_KEY
from trainer.model.diffusion import spell
from trainer.model.lineage import LINEAGE_KEY, shorten_paths
from trainer.release.licence import FAIPL

RECIPE_KEY = "trainer.recipe"  # the config, as the user wrote it


def build_metadata(
    config: Config, state: Mapping[str, Any], lineage: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """What a single file's header says: ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec), and our own keys."""
    side = config.buckets.base_resolution
    described = (
        f"Stage {state['stage']} of {state['run']}: {state['step']} steps of {config.data.global_batch_size} samples "
        f"over {state['images']} images, from {lineage['base']['reference']}."
    )
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "description": described,
        "date": lineage["written_at"],  # of the checkpoint: exporting it again gives the same bytes
        "resolution": f"{side}x{side}",
        "prediction_type": spell(config.diffusion.prediction_type).modelspec[0],
    }
    ours = {LINEAGE_KEY: lineage, CONFIGS_KEY: configs, RECIPE_KEY: shorten_paths(state["config"])}
    return (
        {"format": "pt"}
        | {f"modelspec.{name}": value for name, value in spec.items()}
        | {key: value for key, value in publish_entries(config).items() if value is not None}
        | {name: json.dumps(value, ensure_ascii=False) for name, value in ours.items()}
    )


def publish_entries(config: Config) -> dict[str, str | None]:
    """The entries that publish.* may change after the training; None stands for no entry."""
    publish = config.publish
    said = {"title": publish.title or config.run.name, "author": publish.author, "license": FAIPL}
    return {f"modelspec.{name}": value for name, value in said.items()}

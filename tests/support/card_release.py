"""A release of two stages by the shipped configs, without weights, of which cards are written; and a card's parts."""

import dataclasses
import re
from typing import Any

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.model.lineage import Lineage
from trainer.model.lineage_rows import complete_stage
from trainer.release.card import Release
from trainer.release.licence import OPENRAIL, Terms

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_stage(place: int, name: str, base: dict[str, Any], step: int, images: int, **work: Any) -> Lineage:
    config = load_config([REPOSITORY / f"configs/{name}.yaml"])
    lineage = {
        "run": config.run.name, "stage": config.run.stage, "step": step, "images": images, "base": base,
        "samples_seen": step * config.data.global_batch_size, "index_fingerprint": f"fingerprint{place}",
        "written_at": "2024-01-10T00:00:00+00:00", "config": config.written,
        "code": {"version": "0.2.0", "commit": COMMIT, "dirty": place == 2}, **work,
    }  # fmt: skip
    return complete_stage(lineage)


def make_release(*words: str, **changes: Any) -> Release:
    first = {"reference": "Linaqruf/animagine-xl-2.0", "revision": "c0ffee", "sha256": "ab", "lineage": None}
    stage1 = make_stage(1, "stage1_feature_alignment", first, 132_499, 1_271_990, hours=504.0, hardware=["2 x A100"])
    second = {"reference": "export/stage1", "revision": None, "sha256": "cd", "lineage": stage1}
    stage2 = make_stage(2, "stage2_refine_unet", second, 521, 2_500)
    source = "publish.source_url=https://example.org/source"
    config = load_config([REPOSITORY / "configs/stage2_refine_unet.yaml"], [source, *words])
    release = Release(
        config=config, stages=[stage1, stage2], terms=Terms("Linaqruf/animagine-xl-2.0", OPENRAIL),
        license_files={"LICENSE.md": "FAIPL", "LICENSE-base.md": "Open RAIL"}, acknowledged=None, samples=[],
        base_id=None, weights="stage2_refine_unet.safetensors", full_precision=None,
    )  # fmt: skip
    return dataclasses.replace(release, **changes)


def section(card: str, title: str) -> str:
    """What stands under a heading, up to the next of its level or above."""
    found = re.search(rf"^(#+) {title}\n", card, flags=re.MULTILINE)
    assert found, title
    return re.split(rf"^#{{1,{len(found[1])}}} ", card[found.end() :], flags=re.MULTILINE)[0]


def rows(text: str) -> dict[str, list[str]]:
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [part.strip() for part in line[1:]] for line in lines}

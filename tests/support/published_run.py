"""Two stages that are to be published, and what tests change about them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from support.checkpoints import change_record
from support.exported_run import Parts, make_run, moved_weights
from trainer.model.checkpoint import read_train_state
from trainer.release import licence
from trainer.release.export import export
from trainer.release.publish import Request

OURS = "made from nothing by ourselves"
WORDS = ["publish.dtype=fp16", "publish.author=null"]
SOURCE = "publish.source_url=https://example.org/source"


def write_png(path: Path, **chunks: str) -> None:
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_itxt(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def change(request: Request, **fields: object) -> Request:
    return Request(**{**vars(request), **fields})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def stand_in(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text that counts as the licence: the real one is not ours to ship, and test_licence judges it."""
    digest = hashlib.sha256(b"a stand in").hexdigest()
    monkeypatch.setitem(licence.KNOWN_WORDS, digest, licence.FAIPL)
    file = tmp_path_factory.mktemp("licence") / "stand-in.md"
    file.write_text("# A *stand-in*\n")
    return file


@pytest.fixture(scope="module")
def parts(tiny_base: Path) -> Parts:
    """The base's weights, each a little moved."""
    return moved_weights(tiny_base, seed=5)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, parts: Parts) -> Path:
    """Two runs, the second from the first one's export; hours and hardware only of the second."""
    runs = tmp_path_factory.mktemp("runs")
    first = make_run(runs / "stage1", tiny_base, parts, *WORDS, "data.images=${oc.env:HOME}/images")
    _, folder = export(first)
    (first / "run.json").write_text(json.dumps({"base": {"reference": str(tiny_base)}, "attempts": []}))
    second = make_run(runs / "stage2", folder, parts, *WORDS, step=30)
    (second / "run.json").write_text(json.dumps({"attempts": [{"attempt": 1, "first_step": 0}]}))
    checkpoint = second / "checkpoints/step-00000030"
    lineage = read_train_state(checkpoint)["lineage"] | {"hours": 1.5, "hardware": ["2 x A100"]}
    change_record(checkpoint, lineage=lineage)
    return second


@pytest.fixture
def run(stages: Path, tmp_path: Path) -> Path:
    """The second stage, in a folder of the test's own."""
    return Path(shutil.copytree(stages, tmp_path / "stage2"))


@pytest.fixture
def request_of(run: Path, stand_in: Path) -> Request:
    return Request(run=run, license_files=[stand_in], acknowledged=OURS)

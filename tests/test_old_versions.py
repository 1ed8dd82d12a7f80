"""What an older version left on the disk stays good: the code of the day goes on with it, and makes the same of it.

`tests/data/v0_2_0` is a tiny run as version 0.2.0 wrote it (its README.md says what is in it). All is done by the
scripts, as people do it.
"""

import hashlib
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.arithmetic import hash_tensors, probe_arithmetic
from trainer.release import licence

REPOSITORY = Path(__file__).parent.parent
OLD = Path(__file__).parent / "data/v0_2_0"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
RUN = Path("runs/tiny")
STEP_3, STEP_6 = (RUN / f"checkpoints/step-0000000{step}" for step in (3, 6))
EXPORTED = "tiny-step-00000003-fp16"
Script = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old run, as the working directory: it was made with relative paths."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    for image in (folder / "images").iterdir():  # a copy, or a checkout, does not keep the times
        os.utime(image)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.use_deterministic_algorithms(False)  # of other tests in this process
    return folder


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run one of the repository's scripts with some words; what it printed, line by line."""

    def run(name: str, *words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *words])
        capsys.readouterr()
        runpy.run_path(str(REPOSITORY / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def hash_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def hash_folder(folder: Path) -> dict[str, str]:
    """Tensors of all .safetensors files, by path."""
    return {path.relative_to(folder).as_posix(): hash_tensors(path) for path in folder.rglob("*.safetensors")}


def test_steps_see_what_they_saw(script: Script) -> None:
    assert "8 samples in 2 shards" in script("scripts/verify_shards.py", "shards")[0]
    for step in range(10):
        lines = script("scripts/explain_step.py", "--config", "tiny.yaml", "--step", str(step))
        samples = [json.loads(line) for line in lines]
        for name in ("caption", "timestep", "noise_seed"):
            assert [sample[name] for sample in samples] == EXPECTED[f"{name}s"][step], (step, name)


def test_a_run_goes_on_to_the_same_weights(script: Script, here: Path) -> None:
    script("train.py", "--config", str(RUN / "config.yaml"))
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    attempts = [(line["step"], line["attempt"]) for line in lines]
    assert attempts == [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (5, 2), (6, 2)]
    losses = {str(line["step"]): line["train/loss"] for line in lines}
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-3)
    assert read_json(STEP_6 / "checkpoint.json")["index_fingerprint"] == EXPECTED["index_fingerprint"]
    if probe_arithmetic(here / "base") != EXPECTED["arithmetic"]:
        pytest.skip("this machine's libraries compute other last bits than the machine's that recorded step 6")
    for name, digest in EXPECTED["step_6"].items():
        if name.endswith(" tensors"):
            assert hash_tensors(STEP_6 / name.replace(".safetensors tensors", "-00001.safetensors")) == digest, name


def test_the_set_takes_what_is_new_and_encodes_nothing_again(script: Script) -> None:
    before = hash_files(Path("shards"))
    tars = {name: digest for name, digest in before.items() if name.endswith(".tar")}
    script("scripts/build_shards.py", "--config", "tiny.yaml")
    assert read_json(Path("shards/manifest.json"))["fingerprint"] == EXPECTED["index_fingerprint"]
    assert tars.items() | {("index.arrow", before["index.arrow"])} <= hash_files(Path("shards")).items()
    post = {"id": 10, "file": "1.png", "tag_string_general": "1girl new", "rating": "g"}
    with Path("posts.jsonl").open("a") as file:
        file.write(json.dumps(post) + "\n")
    script("scripts/build_shards.py", "--config", "tiny.yaml")
    assert tars.items() <= hash_files(Path("shards")).items()
    new = [shard for shard in read_json(Path("shards/manifest.json"))["shards"] if shard["name"] not in tars]
    assert [shard["samples"] for shard in new] == [1]
    assert "9 samples in 3 shards" in script("scripts/verify_shards.py", "shards")[0]


@pytest.mark.parametrize("lost", [None, "shard-00000.tar", "shard-00002.tar"])
def test_an_interrupted_preparation_is_resumed(script: Script, lost: str | None) -> None:
    """Two shards of an earlier plan, one of the last; a shard that is lost is made again."""
    tars = hash_files(Path("interrupted.unfinished/set"))
    if lost:
        (Path("interrupted.unfinished/set") / lost).unlink()
        del tars[lost]
    words = ["--config", "tiny.yaml", "data.shards=interrupted", "data.samples_per_shard=2"]
    told = "\n".join(script("scripts/build_shards.py", *words))
    assert f"{3 if lost else 5} of 8 samples were encoded before" in told and "set aside: 1 not an image" in told
    assert read_json(Path("interrupted/manifest.json"))["fingerprint"] == EXPECTED["index_fingerprint"]
    assert tars.items() <= hash_files(Path("interrupted")).items() and not Path("interrupted.unfinished").exists()
    assert "8 samples in" in script("scripts/verify_shards.py", "interrupted")[0]


def test_a_checkpoint_exports_to_the_same_tensors(script: Script) -> None:
    assert hash_folder(RUN / "export") == EXPECTED["export"]  # the old export itself
    script("scripts/export.py", str(STEP_3), "--out", "again")
    assert hash_folder(Path("again")) == EXPECTED["export"]
    old, new = RUN / "export" / EXPORTED, Path("again") / EXPORTED
    for path in sorted(old.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            assert path.read_bytes() == (new / path.relative_to(old)).read_bytes(), path


def test_the_next_stage_starts_from_an_export(script: Script) -> None:
    script(
        "train.py", "--config", "tiny.yaml", "run.name=second", 'run.stage="2, refine UNet"',
        "model.pretrained=runs/tiny",
        "model.train_text_encoder_1=false", "model.train_text_encoder_2=false", "optim.text_encoder_1_lr=0",
        "optim.text_encoder_2_lr=0", "diffusion.noise_offset=0.0357", "schedule.max_steps=1",
    )  # fmt: skip
    base = read_json(Path("runs/second/checkpoints/step-00000001/checkpoint.json"))["lineage"]["base"]
    assert base["reference"] == f"runs/tiny/export/{EXPORTED}" and base["lineage"]["run"] == "tiny"
    assert base["lineage"]["code"]["commit"] == EXPECTED["made_by"]
    told = script("scripts/lineage.py", "runs/second/checkpoints/step-00000001")
    assert told[0] == "second, stage 2, refine UNet, 1 steps"
    assert any(line.strip() == "tiny, stage 1, feature alignment, 3 steps" for line in told)


@pytest.mark.parametrize("made", [STEP_3, RUN / "export" / EXPORTED, RUN / f"export/{EXPORTED}.safetensors"])
def test_files_say_what_made_them(script: Script, made: Path) -> None:
    told = script("scripts/lineage.py", str(made), "--config")
    assert told[0] == "tiny, stage 1, feature alignment, 3 steps"
    assert any(f"commit {EXPECTED['made_by']}" in line for line in told)
    assert any(EXPECTED["index_fingerprint"] in line for line in told)
    assert any(line.strip() == "max_token_length: 150" for line in told)


def test_an_export_draws_and_is_published(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The licence's real text is not ours to ship: a stand-in counts as it."""
    digest = hashlib.sha256(b"a stand in").hexdigest()
    monkeypatch.setitem(licence.KNOWN_WORDS, digest, licence.FAIPL)
    (tmp_path / "stand-in.md").write_text("# A *stand-in*\n")
    words = ["runs/tiny", "publish.source_url=https://example.org/source", "--license-file",
             str(tmp_path / "stand-in.md"), "--acknowledge-base-terms", "made from nothing by ourselves"]  # fmt: skip
    script("scripts/sample.py", "runs/tiny", "--prompt", "1girl, smile", "--size", "64x64", "--steps", "2")
    assert [path.name for path in (RUN / "export/samples").glob("*seed42.png")]
    script("scripts/publish.py", *words)
    published, exported = RUN / "published/tiny", RUN / "export"
    single = published / "tiny-fp16.safetensors"
    assert hash_tensors(single) == hash_tensors(exported / f"{EXPORTED}.safetensors")
    card, changes = ((published / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGES.md"))
    assert EXPECTED["made_by"][:12] in card and EXPECTED["index_fingerprint"][:12] in card and "1 x cpu" in card
    assert EXPECTED["made_by"] in changes and EXPECTED["index_fingerprint"] in changes
    assert len(list((published / "samples").iterdir())) >= 1
    script("scripts/publish.py", *words, "publish.dtype=bf16", "--full-precision", "--out", "from_checkpoint")
    weights = Path("from_checkpoint/tiny-fp32.safetensors")
    assert weights.is_file() and hash_tensors(weights) != EXPECTED["export"][f"{EXPORTED}.safetensors"]

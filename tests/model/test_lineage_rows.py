"""What made a file, in rows and as a tree: every stage to the first base, from the file alone, safe for a terminal."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.checkpoints import change_record
from support.exported_run import make_run
from support.paths import REPOSITORY
from support.scripts import run_script
from trainer.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, RunConfig
from trainer.core.errors import UserError
from trainer.model.lineage import LINEAGE_KEY, build_lineage, find_lineage
from trainer.model.lineage_rows import NOT_RECORDED, format_tree, list_stages, stage_rows

CONFIG = {
    "run": {"name": "refined", "seed": 42},
    "model": {"train_unet": True, "train_text_encoder_1": False},
    "optim": {"name": "adamw", "unet_lr": 2e-6, "text_encoder_1_lr": 0.0, "betas": [0.9, 0.99]},
    "data": {"global_batch_size": 48, "micro_batch_size": 8},
    "diffusion": {"noise_offset": 0.0357, "min_snr_gamma": None, "prediction_type": "epsilon"},
}


def build(name: str, step: int, base: dict, **times: object) -> dict:
    """The lineage of a run as training writes it."""
    config = Config(
        run=RunConfig(name, f"stage of {name}"), model=ModelConfig("x"), data=DataConfig("s", global_batch_size=48),
        diffusion=DiffusionConfig(noise_offset=0.0357), written=CONFIG | {"run": {"name": name, "seed": 42}},
    )  # fmt: skip
    return build_lineage(config, {"images": 2500, "index_fingerprint": f"index-of-{name}", "base": base}, step, **times)


@pytest.fixture(scope="module")
def three() -> dict:
    """Three runs, each from the one before, and a hub id below them."""
    first = build(
        "aligned", 132_499, {"reference": "owner/first", "revision": "0123abc", "sha256": "aa", "lineage": None}
    )
    second = build("refined", 521, {"reference": "e/aligned", "revision": None, "sha256": "bb", "lineage": first})
    base = {"reference": "e/refined", "revision": None, "sha256": "cc", "lineage": second}
    return build("third", 7, base, started_at="2026-01-10T00:00:00+00:00", hours=1.5)


def test_three_generations(three):
    text = format_tree(three)
    lines = text.splitlines()
    heads = [line.strip() for line in lines if ", stage stage of " in line]
    assert heads == [
        "third, stage stage of third, 7 steps",
        "refined, stage stage of refined, 521 steps",
        "aligned, stage stage of aligned, 132,499 steps",
    ]
    depths = [len(line) - len(line.lstrip()) for line in lines if ", stage stage of " in line]
    assert depths == sorted(set(depths)) and depths[0] == 0  # each below and further in
    rows = {" ".join(line.split()) for line in lines}
    assert {
        "samples seen 6,359,952",  # 132,499 x 48
        "images 2,500", "index fingerprint index-of-aligned",
        "starts from owner/first", "its commit 0123abc",
        "its SHA-256 aa", "its SHA-256 bb", "its SHA-256 cc",
        "learning rates 2e-6", "trained UNet", "samples per step 48", "seed 42",
        "optimizer adamw, betas [0.9, 0.99], weight decay not recorded",
        "noise offset 0.0357", "prediction epsilon", "min-SNR gamma off",
        "started 2026-01-10T00:00:00+00:00", "hours (wall clock) 1.5",
    } <= rows  # fmt: skip
    code = three["code"]
    assert any(row.startswith(f"code {code['version']}, commit {code['commit'] or 'not recorded'}") for row in rows)
    assert any(row.startswith(f"libraries torch {three['versions']['torch']}") for row in rows)
    assert lines[-1].strip() == "└─ nothing recorded before this" and text.count("nothing recorded") == 1


def test_uncommitted_changes_are_said(three):
    changed = copy.deepcopy(three)
    changed["code"] = {"version": "0.2.0", "commit": "f00", "dirty": True}
    assert "0.2.0, commit f00 with changes that were not committed" in format_tree(changed)


def test_hardware(three):
    assert stage_rows(list_stages(three | {"hardware": []})[-1])["hardware"] == NOT_RECORDED
    assert stage_rows(list_stages(three | {"hardware": ["2 x A", "1 x B"]})[-1])["hardware"] == "2 x A, 1 x B"


def test_whole_configs_on_request(three):
    assert "  config\n" not in format_tree(three)
    text = format_tree(three, with_config=True)
    assert text.count("  config\n") == 3 and text.count("min_snr_gamma: null") == 3
    assert "    name: aligned" in text


def test_missing_values_are_said_to_be_missing():
    text = format_tree({})
    assert text.startswith("not recorded, stage not recorded, not recorded steps\n")
    assert text.endswith("└─ nothing recorded before this\n") and "None" not in text


@pytest.mark.parametrize(
    "wrong", [None, 3, "x", True, [1], {"a": 1}, {"lineage": [1]}, {"optim": 1, "model": None}, 10**400]
)
def test_values_of_another_type_are_not_recorded(three, wrong):
    """Every value of a lineage, one after the other, and then all of them; the other rows stay."""
    for key in three:
        rows = stage_rows(list_stages(three | {key: wrong})[-1])
        assert rows.keys() == stage_rows(list_stages(three)[-1]).keys() and "None" not in "".join(rows.values())
    everything = dict.fromkeys(three, wrong)
    assert "\n  images                          " in format_tree(everything, with_config=True)
    assert "None" not in format_tree(everything)


def test_what_a_run_did_not_record_is_not_taken_for_off(three):
    rows = stage_rows(list_stages(three | {"config": {"diffusion": {}}})[-1])
    assert rows["noise offset"] == "none" and rows["min-SNR gamma"] == "off"  # of a run that knew no such field
    assert rows["gradient norm"] == NOT_RECORDED


def test_nothing_rewrites_the_terminal():
    text = format_tree(
        {"run": "a\x1b[2Jb\nc", "base": {"reference": "d\re"}, "config": {"run": {"name": "\x1b]0;f"}}}, True
    )
    assert "\x1b" not in text and "\r" not in text and r"a\x1b[2Jb\nc" in text


def write_single(path: Path, lineage: dict | str) -> Path:
    text = lineage if isinstance(lineage, str) else json.dumps(lineage)
    save_file({"x": torch.zeros(1)}, path, {LINEAGE_KEY: text})
    return path


def test_it_is_found_in_every_kind_of_file(three, tmp_path, tiny_base):
    single = write_single(tmp_path / "a.safetensors", three)
    checkpoint, published = (
        make_run(tmp_path / "run", tiny_base, {}) / "checkpoints/step-00000020",
        tmp_path / "published",
    )
    (published / "diffusers").mkdir(parents=True)
    change_record(checkpoint, lineage=three)
    (published / "README.md").write_text("a card")
    (published / "diffusers" / "lineage.json").write_text(json.dumps(three))
    for path in (single, checkpoint, published / "diffusers", published):
        assert find_lineage(path) == three
    write_single(published / "a.safetensors", three)  # the same in both forms
    (published / "samples").mkdir()
    assert find_lineage(published) == three
    write_single(published / "b.safetensors", three["base"]["lineage"])
    with pytest.raises(UserError, match=r"different lineages; name one of them: a\.safetensors, b\.safetensors, diff"):
        find_lineage(published)


def test_none_and_damaged_files(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"plain\.safetensors carries no lineage"):
        find_lineage(tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="gone does not exist"):
        find_lineage(tmp_path / "gone")
    for text in ("[1, 2]", '"text"', "{", "[" * 100_000):
        with pytest.raises(UserError, match=r"the lineage of .*a\.safetensors (is damaged|cannot be read)"):
            find_lineage(write_single(tmp_path / "a.safetensors", text))
    (tmp_path / "b.safetensors").write_bytes(b"no")
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "train_state.json").write_text("[]")
    for name, said in (("b.safetensors", "cannot be read"), ("step", r"train_state\.json is damaged")):
        with pytest.raises(UserError, match=said):
            find_lineage(tmp_path / name)


def test_the_command_line(three, tmp_path, monkeypatch, capsys):
    single = write_single(tmp_path / "a.safetensors", three)
    monkeypatch.setattr(sys, "argv", ["lineage.py", str(single)])
    runpy.run_path(str(REPOSITORY / "scripts" / "lineage.py"), run_name="__main__")
    assert capsys.readouterr().out == format_tree(three)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    done = run_script("scripts/lineage.py", tmp_path / "plain.safetensors", "--config")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "carries no lineage" in done.stderr and "Traceback" not in done.stderr

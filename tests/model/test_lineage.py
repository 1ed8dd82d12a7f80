"""What made a file, from the file alone; and nothing of the user's machine."""

import json
import subprocess
from importlib import metadata

import pytest
import torch
from safetensors.torch import save_file

import trainer
from trainer.config.schema import Config, DataConfig, ModelConfig, RunConfig
from trainer.core.errors import UserError
from trainer.model import lineage as lineage_module
from trainer.model.checkpoint import OLD_FILES
from trainer.model.lineage import LINEAGE_KEY, build_lineage, read_lineage, shorten_path, shorten_paths

WRITTEN = {
    "model": {"pretrained": "/home/someone/models/sdxl"},
    "data": {"posts": ["/data/a/posts.jsonl", "posts.jsonl"], "images": "${oc.env:HOME}/images"},
    "optim": {"betas": [0.9, 0.99]},
}
BASE = {"reference": "~/models/deep/sdxl", "revision": None, "sha256": "cd"}


def build(name="stage1", base=BASE, **times):
    config = Config(
        run=RunConfig(name, "feature_alignment"),
        model=ModelConfig("/home/someone/models/sdxl"),
        data=DataConfig("shards", global_batch_size=96),
        written=WRITTEN,
    )
    return build_lineage(config, {"images": 100, "index_fingerprint": "ab12", "base": base}, 20, **times)


def test_it_is_json_and_complete():
    lineage = build(started_at="2024-01-10T00:00:00+00:00", hours=504.5)
    assert json.loads(json.dumps(lineage)) == lineage
    assert lineage["run"] == "stage1" and lineage["stage"] == "feature_alignment"
    assert lineage["step"] == 20 and lineage["samples_seen"] == 1920 and lineage["images"] == 100
    assert lineage["started_at"] == "2024-01-10T00:00:00+00:00" and lineage["hours"] == 504.5
    assert lineage["code"]["version"] == trainer.__version__
    assert lineage["versions"]["torch"] == metadata.version("torch")
    assert lineage["versions"]["python"].startswith("3.")
    assert lineage["base"]["sha256"] == "cd" and lineage["base"]["lineage"] is None


def test_no_folder_of_the_users_gets_in():
    lineage = build()
    assert lineage["config"]["model"]["pretrained"] == "models/sdxl"
    assert lineage["config"]["data"] == {"posts": ["a/posts.jsonl", "posts.jsonl"], "images": "${oc.env:HOME}/images"}
    assert lineage["base"]["reference"] == "deep/sdxl"
    assert "someone" not in json.dumps(lineage)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/home/someone/a/b", "a/b"),
        ("/model", "model"),
        ("C:\\Users\\someone\\models\\sdxl", "models/sdxl"),
        ("file:///home/someone/models/x.safetensors", "models/x.safetensors"),
        ("/home/someone/images", "images"),
        ("/Users/someone/x/y/z", "y/z"),
        ("C:\\Users\\someone\\m", "m"),
        ("/Users/someone", "Users"),
        ("/data/home/someone/m", "m"),
        ("~someone/m", "m"),
        ("${oc.env:HOME,/mnt/data/x/y}", "${oc.env:HOME,x/y}"),
        ("${oc.env:HOME,/home/someone/x}/images", "${oc.env:HOME,x}/images"),
        ("~hatsune miku, a/b", "~hatsune miku, a/b"),
        ("owner/name", "owner/name"),
        ("runs/a/export/b", "runs/a/export/b"),
        ("masterpiece, best quality", "masterpiece, best quality"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("/", "/"),
        ("|||", "|||"),
    ],
)
def test_paths_are_cut(text, short):
    assert shorten_path(text) == short


def test_it_is_read_back_from_every_kind_of_file(tmp_path):
    lineage = build()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "lineage.json").write_text(json.dumps(lineage))
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / "step-00000020" / "train_state.json").write_text(
        json.dumps({"format_version": 1, "step": 20, "files": dict.fromkeys(OLD_FILES, ""), "lineage": lineage})
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {LINEAGE_KEY: json.dumps(lineage)})
    for name in ("folder", "step-00000020", "a.safetensors"):
        assert read_lineage(tmp_path / name) == lineage


def test_files_without_lineage(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert read_lineage(tmp_path / "a.safetensors") is None
    assert read_lineage(tmp_path) is None
    (tmp_path / "b.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"b\.safetensors"):
        read_lineage(tmp_path / "b.safetensors")


def test_stages_nest(tmp_path):
    """Stage 2 finds what made its base beside the weights, or is told."""
    first = build()
    export = tmp_path / "stage1.safetensors"
    save_file({"x": torch.zeros(1)}, export, {LINEAGE_KEY: json.dumps(first)})
    second = build("stage2", {"reference": str(export), "revision": None, "sha256": "ef"})
    assert second["run"] == "stage2" and second["base"]["sha256"] == "ef"
    assert second["base"]["lineage"] == first
    told = build("stage2", {"reference": "owner/name", "revision": "0123", "sha256": "ef", "lineage": first})
    assert told["base"] == {"reference": "owner/name", "revision": "0123", "sha256": "ef", "lineage": first}


def git(folder, *words):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True
    )


def test_commit_of_our_own_checkout_only(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one")
    monkeypatch.setattr(lineage_module.trainer, "__file__", str(package / "__init__.py"))
    nowhere = {"version": trainer.__version__, "commit": None, "dirty": None}
    assert lineage_module.describe_code() == nowhere
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "somebody else's")
    assert lineage_module.describe_code() == nowhere
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "ours")
    clean = lineage_module.describe_code()
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (package / "__init__.py").write_text("two")
    assert lineage_module.describe_code() == clean | {"dirty": True}


def test_a_path_among_the_rules_of_captions_is_cut_too() -> None:
    home = "/".join(["", "home", "someone", "sets", "first"])
    prose = {"keep_tokens_separator": "/a/b"}
    assert shorten_paths({"captions": prose | {"thresholds_from": home}}) == {
        "captions": prose | {"thresholds_from": "sets/first"}
    }

"""Preparing needs the VAE and nothing else: no base, no schedule, no rates; paths are looked at before it loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.posts_on_disk import make_base, make_config, make_posts, make_vae, run, start_script, write_yaml
from support.tiny_model import TINY, random_parts
from trainer.config.load import load_config
from trainer.config.schema import Config, ModelConfig
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.model import base as base_module
from trainer.model import hub
from trainer.model.base import CONFIGS_KEY, read_vae_alone
from trainer.model.single_file import to_single_file
from trainer.prepare import prepare as prepare_module

PARTS = random_parts(seed=6)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    make_posts(tmp_path / "posts", 3)
    return make_config(make_base(tmp_path / "base"), tmp_path / "posts")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked of the hub, and no base may be hashed."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked of the hub, or hashed")

    for module, name in ((hub.HfApi, "model_info"), (hub, "snapshot_download"), (base_module, "hash_base")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("base", ["someone/else", "nowhere/at/all", "gone.safetensors"])
def test_the_base_may_be_absent_where_a_vae_is_named(config: Config, tmp_path: Path, base: str, no_hub: None) -> None:
    model = ModelConfig(base, vae=str(tmp_path / "base" / "vae"))
    summary = run(replace(config, model=model))
    assert summary.samples == 3
    other = replace(config.data, shards=str(tmp_path / "with_base"))
    run(replace(config, data=other))
    assert open_index(other.shards).fingerprint == open_index(config.data.shards).fingerprint


def test_of_a_base_only_the_vae_is_looked_at(config: Config, tmp_path: Path) -> None:
    for part in ("unet", "text_encoder", "text_encoder_2"):
        shutil.rmtree(tmp_path / "base" / part)
    assert run(config).samples == 3


def test_of_a_hub_id_only_the_vae_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    folder = make_base(tmp_path / "base")

    class Api:
        def model_info(self, repository: str, revision: str | None, timeout: float | None = None) -> Any:
            names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name})() for name in names]})()

    def download(repository: str, **options: Any) -> str:
        asked[repository] = options
        return str(folder if repository == "someone/base" else folder / "vae")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    read_vae_alone(ModelConfig("someone/base", revision="v1"))
    fetched = [name for name in asked["someone/base"]["allow_patterns"] if name.endswith(".safetensors")]
    assert fetched == ["vae/diffusion_pytorch_model.safetensors"] and asked["someone/base"]["revision"] == "v1"
    asked.clear()
    read_vae_alone(ModelConfig("someone/base", vae="someone/vae", vae_revision="abc"))
    assert list(asked) == ["someone/vae"] and asked["someone/vae"]["revision"] == "abc"  # model.vae_revision


def test_a_revision_is_of_the_hub(tmp_path: Path) -> None:
    make_vae(0).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"model\.vae_revision is 'abc', but .* is local"):
        read_vae_alone(ModelConfig("base", vae=str(tmp_path / "vae"), vae_revision="abc"))


def test_a_vae_file_without_config_takes_the_bases_where_that_lies_here(tmp_path: Path, no_hub: None) -> None:
    folder = make_base(tmp_path / "base")
    (folder / "vae" / "config.json").write_text(json.dumps(TINY["vae"]))
    single = to_single_file({"vae": PARTS["vae"]}, TINY)
    save_file(single, tmp_path / "bare.safetensors")
    vae = str(tmp_path / "bare.safetensors")
    assert read_vae_alone(ModelConfig(str(folder), vae=vae)).config == TINY["vae"]
    with pytest.raises(UserError, match=r"model\.vae .*bare\.safetensors: vae: .*tensors are missing"):
        read_vae_alone(ModelConfig("someone/else", vae=vae))  # of SDXL's own config it is not
    save_file(single, tmp_path / "told.safetensors", {CONFIGS_KEY: json.dumps(TINY)})
    assert read_vae_alone(ModelConfig("someone/else", vae=str(tmp_path / "told.safetensors"))).config == TINY["vae"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"posts": ["missing.jsonl"]}, r"data\.posts: missing\.jsonl does not exist"),
        ({"images": "missing"}, r"data\.images: missing"),
        ({"posts": None, "images": "missing"}, r"data\.images: missing"),
    ],
)
def test_paths_are_looked_at_before_anything_is_loaded(
    config: Config, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "read_vae_alone", None)
    with pytest.raises(UserError, match=said):
        run(replace(config, data=replace(config.data, **changes)))


def test_preparing_asks_for_neither_schedule_nor_rates(config: Config, tmp_path: Path) -> None:
    file = write_yaml(config, tmp_path / "config.yaml")
    words = ["schedule.max_steps=null", "optim.unet_lr=0"]
    with pytest.raises(UserError, match="2 problem"):
        load_config([file], words)
    assert load_config([file], words, preparing=True).schedule.max_steps is None
    with pytest.raises(UserError, match="set exactly one"):
        load_config([file], ["schedule.max_steps=1", "schedule.epochs=1"], preparing=True)
    process = start_script(file, *words)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and "3 samples in 1 shard," in output, errors


@pytest.mark.parametrize("numbers", [{"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, {"shift_factor": 0.25}])
def test_the_manifest_has_a_vaes_other_numbers(config: Config, tmp_path: Path, numbers: dict[str, Any]) -> None:
    run(config)
    plain = open_index(config.data.shards)
    assert "latents_mean" not in plain.manifest["latents"]  # the fingerprints of sets that have none stay
    path = tmp_path / "base" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | numbers))
    with pytest.raises(UserError, match="made with other settings"):
        run(config)
    other = replace(config.data, shards=str(tmp_path / "other"))
    run(replace(config, data=other))
    assert numbers.items() <= open_index(other.shards).manifest["latents"].items()


def test_a_vae_that_is_not_finite_is_named(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["quant_conv.bias"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"vae: quant_conv\.bias holds NaN"):
        run(config)

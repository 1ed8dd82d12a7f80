"""Where weights come from: every layout gives the same tensors; what cannot be trusted is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.tiny_model import STEMS, TINY, build_module, random_parts, write_folder
from trainer.core.errors import UserError
from trainer.model import hub
from trainer.model.base import (
    CONFIGS_KEY,
    Base,
    find_base,
    find_tokenizers,
    hash_base,
    hash_tensors,
    read_config,
    read_state,
    read_vae,
)
from trainer.model.single_file import NAME_PREFIXES, to_single_file

PARTS = random_parts(seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("base") / "model", PARTS)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file(to_single_file(PARTS, TINY), path, {CONFIGS_KEY: json.dumps(TINY)})
    return path


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def weights(folder: Path, component: str) -> Path:
    return folder / component / f"{STEMS[component]}.safetensors"


def assert_same(state: dict[str, torch.Tensor], component: str) -> None:
    assert state.keys() == PARTS[component].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in PARTS[component].items())


@pytest.mark.parametrize("component", list(TINY))
def test_folder_and_file_hold_the_same(folder, file, component):
    for path in (folder, file):
        base = find_base(str(path))
        assert base == Base(str(path), path, None)
        assert read_config(base, component) == TINY[component]
        assert_same(read_state(base, component), component)


def test_dtype_stays_as_stored(tmp_path):
    base = find_base(str(write_folder(tmp_path / "half", PARTS, torch.float16)))
    assert {tensor.dtype for tensor in read_state(base, "unet").values()} == {torch.float16}


def test_text_encoder_as_transformers_5_writes_it(copy):
    """Its folders may lack the ``text_model.`` prefix, and leave out of the config what is a default."""
    module = build_module("text_encoder", TINY["text_encoder"])
    shutil.rmtree(copy / "text_encoder")
    module.save_pretrained(copy / "text_encoder")
    state = read_state(find_base(str(copy)), "text_encoder")
    assert state.keys() == PARTS["text_encoder"].keys()
    stored = module.state_dict()
    assert all(
        torch.equal(state[name], stored.get(name, stored.get(name.removeprefix("text_model.")))) for name in state
    )


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_encoder_without_prefix_and_with_position_ids(copy, component):
    stored = {name.removeprefix("text_model."): tensor for name, tensor in PARTS[component].items()}
    stored["embeddings.position_ids"] = torch.arange(77)[None]
    save_file(stored, weights(copy, component))
    assert_same(read_state(find_base(str(copy)), component), component)


def test_old_vae_names(copy):
    """Diffusers before 0.18 called the attention's layers query, key, value and proj_attn."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    stored = dict(PARTS["vae"])
    for new, name in old.items():
        stored = {key.replace(new, name): tensor for key, tensor in stored.items()}
    assert any(".proj_attn." in name for name in stored)
    save_file(stored, weights(copy, "vae"))
    assert_same(read_state(find_base(str(copy)), "vae"), "vae")


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards(copy, variant):
    dot = f".{variant}" if variant else ""
    names = sorted(PARTS["unet"])
    weights(copy, "unet").unlink()
    places = {}
    for number, chosen in enumerate([names[::2], names[1::2]], start=1):
        shard = f"diffusion_pytorch_model{dot}-0000{number}-of-00002.safetensors"
        save_file({name: PARTS["unet"][name] for name in chosen}, copy / "unet" / shard)
        places |= dict.fromkeys(chosen, shard)
    index = copy / "unet" / f"diffusion_pytorch_model.safetensors.index{dot}.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_same(read_state(find_base(str(copy)), "unet"), "unet")
    (copy / "unet" / f"diffusion_pytorch_model{dot}-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="00002-of-00002"):
        find_base(str(copy))


def test_variant_only_where_there_is_nothing_else(copy):
    half = {name: tensor.half() for name, tensor in PARTS["unet"].items()}
    save_file(half, copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    base = find_base(str(copy))
    assert read_state(base, "unet")["conv_in.weight"].dtype == torch.float32
    weights(copy, "unet").unlink()
    assert read_state(base, "unet")["conv_in.weight"].dtype == torch.float16


@pytest.mark.parametrize("component", list(TINY))
def test_missing_and_unknown_tensors_are_named(copy, component):
    path, stored = weights(copy, component), PARTS[component]
    name, tensor = sorted(stored.items())[-1]
    save_file({key: stored[key] for key in stored if key != name}, path)
    with pytest.raises(UserError, match=rf"{component}.*missing.*{name}"):
        read_state(find_base(str(copy)), component)
    save_file(stored | {"lora.up.weight": tensor.clone()}, path)
    with pytest.raises(UserError, match=r"lora\.up\.weight"):
        read_state(find_base(str(copy)), component)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.ckpt", "pickled"),
        ("model.bin", "pickled"),
        ("model.onnx", "neither a diffusers folder nor"),
        ("nothing/here/model.safetensors", "does not exist, and is not a hub id"),
    ],
)
def test_other_files_are_refused(tmp_path, name, message):
    if not name.startswith("nothing"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        find_base(str(tmp_path / name))


def test_folders_with_pickled_weights_are_refused(copy):
    weights(copy, "text_encoder_2").rename(copy / "text_encoder_2" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        find_base(str(copy))


def test_other_folders_are_refused(copy):
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UserError, match="not an SDXL model"):
        find_base(str(copy))
    with pytest.raises(UserError, match="not a diffusers folder"):
        find_base(str(copy / "unet"))


def test_a_damaged_file_is_a_message(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="not a readable"):
        read_state(find_base(str(path)), "unet")


def test_a_revision_is_of_the_hub(folder):
    with pytest.raises(UserError, match=r"model\.revision"):
        find_base(str(folder), "main")


def test_a_bare_single_file_is_sdxl(tmp_path):
    """Without configs of its own; markers of the community say how it predicts."""
    path = tmp_path / "model.safetensors"
    names = ["model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
             "conditioner.embedders.1.model.logit_scale"]  # fmt: skip
    tensors = {name: torch.zeros(1) for name in names}
    save_file(tensors, path)
    base = find_base(str(path))
    assert read_config(base, "unet")["cross_attention_dim"] == 2048
    assert read_config(base, "model_index")["_class_name"] == "StableDiffusionXLPipeline"
    assert read_config(base, "scheduler")["prediction_type"] == "epsilon"
    save_file(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    scheduler = read_config(base, "scheduler")
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]


def test_hash_is_of_the_contents(folder, file, copy, tmp_path):
    assert hash_base(find_base(str(copy))) == hash_base(find_base(str(folder)))
    (copy / "README.md").write_text("not a weight")
    assert hash_base(find_base(str(copy))) == hash_base(find_base(str(folder)))
    stored = dict(PARTS["vae"])
    stored["quant_conv.bias"] = stored["quant_conv.bias"] + 1
    save_file(stored, weights(copy, "vae"))
    assert hash_base(find_base(str(copy))) != hash_base(find_base(str(folder)))
    other = shutil.copy(file, tmp_path / "other.safetensors")
    assert hash_base(find_base(str(other))) == hash_base(find_base(str(file)))


def test_tokenizers(folder, file, copy):
    assert find_tokenizers(find_base(str(folder)), None) == (folder / "tokenizer", folder / "tokenizer_2")
    with pytest.raises(UserError, match=r"set model\.tokenizer"):
        find_tokenizers(find_base(str(file)), None)
    assert find_tokenizers(find_base(str(file)), str(folder)) == (folder / "tokenizer", folder / "tokenizer_2")
    (copy / "tokenizer_2" / "merges.txt").unlink()
    with pytest.raises(UserError, match="tokenizer_2"):
        find_tokenizers(find_base(str(copy)), None)


@pytest.fixture
def vae_places(folder, file, tmp_path) -> list[str | None]:
    """The same VAE in every place where one can lie."""
    shutil.copytree(folder / "vae", tmp_path / "only_vae")
    single = to_single_file({"vae": PARTS["vae"]}, TINY)
    save_file(single, tmp_path / "prefixed.safetensors")
    bare = {name.removeprefix(NAME_PREFIXES["vae"]): tensor for name, tensor in single.items()}
    save_file(bare | {"loss.logvar": torch.zeros(())}, tmp_path / "bare.safetensors")
    names = ["only_vae", "prefixed.safetensors", "bare.safetensors", "only_vae/diffusion_pytorch_model.safetensors"]
    return [None, str(folder), str(file), *(str(tmp_path / name) for name in names)]


def test_vae_from_anywhere_is_the_same(folder, vae_places):
    base = find_base(str(folder))
    hashes = set()
    for vae in vae_places:
        found = read_vae(vae, base)
        assert found.config == TINY["vae"]
        assert_same(found.state, "vae")
        hashes.add(found.sha256)
    assert len(hashes) == 1


def test_vae_hash_follows_values_not_dtype():
    state = PARTS["vae"]
    half = {name: tensor.half() for name, tensor in state.items()}
    assert hash_tensors(half) == hash_tensors(state)
    other = state | {"quant_conv.bias": state["quant_conv.bias"] + 0.01}
    assert hash_tensors(other) != hash_tensors(state)


def test_a_base_without_vae_asks_for_one(copy, folder, tmp_path):
    shutil.rmtree(copy / "vae")
    save_file(to_single_file({name: PARTS[name] for name in PARTS if name != "vae"}, TINY), tmp_path / "no.safetensors",
              {CONFIGS_KEY: json.dumps(TINY)})  # fmt: skip
    for reference in (copy, tmp_path / "no.safetensors"):
        base = find_base(str(reference))
        assert_same(read_state(base, "unet"), "unet")
        with pytest.raises(UserError, match=r"set model\.vae"):
            read_vae(None, base)
        assert_same(read_vae(str(folder), base).state, "vae")


def test_hub_files_are_the_needed_ones():
    unet = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.bin"]  # fmt: skip
    names = ["model_index.json", "README.md", "sdxl.safetensors", "preview/a.png", "unet_onnx/config.json",
             "scheduler/scheduler_config.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json",
             "text_encoder/model.fp16.safetensors", "text_encoder/config.json", "text_encoder/pytorch_model.bin",
             *(f"unet/{name}" for name in unet)]  # fmt: skip
    assert hub.choose_files(names) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "tokenizer_2/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    shards = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    half = "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert hub.choose_files([*shards, half, index]) == sorted([*shards, index])


def test_a_hub_id_becomes_its_snapshot(folder, monkeypatch, tmp_path):
    """The download itself is the hub library's; what is asked of it, and what becomes of the answer, is ours."""
    snapshot = Path(shutil.copytree(folder, tmp_path / "snapshots" / "0123abc"))
    asked = {}

    class Api:
        def model_info(self, repository, revision, timeout=None):
            files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
            siblings = [type("File", (), {"rfilename": name})() for name in files]
            return type("Info", (), {"siblings": siblings})()

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(snapshot)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    base = find_base("someone/model", "v1")
    assert base == Base("someone/model", snapshot, "0123abc")
    assert asked["repository"] == "someone/model" and asked["revision"] == "v1"
    assert "unet/diffusion_pytorch_model.safetensors" in asked["allow_patterns"]
    find_tokenizers(base, "someone/model")
    assert asked["revision"] == "0123abc" and not any(name.startswith("unet/") for name in asked["allow_patterns"])
    find_tokenizers(base, "another/model")
    assert asked["revision"] is None


def test_an_unreachable_hub_is_a_message(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"model\.pretrained: runs/none does not exist here.*no route to host"):
        find_base("runs/none")


def test_a_runs_folder_stands_for_its_newest_export(tmp_path: Path, tiny_base: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"python scripts/export\.py"):
        find_base(str(run))
    for name in ("run-step-00000900-fp32", "run-step-00001000-fp16"):
        shutil.copytree(tiny_base, run / "export" / name)
    found = find_base(str(run))
    assert found.path.name == "run-step-00001000-fp16" and found.reference == str(found.path)
    shutil.copytree(tiny_base, run / "export" / "run-step-00001000-fp32")
    with pytest.raises(UserError, match="several exports of its newest step"):
        find_base(str(run))

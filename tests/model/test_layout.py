"""What other programs look for in a single file, at full size on the meta device, with diffusers as the witness."""

import datetime
import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_reader
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from support.exported_run import make_run
from support.tiny_model import build_module, build_parts, read_assets
from trainer.config.schema import DiffusionConfig
from trainer.model.base import Base, find_base, read_state
from trainer.model.sdxl import COMPONENTS
from trainer.model.single_file import NAME_PREFIXES
from trainer.release.export import Export, build_configs, export, single_file_tensors

State = dict[str, torch.Tensor]
V_PREDICTION = DiffusionConfig(prediction_type="v_prediction")
ZERO_SNR = DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Export:
    """An export of SDXL itself in fp16, without its weights."""
    assets = read_assets()
    with torch.device("meta"):
        parts = {
            component: {name: tensor.to(torch.float16) for name, tensor in part.items()}
            for component, part in build_parts(assets).items()
        }
    return Export("full", parts, full_configs(tmp_path_factory.mktemp("base"), DiffusionConfig()), {}, {}, None)


def full_configs(folder: Path, diffusion: DiffusionConfig) -> dict:
    """The configs of an export whose base is a single file without any: SDXL's own."""
    save_file({"x": torch.zeros(1)}, folder / "base.safetensors")
    return build_configs(Base("base", folder / "base.safetensors", None), read_assets()["vae"], diffusion, "fp16")


def test_diffusers_reads_every_tensor_at_full_size(full):
    """All 2,515: as many names as there are, each found, each with the shape that its module wants, none left over."""
    state = single_file_tensors(full)
    assert len(state) == 2_515
    assert diffusers_reader.infer_diffusers_model_type(state) == "xl_base"
    with torch.device("meta"):
        encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**full.configs["text_encoder_2"]))
    read = {
        "unet": diffusers_reader.convert_ldm_unet_checkpoint(dict(state), full.configs["unet"]),
        "vae": diffusers_reader.convert_ldm_vae_checkpoint(dict(state), full.configs["vae"]),
        "text_encoder": diffusers_reader.convert_ldm_clip_checkpoint(dict(state)),
        "text_encoder_2": diffusers_reader.convert_open_clip_checkpoint(
            encoder_2, dict(state), prefix=NAME_PREFIXES["text_encoder_2"]
        ),
    }
    assert tuple(read["text_encoder"].pop("text_model.embeddings.position_ids").shape) == (1, 77)
    for component, part in full.parts.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in part.items()}
        assert {name: tuple(tensor.shape) for name, tensor in read[component].items()} == shapes
    # beside what was read stand two more: position_ids and logit_scale; q, k and v stand joined 2 x 32 times
    assert len(state) == sum(map(len, full.parts.values())) - 2 * 2 * 32 + 2


def test_dtypes_at_full_size(full):
    others = {name: tensor.dtype for name, tensor in single_file_tensors(full).items() if tensor.dtype != torch.float16}
    assert others == {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.int64}


@pytest.mark.parametrize(
    ("diffusion", "markers"),
    [(DiffusionConfig(), set()), (V_PREDICTION, {"v_pred"}), (ZERO_SNR, {"v_pred", "ztsnr"})],
    ids=["epsilon", "v_prediction", "zero_snr"],
)
def test_markers_and_scheduler_at_full_size(full, tmp_path, diffusion, markers):
    """ComfyUI and Forge look for the empty tensors, diffusers for the scheduler's config."""
    configs = full_configs(tmp_path, diffusion)
    made = Export("full", full.parts, configs, {}, {}, None)
    state = single_file_tensors(made)
    assert state.keys() - single_file_tensors(full).keys() == markers and len(state) == 2_515 + len(markers)
    assert all(state[name].numel() == 0 for name in markers)
    scheduler = configs["scheduler"]
    assert scheduler["prediction_type"] == diffusion.prediction_type
    assert bool(scheduler.get("rescale_betas_zero_snr")) == ("ztsnr" in markers)
    assert scheduler["timestep_spacing"] == ("trailing" if "ztsnr" in markers else "leading")


def test_full_size_modules_are_what_the_configs_build(full):
    """The configs that lie in an exported folder make modules of exactly the tensors beside them."""
    with torch.device("meta"):
        for component, part in full.parts.items():
            module = build_module(component, full.configs[component])
            assert sum(tensor.numel() for tensor in part.values()) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("words", [[], ["diffusion.prediction_type=v_prediction", "diffusion.zero_terminal_snr=true"]])
def test_modelspec(tiny_base, tmp_path, words):
    """Version 1.0.1: what must be there, what should, and their forms (github.com/Stability-AI/ModelSpec)."""
    base = find_base(str(tiny_base))
    trained = {part: read_state(base, component) for part, component in COMPONENTS.items()}
    run = make_run(tmp_path / "run", tiny_base, trained, "publish.formats=[single_file]", "publish.dtype=fp16", *words)
    (file,) = export(run)
    with file.open("rb") as reader:  # the format: a length, a header of so many bytes, the tensors
        (length,) = struct.unpack("<Q", reader.read(8))
        header = json.loads(reader.read(length))
        body = reader.read()
    metadata = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values())
    spec = {name.removeprefix("modelspec."): value for name, value in metadata.items() if name.startswith("modelspec.")}
    must = {"sai_model_spec": "1.0.1", "architecture": "stable-diffusion-xl-v1-base",
            "implementation": "https://github.com/Stability-AI/generative-models", "title": "run"}  # fmt: skip
    assert must.items() <= spec.items()
    assert spec["description"] and spec["author"] == "A. N. Other"
    assert datetime.datetime.fromisoformat(spec["date"]).tzinfo is not None
    assert re.fullmatch(r"\d+x\d+", spec["resolution"]) and spec["prediction_type"] == ("v" if words else "epsilon")
    assert re.fullmatch("0x[0-9a-f]{64}", spec["hash_sha256"])
    assert spec["hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(body)  # all of it is tensors
    assert {"v_pred", "ztsnr"} & header.keys() == ({"v_pred", "ztsnr"} if words else set())

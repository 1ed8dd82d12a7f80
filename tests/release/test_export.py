"""Exports load everywhere and hold exactly what was trained; nothing wrong is exported, nothing overwritten."""

import hashlib
import json
import runpy
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from support.checkpoints import MODEL, OPTIMIZER
from support.exported_run import Parts, make_run, moved_weights
from support.paths import REPOSITORY
from trainer.core.errors import UserError
from trainer.model.base import find_base, find_tokenizers, read_config, read_state, read_vae
from trainer.model.lineage import read_lineage
from trainer.model.sdxl import COMPONENTS
from trainer.release.export import export


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tiny_base) -> Parts:
    return moved_weights(tiny_base)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base, trained) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_base, trained)


@pytest.fixture(scope="module")
def exported(run) -> tuple[Path, Path]:
    file, folder = export(run)
    return file, folder


def draw(pipeline: StableDiffusionXLPipeline) -> np.ndarray:
    """Two steps with guidance, so that both prompts and both encoders matter.

    Libraries may leave weights in a mapped file, at any address; the last bits of a product depend on its alignment.
    """
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.load_state_dict({name: tensor.clone() for name, tensor in module.state_dict().items()}, assign=True)
    return pipeline(
        "bird, solo", negative_prompt="tree", num_inference_steps=2, guidance_scale=3.0, height=64, width=64,
        generator=torch.Generator().manual_seed(1), output_type="np",
    ).images  # fmt: skip


def assemble(tiny_base: Path, trained: Parts) -> StableDiffusionXLPipeline:
    """A pipeline from the trained tensors themselves, without any export."""
    base = find_base(str(tiny_base))
    configs = {component: read_config(base, component) for component in (*COMPONENTS.values(), "vae")}
    modules = {
        "unet": UNet2DConditionModel.from_config(configs["unet"]),
        "vae": AutoencoderKL.from_config(configs["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
    }
    states = {COMPONENTS[part]: state for part, state in trained.items()} | {"vae": read_state(base, "vae")}
    for component, module in modules.items():
        own = set(module.state_dict())
        module.load_state_dict(
            {
                name if name in own else name.removeprefix("text_model."): tensor
                for name, tensor in states[component].items()
            }
        )
        module.eval()
    return StableDiffusionXLPipeline(
        **modules,
        tokenizer=CLIPTokenizer.from_pretrained(tiny_base / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tiny_base / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler.from_config(read_config(base, "scheduler")),
    )


def test_images_are_those_of_the_trained_modules(tiny_base, trained, exported):
    """Bit for bit, from an fp32 export, loaded by diffusers alone."""
    file, folder = exported
    expected = draw(assemble(tiny_base, trained))
    base_images = draw(StableDiffusionXLPipeline.from_pretrained(tiny_base, local_files_only=True))
    assert not np.array_equal(base_images, expected)
    from_folder = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert np.array_equal(draw(from_folder), expected)
    from_file = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert np.array_equal(draw(from_file), expected)


def test_both_forms_hold_what_was_trained(tiny_base, trained, exported):
    """The next stage reads bit by bit what this one made, from either."""
    for path in exported:
        base = find_base(str(path))
        for part, component in COMPONENTS.items():
            state = read_state(base, component)
            assert state.keys() == trained[part].keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in trained[part].items())
        assert read_vae(None, base).sha256 == read_vae(None, find_base(str(tiny_base))).sha256
        channels = read_config(find_base(str(tiny_base)), "unet")["block_out_channels"]
        assert read_config(base, "unet")["block_out_channels"] == channels
    assert find_tokenizers(find_base(str(exported[1])), None)


def test_half_precision_and_its_vae(tiny_base, trained, run, tmp_path):
    for dtype, expected in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for path in export(run, tmp_path, dtype):
            base = find_base(str(path))
            state = read_state(base, "unet")
            assert all(torch.equal(state[name], tensor.to(expected)) for name, tensor in trained["unet"].items())
            assert {tensor.dtype for tensor in read_state(base, "vae").values()} == {expected}
            assert dtype in path.name
            if dtype == "fp16":  # the latents of this stage serve the next
                assert read_vae(None, base).sha256 == read_vae(None, find_base(str(tiny_base))).sha256


def test_classic_names_and_files(exported):
    """What transformers 4 looks for: without ``text_model.`` it fills the encoder with random weights."""
    folder = exported[1]
    with safe_open(folder / "text_encoder" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    with safe_open(folder / "text_encoder_2" / "model.safetensors", framework="pt") as file:
        others = [name for name in file.keys() if not name.startswith("text_model.")]  # noqa: SIM118
        assert others == ["text_projection.weight"]
    for name in ("tokenizer", "tokenizer_2"):
        assert sorted(path.name for path in (folder / name).iterdir()) == [
            "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"
        ]  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}


def read_header(file: Path) -> tuple[dict[str, str], bytes]:
    """A single file's metadata, and the bytes behind the header."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"], content[8 + length :]


def test_the_file_explains_itself(exported, run):
    metadata, tensors = read_header(exported[0])
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert metadata["modelspec.title"] == "tiny" and metadata["modelspec.author"] == "A. N. Other"
    assert metadata["modelspec.resolution"] == "1024x1024" and metadata["modelspec.license"] == "faipl-1.0-sd"
    assert json.loads(metadata["trainer.recipe"])["optim"]["unet_lr"] == 1e-3
    lineage = read_lineage(run / "checkpoints" / "step-00000020")
    assert lineage["step"] == 20
    assert read_lineage(exported[0]) == lineage == read_lineage(exported[1])


def test_nothing_of_the_users_folders_is_published(exported, tiny_base, run):
    texts = [*read_header(exported[0])[0].values()]
    texts += [path.read_text(encoding="utf-8") for path in exported[1].rglob("*.json")]
    for private in (str(tiny_base), str(run), str(run.parent), str(Path.home()) + "/"):
        assert not any(private in text for text in texts)
    assert not any('"/' in text for text in texts if "vocab" not in text and "<|startoftext|>" not in text)


def test_again_is_nothing_new(exported, run):
    before = {path: path.stat().st_mtime_ns for path in (run / "export").rglob("*")}
    assert export(run) == list(exported)
    assert {path: path.stat().st_mtime_ns for path in (run / "export").rglob("*")} == before


def test_steps_and_dtypes_lie_side_by_side(run, exported, tiny_base, trained, tmp_path):
    later = make_run(tmp_path / "tiny", tiny_base, trained, step=40)
    shutil.copytree(run / "checkpoints" / "step-00000020", later / "checkpoints" / "step-00000020")
    written = export(later)  # the newest
    written += export(later, dtype="bf16")
    written += export(later / "checkpoints" / "step-00000020")
    assert [path.name for path in written] == [
        "tiny-step-00000040-fp32.safetensors", "tiny-step-00000040-fp32",
        "tiny-step-00000040-bf16.safetensors", "tiny-step-00000040-bf16",
        "tiny-step-00000020-fp32.safetensors", "tiny-step-00000020-fp32",
    ]  # fmt: skip
    sums = {path.name.removesuffix(".safetensors") + ".sha256" for path in written}
    assert {path.name for path in (later / "export").iterdir()} == {path.name for path in written} | sums


@pytest.mark.parametrize("place", ["file", "folder"])
def test_other_work_is_never_overwritten(tiny_base, trained, tmp_path, place):
    form = {"file": "single_file", "folder": "diffusers"}[place]
    run = make_run(tmp_path / "tiny", tiny_base, trained, f"publish.formats=[{form}]")
    (path,) = export(run)
    victim = path if place == "file" else path / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="left alone"):
        export(run)
    assert victim.read_bytes() == content
    sums = path.name.removesuffix(".safetensors") + ".sha256"
    assert {entry.name for entry in (run / "export").iterdir()} == {path.name, sums}  # and no temporary files


def test_what_was_not_trained_is_the_bases(tiny_base, trained, tmp_path):
    words = ["model.train_text_encoder_1=false", "model.train_text_encoder_2=false", "optim.text_encoder_1_lr=0",
             "optim.text_encoder_2_lr=0", "publish.formats=[single_file]"]  # fmt: skip
    run = make_run(tmp_path / "stage2", tiny_base, {"unet": trained["unet"]}, *words)
    (file,) = export(run)
    for component in ("text_encoder", "text_encoder_2"):
        ours, theirs = (read_state(find_base(str(path)), component) for path in (file, tiny_base))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(read_state(find_base(str(file)), "unet")["conv_in.bias"], trained["unet"]["conv_in.bias"])


def copy_base(tiny_base: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny_base, target))


def test_another_base_is_refused(tiny_base, trained, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    run = make_run(tmp_path / "run", base, trained, "publish.formats=[single_file]")
    other = dict(read_state(find_base(str(base)), "text_encoder"))
    other["text_model.final_layer_norm.bias"] = other["text_model.final_layer_norm.bias"] + 1
    (base / "text_encoder" / "model.safetensors").unlink()
    save_file(other, base / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not the model that this checkpoint was trained from"):
        export(run)
    assert not list((run / "export").glob("*"))


def test_a_base_that_moved_is_found_by_the_config(tiny_base, trained, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    run = make_run(tmp_path / "run", base, trained, "publish.formats=[single_file]")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="does not exist"):
        export(run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(base), str(tmp_path / "moved")))
    assert export(run)


def test_another_vae_is_refused(tiny_base, trained, tmp_path):
    run = make_run(tmp_path / "run", tiny_base, trained)
    vae = Path(shutil.copytree(tiny_base / "vae", tmp_path / "vae"))
    state = {name: tensor * 2 for name, tensor in read_state(find_base(str(tiny_base)), "vae").items()}
    save_file(state, vae / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    config = OmegaConf.load(run / "config.yaml")
    config.model.vae = str(vae)
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(UserError, match=r"not the one that made the latents.*model\.vae"):
        export(run)


def test_a_separate_vae_is_exported(tiny_base, trained, tmp_path):
    vae = Path(shutil.copytree(tiny_base / "vae", tmp_path / "vae"))
    state = {name: tensor * 2 for name, tensor in read_state(find_base(str(tiny_base)), "vae").items()}
    save_file(state, vae / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    run = make_run(tmp_path / "run", tiny_base, trained, f"model.vae={vae}", "publish.formats=[diffusers]")
    (folder,) = export(run)
    exported = read_state(find_base(str(folder)), "vae")
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_damaged_checkpoint_is_refused(tiny_base, trained, tmp_path, name):
    run = make_run(tmp_path / "run", tiny_base, trained)
    path = run / "checkpoints" / "step-00000020" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        export(run)


@pytest.mark.parametrize(
    ("part", "name", "shape", "message"),
    [
        ("unet", "lora_up.weight", (2, 2), r"unet has tensors that .* has not: lora_up\.weight"),
        ("unet", "conv_in.bias", (31,), r"unet\.conv_in\.bias has different shapes: \(31,\)"),
        ("vae", "conv_in.bias", (31,), r"no known part: vae\.conv_in\.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tiny_base, trained, tmp_path, part, name, shape, message):
    run = make_run(tmp_path / "run", tiny_base, trained | {part: trained.get(part, {}) | {name: torch.zeros(shape)}})
    with pytest.raises(UserError, match=message):
        export(run)


def test_values_beyond_fp16_are_named(tiny_base, trained, tmp_path):
    large = trained["unet"] | {"conv_in.bias": torch.full((32,), 70_000.0)}
    run = make_run(tmp_path / "run", tiny_base, trained | {"unet": large}, "publish.formats=[single_file]")
    with pytest.raises(UserError, match=r"unet\.conv_in\.bias.*70000.*--dtype"):
        export(run, dtype="fp16")
    assert export(run, dtype="bf16")


def test_v_prediction_is_marked(tiny_base, trained, tmp_path):
    words = ["diffusion.prediction_type=v_prediction", "diffusion.zero_terminal_snr=true"]
    run = make_run(tmp_path / "run", tiny_base, trained, *words)
    file, folder = export(run)
    with safe_open(file, framework="pt") as reader:
        assert {"v_pred", "ztsnr"} <= set(reader.keys())
        assert reader.metadata()["modelspec.prediction_type"] == "v"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    expected = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert expected.items() <= scheduler.items()
    pipeline = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    assert expected.items() <= dict(pipeline.scheduler.config).items()
    assert np.array_equal(draw(pipeline), draw(StableDiffusionXLPipeline.from_pretrained(folder)))
    # a next stage in epsilon says so again
    words = ["diffusion.prediction_type=epsilon", "publish.formats=[diffusers]"]
    (folder,) = export(make_run(tmp_path / "next", folder, trained, *words))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon" and not scheduler["rescale_betas_zero_snr"]


def test_stages_meet_through_the_single_file(exported, tiny_base, trained, tmp_path):
    """Stage 2 from stage 1's single file: configs from the file, tokenizers by model.tokenizer, lineage nested."""
    file = exported[0]
    run = make_run(tmp_path / "stage2", file, trained, f"model.tokenizer={tiny_base}")
    single, folder = export(run)
    assert read_lineage(single)["base"]["lineage"] == read_lineage(file)
    expected = draw(assemble(tiny_base, trained))
    assert np.array_equal(draw(StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)), expected)


def test_tokenizers_of_transformers_5_become_classic(tiny_base, trained, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    for name in ("tokenizer", "tokenizer_2"):
        CLIPTokenizer.from_pretrained(tiny_base / name).save_pretrained(tmp_path / name)
        shutil.rmtree(base / name)
        (tmp_path / name).rename(base / name)
        assert not (base / name / "vocab.json").exists()
    (folder,) = export(make_run(tmp_path / "run", base, trained, "publish.formats=[diffusers]"))
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        made, classic = folder / name, tiny_base / name
        assert json.loads((made / "vocab.json").read_text()) == json.loads((classic / "vocab.json").read_text())
        assert (made / "merges.txt").read_text() == (classic / "merges.txt").read_text()
        assert json.loads((made / "special_tokens_map.json").read_text())["pad_token"] == padding
        text = "Bird, love_live and 3 trees"
        ids = [CLIPTokenizer.from_pretrained(path)(text, padding="max_length").input_ids for path in (made, classic)]
        assert ids[0] == ids[1]


def test_a_checkpoint_alone(run, tmp_path, trained):
    """It carries its config; only where to write is asked for."""
    checkpoint = Path(shutil.copytree(run / "checkpoints" / "step-00000020", tmp_path / "step-00000020"))
    with pytest.raises(UserError, match="--out"):
        export(checkpoint)
    file, _ = export(checkpoint, tmp_path / "out")
    assert torch.equal(read_state(find_base(str(file)), "unet")["conv_in.bias"], trained["unet"]["conv_in.bias"])


def test_neither_run_nor_checkpoint(tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        export(tmp_path)


def test_the_command_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--out", str(tmp_path), "--dtype", "fp16"])
    runpy.run_path(str(REPOSITORY / "scripts" / "export.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert str(tmp_path / "tiny-step-00000020-fp16.safetensors") in said
    assert f'from_pretrained("{tmp_path / "tiny-step-00000020-fp16"}")' in said
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(REPOSITORY / "scripts" / "export.py"), run_name="__main__")
    assert ending.value.code == 2 and "neither a checkpoint nor a run" in capsys.readouterr().err

"""Drawing with any checkpoint: an image is a function of what its file says, and nothing is overwritten."""

import json
import runpy
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.paths import REPOSITORY
from trainer.config.schema import NEGATIVE_PROMPT, SamplingConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.data.buckets import list_buckets
from trainer.model.base import find_base, hash_base, read_config, read_state
from trainer.model.hub import STEMS
from trainer.model.single_file import to_single_file
from trainer.sample import drawing
from trainer.sample.drawing import default_folder, draw, find_source, load_source
from trainer.sample.pictures import (
    CARD_SIZES,
    Picture,
    check_sampling,
    grid_scale,
    plan_pictures,
    read_prompts,
    read_samples,
    read_size,
)

QUICK = SamplingConfig(num_inference_steps=2)
Sample = Callable[..., list[str]]


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run scripts/sample.py with some words; what it printed, line by line."""

    def run(*words: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        runpy.run_path(str(REPOSITORY / "scripts" / "sample.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)


def settings(path: Path) -> dict:
    return json.loads(texts(path)["settings"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def copy_with(folder: Path, target: Path, component: str, **changes: object) -> Path:
    """A copy of a model with another config of one component."""
    shutil.copytree(folder, target)
    file = target / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


# --- what is to be drawn


def test_the_cards_sizes_are_buckets():
    """Recipe, sections 1 and 3."""
    assert len(set(CARD_SIZES)) == 9 and set(CARD_SIZES) <= set(list_buckets(1024, 512, 2048, 64))
    listed = (REPOSITORY / "docs/recipe.md").read_text().split("Sizes on the card: ")[1].split(".")[0]
    assert [read_size(size) for size in listed.split(", ")] == list(CARD_SIZES)


def test_every_image_has_its_seed():
    pictures = plan_pictures(["a", "b"], [(64, 96), (96, 64)], 42)
    assert pictures == [
        Picture("a", (64, 96), 42), Picture("a", (96, 64), 43), Picture("b", (64, 96), 44), Picture("b", (96, 64), 45),
    ]  # fmt: skip


def test_a_prompts_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# mine\r\n1girl, solo\r\n\r\n  木, #tag  \r\n   # no\r\n".encode())
    assert read_prompts(file) == ["1girl, solo", "木, #tag"]
    file.write_text("# only this\n\n")
    with pytest.raises(UserError, match=r"prompts\.txt has no prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    for path in (file, tmp_path / "gone.txt", tmp_path):
        with pytest.raises(UserError, match=f"{path.name} cannot be read"):
            read_prompts(path)


@pytest.mark.parametrize(
    "text", ["832", "832x", "x832", "832x1220", "0x64", "-64x64", "64x64x64", "a x b", "\u0666x64"]
)
def test_sizes_that_are_none(text):
    assert read_size("832x1216") == (832, 1216)
    with pytest.raises(UserError, match="WIDTHxHEIGHT in multiples of 8"):
        read_size(text)


@pytest.mark.parametrize(("steps", "guidance"), [(0, 7.0), (1001, 7.0), (28, 0.5), (28, float("nan"))])
def test_settings_that_mean_nothing(steps, guidance):
    check_sampling(SamplingConfig())
    with pytest.raises(UserError, match=r"--steps|--guidance"):
        check_sampling(SamplingConfig(num_inference_steps=steps, guidance_scale=guidance))


def test_large_grids_are_shrunk():
    assert grid_scale([(1024, 1024)] * 4, 2) == 1.0
    scale = grid_scale([(1536, 640), (640, 1536)] * 50, 2)
    assert 200 * (1536 * scale) ** 2 == pytest.approx(64_000_000)
    image = drawing.shrink(Image.new("RGB", (1536, 640)), 0.5)
    assert image.size == (768, 320)


def test_the_runs_own_settings():
    card = SamplingConfig(width=1024, height=1024)
    strange = {"width": True, "guidance_scale": "${x}", "negative_prompt": "${y}"}
    configs = [None, {"sampling": [], "buckets": 3}, {"sampling": strange}]
    for unknown in (None, {}, *({"config": config} for config in configs)):
        assert drawing.trained_sampling(unknown) == card
    small = {
        "buckets": {"base_resolution": 128},
        "sampling": {"guidance_scale": 1.0, "width": None, "prompts": ["sea"]},
    }
    assert drawing.trained_sampling({"config": small}) == SamplingConfig(guidance_scale=1.0, width=128, height=128)
    small["sampling"] |= {"width": 96, "num_inference_steps": 3, "negative_prompt": "bad"}
    expected = SamplingConfig(guidance_scale=1.0, width=96, height=128, num_inference_steps=3, negative_prompt="bad")
    assert drawing.trained_sampling({"config": small}) == expected


# --- the images


def test_the_cards_settings_by_default(tiny_base, tmp_path, sample):
    """Of what takes no size: at 1024 x 1024 the tiny model would take long."""
    printed = sample(tiny_base, "--prompt", "1girl, 木", "--size", "64x96", "--out", tmp_path)
    assert names(tmp_path) == ["000-64x96-seed42.png", "grid.png"]
    assert f"grid: {tmp_path / 'grid.png'}" in printed
    path = tmp_path / "000-64x96-seed42.png"
    with Image.open(path) as image:
        assert image.size == (64, 96) and image.mode == "RGB"
    assert texts(path).keys() == {"prompt", "negative_prompt", "settings"}
    assert texts(path)["prompt"] == "1girl, 木" and texts(path)["negative_prompt"] == NEGATIVE_PROMPT
    said = settings(path)
    expected = {"model": "tiny", "sha256": hash_base(find_base(str(tiny_base))), "size": "64x96", "seed": 42,
                "steps": 28, "guidance": 7.0, "sampler": "Euler ancestral", "prediction_type": "epsilon",
                "zero_terminal_snr": False, "max_token_length": 225}  # fmt: skip
    assert expected.items() <= said.items() and said["versions"]["torch"]
    assert not any(str(tiny_base.parent) in text for text in texts(path).values())
    assert texts(tmp_path / "grid.png") == {}
    # what publishing takes from such a folder: the image, not the grid
    (taken,) = read_samples(tmp_path)
    assert (taken.path, taken.prompt, taken.negative_prompt, taken.settings) == (
        path,
        "1girl, 木",
        NEGATIVE_PROMPT,
        said,
    )


def test_an_image_alone_is_the_same_file(tiny_base, tmp_path, sample):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("bird\ntree\n")
    words = ["--steps", 2, "--size", "64x64", "96x64"]
    sample(tiny_base, "--prompts", prompts, "--prompt", "sea", *words, "--seed", 7, "--out", tmp_path / "all")
    files = sorted((tmp_path / "all").glob("0*.png"))
    assert [settings(file)["seed"] for file in files] == [7, 8, 9, 10, 11, 12]
    alone = ["--prompt", "tree", "--steps", 2, "--size", "96x64", "--seed", 10, "--out", tmp_path / "alone"]
    sample(tiny_base, *alone)
    assert (tmp_path / "alone" / "000-96x64-seed10.png").read_bytes() == files[3].read_bytes()
    with Image.open(tmp_path / "all" / "grid.png") as grid:
        assert 2 * 96 < grid.width < 3 * 96 and grid.height > 3 * 64  # a column for each size
    # each of prompt, seed, steps, guidance and negative prompt matters
    others = [["--prompt", "sea"], ["--seed", 11], ["--steps", 3], ["--guidance", 5], ["--negative", "x"]]
    for number, other in enumerate(others):
        sample(tiny_base, *alone, *other, "--out", tmp_path / str(number))
        (file,) = (tmp_path / str(number)).glob("0*.png")
        with Image.open(file) as image, Image.open(files[3]) as first:
            assert not np.array_equal(np.asarray(image), np.asarray(first)), other


def test_nothing_is_overwritten(tiny_base, tmp_path, monkeypatch):
    source, pictures = find_source(str(tiny_base)), plan_pictures(["a"], [(64, 64)], 1)
    draw([source], pictures, QUICK, tmp_path, columns=1)
    before = {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    monkeypatch.setattr(drawing, "load_source", None)  # it is refused before anything is loaded
    for kept in ("grid.png", "000-64x64-seed1.png"):
        with pytest.raises(UserError, match=rf"holds {kept} already.*--out DIR"):
            draw([source], pictures, QUICK, tmp_path, columns=1)
        assert before == {path.name: (sha256_file(path), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
        (tmp_path / "grid.png").unlink(missing_ok=True)
        before.pop("grid.png", None)


def test_drawing_again_beside_the_model_numbers_on(tiny_base, tmp_path, sample):
    """Nothing is overwritten, and publishing finds all images."""
    shutil.copytree(tiny_base, tmp_path / "export" / "model")
    words = [tmp_path / "export" / "model", "--size", "64x64", "--steps", 1]
    sample(*words, "--prompt", "a", "b")
    folder = tmp_path / "export" / "samples"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    printed = sample(*words, "--prompt", "a")
    assert f"grid: {folder / 'grid-2.png'}" in printed
    (folder / "grid.png").unlink()  # as where somebody tidied up
    sample(*words, "--prompt", "c")
    assert names(folder) == [
        "000-64x64-seed42.png", "001-64x64-seed43.png", "002-64x64-seed42.png", "003-64x64-seed42.png", "grid-2.png",
        "grid.png",
    ]  # fmt: skip
    assert all((folder / name).read_bytes() == content for name, content in before.items() if name != "grid.png")
    assert (folder / "002-64x64-seed42.png").read_bytes() == before["000-64x64-seed42.png"]
    assert [each.prompt for each in read_samples(folder)] == ["a", "b", "a", "c"]


def pixels(folder: Path) -> list[np.ndarray]:
    """The single images in a folder, in order."""
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_long_prompts_are_encoded_as_in_training(tiny_base, tmp_path, notes):
    """Three chunks are seen; what lies behind the 225th token is not, which is told."""
    source = find_source(str(tiny_base))
    (bird,) = load_source(source, None).tokenizers[0].content_ids(["bird,"])
    assert len(bird) == 2
    middle, whole = "bird, " * 100, "bird, " * 112 + "bird"  # 200 and 225 tokens
    prompts = [f"{middle} sea", f"{middle} tree", whole, f"{whole}, sea", f"{whole}, tree"]
    draw([source], [Picture(prompt, (64, 64), 1) for prompt in prompts], QUICK, tmp_path, columns=5)
    sea, tree, exact, cut, cut_too = pixels(tmp_path)
    assert not np.array_equal(sea, tree)
    assert np.array_equal(exact, cut) and np.array_equal(cut, cut_too)
    assert notes().count("only the first 225 of its 22") == 2


def test_two_checkpoints_side_by_side(tiny_base, tmp_path, sample):
    other = copy_with(tiny_base, tmp_path / "other", "vae", scaling_factor=0.5)
    words = ["--prompt", "bird", "sea", "--steps", 2, "--size", "64x64"]
    sample(tiny_base, *words, "--compare", other, "--out", tmp_path / "both")
    assert names(tmp_path / "both") == [
        "000-64x64-seed42-A.png", "000-64x64-seed42-B.png", "001-64x64-seed43-A.png", "001-64x64-seed43-B.png",
        "grid.png",
    ]  # fmt: skip
    for letter, model in (("A", tiny_base), ("B", other)):  # the same noise, and the same files as without the other
        sample(model, *words, "--out", tmp_path / letter)
        for name in names(tmp_path / letter)[:2]:
            both = tmp_path / "both" / name.replace(".png", f"-{letter}.png")
            assert both.read_bytes() == (tmp_path / letter / name).read_bytes()
            assert settings(both)["model"] == model.name
    drawn = pixels(tmp_path / "both")
    assert not np.array_equal(drawn[0], drawn[1])
    with Image.open(tmp_path / "both" / "grid.png") as grid:
        array = np.asarray(grid)
    for number, (top, left) in enumerate([(8, 8), (8, 80), (120, 8), (120, 80)]):  # rows are prompts
        assert np.array_equal(array[top : top + 64, left : left + 64], drawn[number])


def test_one_model_at_a_time_is_in_memory(tiny_base, tmp_path, monkeypatch):
    loaded: list[weakref.ref] = []

    def load(*words):
        assert all(model() is None for model in loaded)
        model = load_source(*words)
        loaded.append(weakref.ref(model.sdxl.unet))
        return model

    monkeypatch.setattr(drawing, "load_source", load)
    source = find_source(str(tiny_base))
    draw([source, source], plan_pictures(["a", "b"], [(64, 64)], 1), QUICK, tmp_path, columns=1)
    assert len(loaded) == 2


# --- whose model


def test_the_models_own_scheduler_is_followed(tiny_base, tmp_path):
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    model = load_source(find_source(str(copy_with(tiny_base, tmp_path / "v", "scheduler", **changes))), None)
    assert changes.items() <= dict(model.pipeline.scheduler.config).items()
    model.pipeline.scheduler.set_timesteps(28)
    assert int(model.pipeline.scheduler.timesteps[0]) == 999  # where the signal is zero
    assert model.facts["prediction_type"] == "v_prediction" and model.facts["zero_terminal_snr"]
    plain = load_source(find_source(str(tiny_base)), None).pipeline.scheduler.config
    assert plain.prediction_type == "epsilon" and plain.timestep_spacing == "leading"
    with pytest.raises(UserError, match="prediction_type 'sample'"):
        find_source(str(copy_with(tiny_base, tmp_path / "x", "scheduler", prediction_type="sample")))


@pytest.mark.parametrize(("lineage", "length"), [
    ({"config": {"captions": {"max_token_length": 75}}}, 75), ({"config": {"captions": {"max_token_length": 9}}}, 225),
    ({"config": None}, 225), ({"config": {"captions": []}}, 225), ({}, 225),
])  # fmt: skip
def test_token_length_is_that_of_the_training(tiny_base, tmp_path, lineage, length):
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    (folder / "lineage.json").write_text(json.dumps(lineage))
    assert find_source(str(folder)).max_token_length == length


def test_a_vae_that_overflows_is_not_run_in_half_precision(tiny_base, tmp_path):
    safe = copy_with(tiny_base, tmp_path / "safe", "vae", force_upcast=False)
    unsafe = copy_with(tiny_base, tmp_path / "unsafe", "vae", force_upcast=True)
    for folder, dtype in ((safe, torch.bfloat16), (unsafe, torch.float32)):
        model = load_source(find_source(str(folder)), "bf16")
        assert model.pipeline.vae.dtype == dtype and model.sdxl.unet.dtype == torch.bfloat16
        draw([find_source(str(folder))], plan_pictures(["a"], [(64, 64)], 1), QUICK, tmp_path / folder.name / "out",
             columns=1, dtype="bf16")  # fmt: skip
        assert settings(tmp_path / folder.name / "out" / "000-64x64-seed1.png")["dtype"] == "bf16"


def write_single(folder: Path, target: Path, components: tuple[str, ...] = tuple(STEMS)) -> Path:
    """A single file of ours, as export writes it, from a folder."""
    base = find_base(str(folder))
    configs = {name: read_config(base, name) for name in (*STEMS, "scheduler", "model_index")}
    tensors = to_single_file({name: read_state(base, name) for name in components}, configs)
    save_file(tensors, target, {"trainer.configs": json.dumps(configs)})
    return target


def test_a_single_file_draws_the_same(tiny_base, tmp_path):
    """It has no tokenizers: they are named, or lie in the folder of the same name beside it, or around it."""
    file = write_single(tiny_base, tmp_path / "tiny.safetensors")
    with pytest.raises(UserError, match=r"no tokenizer in .*: set --tokenizer"):
        find_source(str(file))
    sources = [find_source(str(file), str(tiny_base)), find_source(str(tiny_base))]
    shutil.copytree(tiny_base, tmp_path / "tiny")
    sources.append(find_source(str(file)))
    sources.append(find_source(str(shutil.copy(file, tmp_path / "tiny" / "tiny.safetensors"))))
    assert {source.name for source in sources} == {"tiny"}
    draw(sources, plan_pictures(["bird"], [(64, 64)], 1), QUICK, tmp_path / "out", columns=1)
    first, *others = pixels(tmp_path / "out")
    assert len(others) == 3 and all(np.array_equal(first, other) for other in others)
    assert settings(tmp_path / "out" / "000-64x64-seed1-A.png")["sha256"] == sha256_file(file)


def test_what_cannot_draw_is_named(tiny_base, tmp_path):
    file = write_single(tiny_base, tmp_path / "a.safetensors", ("unet", "text_encoder", "text_encoder_2"))
    with pytest.raises(UserError, match=r"a\.safetensors has no VAE"):
        find_source(str(file), str(tiny_base))
    with pytest.raises(UserError, match=r"MODEL: .*gone does not exist"):
        find_source(str(tmp_path / "gone"))
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="pickled"):
        find_source(str(tmp_path / "a.ckpt"))


def test_a_run_is_its_newest_export(tiny_base, tmp_path):
    """Drawn into export/samples, where publishing takes its images from."""
    run = tmp_path / "runs" / "mine"
    for step in (8, 16):
        shutil.copytree(tiny_base, run / "export" / f"mine-step-{step:08d}-fp16")
    (run / "run.json").write_text("{}")
    source = find_source(str(run))
    assert source.name == "mine-step-00000016-fp16"
    assert default_folder([source]) == run / "export" / "samples"
    assert default_folder([source, source]) == run / "export" / "comparison"


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "nothing to draw"), (["--prompt", "a", "--size", "100x100"], "multiples of 8"),
     (["--prompt", "a", "--steps", "0"], "--steps 0"), (["--prompts", "gone.txt"], "gone.txt cannot be read")],
)  # fmt: skip
def test_the_users_problems(tiny_base, tmp_path, sample, capsys, words, message):
    with pytest.raises(SystemExit) as ending:
        sample(tiny_base, *words, "--out", tmp_path)
    assert ending.value.code == 2 and message in capsys.readouterr().err and names(tmp_path) == []

"""The demo's drawings, posts and VAE, and the tiny base model that is made from them."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.prepare.prepare import prepare
from trainer.release.export import export
from trainer.sample.drawing import trained_sampling
from trainer.train.loop import train

DEMO = REPOSITORY / "demo"
POSTS: list[dict[str, Any]] = [json.loads(line) for line in (DEMO / "posts.jsonl").read_text("utf-8").splitlines()]
STAGES: list[list[dict[str, Any]]] = [
    [json.loads(line) for line in (DEMO / f"stage{stage}.jsonl").read_text("utf-8").splitlines()] for stage in (1, 2)
]
POST_FIELDS = {
    "id", "file", "file_ext", "image_width", "image_height", "created_at", "tag_string_general", "source",
    "tag_string_character", "tag_string_copyright", "tag_string_artist", "tag_string_meta",
}  # fmt: skip
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# dB at 128 x 128 px; measured: mean 21.4 and worst 16.4 of every fifth drawing (of all: 21.5 and 14.3).
MEAN_PSNR, WORST_PSNR = 20.5, 14.5


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """The scripts importable by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        yield


def make_tiny_base(out: Path, seed: int = 3, vae: Path = DEMO / "tiny_vae.safetensors") -> None:
    from make_tiny_base import main

    words = [str(out), "--seed", str(seed), "--vae", str(vae), "--posts", str(DEMO / "posts.jsonl")]
    main(words)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, scripts: None) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "base"
    make_tiny_base(out)
    return out


def test_every_post_has_its_image_and_states_its_size() -> None:
    for post in POSTS:
        with Image.open(DEMO / "images" / post["file"]) as image:
            assert image.size == (post["image_width"], post["image_height"]), post["file"]
            assert image.format == "PNG"
            assert post["file_ext"] == "png"
    assert {post["file"] for post in POSTS} == {path.name for path in (DEMO / "images").iterdir()}


def test_posts_are_those_of_the_list_and_invent_nothing() -> None:
    drawings = [line.split() for line in (DEMO / "drawings.txt").read_text("utf-8").splitlines()]
    assert [post["source"] for post in POSTS] == [f"openclipart-svg/svg/{name}" for name, *_ in drawings]
    assert [post["id"] for post in POSTS] == list(range(1, len(drawings) + 1))
    for post, (_, *seen) in zip(POSTS, drawings, strict=True):
        assert post["tag_string_general"].split()[: len(seen)] == seen
        assert bool(seen) == (post["file"] in {post["file"] for post in STAGES[0]})  # by eye only where trained on
    for post in POSTS:
        assert set(post) <= POST_FIELDS  # no rating, no score
        assert post["tag_string_general"]
        assert "," not in post["tag_string_general"]
    dated = [post["created_at"] for post in POSTS if "created_at" in post]
    assert 10 < len(dated) < len(POSTS)
    assert all(date.startswith("2005-") for date in dated)


def test_the_stages_are_chosen_from_the_posts_and_no_drawing_is_known_by_its_size() -> None:
    stage1, stage2 = STAGES
    assert all(post in POSTS for post in stage1) and all(post in stage1 for post in stage2)
    assert (len(stage1), len(stage2)) == (12, 8)
    people = [post for post in stage2 if {"1girl", "1boy"} & set(post["tag_string_general"].split())]
    assert len(people) == 6
    # the size conditioning of a set this small would be a second name of each drawing, which prompts do not have
    sizes = Counter((post["image_width"], post["image_height"]) for post in stage1)
    assert sizes == {(272, 272): 10, (162, 270): 2}


def test_the_drawings_are_varied_and_the_demo_is_small() -> None:
    ratios = [post["image_width"] / post["image_height"] for post in POSTS]
    assert (
        min(sum(r < 0.87 for r in ratios), sum(r > 1.15 for r in ratios), sum(0.87 <= r <= 1.15 for r in ratios)) > 30
    )
    transparent = 0
    for post in POSTS:
        with Image.open(DEMO / "images" / post["file"]) as image:
            transparent += image.mode == "RGBA" and 0 in image.getchannel("A").tobytes()
    assert transparent >= 15
    sizes = {path: path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 4_500_000
    assert sizes[DEMO / "tiny_vae.safetensors"] <= 2_000_000


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2005/06/21", "2005-06-21"),
        ("2005-08-19", "2005-08-19"),
        ("19 08 2005", "2005-08-19"),
        ("6/24/2005", "2005-06-24"),
        ("May 3, 2005", "2005-05-03"),
        ("2005 August 29", "2005-08-29"),
        ("03/04/2005", None),  # the third of April, or the fourth of March
        ("2004-08-39", None),
        ("07-28-05", None),
        ("September 2005", None),
        ("", None),
    ],
)
def test_a_date_is_taken_only_where_it_is_one_day(text: str, date: str | None, scripts: None) -> None:
    from make_demo_data import parse_date

    assert parse_date(text) == date


def test_the_same_seed_gives_the_same_folder(tiny_base: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    make_tiny_base(again)
    make_tiny_base(other, seed=4)
    names = sorted(str(path.relative_to(tiny_base)) for path in tiny_base.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    assert filecmp.cmpfiles(tiny_base, again, names, shallow=False) == (names, [], [])
    _, differ, _ = filecmp.cmpfiles(tiny_base, other, names, shallow=False)
    assert sorted(differ) == [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_what_is_missing_is_named(tmp_path: Path, scripts: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_tiny_base(tmp_path / "base", vae=tmp_path / "none.safetensors")
    message = capsys.readouterr().err
    assert "none.safetensors" in message and "train_tiny_vae.py" in message
    novel = tmp_path / "mine" / "novel.txt"
    novel.parent.mkdir()
    novel.write_text("chapter one")
    with pytest.raises(SystemExit, match="2"):
        make_tiny_base(novel.parent)
    assert novel.is_file()


def test_diffusers_loads_and_runs_it(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base, local_files_only=True)
    assert not [record for record in caplog.records if "weight" in record.getMessage().lower()]
    for name in ("text_encoder", "text_encoder_2"):
        stored = load_file(tiny_base / name / "model.safetensors")
        assert all(key.startswith(("text_model.", "text_projection.")) for key in stored)
        loaded = getattr(pipeline, name).state_dict()
        assert len(loaded) == len(stored)
        for key, tensor in stored.items():
            found = loaded.get(key, loaded.get(key.removeprefix("text_model.")))
            assert found is not None
            assert torch.equal(found, tensor), key
    assert 1_500_000 < sum(p.numel() for p in pipeline.unet.parameters()) < 2_000_000
    assert pipeline.vae_scale_factor == 8
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("ladybug, insect", width=128, height=96, num_inference_steps=2, guidance_scale=1.0).images[0]
    assert image.size == (128, 96)


@pytest.mark.parametrize(("folder", "pad"), [("tokenizer", EOS), ("tokenizer_2", "!")])
def test_tokenizers_have_clips_structure(tiny_base: Path, folder: str, pad: str) -> None:
    from transformers import CLIPTokenizer

    vocabulary = json.loads((tiny_base / folder / "vocab.json").read_text("utf-8"))
    merges = (tiny_base / folder / "merges.txt").read_text("utf-8").splitlines()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    assert tokens[0] == "!" and tokens[256] == "!</w>" and tokens[1] == '"'
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    assert tokens[-2:] == [BOS, EOS] and len(tokens) <= 49_408
    assert merges[0].startswith("#version")
    assert set(tokens[512:-2]) <= {merge.replace(" ", "") for merge in merges[1:]}

    tokenizer = CLIPTokenizer.from_pretrained(tiny_base / folder, local_files_only=True)
    bos, eos = len(tokens) - 2, len(tokens) - 1
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokens), bos, eos)
    assert tokenizer.pad_token == pad
    for post in POSTS:
        text = post["tag_string_general"].replace("_", " ").replace(" ", ", ")
        ids = tokenizer(text).input_ids
        assert ids[0] == bos and ids[-1] == eos
        assert bos not in ids[1:] and eos not in ids[:-1]
    for encoder in ("text_encoder", "text_encoder_2"):
        config = json.loads((tiny_base / encoder / "config.json").read_text("utf-8"))
        assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (len(tokens), bos, eos)
        assert config["max_position_embeddings"] == 77


def read_square(post: dict[str, Any], side: int = 128) -> torch.Tensor:
    """A post's drawing, whole, centred on a white square: (1, 3, side, side) in [-1, 1]."""
    with Image.open(DEMO / "images" / post["file"]) as file:
        drawing = file.convert("RGBA")
    drawing.thumbnail((side, side), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    pixels = torch.from_numpy(np.array(canvas.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def test_the_vae_knows_the_drawings(tiny_base: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_base / "vae", local_files_only=True)
    pixels = torch.cat([read_square(post) for post in POSTS[::5]])
    latents = vae.encode(pixels).latent_dist.mode()  # (31, 4, 16, 16)
    errors = (vae.decode(latents).sample.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3))
    decibels = 10 * torch.log10(4 / errors)
    assert float(decibels.mean()) > MEAN_PSNR
    assert float(decibels.min()) > WORST_PSNR
    scaled = latents * vae.config.scaling_factor
    assert abs(float(scaled.std()) - 1) < 0.1
    assert float(scaled.mean(dim=(0, 2, 3)).abs().max()) < 0.5
    with safe_open(DEMO / "tiny_vae.safetensors", "pt") as file:
        assert file.metadata()["final"] == "true"  # not one of training's intermediate saves
        assert all(file.get_tensor(name).dtype == torch.float16 for name in file.keys())  # noqa: SIM118


def demo_configs() -> list[Path]:
    """The configs that ``make demo`` prepares and trains its two stages with."""
    shown = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=REPOSITORY, capture_output=True, text=True, check=True,
        env={**os.environ, "MAKEFLAGS": ""},
    ).stdout.splitlines()  # fmt: skip
    trained, prepared = (
        [line.split(f"{script} ")[1] for line in shown if f"{script} " in line]
        for script in ("train.py", "build_shards.py")
    )
    assert trained == prepared and len(trained) == 2
    return [Path(file) for file in trained]


def test_the_demo_trains_the_recipes_two_stages() -> None:
    stage1, stage2 = (load_config([REPOSITORY / file]) for file in demo_configs())
    for stage, file in ((stage1, "stage1_feature_alignment"), (stage2, "stage2_refine_unet")):
        recipe = load_config([REPOSITORY / f"configs/{file}.yaml"])
        assert stage.run.name == recipe.run.name and stage.diffusion == recipe.diffusion
        assert stage.captions == recipe.captions and stage.schedule.lr == recipe.schedule.lr == "constant"
    assert stage1.model.train_text_encoder_1 and stage1.model.train_text_encoder_2
    assert not stage2.model.train_text_encoder_1 and not stage2.model.train_text_encoder_2
    assert stage2.model.pretrained == f"{stage1.run.output_dir}/{stage1.run.name}"
    assert stage2.diffusion.noise_offset == 0.0357


@torch.no_grad()
def encode_drawings(pipeline: Any, images: list[Image.Image]) -> torch.Tensor:
    """Scaled latents (N, 4, H/8, W/8) of images of one size."""
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents: torch.Tensor = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    return latents


@pytest.mark.slow
def test_every_drawing_of_stage_2_is_drawn_right_and_nearer_than_after_stage_1(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What make demo trains, in its own words; four seeds; among all drawings of stage 1 at the drawn one's size."""
    from diffusers import StableDiffusionXLPipeline
    from make_tiny_base import main as make_base
    from show_demo import draw, open_drawings

    for name in ("configs", "demo"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make_base(["demo_run/tiny_base"])
    configs, exports = [], []
    for file in demo_configs():
        config = load_config([file])
        prepare(config)
        train(config)
        configs.append(config)
        exports.append(next(path for path in export(Path(config.run.output_dir) / config.run.name) if path.is_dir()))
    pipeline = StableDiffusionXLPipeline.from_pretrained(exports[1], local_files_only=True, torch_dtype=torch.float32)
    drawings = open_drawings(configs[1])
    known: dict[Any, dict[str, torch.Tensor]] = {}  # of each drawn size: key -> latents, of all drawings of stage 1
    for size in {drawing.image.size for drawing in drawings}:
        others = open_drawings(configs[0], size)
        latents = encode_drawings(pipeline, [other.image for other in others])
        known[size] = {other.key: one for other, one in zip(others, latents, strict=True)}
    distances = []
    for folder in exports:
        own = []
        for seed in range(42, 46):
            for drawing, image in zip(drawings, draw(seed, folder, drawings), strict=True):
                (drawn,) = encode_drawings(pipeline, [image])
                errors = {key: float((one - drawn).square().mean()) for key, one in known[image.size].items()}
                own.append(errors[drawing.key])
                if folder == exports[1]:
                    assert min(errors, key=errors.__getitem__) == drawing.key, f"{drawing.prompt}, seed {seed}"
        distances.append(np.mean(own))
    assert distances[1] < distances[0]


@pytest.mark.parametrize("stage", ["configs/demo_stage1.yaml", "configs/demo_stage2.yaml"])
def test_exports_of_the_demo_are_drawn_at_its_size(stage: str) -> None:
    settings = trained_sampling({"config": load_config([stage], preparing=True).written})
    assert (settings.width, settings.height, settings.guidance_scale) == (128, 128, 1.0)

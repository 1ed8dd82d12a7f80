"""It learns: eight drawings by heart, exported, drawn again from the exported file alone by diffusers' own pipeline."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import MemoryConfig, ModelConfig, PrecisionConfig
from trainer.data.caption_draws import whole_caption
from trainer.data.index import open_index, read_raw_latents
from trainer.data.template import ready_rules
from trainer.data.tokens import load_tokenizers, tokenize_captions
from trainer.model.base import find_base, read_state
from trainer.model.sdxl import build_sdxl, encode_prompts
from trainer.prepare.prepare import prepare
from trainer.release.export import export
from trainer.train.loop import train

STEPS = 400
EIGHT = (
    "beach_ball_01.png", "blue_girl_dirk_struve.png", "bunny_01.png", "casa_verde_architetto_fr_01.png",
    "flower_01.png", "heart.png", "ladybug_01.png", "pumpkin2_yemu_01.png",
)  # fmt: skip


def eight_drawings(folder: Path) -> None:
    """Eight of the demo's drawings, all square, with captions unlike each other."""
    lines = (REPOSITORY / "demo/posts.jsonl").read_text().splitlines(keepends=True)
    chosen = [line for line in lines if json.loads(line)["file"] in EIGHT]
    posts = [json.loads(line) for line in chosen]
    assert len(posts) == 8
    (folder / "images").mkdir()
    for post in posts:
        # all of one size: a model would know them by their size conditioning instead of their captions
        canvas = Image.new("RGB", (272, 272), "white")
        with Image.open(REPOSITORY / "demo/images" / post["file"]) as drawing:
            rgba = drawing.convert("RGBA")
        canvas.paste(rgba, ((272 - rgba.width) // 2, (272 - rgba.height) // 2), rgba)
        canvas.save(folder / "images" / post["file"])
    (folder / "posts.jsonl").write_text("".join(chosen))


@pytest.mark.slow
@pytest.mark.parametrize("max_token_length", [75, 225])
def test_eight_drawings_are_learned_by_heart(tiny_base: Path, tmp_path: Path, max_token_length: int) -> None:
    eight_drawings(tmp_path)
    config = load_config([], [
        "run.name=eight", "run.stage=test", f"run.output_dir={tmp_path}", f"model.pretrained={tiny_base}",
        "model.train_text_encoder_1=true", "model.train_text_encoder_2=true",
        f"data.posts=[{tmp_path / 'posts.jsonl'}]", f"data.images={tmp_path / 'images'}",
        f"data.shards={tmp_path / 'shards'}", "data.global_batch_size=16", "data.bucket_batch_size=16",
        "data.micro_batch_size=16", "data.loader_threads=1", f"captions.max_token_length={max_token_length}",
        "buckets.base_resolution=128", "buckets.min_side=64", "buckets.max_side=256", "buckets.step=32",
        "optim.unet_lr=2e-3", "optim.text_encoder_1_lr=2e-3", "optim.text_encoder_2_lr=2e-3",
        f"schedule.max_steps={STEPS}", "schedule.lr=cosine", "optim.weight_decay=0",
        "precision.compute=fp32", "precision.frozen=fp32",
        "memory.policy=none", "publish.dtype=fp32",
    ])  # fmt: skip
    prepare(config)
    train(config)
    paths = export(tmp_path / "eight")
    single, folder = sorted(paths, key=Path.is_dir)
    index = open_index(config.data.shards)
    rules = ready_rules(config.captions)
    captions = [whole_caption(index.row(row), rules) for row in range(len(index))]
    pipeline = StableDiffusionXLPipeline.from_single_file(str(single), config=str(folder), local_files_only=True)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    embed = (lambda caption: {"prompt": caption}) if max_token_length == 75 else our_embeddings(folder)
    nearest = []
    scaling = pipeline.vae.config.scaling_factor
    known = np.stack([read_raw_latents(index, row).astype(np.float32) * scaling for row in range(len(index))])
    for number, caption in enumerate(captions):
        latents = pipeline(
            **embed(caption), guidance_scale=1.0, num_inference_steps=28, width=128, height=128, output_type="latent",
            generator=torch.Generator().manual_seed(number), original_size=(272, 272), target_size=(128, 128),
        ).images[0]  # fmt: skip
        nearest.append(int(np.square(known - latents.numpy()[None]).mean(axis=(1, 2, 3)).argmin()))
    assert nearest == list(range(8))


def our_embeddings(folder: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """Prompt embeddings of 227 vectors, from an exported folder."""
    base = find_base(str(folder))
    sdxl = build_sdxl(base, ModelConfig("", train_unet=False), PrecisionConfig(frozen="fp32"), MemoryConfig("none"))
    encoders = [sdxl.text_encoder_1, sdxl.text_encoder_2]
    sizes = [encoder.config.vocab_size for encoder in encoders]
    tokenizers = load_tokenizers(folder / "tokenizer", folder / "tokenizer_2", (sizes[0], sizes[1]))

    @torch.no_grad()
    def embed(caption: str) -> dict[str, torch.Tensor]:
        chunks = tokenize_captions([caption], tokenizers, 225)
        arrays = (chunks.input_ids_1, chunks.input_ids_2, chunks.chunk_map)
        prompt_embeds, pooled = encode_prompts(*encoders, *(torch.from_numpy(array) for array in arrays))
        assert prompt_embeds.shape[1] == 227
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    return embed


def test_stage_2_leaves_the_text_encoders_byte_identical(make_config: Callable[..., object], tmp_path: Path) -> None:
    config = make_config("diffusion.noise_offset=0.0357", "schedule.max_steps=2", "publish.dtype=fp32")
    train(config)  # type: ignore[arg-type]
    folder = next(path for path in export(tmp_path / "runs" / "run") if path.is_dir())
    before, after = find_base(config.model.pretrained), find_base(str(folder))  # type: ignore[attr-defined]
    for component in ("text_encoder", "text_encoder_2"):
        old, new = read_state(before, component), read_state(after, component)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name].float(), new[name]) for name in old)
    old, new = read_state(before, "unet"), read_state(after, "unet")
    assert any(not torch.equal(old[name].float(), new[name]) for name in old)

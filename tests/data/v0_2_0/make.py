"""How this folder was made: a whole tiny run, written by the code of version 0.2.0 (commit f02ee99), and by no other.

It is kept as documentation and is run by no test. Given a checkout of that commit it writes everything beside itself
anew, with that checkout's own scripts, each in a process of one thread on the CPU:

    git clone . ../f02ee99 && git -C ../f02ee99 checkout f02ee99
    OMP_NUM_THREADS=1 python tests/data/v0_2_0/make.py ../f02ee99

All bytes but dates and times are the same each time, on the same machine with the same libraries.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "support"))
from arithmetic import hash_tensors, probe_arithmetic  # noqa: E402

KEPT = {"make.py", "interrupt.py", "README.md"}
COMMIT = "f02ee99"
RUN, CHECKPOINTS = "runs/tiny", "runs/tiny/checkpoints"
STEP_3, STEP_6 = f"{CHECKPOINTS}/step-00000003", f"{CHECKPOINTS}/step-00000006"
CONFIG = """\
run: {name: tiny, stage: "1, feature alignment", output_dir: runs, seed: 42}
model: {pretrained: base, train_unet: true, train_text_encoder_1: true, train_text_encoder_2: true}
data:
  posts: [posts.jsonl]
  images: images
  shards: shards
  samples_per_shard: 4
  max_bad_fraction: 0.2
  global_batch_size: 4
  bucket_batch_size: 2
  micro_batch_size: 2
  num_workers: 0
captions:
  max_token_length: 150
  columns: [{column: aesthetic, tag: very aesthetic, above: 5}, {column: aesthetic, tag: plain}]
buckets: {base_resolution: 64, min_side: 32, max_side: 128, step: 32}
optim: {unet_lr: 1.0e-3, text_encoder_1_lr: 5.0e-4, text_encoder_2_lr: 5.0e-4}
schedule: {max_steps: 6}
precision: {compute: fp32, frozen: fp32, vae: fp32}
memory: {gradient_checkpointing: false}
checkpoint: {every_steps: 3}
logging: {every_steps: 1}
"""
SIZES = [(90, 60), (60, 90), (70, 70), (128, 32)]
TAGS = ["solo", "smile", "long_hair", "school_uniform", "outdoors", "cherry_blossoms", "night", "^_^"]


def draw_images_and_posts(folder: Path) -> None:
    """Eight pictures in four shapes, and two posts of which one has a broken image and one states another size."""
    (folder / "images").mkdir()
    posts = []
    for number in range(8):
        width, height = SIZES[number % 4]
        colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
        picture.save(folder / "images" / f"{number + 1}.png")
        posts.append({
            "id": number + 1, "rating": "gsqe"[number % 4], "score": number * 25 - 10, "aesthetic": number,
            "created_at": f"{2006 + 2 * number}-05-01T00:00:00Z", "image_width": width + (number == 7),
            "image_height": height, "tag_string_general": f"1girl {' '.join(TAGS[number % 3 :: 2])}",
            "tag_string_character": "hatsune_miku" if number % 2 else "", "tag_string_artist": f"artist_{number % 3}",
            "tag_string_copyright": "vocaloid" if number % 2 else "", "tag_string_meta": "highres",
        })  # fmt: skip
    posts.append({"id": 9, "tag_string_general": "broken"})
    (folder / "images/9.png").write_bytes(b"404 not found")
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    for image in (folder / "images").iterdir():
        os.utime(image, (1_600_000_000, 1_600_000_000))


def make_base(folder: Path, posts: Path, scripts: Path) -> None:
    """SDXL's kinds of blocks and conditioning at the smallest widths, random, in fp16; tokenizers of ASCII words."""
    sys.path.insert(0, str(scripts))
    import make_tiny_base as tiny

    words = tiny.split_words(tiny.read_captions(posts))
    merges = list(tiny.learn_merges(words, 24))
    symbols = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(a + b for a, b in merges), tiny.BOS, tiny.EOS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tiny.write_tokenizer(folder / "tokenizer", vocabulary, merges, pad=tiny.EOS)
    tiny.write_tokenizer(folder / "tokenizer_2", vocabulary, merges, pad="!")
    torch.manual_seed(0)
    tiny.TEXT_ENCODERS = ((16, 2, 2, "quick_gelu"), (24, 2, 2, "gelu"))
    for number, kind in enumerate((CLIPTextModel, CLIPTextModelWithProjection)):
        config: CLIPTextConfig = tiny.text_config(number, vocabulary)
        config.intermediate_size = 2 * config.hidden_size
        tiny.write_text_encoder(folder / ("text_encoder", "text_encoder_2")[number], kind(config).half())
    unet = UNet2DConditionModel(
        sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(4, 8), layers_per_block=1,
        transformer_layers_per_block=[1, 1], attention_head_dim=[1, 2], norm_num_groups=4, cross_attention_dim=16 + 24,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )  # fmt: skip
    unet.half().save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2, scaling_factor=0.5,
    )  # fmt: skip
    vae.half().save_pretrained(folder / "vae")
    EulerDiscreteScheduler(**tiny.SCHEDULER).save_pretrained(folder / "scheduler")
    classes = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "EulerDiscreteScheduler"}
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {name: ["diffusers", kind] for name, kind in classes.items()}
    index |= {name: ["transformers", kind] for name, kind in encoders.items()}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    tiny.write_json(folder / "model_index.json", index)
    for path in folder.rglob("*"):  # safetensors writes 0600
        path.chmod(0o755 if path.is_dir() else 0o644)


def hash_checkpoint(folder: Path) -> dict[str, str]:
    """Of both files of a checkpoint: their own hashes, and those of their tensors."""
    hashes = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        hashes[f"{name} tensors"] = hash_tensors(folder / name)
    return hashes


def read_losses(folder: Path) -> dict[str, float]:
    """Step -> loss, of the last attempt at it."""
    lines = map(json.loads, (folder / RUN / "metrics.jsonl").read_text().splitlines())
    return {str(line["step"]): line["train/loss"] for line in lines}


def cut_to_step_3(folder: Path) -> None:
    """Leave of the finished run what is there when it is killed behind its fourth step."""
    shutil.rmtree(folder / STEP_6)
    (folder / RUN / ".lock").unlink()
    metrics = folder / RUN / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert head.stdout.startswith(COMMIT) and os.environ.get("OMP_NUM_THREADS") == "1"
    for path in HERE.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    variables = {"PYTHONPATH": str(checkout), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}

    def run(folder: Path, script: str, *words: str) -> str:
        command = [sys.executable, str(checkout / script), *words]
        done = subprocess.run(command, cwd=folder, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True)
        done.check_returncode()
        return done.stdout

    draw_images_and_posts(HERE)
    make_base(HERE / "base", HERE / "posts.jsonl", checkout / "scripts")
    (HERE / "tiny.yaml").write_text(CONFIG)
    run(HERE, "scripts/build_shards.py", "--config", "tiny.yaml")
    steps = [run(HERE, "scripts/explain_step.py", "--config", "tiny.yaml", "--step", str(step)) for step in range(10)]
    run(HERE, "train.py", "--config", "tiny.yaml")
    uninterrupted = hash_checkpoint(HERE / STEP_6)
    run(HERE, "scripts/export.py", STEP_3)
    cut_to_step_3(HERE)
    with tempfile.TemporaryDirectory() as other:
        copy = Path(shutil.copytree(HERE, Path(other) / "copy"))
        run(copy, "train.py", "--config", f"{RUN}/config.yaml")
        resumed, losses = hash_checkpoint(copy / STEP_6), read_losses(copy)
    assert resumed == uninterrupted

    exported = sorted((HERE / RUN / "export").rglob("*.safetensors"))
    explained = [[json.loads(line) for line in lines.splitlines()] for lines in steps]
    expected = {
        "made_by": head.stdout.strip(),
        "libraries": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "arithmetic": probe_arithmetic(HERE / "base"),  # of the machine: bits are to be compared where it is the same
        "index_fingerprint": json.loads((HERE / "shards/manifest.json").read_text())["fingerprint"],
        "step_3": hash_checkpoint(HERE / STEP_3),
        "step_6": resumed,
        "losses": losses,
        "export": {path.relative_to(HERE / RUN / "export").as_posix(): hash_tensors(path) for path in exported},
        "captions": [[sample["caption"] for sample in samples] for samples in explained],
        "timesteps": [[sample["timestep"] for sample in samples] for samples in explained],
        "noise_seeds": [[sample["noise_seed"] for sample in samples] for samples in explained],
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

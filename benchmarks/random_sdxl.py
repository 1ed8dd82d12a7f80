"""A full-size SDXL with random weights, as a diffusers folder of fp16 files.

``python benchmarks/random_sdxl.py FOLDER [--vae]`` (6.9 GB, half a minute; the VAE alone 167 MB). CLIP's vocabulary is
read as data from the wheel of open_clip_torch, which ``make setup-dev`` installs without its dependencies; the package
is never imported.
"""

import argparse
import gzip
import json
import math
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.core.rng import philox_key
from trainer.model.base import read_sdxl_config
from trainer.model.sdxl import COMPONENTS, build_empty, classic_name

VOCABULARY = ("open_clip_torch", "open_clip/bpe_simple_vocab_16e6.txt.gz")
MERGES = 49_408 - 2 * 256 - 2  # the vocabulary: bytes, bytes that end a word, merges, BOS and EOS
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def draw_weights(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Classic names and fp16 values that keep activations of ordinary size: norms are one, biases zero."""
    for name, parameter in module.named_parameters():
        shape = parameter.shape
        generator = torch.Generator().manual_seed(philox_key("random_sdxl", prefix, name) % 2**63)
        if len(shape) > 1:
            values = torch.empty(shape).normal_(0, 1 / math.sqrt(shape[1:].numel()), generator=generator)
        else:
            values = torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        yield classic_name(f"{prefix}.{name}").removeprefix(f"{prefix}."), values.half()


def read_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's tokens with their ids, and its merges.

    Raises:
        importlib.metadata.PackageNotFoundError: where open_clip_torch is not installed.
    """
    package, file = VOCABULARY
    lines = (
        gzip.decompress(Path(str(metadata.distribution(package).locate_file(file))).read_bytes()).decode().split("\n")
    )
    merges = [(first, second) for first, second in (line.split(" ") for line in lines[1 : MERGES + 1])]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [
        chr(code) for code in [*printable, *range(256, 512 - len(printable))]
    ]  # of the bytes, those that print first
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), BOS, EOS]
    return {word: number for number, word in enumerate(words)}, merges


def write_tokenizers(folder: Path) -> tuple[Path, Path]:
    """SDXL's two tokenizer folders over CLIP's vocabulary, as the hub has them."""
    words, merges = read_vocabulary()
    for name, padding in (("tokenizer", EOS), ("tokenizer_2", "!")):
        (folder / name).mkdir(parents=True)
        (folder / name / "vocab.json").write_text(json.dumps(words))
        (folder / name / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": padding}
        (folder / name / "special_tokens_map.json").write_text(json.dumps(special))
    return folder / "tokenizer", folder / "tokenizer_2"


def write_component(folder: Path, part: str, component: str) -> None:
    """A component's weights and config into a new folder."""
    folder.mkdir(parents=True)
    config = read_sdxl_config(component)
    with torch.device("meta"):
        module = AutoencoderKL.from_config(config) if part == "vae" else build_empty(part, config)
    file = "model" if component.startswith("text") else "diffusion_pytorch_model"
    save_file(dict(draw_weights(module, part)), folder / f"{file}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def make_random_sdxl(folder: Path) -> None:
    """Write all of it into a new folder, one component in memory at a time."""
    write_tokenizers(folder)
    for part, component in {**COMPONENTS, "vae": "vae"}.items():
        write_component(folder / component, part, component)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(read_sdxl_config("scheduler")))
    (folder / "model_index.json").write_text(json.dumps(read_sdxl_config("model_index")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="which is not there yet")
    parser.add_argument("--vae", action="store_true", help="the VAE's folder alone")
    arguments = parser.parse_args()
    if arguments.vae:
        write_component(arguments.folder, "vae", "vae")
    else:
        make_random_sdxl(arguments.folder)

"""Make a tiny SDXL: the architecture of the real one, small widths, random weights, a VAE that was trained.

Writes a complete `StableDiffusionXLPipeline` in diffusers' classic layout (`text_model.` prefixes, `vocab.json`
and `merges.txt`), which diffusers loads with transformers 4 and 5. The same seed gives the same bytes.
Example: `python scripts/make_tiny_base.py build/tiny_base --seed 0`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.core.console import CommandParser, Result
from trainer.core.errors import run_command
from trainer.core.files import home_path

if TYPE_CHECKING:  # imported where they are used: they take seconds, and --help needs none of them
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_VOCABULARY = 49_408  # CLIP's
# CLIP's pre-tokenizer in the standard library's terms: contractions, letters, single digits, runs of the rest.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
TAG_FIELDS = ("tag_string_general", "tag_string_character", "tag_string_copyright", "tag_string_artist")

# (hidden size, layers, heads, activation) of the two encoders; SDXL's are (768, 12, 12, quick_gelu) and
# (1280, 32, 20, gelu).
TEXT_ENCODERS = ((64, 3, 4, "quick_gelu"), (96, 3, 4, "gelu"))
TIME_ID_CHANNELS = 32  # SDXL: 256 for each of the six integers
SCHEDULER: dict[str, Any] = {  # SDXL base's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

Pair = tuple[str, str]


def byte_symbols() -> list[str]:
    """The 256 printable symbols of byte-level BPE in the order of CLIP's vocabulary, "!" first.

    Bytes that print as themselves come first; the other 68 take the code points from 256 on, in order.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def byte_encoder() -> dict[int, str]:
    """byte -> its symbol."""
    symbols = byte_symbols()
    printable = {ord(s): s for s in symbols if ord(s) < 256}
    rest = iter(s for s in symbols if ord(s) >= 256)
    return {byte: printable.get(byte) or next(rest) for byte in range(256)}


def read_captions(posts: Path) -> list[str]:
    """One caption a post of a JSONL file in Danbooru's field names: its tags, joined by commas."""
    captions = []
    for line in posts.read_text(encoding="utf-8").splitlines():
        post = json.loads(line)
        tags = [tag for field in TAG_FIELDS for tag in post.get(field, "").split()]
        captions.append(", ".join(tag.replace("_", " ") for tag in tags))
    return captions


def split_words(captions: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Words as tuples of byte symbols, the last with `</w>`, and how often each occurs."""
    encoder = byte_encoder()
    words: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        for word in WORDS.findall(caption.lower()):
            symbols = [encoder[byte] for byte in word.encode()]
            words[(*symbols[:-1], symbols[-1] + END_OF_WORD)] += 1
    return words


def merge_pair(word: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """`word` with each occurrence of `pair`, from the left, joined into one symbol."""
    merged: list[str] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return tuple(merged)


def learn_merges(words: Counter[tuple[str, ...]], limit: int) -> Iterator[Pair]:
    """BPE merges (Sennrich et al. 2016), the most frequent pair first, ties by spelling; ends at frequency 1."""
    for _ in range(limit):
        pairs: Counter[Pair] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            return
        yield best
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            merged[merge_pair(word, best) if best[0] in word else word] += count
        words = merged


def build_vocabulary(captions: Iterable[str]) -> tuple[dict[str, int], list[Pair]]:
    """Token -> id in CLIP's order (bytes, bytes that end a word, merges, BOS, EOS), and the merges."""
    symbols = byte_symbols()
    merges = list(learn_merges(split_words(captions), MAX_VOCABULARY - 2 * len(symbols) - 2))
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *(a + b for a, b in merges)]
    # Two merges may spell the same token ("a"+"bc", "ab"+"c"); the first keeps the id.
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_json(path: Path, content: object) -> None:
    """Indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[Pair], pad: str) -> None:
    """The four files of a slow CLIP tokenizer, as SDXL's folders hold them; `pad` is `<|endoftext|>` or "!"."""
    folder.mkdir(parents=True)

    def special(content: str, normalized: bool) -> dict[str, object]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": normalized,
            "rstrip": False,
            "single_word": False,
        }

    added = {vocabulary[token]: special(token, True) | {"special": True} for token in (BOS, EOS)}
    if pad not in (BOS, EOS):  # SDXL's second tokenizer declares "!" special, too
        added[vocabulary[pad]] = special(pad, False) | {"special": True}
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(
        folder / "special_tokens_map.json",
        {
            "bos_token": special(BOS, True),
            "eos_token": special(EOS, True),
            "pad_token": pad,
            "unk_token": special(EOS, True),
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(index): added[index] for index in sorted(added)},
            "bos_token": BOS,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": EOS,
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": EOS,
        },
    )


def text_config(encoder: int, vocabulary: dict[str, int]) -> CLIPTextConfig:
    """Config of text encoder 0 or 1."""
    from transformers import CLIPTextConfig

    hidden, layers, heads, activation = TEXT_ENCODERS[encoder]
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        projection_dim=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[EOS] if encoder == 0 else vocabulary["!"],
    )


def write_text_encoder(folder: Path, model: CLIPTextModel | CLIPTextModelWithProjection) -> None:
    """Weights with the classic `text_model.` prefix, which transformers 5 drops for a plain CLIPTextModel."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def build_unet() -> UNet2DConditionModel:
    """SDXL's three levels and its conditioning, about 1.9 million parameters."""
    from diffusers import UNet2DConditionModel

    (hidden_1, *_), (hidden_2, *_) = TEXT_ENCODERS
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 40, 48),
        layers_per_block=2,
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 2, 3],  # SDXL's name for the number of heads
        norm_num_groups=8,
        cross_attention_dim=hidden_1 + hidden_2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_CHANNELS,
        projection_class_embeddings_input_dim=6 * TIME_ID_CHANNELS + hidden_2,
    )


def load_vae(weights: Path) -> AutoencoderKL:
    """The trained VAE in fp32; its config and scaling factor are the file's metadata (`train_tiny_vae.py`)."""
    from diffusers import AutoencoderKL
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(weights, "pt") as file:
        metadata = file.metadata() or {}
    if not {"config", "scaling_factor"} <= metadata.keys():
        raise SystemExit(f"make_tiny_base: {weights} states no config and scaling_factor; see train_tiny_vae.py")
    vae = AutoencoderKL(**json.loads(metadata["config"]), scaling_factor=float(metadata["scaling_factor"]))
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return vae


def build_tiny_base(out: Path, seed: int, vae_weights: Path, posts: Path) -> None:
    """Write the whole pipeline into the new folder `out`."""
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    vocabulary, merges = build_vocabulary(read_captions(posts))
    write_tokenizer(out / "tokenizer", vocabulary, merges, pad=EOS)
    write_tokenizer(out / "tokenizer_2", vocabulary, merges, pad="!")
    torch.manual_seed(seed)
    write_text_encoder(out / "text_encoder", CLIPTextModel(text_config(0, vocabulary)))
    write_text_encoder(out / "text_encoder_2", CLIPTextModelWithProjection(text_config(1, vocabulary)))
    build_unet().save_pretrained(out / "unet")
    load_vae(vae_weights).save_pretrained(out / "vae")
    diffusers.EulerDiscreteScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    write_json(
        out / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": diffusers.__version__,
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    for path in out.rglob("*"):  # safetensors writes 0600
        path.chmod(0o755 if path.is_dir() else 0o644)


def main(argv: list[str] | None = None) -> Result:
    parser = CommandParser(__doc__ or "")
    parser.add_argument("out", type=home_path, help="folder to write; an earlier tiny base there is replaced")
    parser.add_argument("--seed", type=int, default=0, help="of the UNet's and the text encoders' weights")
    parser.add_argument("--vae", type=home_path, default=Path("demo/tiny_vae.safetensors"))
    parser.add_argument("--posts", type=home_path, default=Path("demo/posts.jsonl"), help="captions for the tokenizers")
    args = parser.parse_args(argv)
    for path, maker in ((args.vae, "scripts/train_tiny_vae.py"), (args.posts, "scripts/make_demo_data.py")):
        if not path.is_file():
            parser.error(f"no file {path}; start in the repository, or make it with {maker}")
    if args.out.exists() and not (args.out / "model_index.json").is_file():
        parser.error(f"{args.out} exists and is no pipeline; name another folder")
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    build_tiny_base(part, args.seed, args.vae, args.posts)
    shutil.rmtree(args.out, ignore_errors=True)
    part.rename(args.out)
    return Result(f"a tiny base of SDXL's architecture: {args.out}", [args.out])


if __name__ == "__main__":
    run_command(main)

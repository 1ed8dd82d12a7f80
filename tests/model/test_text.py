"""The recipe's section 4: chunks of token ids, what is refused, and equality with the libraries' own text encoding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from support.paths import REPOSITORY
from trainer.core.errors import UserError
from trainer.data.tokens import (
    TextTokenizer,
    TokenChunks,
    load_tokenizer,
    load_tokenizers,
    make_chunks,
    tokenize_captions,
)
from trainer.model.sdxl import encode_prompts, join_chunks

BOS, EOS = 49406, 49407
CLIP_1 = TextTokenizer(None, BOS, EOS, EOS)
CLIP_2 = TextTokenizer(None, BOS, EOS, 0)
Tokenizers = tuple[TextTokenizer, TextTokenizer]


@pytest.fixture(scope="module")
def vocab_size(tiny_base: Path) -> int:
    return len(json.loads((tiny_base / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def tokenizers(tiny_base: Path, vocab_size: int) -> Tokenizers:
    return load_tokenizers(tiny_base / "tokenizer", tiny_base / "tokenizer_2", (vocab_size, vocab_size))


@pytest.fixture(scope="module")
def encoders(tiny_base: Path) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    return (
        CLIPTextModel.from_pretrained(tiny_base / "text_encoder").eval(),
        CLIPTextModelWithProjection.from_pretrained(tiny_base / "text_encoder_2").eval(),
    )


# --- layout of chunks


def content(first: int, last: int) -> list[int]:
    """Content tokens t1 .. tn, told apart by number; none is 0, BOS or EOS."""
    return list(range(1000 + first, 1000 + last))


@pytest.mark.parametrize(
    ("count", "first", "second"),
    [
        (0, [[BOS] + [EOS] * 76] * 3, [[BOS, EOS] + [0] * 75] * 3),
        (
            10,
            [[BOS, *content(0, 10)] + [EOS] * 66, [BOS] + [EOS] * 76, [BOS] + [EOS] * 76],
            [[BOS, *content(0, 10), EOS] + [0] * 65, [BOS, EOS] + [0] * 75, [BOS, EOS] + [0] * 75],
        ),
        (
            75,
            [[BOS, *content(0, 75), EOS], [BOS] + [EOS] * 76, [BOS] + [EOS] * 76],
            [[BOS, *content(0, 75), EOS], [BOS, EOS] + [0] * 75, [BOS, EOS] + [0] * 75],
        ),
        (
            76,
            [[BOS, *content(0, 75), EOS], [BOS, *content(75, 76)] + [EOS] * 75, [BOS] + [EOS] * 76],
            [[BOS, *content(0, 75), EOS], [BOS, *content(75, 76), EOS] + [0] * 74, [BOS, EOS] + [0] * 75],
        ),
        *[
            (count, *[[[BOS, *content(first, first + 75), EOS] for first in (0, 75, 150)]] * 2)
            for count in (225, 226, 300)
        ],
    ],
)
def test_chunks_are_laid_out_as_the_recipe_says(count: int, first: list[list[int]], second: list[list[int]]) -> None:
    for tokenizer, expected in ((CLIP_1, first), (CLIP_2, second)):
        chunks = make_chunks([content(0, count)], tokenizer, 3)
        assert chunks.dtype == np.int64 and chunks.shape == (3, 77)
        assert chunks.tolist() == expected
        assert make_chunks([content(0, count)], tokenizer, 1).tolist() == expected[:1]


@pytest.mark.parametrize(("length", "vectors"), [(75, 77), (150, 152), (225, 227)])
def test_chunks_join_to_the_recipes_number_of_vectors(length: int, vectors: int) -> None:
    chunks = length // 75
    hidden = torch.arange(chunks * 77, dtype=torch.float32).view(chunks, 77, 1)
    chunk_map = torch.arange(chunks)[None]
    joined = join_chunks(hidden, chunk_map).flatten().tolist()
    assert len(joined) == vectors == length + 2
    # position 0 of the first, positions 1..75 of each, position 76 of the last
    positions = [0, *[77 * chunk + place for chunk in range(chunks) for place in range(1, 76)], 77 * chunks - 1]
    assert joined == positions


# --- tokens


def demo_captions() -> list[str]:
    posts = [json.loads(line) for line in (REPOSITORY / "demo/posts.jsonl").read_text(encoding="utf-8").splitlines()]
    tags = [
        tag for post in posts for name, text in post.items() if name.startswith("tag_string") for tag in text.split()
    ]
    names = sorted(set(tags))
    generator = np.random.default_rng(0)
    captions = [", ".join(generator.choice(names, generator.integers(1, 40))) for _ in range(1000)]
    return [
        *captions,
        *(caption.replace("_", " ") for caption in captions),
        "",
        " ",
        "a  b",
        "ÀÉ ß",
        "日本語",
        "^_^ o_o :3",
    ]


def list_ids(tokenizer: TextTokenizer, captions: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.content_ids(captions)]


def check_ids(captions: list[str], ours: TextTokenizer, theirs: CLIPTokenizer) -> None:
    """Our first chunk is what the library makes of a caption, padded and truncated."""
    library = theirs(captions, padding="max_length", max_length=77, truncation=True).input_ids
    framed = [make_chunks([ids], ours, 1)[0].tolist() for ids in ours.content_ids(captions)]
    assert framed == library


def test_ids_are_the_librarys_on_thousands_of_captions(tiny_base: Path, tokenizers: Tokenizers) -> None:
    captions = demo_captions()
    assert len(captions) > 2000
    check_ids(captions, tokenizers[0], CLIPTokenizer.from_pretrained(tiny_base / "tokenizer"))
    # encoder 2's library tokenizer takes "!" for padding; without it both agree
    without = [caption for caption in captions if "!" not in caption]
    check_ids(without, tokenizers[1], CLIPTokenizer.from_pretrained(tiny_base / "tokenizer_2"))


@pytest.fixture(scope="module")
def library(tiny_base: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(tiny_base / "tokenizer")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=40) | st.text("abc!,'_^ 0123é<|endoftext>", max_size=40), min_size=1, max_size=5))
def test_ids_are_the_librarys_on_any_text(tokenizers: Tokenizers, library: CLIPTokenizer, captions: list[str]) -> None:
    check_ids(captions, tokenizers[0], library)
    assert list_ids(tokenizers[1], captions) == list_ids(tokenizers[0], captions)


def test_an_exclamation_mark_is_an_ordinary_token(tiny_base: Path, tokenizers: Tokenizers) -> None:
    """Not encoder 2's padding, which diffusers' tokenizer makes of it: 256 is CLIP's "!</w>"."""
    vocabulary = json.loads((tiny_base / "tokenizer_2" / "vocab.json").read_text(encoding="utf-8"))
    assert (vocabulary["!"], vocabulary["!</w>"]) == (0, 256)
    trap = CLIPTokenizer.from_pretrained(tiny_base / "tokenizer_2")
    assert trap("love live!").input_ids[-2] == 0  # the trap is there
    for tokenizer in tokenizers:
        (ids,) = list_ids(tokenizer, ["love live!"])
        assert ids[-1] == 256 and 0 not in ids
        chunk = make_chunks([ids], tokenizer, 1)[0].tolist()
        assert chunk[len(ids) : len(ids) + 2] == [256, tokenizer.eos_id]
        assert 0 not in list_ids(tokenizer, ["! a!b !, wow!"])[0][-1:]


def test_distinct_chunks_are_encoded_once(tokenizers: Tokenizers) -> None:
    long = ", ".join(["bird"] * 60)  # 119 or more tokens: two chunks
    captions = ["bird", "animals", "bird", "", long]
    chunks = tokenize_captions(captions, tokenizers, 225)
    for tokenizer, ids in zip(tokenizers, (chunks.input_ids_1, chunks.input_ids_2), strict=True):
        expected = [make_chunks([content], tokenizer, 3) for content in tokenizer.content_ids(captions)]
        assert np.array_equal(ids[chunks.chunk_map], np.stack(expected))
        assert ids.dtype == np.int64
    # "bird", the empty one, "animals", and the long one's two
    assert chunks.input_ids_1.shape == chunks.input_ids_2.shape == (5, 77)
    assert chunks.chunk_map.tolist()[:4] == [[0, 1, 1], [2, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert chunks.chunk_map.tolist()[4] == [3, 4, 1]


def test_chunks_that_only_encoder_2_tells_apart_are_distinct(tokenizers: Tokenizers) -> None:
    """Encoder 1 pads with EOS, so a written EOS looks like padding to it; to encoder 2 it does not."""
    chunks = tokenize_captions(["bird", "bird<|endoftext|>"], tokenizers, 75)
    assert np.array_equal(chunks.input_ids_1[0], chunks.input_ids_1[1])
    assert not np.array_equal(chunks.input_ids_2[0], chunks.input_ids_2[1])
    assert chunks.chunk_map.tolist() == [[0], [1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["", "bird", "animals, bird", "bird " * 80, "bird " * 75, "a " * 200]), min_size=1,
                max_size=6), st.sampled_from([75, 150, 225]))  # fmt: skip
def test_no_chunk_is_there_twice_or_in_vain(tokenizers: Tokenizers, captions: list[str], length: int) -> None:
    chunks = tokenize_captions(captions, tokenizers, length)
    assert chunks.chunk_map.shape == (len(captions), length // 75)
    pairs = np.concatenate([chunks.input_ids_1, chunks.input_ids_2], axis=1)
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    assert set(chunks.chunk_map.flatten().tolist()) == set(range(len(pairs)))


# --- tokenizers that are refused


def drop(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values), encoding="utf-8")

    return change


def swap_frame(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    bos, eos = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    edit("vocab.json", **{"<|startoftext|>": eos, "<|endoftext|>": bos})(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (drop("vocab.json"), "neither vocab.json with merges.txt nor tokenizer.json"),
        (drop("merges.txt"), "neither vocab.json with merges.txt nor tokenizer.json"),
        (edit("vocab.json", another=99_999), "tokens, but its text encoder knows"),
        (swap_frame, "'<|startoftext|>' the id"),
        (edit("special_tokens_map.json", pad_token="!"), "pads with '!'"),
        (edit("special_tokens_map.json", pad_token={"content": "<|startoftext|>"}), "pads with '<|startoftext|>'"),
    ],
)
def test_tokenizers_that_are_not_clips_are_refused(
    tiny_base: Path, vocab_size: int, tmp_path: Path, change: Callable[[Path], None], part: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_base / "tokenizer", folder)
    load_tokenizer(folder, vocab_size, "<|endoftext|>")
    change(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, vocab_size, "<|endoftext|>")
    assert part in str(caught.value) and str(folder) in str(caught.value)


def test_the_two_tokenizers_are_not_interchangeable(tiny_base: Path, vocab_size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pads with"):
        load_tokenizers(tiny_base / "tokenizer_2", tiny_base / "tokenizer", (vocab_size, vocab_size))
    with pytest.raises(UserError, match="neither"):
        load_tokenizers(tmp_path, tmp_path, (vocab_size, vocab_size))
    with pytest.raises(UserError, match="its text encoder knows 49408"):
        load_tokenizers(tiny_base / "tokenizer", tiny_base / "tokenizer_2", (vocab_size, 49408))


def test_a_folder_with_tokenizer_json_alone_gives_the_same_ids(
    tiny_base: Path, vocab_size: int, tokenizers: Tokenizers, tmp_path: Path
) -> None:
    """What transformers 5 writes: no vocab.json, no merges.txt."""
    captions = [*demo_captions()[:200], "love live!"]
    for name, tokenizer, padding in zip(("tokenizer", "tokenizer_2"), tokenizers, ("<|endoftext|>", "!"), strict=True):
        CLIPTokenizer.from_pretrained(tiny_base / name).save_pretrained(tmp_path / name)
        assert (tmp_path / name / "tokenizer.json").exists() and not (tmp_path / name / "vocab.json").exists()
        again = load_tokenizer(tmp_path / name, vocab_size, padding)
        assert (again.bos_id, again.eos_id, again.padding_id) == (
            tokenizer.bos_id, tokenizer.eos_id, tokenizer.padding_id)  # fmt: skip
        assert list_ids(again, captions) == list_ids(tokenizer, captions)


# --- encoding

Encoders = tuple[CLIPTextModel, CLIPTextModelWithProjection]


def encode(encoders: Encoders, chunks: TokenChunks) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return encode_prompts(
            *encoders, *map(torch.from_numpy, (chunks.input_ids_1, chunks.input_ids_2, chunks.chunk_map))
        )


def layer_by_layer(encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """The hidden state before the last layer, by the encoder's own layers called one after another."""
    inner = getattr(encoder, "text_model", encoder)
    hidden = inner.embeddings(input_ids=ids)
    causal = torch.full((77, 77), -torch.inf).triu(1)[None, None].expand(len(ids), 1, 77, 77)
    for layer in inner.encoder.layers[:-1]:
        output = layer(hidden, attention_mask=causal)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def test_hidden_states_are_those_before_the_last_layer(encoders: Encoders, tokenizers: Tokenizers) -> None:
    captions = ["bird", "animals, architetto francesco rollandin, " * 20, ""]
    chunks = tokenize_captions(captions, tokenizers, 225)
    embeds, _ = encode(encoders, chunks)
    assert embeds.shape == (3, 227, 64 + 96)
    with torch.no_grad():
        by_hand = torch.cat(
            [
                layer_by_layer(encoder, torch.from_numpy(ids))
                for encoder, ids in zip(encoders, (chunks.input_ids_1, chunks.input_ids_2), strict=True)
            ],
            dim=-1,
        )
    torch.testing.assert_close(embeds, join_chunks(by_hand, torch.from_numpy(chunks.chunk_map)), rtol=1e-5, atol=1e-5)
    # no final norm: normed states have a mean square near 1, these do not
    assert not torch.allclose(embeds[..., :64].square().mean(-1), torch.ones(()), atol=0.05)


def test_the_pooled_vector_is_the_librarys(encoders: Encoders, tokenizers: Tokenizers) -> None:
    captions = ["bird", "", "animals, bird", "love live!"]
    for length in (75, 225):
        chunks = tokenize_captions(captions, tokenizers, length)
        _, pooled = encode(encoders, chunks)
        first = torch.from_numpy(chunks.input_ids_2)[chunks.chunk_map[:, 0]]
        with torch.no_grad():
            expected = encoders[1](first).text_embeds
        assert pooled.shape == (4, 96)
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-6)


def test_a_long_captions_pooled_vector_is_its_first_chunks(encoders: Encoders, tokenizers: Tokenizers) -> None:
    long = "bird, " * 60
    whole, cut = (encode(encoders, tokenize_captions([long], tokenizers, length))[1] for length in (225, 75))
    torch.testing.assert_close(whole, cut, rtol=1e-5, atol=1e-6)


def test_chunks_of_other_samples_change_nothing(encoders: Encoders, tokenizers: Tokenizers) -> None:
    captions = ["bird", "animals " * 100, "bird", ""]
    embeds, pooled = encode(encoders, tokenize_captions(captions, tokenizers, 225))
    for number, caption in enumerate(captions):
        alone = encode(encoders, tokenize_captions([caption], tokenizers, 225))
        torch.testing.assert_close(embeds[number], alone[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled[number], alone[1][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(embeds[0], embeds[2])


def test_prompt_embeds_are_diffusers(tiny_base: Path, encoders: Encoders, tokenizers: Tokenizers) -> None:
    """What the trained model saw is what diffusers' own pipeline shows it."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base, unet=None, vae=None)
    prompts = ["bird", "animals, architetto francesco rollandin", "", "a, " * 60, "1girl, smile, ^_^"]
    embeds, pooled = encode(encoders, tokenize_captions(prompts, tokenizers, 75))
    with torch.no_grad():
        theirs = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, theirs[2], rtol=1e-5, atol=1e-5)

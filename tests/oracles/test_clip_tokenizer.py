"""Token ids over CLIP's real vocabulary, beside transformers' own tokenizer and ids that are known in public.

The vocabulary is read as data from the wheel of open_clip_torch, which ``make setup-dev`` installs without its
dependencies; the package is never imported.
"""

import gzip
import json
from importlib import metadata
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from trainer.data.tokens import TextTokenizer, load_tokenizers

PACKAGE, FILE = "open_clip_torch", "open_clip/bpe_simple_vocab_16e6.txt.gz"
MERGES = 49_408 - 2 * 256 - 2  # the vocabulary: bytes, bytes that end a word, merges, BOS and EOS
BREAKS = "\t\n\x0b\x0c\r\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000"  # white space to someone
MARKS = "\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\ufe0f\u0301\u20dd"  # of no width, or joined to a letter
# after the tests of CLIP's tokenizers: contractions, signs within words, decomposed letters, breaks, marks, BOS and EOS
TEXTS = [
    "A\n'll 11p223RF☆ho!!to?'d'd''d of a cat",
    "xa\u0303y xãy", "xa\u0303y, xãy", "cafe\u0301, café", "1girl, \u0301a", "\u1100\u1161\u11a8, 각",
    *(f"x{sign}y, a{sign}, {sign}b,{sign}c, {sign}, d {sign} e" for sign in [*BREAKS, "\r\n", *MARKS]),
    *(text.replace("@", token) for token in ("<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|endoftext|")
      for text in ("@", "a @ b", "a, @, b", "a,@,b", "x@y, @@", "@, a", "a, @")),
    "ﬁ, ①, \uff21, İ, ß, ΟΔΟΣ, Σ, ǅ", "初音ミク, 日本語, ｶﾞ, カ\u3099", "👨\u200d👩\u200d👧, 🇯🇵, ✌️",
    "don't, it's, WE'LL, 'tis", "^_^, :3, >_<, 6+girls, 1girl, no humans", "&amp;, &lt;b&gt;, a|||b",
    "", " ", ",", ", ", " ,", ", ,", ",,  ,", "  a ,  b  ", "a,", "a, ", "love live!, idol!",
]  # fmt: skip


def byte_symbols() -> list[str]:
    """The characters that stand for bytes, in the vocabulary: bytes that print, then the others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SDXL's two tokenizer folders, as the hub has them."""
    try:
        file = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed, whose wheel holds CLIP's vocabulary: make setup-dev")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = [line.split(" ") for line in lines[1 : MERGES + 1]]
    symbols = byte_symbols()
    words = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    root = tmp_path_factory.mktemp("clip")
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (root / name).mkdir()
        (root / name / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        (root / name / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        (root / name / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": padding}))
    return root / "tokenizer", root / "tokenizer_2"


@pytest.fixture(scope="module")
def tokenizers(folders: tuple[Path, Path]) -> tuple[TextTokenizer, TextTokenizer]:
    return load_tokenizers(*folders, (49_408, 49_408))


@pytest.fixture(scope="module")
def library(folders: tuple[Path, Path]) -> CLIPTokenizer:
    """Transformers' own reading of the first folder."""
    loaded = CLIPTokenizer.from_pretrained(folders[0])
    assert len(loaded) == 49_408  # and not the two tokens that it makes of a folder it cannot read
    return loaded


def test_ids_that_are_known_in_public(tokenizers: tuple[TextTokenizer, TextTokenizer]) -> None:
    """Of CLIP's first example, and of the words with which its tokenizers are tested."""
    known = {"a photo of a cat": [320, 1125, 539, 320, 2368], "hello world!": [3306, 1002, 256]}
    for tokenizer in tokenizers:
        assert [ids.tolist() for ids in tokenizer.content_ids(list(known))] == list(known.values())
        assert (tokenizer.bos_id, tokenizer.eos_id) == (49_406, 49_407)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_ids_are_those_of_transformers(
    library: CLIPTokenizer, tokenizers: tuple[TextTokenizer, TextTokenizer], text: str
) -> None:
    expected = library(text, add_special_tokens=False).input_ids
    for tokenizer in tokenizers:
        assert tokenizer.content_ids([text])[0].tolist() == expected

"""Captions -> chunks of token ids, as SDXL's two text encoders read them.

A caption is tokenized once, cut into chunks of 75 content tokens, and each chunk gets its own BOS and EOS: 77 ids.
Many chunks of a batch are identical (a short caption leaves empty ones), so only the distinct ones are kept.
Recipe, section 4.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

from trainer.core.errors import UserError, shorten
from trainer.core.files import sha256_json
from trainer.core.json_text import check_object, read_json
from trainer.core.layout import TOKENIZER_SETTINGS

CHUNK_LENGTH = 77  # ids of a chunk: BOS, 75 content tokens, EOS
CONTENT_LENGTH = 75
MAX_KNOWN_PARTS = 131_072  # tags whose ids are kept, about 35 MB
MAX_PART_LENGTH = 64  # characters of such a tag; longer ones are tokenized each time
BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"


class TagIds:
    """Ids of captions, put together from those of their tags, which are tokenized once.

    CLIP's tokenizer lowercases letter by letter, finds words that hold no space, and pairs bytes within a word: no
    token comes of both sides of a space. So a caption's ids are those of its parts between ", ", each with its comma.
    The comma stays with its part: of "love live!," the last word is "!,".
    """

    def __init__(self, bpe: Any) -> None:
        """``bpe``: the tokenizers library's Tokenizer."""
        self.bpe = bpe
        # a part's ids with and without a comma after it, int32: bytes are a fourth of the lists
        self._known: dict[str, tuple[bytes, bytes]] = {}

    def encode(self, captions: list[str]) -> list[np.ndarray]:
        """What ``bpe`` makes of each caption without special tokens, int32 (n,). Threads may call it at once."""
        return [np.frombuffer(self._join_parts(caption.split(", ")), dtype=np.int32) for caption in captions]

    def _join_parts(self, parts: list[str]) -> bytes:
        known = self._known
        ids = [known.get(part) or self._encode_part(part) for part in parts]
        return b"".join([*[with_comma for with_comma, _ in ids[:-1]], ids[-1][1]])

    def _encode_part(self, part: str) -> tuple[bytes, bytes]:
        encodings = [self.bpe.encode(text, add_special_tokens=False) for text in (f"{part},", part)]
        with_comma, alone = (np.array(encoding.ids, dtype=np.int32).tobytes() for encoding in encodings)
        # common tags come first, so that what a full cache holds is worth holding; sentences are not
        if len(self._known) < MAX_KNOWN_PARTS and len(part) <= MAX_PART_LENGTH:
            self._known[part] = with_comma, alone
        return with_comma, alone


@dataclass(frozen=True)
class TextTokenizer:
    """One of SDXL's two tokenizers, with the ids that frame and fill a chunk."""

    tag_ids: TagIds
    bos_id: int
    eos_id: int
    padding_id: int

    def content_ids(self, captions: list[str]) -> list[np.ndarray]:
        """Content tokens of each caption, without BOS, EOS and padding, however long: int32 (n,)."""
        return self.tag_ids.encode(captions)


@dataclass(frozen=True)
class TokenChunks:
    """The distinct chunks of some captions, and which of them make up each caption."""

    input_ids_1: np.ndarray  # int64 (K, 77), for encoder 1
    input_ids_2: np.ndarray  # int64 (K, 77), for encoder 2
    chunk_map: np.ndarray  # int64 (B, chunks), rows of the two above


def load_tokenizers(
    folder_1: Path, folder_2: Path, vocab_sizes: tuple[int, int]
) -> tuple[TextTokenizer, TextTokenizer]:
    """The tokenizers of both encoders, checked against the encoders' vocabulary sizes.

    Encoder 1 pads with EOS, encoder 2 with id 0.

    Raises:
        UserError: when files are missing, or length, BOS, EOS or padding are not CLIP's.
    """
    first = load_tokenizer(folder_1, vocab_sizes[0], padding_token=EOS_TOKEN)
    second = load_tokenizer(folder_2, vocab_sizes[1], padding_token="!")
    if first.tag_ids.bpe.to_str() == second.tag_ids.bpe.to_str():  # SDXL's are: what one knows serves both
        second = dataclasses.replace(second, tag_ids=first.tag_ids)
    return first, second


def load_tokenizer(folder: Path, vocab_size: int, padding_token: str) -> TextTokenizer:
    """One tokenizer from ``vocab.json`` and ``merges.txt``, or from ``tokenizer.json``.

    The library's own loading is not used: it builds a silent two-token tokenizer when files are missing, and it
    makes the second folder's padding "!" a special token, so that "love live!" would end in padding.
    """
    vocab, merges = read_bpe(folder)
    if len(vocab) != vocab_size:
        raise UserError(f"tokenizer {folder} has {len(vocab)} tokens, but its text encoder knows {vocab_size}")
    if (largest := max(vocab.values())) >= vocab_size:
        raise UserError(f"tokenizer {folder} has the id {largest}, but its text encoder knows {vocab_size}")
    expected = {BOS_TOKEN: vocab_size - 2, EOS_TOKEN: vocab_size - 1, "!": 0}
    for token, number in expected.items():
        if vocab.get(token) != number:
            raise UserError(f"tokenizer {folder} gives {token!r} the id {vocab.get(token)}, CLIP's has {number}")
    declared = declared_padding(folder)
    if declared is not None and declared != padding_token:
        raise UserError(f"tokenizer {folder} pads with {declared!r}; this encoder of SDXL pads with {padding_token!r}")
    try:
        wrapped = CLIPTokenizer(
            vocab=vocab, merges=merges, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN
        )
    except Exception as error:  # the library has no class of its own for a merge of tokens that are not there
        raise UserError(f"tokenizer {folder} makes no tokenizer: {shorten(str(error))}") from error
    return TextTokenizer(TagIds(wrapped.backend_tokenizer), vocab[BOS_TOKEN], vocab[EOS_TOKEN], vocab[padding_token])


def read_bpe(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer folder.

    Raises:
        UserError: where there are none, or they are no such tables, naming the file.
    """
    vocab_file, merges_file, fast_file = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if vocab_file.exists() and merges_file.exists():
        try:
            lines = merges_file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{merges_file} cannot be read: {error}") from error
        pairs: Any = [line.split() for line in lines if line and not line.startswith("#version")]
        return check_vocabulary(read_json(vocab_file), vocab_file), check_merges(pairs, merges_file)
    if fast_file.exists():
        model = check_object(read_json(fast_file).get("model"), f"{fast_file}: model")
        merges = model.get("merges")
        if isinstance(merges, list):
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        return check_vocabulary(model.get("vocab"), fast_file), check_merges(merges or [], fast_file)
    raise UserError(f"tokenizer {folder} has neither vocab.json with merges.txt nor tokenizer.json")


def check_vocabulary(vocab: Any, file: Path) -> dict[str, int]:
    """Tokens and their ids, each of which is given once."""
    known = check_object(vocab, f"the vocabulary in {file}")
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in known.values()):
        raise UserError(f"the vocabulary in {file} must map tokens to whole numbers")
    if len(set(known.values())) < len(known):
        raise UserError(f"the vocabulary in {file} gives two tokens the same id")
    return known


def check_merges(pairs: Any, file: Path) -> list[tuple[str, str]]:
    """Merges, pairs of texts."""
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair) for pair in pairs
    ):
        raise UserError(f"the merges in {file} must be pairs of tokens")
    return [(left, right) for left, right in pairs]


def read_added_tokens(folder: Path) -> dict[str, int]:
    """The tokens of tokenizer.json beside its vocabulary."""
    added = read_json(folder / "tokenizer.json").get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError(f"{folder / 'tokenizer.json'}: added_tokens must be a list of objects")
    return check_vocabulary({str(token.get("content")): token.get("id") for token in added}, folder / "tokenizer.json")


def hash_tokenizers(folder_1: Path, folder_2: Path) -> str:
    """SHA-256 of what decides the ids: vocabulary and merges of both, whatever files they lie in."""
    return sha256_json([read_bpe(folder) for folder in (folder_1, folder_2)])


def declared_padding(folder: Path) -> str | None:
    """The padding token that a tokenizer folder declares, if it does."""
    for name in TOKENIZER_SETTINGS[::-1]:
        file = folder / name
        if file.exists() and (token := read_json(file).get("pad_token")) is not None:
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise UserError(f"{file}: pad_token must be a token, not {shorten(repr(token), 80)}")
            return content
    return None


def make_chunks(contents: Sequence[Sequence[int] | np.ndarray], tokenizer: TextTokenizer, chunks: int) -> np.ndarray:
    """Content tokens of B captions, each cut after ``chunks`` times 75, as framed chunks: int64 (B * chunks, 77).

    The first padding slot of a chunk is its EOS.
    """
    body = np.full((len(contents), chunks * CONTENT_LENGTH), tokenizer.padding_id, dtype=np.int64)
    for row, content in zip(body, contents, strict=True):
        row[: len(content)] = content[: len(row)]
    left = np.array([len(content) for content in contents])[:, None] - CONTENT_LENGTH * np.arange(chunks)
    ids = np.full((len(contents), chunks, CHUNK_LENGTH), tokenizer.padding_id, dtype=np.int64)
    ids[:, :, 0] = tokenizer.bos_id
    ids[:, :, 1:-1] = body.reshape(len(contents), chunks, CONTENT_LENGTH)
    np.put_along_axis(ids, 1 + left.clip(0, CONTENT_LENGTH)[..., None], tokenizer.eos_id, axis=2)
    return ids.reshape(-1, CHUNK_LENGTH)


def tokenize_captions(
    captions: list[str], tokenizers: tuple[TextTokenizer, TextTokenizer], max_token_length: int
) -> TokenChunks:
    """The distinct chunks of a batch of captions, in order of their first appearance."""
    chunks = max_token_length // CONTENT_LENGTH
    first, second = tokenizers
    contents_1 = first.content_ids(captions)
    contents_2 = contents_1 if second.tag_ids is first.tag_ids else second.content_ids(captions)
    framed = [make_chunks(contents_1, first, chunks), make_chunks(contents_2, second, chunks)]
    pairs = np.concatenate(framed, axis=1)  # (B * chunks, 2 * 77): a chunk is distinct if either encoder's ids are
    seen: dict[bytes, int] = {}
    numbers = [seen.setdefault(pair.tobytes(), len(seen)) for pair in pairs]
    first_places = np.unique(numbers, return_index=True)[1]
    return TokenChunks(
        framed[0][first_places],
        framed[1][first_places],
        np.array(numbers, dtype=np.int64).reshape(len(captions), chunks),
    )

"""The ids of a caption, put together from its tags': the tokenizer's own, to the last one."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.paths import REPOSITORY
from trainer.data import tokens
from trainer.data.tokens import TagIds, TextTokenizer, load_tokenizers, tokenize_captions

ODD_TAGS = [
    # brackets, marks and faces, at the ends where they meet the comma
    "saber (fate)", "(fate) saber", "star (symbol)", "love live!", "!?", "!", "...", "^_^", ":3", ":d", ";)",
    "\\(^o^)/",     ">_<", "@_@", "=_=", "o_o", "0_0", "\\m/", "?", "k-on!", "re:zero", "fate/stay night",
    "idolm@ster", "-", "--a--",
    # contractions, which are words of their own, also cut off by the comma or by a digit
    "it's", "don't say \"lazy\"", "rock'n'roll", "'s", "s'", "'", "we'll 've", "'re'd", "I'M", "girls'",
    "jack-o'-lantern",
    # digits stand alone; spaces and letters of all kinds
    "2girls", "6+girls", "1990s (style)", "69", "½", "x²", "a  b", " a", "a ", "\ta\n", "\u3000a\u3000",
    "\u00a0", "\u200b", "\u0085x", "café", "cafe\u0301", "\u0301e", "e\u0301\u0323", "e\u0323\u0301", "ΣΑΣ",
    "ΣΑΣ Σ", "İstanbul", "ǅ", "ß",
    "ﬁ", "東方", "初音ミク", "\uff46\uff55\uff4c\uff4c\u3000\uff57", "\uff01", "\uff0c", "、", "가나",
    "\u1112\u1161\u11ab", "नमस्ते", "👩‍👩‍👧", "🇯🇵", "❤️", "\U0001d4b3",
    # commas within, and what the tokenizer takes for its own
    "a,b", ",", ",,", ",a", "a,", "a,,b", ", ", "", " ", "  ", "<|endoftext|>", "a<|endoftext|>b", "<|startoftext|>x",
    "<|ENDOFTEXT|>", "<|endoftext|", "|>", "</w>", "Ġa", "\x00", "\x1f", "_", "__", "a_b_c",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tiny_base: Path) -> tuple[TextTokenizer, TextTokenizer]:
    size = len(json.loads((tiny_base / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))
    return load_tokenizers(tiny_base / "tokenizer", tiny_base / "tokenizer_2", (size, size))


def check(tag_ids: TagIds, captions: list[str]) -> None:
    whole = [encoding.ids for encoding in tag_ids.bpe.encode_batch(captions, add_special_tokens=False)]
    assert [ids.tolist() for ids in tag_ids.encode(captions)] == whole


def demo_tags() -> list[str]:
    lines = (REPOSITORY / "demo/posts.jsonl").read_text(encoding="utf-8").splitlines()
    fields = [value for line in lines for name, value in json.loads(line).items() if name.startswith("tag_string")]
    return sorted({tag.replace("_", " ") for field in fields for tag in field.split()})


@pytest.mark.parametrize("separator", [", ", ",", " , ", ",  "])
def test_ids_are_the_tokenizers_on_thousands_of_captions(
    tokenizers: tuple[TextTokenizer, TextTokenizer], separator: str
) -> None:
    generator = np.random.default_rng(0)
    tags = np.array([*ODD_TAGS, *demo_tags()], dtype=object)
    captions = [separator.join(generator.choice(tags, generator.integers(0, 40))) for _ in range(2000)]
    captions += list(tags)
    for _ in range(2):  # the second time nothing is new
        check(tokenizers[0].tag_ids, captions)


def test_every_two_odd_tags_stand_side_by_side(tokenizers: tuple[TextTokenizer, TextTokenizer]) -> None:
    check(tokenizers[0].tag_ids, [f"{left}, {right}" for left in ODD_TAGS for right in ODD_TAGS])


TAGS = (
    st.text(max_size=12)
    | st.text("abΣÉ!,.'|<>()_^ \u3000\u030101<|endoftext|>st", max_size=12)
    | st.sampled_from(ODD_TAGS)
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(TAGS, max_size=8).map(", ".join) | st.text(max_size=60), min_size=1, max_size=5))
def test_ids_are_the_tokenizers_on_any_text(
    tokenizers: tuple[TextTokenizer, TextTokenizer], captions: list[str]
) -> None:
    check(tokenizers[0].tag_ids, captions)


class Counting:
    """A tokenizer that counts what it is asked."""

    def __init__(self, bpe: Any) -> None:
        self.bpe, self.asked = bpe, list[str]()

    def encode(self, part: str, add_special_tokens: bool) -> Any:
        self.asked.append(part)
        return self.bpe.encode(part, add_special_tokens=add_special_tokens)


def test_a_tag_is_tokenized_once(tokenizers: tuple[TextTokenizer, TextTokenizer]) -> None:
    counting = Counting(tokenizers[0].tag_ids.bpe)
    tag_ids = TagIds(counting)
    tag_ids.encode(["a, b, a, c", "b, c"])
    tag_ids.encode(["c, b,a, a"])
    # with a comma behind it and at a caption's end; a comma without a space is within a tag
    assert counting.asked == ["a,", "a", "b,", "b", "c,", "c", "b,a,", "b,a"]


def test_what_is_kept_is_bounded(
    tokenizers: tuple[TextTokenizer, TextTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_KNOWN_PARTS", 10)
    counting = Counting(tokenizers[0].tag_ids.bpe)
    tag_ids = TagIds(counting)
    sentence = "a sentence " * 10
    for captions in (["a, b", sentence], [f"{n}, x{n}" for n in range(20)], [f"{n}, y{n}" for n in range(50)]):
        whole = [encoding.ids for encoding in counting.bpe.encode_batch(captions, add_special_tokens=False)]
        for _ in range(2):
            assert [ids.tolist() for ids in tag_ids.encode(captions)] == whole
    assert len(tag_ids._known) == 10
    assert [counting.asked.count(part) for part in ("a", sentence, "49")] == [1, 2, 2]


def test_threads_share_what_is_known(tokenizers: tuple[TextTokenizer, TextTokenizer]) -> None:
    tag_ids = TagIds(tokenizers[0].tag_ids.bpe)
    captions = [", ".join(demo_tags()[start : start + 9]) for start in range(0, 200, 3)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check(tag_ids, captions), range(16)))


def test_tokenizers_work_in_a_forked_process(tokenizers: tuple[TextTokenizer, TextTokenizer]) -> None:
    captions = ["bird, love live!", "^_^, bird"]
    known = [ids.tolist() for ids in tokenizers[0].content_ids(captions)]
    child = os.fork()
    if child == 0:
        same = [ids.tolist() for ids in tokenizers[1].content_ids(captions)] == known
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_two_tokenizers_that_differ_keep_their_own_ids(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_base / name, tmp_path / name)
    merges = tmp_path / "tokenizer_2" / "merges.txt"
    merges.write_text("\n".join(merges.read_text(encoding="utf-8").splitlines()[:-100]) + "\n", encoding="utf-8")
    size = len(json.loads((tiny_base / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))
    first, second = load_tokenizers(tmp_path / "tokenizer", tmp_path / "tokenizer_2", (size, size))
    assert first.tag_ids is not second.tag_ids
    captions = [", ".join(demo_tags()[start : start + 12]) for start in range(0, 120, 12)]
    ids_1, ids_2 = first.content_ids(captions), second.content_ids(captions)
    assert any(a.tolist() != b.tolist() for a, b in zip(ids_1, ids_2, strict=True))
    check(second.tag_ids, captions)
    chunks = tokenize_captions(captions, (first, second), 75)
    for place, (a, b) in enumerate(zip(ids_1, ids_2, strict=True)):
        row = chunks.chunk_map[place, 0]
        assert chunks.input_ids_1[row][1:76][: len(a)].tolist() == a[:75].tolist()
        assert chunks.input_ids_2[row][1:76][: len(b)].tolist() == b[:75].tolist()


def test_sdxls_two_tokenizers_share_what_they_know(tokenizers: tuple[TextTokenizer, TextTokenizer]) -> None:
    assert tokenizers[0].tag_ids is tokenizers[1].tag_ids
    assert tokenizers[0].padding_id != tokenizers[1].padding_id == 0

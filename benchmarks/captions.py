"""How fast captions are composed, drawn and tokenized, beside calling the tokenizer for each. Prints one table.

``python benchmarks/captions.py [--captions 4000] [--rounds 5] [--tokenizers FOLDER]``

Each round is another pass over the same posts in batches of 16: other draws, and tags known from the passes before, as
in a run. All is measured in turn, in seconds of CPU, which other programs disturb less; the table has medians, and the
median of each round's ratio to the first line. Before that the ids of a pass's captions are compared with the library's
tokenizer; the script fails if one differs. ``--tokenizers`` names a base model whose two tokenizers are used; without
it tiny ones are made, which cut words into more pieces.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posts import find_tokenizer_base, load_base_tokenizers, make_rows, plain_config, print_rates
from transformers import CLIPTokenizer

from trainer.data.caption_draws import draw_sample_caption
from trainer.data.template import CaptionRules, ready_rules
from trainer.data.tokens import TextTokenizer, tokenize_captions

Rows = list[dict[str, Any]]
Work = Callable[[list[str], int], object]  # of some captions, already drawn, and a pass's number
BATCH = 16


def check_ids(captions: list[str], tokenizers: tuple[TextTokenizer, TextTokenizer], library: CLIPTokenizer) -> int:
    """Compare every caption's ids with the library's, of the whole caption at once; returns how many ids there were."""
    count = 0
    for tokenizer in tokenizers:
        for caption, ids in zip(captions, tokenizer.content_ids(captions), strict=True):
            if library(caption, add_special_tokens=False).input_ids != ids.tolist():
                raise SystemExit(f"other ids than the tokenizer's: {caption!r}")
            count += len(ids)
    return count


def list_work(
    rows: Rows,
    rules: CaptionRules,
    tokenizers: tuple[TextTokenizer, TextTokenizer],
    library: tuple[CLIPTokenizer, ...],
) -> dict[str, Work]:
    """What is measured, by name, the tokenizer called for each caption first."""

    def call_library(captions: list[str], _: int) -> None:
        for caption in captions:
            for tokenizer in library:
                tokenizer(caption, padding="max_length", truncation=True, max_length=227)

    def draw_and_call(captions: list[str], pass_: int) -> None:
        draw(captions, pass_)
        call_library(captions, pass_)

    def call_backend(captions: list[str], _: int) -> None:
        for caption in captions:
            for tokenizer in tokenizers:
                tokenizer.tag_ids.bpe.encode(caption, add_special_tokens=False)

    def draw(_: list[str], pass_: int) -> None:
        for row in rows:
            draw_sample_caption(row, pass_, 42, rules)

    def tokenize(captions: list[str], _: int) -> None:
        for start in range(0, len(captions), BATCH):
            tokenize_captions(captions[start : start + BATCH], tokenizers, rules.config.max_token_length)

    def everything(_: list[str], pass_: int) -> None:
        for start in range(0, len(rows), BATCH):
            captions = [draw_sample_caption(row, pass_, 42, rules) for row in rows[start : start + BATCH]]
            tokenize_captions(captions, tokenizers, rules.config.max_token_length)

    return {
        "transformers' tokenizer called, twice a caption": call_library,
        "composed, drawn, and transformers' tokenizer called": draw_and_call,
        "its backend called, twice a caption": call_backend,
        "ours: tokenized and cut into chunks, both encoders": tokenize,
        "ours: composed and drawn": draw,
        "ours: composed, drawn, tokenized, cut into chunks": everything,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Captions per second, composed, drawn and tokenized.")
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizers", type=Path, help="a base model's folder with tokenizer and tokenizer_2")
    arguments = parser.parse_args()
    rules = ready_rules(plain_config().captions)
    rows = list(make_rows(arguments.captions))
    with tempfile.TemporaryDirectory() as name:
        base = find_tokenizer_base(arguments.tokenizers, Path(name))
        tokenizers = load_base_tokenizers(base)
        # encoder 2's own takes "!" for padding, and makes other ids of it: the first one, twice, is what is right
        library = (CLIPTokenizer.from_pretrained(base / "tokenizer"),) * 2
    rates: dict[str, list[float]] = {}
    for pass_ in range(arguments.rounds + 1):
        captions = [draw_sample_caption(row, pass_, 42, rules) for row in rows]
        if pass_ == 0:
            ids = check_ids(captions, tokenizers, library[0])
            print(f"{len(captions)} captions, {ids} ids: all as the tokenizer's own")
        for work_name, do in list_work(rows, rules, tokenizers, library).items():
            start = time.process_time()
            do(captions, pass_)
            if pass_:  # the first pass fills the cache
                rates.setdefault(work_name, []).append(len(rows) / (time.process_time() - start))
    print_rates("", "captions/s", rates)


if __name__ == "__main__":
    main()

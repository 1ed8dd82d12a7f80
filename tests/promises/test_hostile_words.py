"""P12, second part. Words of others stay words in a card, CHANGES.md and the files of a published folder.

Tags, prompts, a base's lineage and the text chunks of samples come from other people's files. Not promised: that an
address in them is not shown as one, and what the publisher writes in publish.notes and publish.acknowledgements.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from support.card_release import make_release
from support.checkpoints import change_record
from support.hostile_words import HOSTILE
from support.html_reader import Reader
from support.published_run import SOURCE, change, parts, request_of, run, stages, stand_in, write_png
from trainer.config.caption_fields import ColumnRule, QualityRule, YearRule
from trainer.model.checkpoint import read_train_state
from trainer.model.lineage import LINEAGE_KEY
from trainer.model.lineage_rows import list_stages
from trainer.model.weights_file import LazyFile
from trainer.release.card import write_card, write_changes
from trainer.release.publish import Request, publish
from trainer.sample.pictures import Sample

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures

Count = Callable[[str, bool], None]

ADDRESSES = (
    r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*",
    r"https://huggingface\.co/[\w.-]+/[\w.-]+",
    r"https://example\.org/.*",
)
TAGS = {"h1", "h2", "h3", "h4", "p", "ul", "li", "strong", "a", "code", "pre", "table", "thead", "tbody", "tr", "th",
        "td", "details", "summary", "blockquote", "img"}  # fmt: skip


def read_markdown(text: str) -> Reader:
    """A card as a page shows it: CommonMark with tables, and HTML as it stands."""
    _, _, body = text.partition("\n---\n") if text.startswith("---\n") else ("", "", text)
    return Reader(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))


def find_escape(text: str, sound: str) -> str | None:
    """What in a card is not as in one of plain words; None where only words differ."""
    if text.startswith("---\n"):
        headers = [yaml.safe_load(each.split("\n---\n")[0]) for each in (text, sound)]
        if headers[0].keys() != headers[1].keys() or headers[0]["license"] != "other":
            return f"the header: {headers[0]}"
    read, plain = read_markdown(text), read_markdown(sound)
    if strange := set(read.tags) - TAGS:
        return f"tags {strange}"
    for tag in ("h1", "h2", "h3", "h4", "table", "tr", "td", "th", "ul", "li", "details", "pre", "img", "blockquote"):
        if read.tags.count(tag) != plain.tags.count(tag):
            return f"{read.tags.count(tag)} {tag}, not {plain.tags.count(tag)}"
    for tag, name, value in read.attributes:
        if name in ("href", "src") and not any(re.fullmatch(form, value) for form in ADDRESSES):
            return f"{tag} {name}={value}"
        if name not in ("href", "src", "alt", "class", "style"):
            return f"{tag} {name}"
        if name == "style" and not re.fullmatch(r"text-align:\w+", value):
            return f"style {value}"
    return None


def spoil(value: Any, text: str, kept: tuple[str, ...] = ("run", "sha256", "revision")) -> Any:
    """The same JSON with that text in the place of all others, but for what a lineage is refused over."""
    if isinstance(value, dict):
        return {key: item if key in kept else spoil(item, text, kept) for key, item in value.items()}
    if isinstance(value, list):
        return [spoil(item, text, kept) for item in value]
    return text if isinstance(value, str) else value


def lineage_of(release: Any) -> dict[str, Any]:
    return json.loads(json.dumps(release.stages[-1]))


SOUND = "words"


def make_card(text: str) -> tuple[str, str]:
    """Card and changes of two stages, of which everything that others say is that text."""
    release = make_release()
    lineage = spoil(lineage_of(release), text)
    for made in (lineage, lineage["base"]["lineage"]):
        made["hardware"], made["versions"] = [text], {"torch": text, "diffusers": text}
        made["code"] = {"version": text, "commit": text, "dirty": True}
        made["fork"] = {"run": text, "step": 3, "lineage": None}
        made["caption_fields"] = {"caption": 1, "score": 1, "rating": 1, "year": 1, text: 2, f"extra.{text}": 3}
        made["base"]["sha256"] = made["index_fingerprint"] = text
    settings = dict.fromkeys(("sampler", "size", "seed", "guidance", "steps", "model"), text)
    samples = [Sample(Path(f"{name}.png"), text, text, settings) for name in ("a", "b")]
    captions = dataclasses.replace(
        release.config.captions,
        ratings={"g": text, "q": f"x{text}"},
        people=[text],
        years=[YearRule(2019, 2021, text)],
        quality=[QualityRule(text, 1), QualityRule(f"x{text}")],
        columns=[ColumnRule(text, text, 0.5)],
    )
    config = dataclasses.replace(release.config, captions=captions)
    made_of = dataclasses.replace(
        release, config=config, stages=list_stages(lineage), samples=samples, acknowledged=text,
        license_files={"LICENSE.md": "x", "LICENSE-base.md": text},
    )  # fmt: skip
    return write_card(made_of), write_changes(made_of)


@functools.cache
def sound_card() -> tuple[str, str]:
    return make_card(SOUND)


def check_cards(text: str, what: str, count_try: Count) -> None:
    for made, sound in zip(make_card(text), sound_card(), strict=True):
        found = find_escape(made, sound)
        count_try(what, found is None)
        assert found is None, (text, found)


def test_every_hostile_word_of_a_card(count_try: Count) -> None:
    for text in HOSTILE:
        check_cards(text, "hostile words of a lineage, prompts and samples stay words in a card", count_try)


@pytest.mark.faults
@pytest.mark.parametrize("form", ["x {} y", "{0}{0}", "x{0}", "{0}\n{0}"])
def test_hostile_words_within_others(form: str, count_try: Count) -> None:
    for text in HOSTILE:
        placed = form.replace("{0}", text).replace("{}", text)
        check_cards(placed, "hostile words within others stay words in a card", count_try)


@pytest.mark.faults
def test_mixtures_of_hostile_words(count_try: Count) -> None:
    generator = np.random.default_rng(4)
    for _ in range(400):
        pieces = generator.choice(len(HOSTILE), generator.integers(2, 5))
        text = generator.choice(["", " ", "\n", "x"]).join(HOSTILE[piece] for piece in pieces)
        check_cards(text, "mixtures of hostile words stay words in a card", count_try)


def test_a_published_folder_of_hostile_words(run: Path, request_of: Request, tmp_path: Path, count_try: Count) -> None:
    """Reached by the real way: a run whose base's lineage, config and samples are hostile is exported and published."""
    text = "</details><script>x</script> ![p](https://evil.example/t.png) | `x` [a](javascript:x)\n---\nlicense: mit\n"

    def publish_with(words: str, out: Path) -> Path:
        checkpoint = run / "checkpoints/step-00000030"
        state = read_train_state(checkpoint)
        lineage = state["lineage"]
        kept = ("run", "sha256", "revision", "reference", "lineage", "config")
        lineage["base"]["lineage"] = spoil(lineage["base"]["lineage"], words, kept) | {"hardware": [words]}
        lineage["base"]["lineage"]["config"]["captions"]["ratings"] = {"g": words}
        lineage["hardware"] = [words]
        for config in (
            state["config"],
            lineage["config"],
            written := yaml.safe_load((run / "config.yaml").read_text()),
        ):
            config["sampling"] |= {"prompts": [words], "negative_prompt": words, "every_steps": 10}
            config["captions"] |= {"ratings": {"g": words}, "people": [words]}
        (run / "config.yaml").write_text(yaml.safe_dump(written))
        change_record(checkpoint, **state)
        for name in ("a", "b"):
            write_png(run / f"export/samples/{name}.png", prompt=words, negative_prompt=words,
                      settings=json.dumps({"sampler": words, "seed": words, "size": words}))  # fmt: skip
        settings = [SOURCE, f"publish.title={json.dumps(words)}", f"publish.author={json.dumps(words)}"]
        folder, _ = publish(change(request_of, out=out, acknowledged=f"made by ourselves: {words}"), settings)
        return folder

    sound, hostile = publish_with(SOUND, tmp_path / "sound"), publish_with(text, tmp_path / "hostile")
    for name in ("README.md", "CHANGES.md"):
        found = find_escape((hostile / name).read_text(), (sound / name).read_text())
        count_try("a published folder of hostile words holds no more than words", found is None)
        assert found is None, (name, found)
    inside = {path.relative_to(hostile).as_posix() for path in hostile.rglob("*") if path.is_file()}
    names = {path.relative_to(sound).as_posix() for path in sound.rglob("*") if path.is_file()}

    def drop_title(files: set[str]) -> set[str]:
        """The single file is called by the title's letters."""
        assert all(re.fullmatch(r"[\w./-]+", name) for name in files)
        return {"single" if name.endswith("-fp16.safetensors") else name for name in files}

    assert drop_title(inside) == drop_title(names)
    for config in hostile.glob("configs/*.yaml"):
        assert isinstance(yaml.safe_load(config.read_text()), dict)
    (single,) = hostile.glob("*.safetensors")
    json.loads(LazyFile(single).metadata[LINEAGE_KEY])

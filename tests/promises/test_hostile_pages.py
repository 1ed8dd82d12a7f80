"""P12, third part. On the pages of a run, of a set and of runs side by side, words of others stay words.

All that files of strangers may say stands on one page each, which Python's parser and, where there is one, Chromium
read: the same tags and attributes as on the page of plain words, no script but ours, nothing asked for.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support.browser import CHROMIUM, Page, browse
from support.hostile_words import HOSTILE
from support.html_reader import Reader
from support.run_on_disk import view_of, write_run, write_sheet
from support.set_on_disk import row, write_set
from trainer.config.caption_fields import YearRule
from trainer.config.schema import Config
from trainer.report.comparison import read_runs, render_comparison
from trainer.report.data_page import make_report, render_data
from trainer.report.run_page import RunState, render_run

Count = Callable[[str, bool], None]

SOUND = [f"word{number}" for number in range(len(HOSTILE))]
SCRIPTED = "<script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page | None]:
    if CHROMIUM is None:
        print("no Chromium is installed: Python's parser alone read these pages")
        yield None
        return
    with browse(tmp_path_factory.mktemp("profile")) as page:
        yield page


def run_page(folder: Path, words: list[str]) -> Path:
    """What records, metrics, samples, warnings and the last message say."""
    facts = [{"reference": text, "revision": text, "sha256": text, "prediction": {"prediction_type": text}}
             for text in words]  # fmt: skip
    pages = folder / "run"
    line = {"step": 1, "train/loss": 0.1, "progress/samples_seen": 4, "progress/epoch": 0.1}
    write_run(pages, [line | {f"own/{text}": 1.0 for text in words}], base=facts[0], index_fingerprint="".join(words))
    write_sheet(pages, 1, words)
    view = view_of(pages, warnings=words, state=RunState("failed", " ".join(words)), resume="".join(words))
    view.written["run"] |= {"name": "".join(words), "stage": words[0]}
    view.written["data"]["shards"] = view.written["model"]["vae"] = " ".join(words)
    view.written["sampling"] |= {"prompts": words, "negative_prompt": "".join(words)}
    view.records["attempts"][0] |= {"device": "".join(words), "code": {"version": words[1], "commit": "".join(words)}}
    path = pages / "index.html"
    path.write_text(render_run(view), encoding="utf-8")
    return path


def comparison(folder: Path, words: list[str]) -> Path:
    made = []
    for name in ("first", "second"):
        line = {"step": 1, "train/loss": 0.1, "progress/samples_seen": 4, "progress/epoch": 0.1}
        base = dict.fromkeys(("reference", "revision", "sha256"), f"{name} {''.join(words)}")
        made.append(write_run(folder / name, [line | {f"own/{text}": 1.0 for text in words}], base=base,
                              index_fingerprint=f"{name} {''.join(words)}"))  # fmt: skip
        write_sheet(folder / name, 1, words)
    read = [dataclasses.replace(run, label=f"{number} {''.join(words)}") for number, run in enumerate(read_runs(made))]
    path = folder / "comparison.html"
    path.write_text(render_comparison(read, path), encoding="utf-8")
    return path


def data_page(folder: Path, words: list[str], config: Config) -> Path:
    """Keys, tags, captions, sources, ratings and reasons of a set, each sample with thumbnails of what it holds."""
    rows = [
        row(quote(text[:99], safe="") + str(number), rating=text, source=text, tags_general=f"{text} ok",
            tags_artist=text, tags_character=text, caption=text if number % 2 else None, year=2020)
        for number, text in enumerate(words)
    ]  # fmt: skip
    aside = dict.fromkeys(words, 1)
    counts = {"inputs": len(words), "samples": len(words), "set_aside": aside, "notes": aside}
    folder.mkdir()
    shards = write_set(folder / quote(words[0], safe="<>"), rows, counts=counts)
    captions = dataclasses.replace(config.captions, ratings=dict.fromkeys(words, words[1]), people=words,
                                   years=[YearRule(2019, 2021, words[2])])  # fmt: skip
    data = dataclasses.replace(config.data, shards=str(shards), posts=[f"{words[3]}.jsonl"])
    path = folder / "data.html"
    report = make_report(dataclasses.replace(config, data=data, captions=captions))
    path.write_text(render_data(report), encoding="utf-8")
    return path


def build(kind: str, folder: Path, words: list[str], config: Config) -> Path:
    if kind == "set":
        return data_page(folder, words, config)
    return run_page(folder, words) if kind == "run" else comparison(folder, words)


def count_shape(page: str) -> Counter[Any]:
    """Tags and attributes' names; without those that names are broken with after each underscore."""
    read = Reader(page)
    return Counter(tag for tag in read.tags if tag != "wbr") + Counter(
        f"{tag} {name}" for tag, name, _ in read.attributes
    )


@pytest.mark.parametrize("kind", ["run", "set", "comparison"])
def test_hostile_words_on_pages(
    kind: str, tmp_path: Path, make_config: Callable[..., Config], browser: Page | None, count_try: Count
) -> None:
    config, words = make_config(), [*HOSTILE, SCRIPTED]
    sound = build(kind, tmp_path / "sound", [*SOUND, "last"], config).read_text(encoding="utf-8")
    path = build(kind, tmp_path / "hostile", words, config)
    page = path.read_text(encoding="utf-8")
    what = f"hostile words on the page of a {kind}" if kind != "comparison" else "hostile words on a comparison"
    shapes = count_shape(page), count_shape(sound)
    if kind == "set":  # where texts are counted in parts, at commas and spaces: as many rows as parts
        shapes = Counter(list(shapes[0])), Counter(list(shapes[1]))
    held = shapes[0] == shapes[1]
    count_try(f"{what}: the same tags and attributes as of plain words", held)
    assert held, (shapes[0] - shapes[1], shapes[1] - shapes[0])
    assert SCRIPTED in Reader(page).text and "javascript:alert(1)" in Reader(page).text
    if browser is None:
        return
    browser.open(path)
    found = browser.evaluate("[...document.querySelectorAll('*')].map((one) => one.localName)")
    links = browser.evaluate("[...document.querySelectorAll('[href], [src]')].map((one) => one.href || one.src)")
    held = browser.complaints() == [] and browser.evaluate("document.title") != "hit"
    held = held and all(str(url).startswith(("file:", "data:")) for url in [*links, *browser.requests()] if url != {})
    held = held and Counter(found)["script"] == (0 if kind == "set" else 2) and "svg/onload" not in found
    count_try(f"{what}, in Chromium: no script runs, nothing is asked for", held)
    assert held, (browser.complaints(), links, browser.requests(), Counter(found))

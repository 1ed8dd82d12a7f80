"""The pages in a real browser: the slider moves all strips, the pointer finds values, nothing is too wide."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import CHROMIUM, Page, browse
from support.run_on_disk import view_of, write_run, write_sheet
from trainer.config.schema import Config
from trainer.report.comparison import read_runs, render_comparison
from trainer.report.run_page import render_run
from trainer.report.subset_page import make_subset_report, render_subset

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

HOSTILE = "<img src=x onerror=\"document.title='hit'\"></script><script>document.title='hit'</script>"
PROMPTS = ["a cat", HOSTILE, "a very long prompt, " * 20]
PIXEL = """(async () => {{
  const figure = document.querySelectorAll("figure.chosen")[{0}], image = figure.querySelector("img");
  await image.decode();
  const cell = figure.querySelector("a").getBoundingClientRect(), whole = image.getBoundingClientRect();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const x = (cell.left + cell.width / 2 - whole.left) / whole.width * canvas.width;
  const y = (cell.top + cell.height / 2 - whole.top) / whole.height * canvas.height;
  return [Math.round(x), Math.round(y), image.getAttribute("src"), figure.querySelector("figcaption").textContent];
}})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browse(tmp_path_factory.mktemp("profile")) as page:
        yield page


def lines(count: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "train/loss": 0.1 + step % 9 / 100, "lr/unet": 1e-5, "progress/samples_seen": 4 * step,
         "progress/epoch": step / 6}
        for step in range(1, count + 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", lines(3000))
    for step in (10, 20, 30):
        write_sheet(folder, step, PROMPTS)
    path = folder / "index.html"
    path.write_text(render_run(view_of(folder, warnings=[HOSTILE])), encoding="utf-8")
    return path


def find(browser: Page, selector: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of an element in the window, into which it is scrolled."""
    element = f"document.querySelector('{selector}')"
    browser.evaluate(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    box = browser.evaluate(f"(b => [b.left, b.top, b.width, b.height])({element}.getBoundingClientRect())")
    return tuple(box)


def texts(browser: Page, selector: str) -> list[str]:
    """The words of all such elements."""
    return browser.evaluate(f"[...document.querySelectorAll('{selector}')].map((one) => one.textContent)")


def shown(browser: Page, number: int) -> list[Any]:
    """Where in its file the middle of a strip's chosen cell lies, the file, and the words below."""
    return browser.evaluate(PIXEL.format(number))


def test_the_slider_moves_every_strip(browser: Page, page: Path) -> None:
    browser.open(page)
    newest = [shown(browser, number) for number in range(3)]
    assert [found[2:] for found in newest] == [["samples/step-00000030.png", "step 30"]] * 3
    # a cell shows the middle of its own image: 8 pixels of margin, images of 32 x 48
    assert [found[:2] for found in newest] == [[24, 32], [64, 32], [104, 32]]
    left, top, width, height = find(browser, "#step")
    browser.click(left + width / 2, top + height / 2)
    assert [shown(browser, number)[2:] for number in range(3)] == [["samples/step-00000020.png", "step 20"]] * 3
    browser.press("ArrowLeft")
    assert shown(browser, 1) == [64, 32, "samples/step-00000010.png", "step 10"]
    assert browser.evaluate("document.getElementById('at').value") == "10"
    browser.press("End")
    assert shown(browser, 2)[3] == "step 30"
    assert texts(browser, ".strip figure:not(.chosen) figcaption") == ["first, step 10", "last, step 30"] * 3
    assert browser.complaints() == [] and browser.evaluate("document.title") == "run"


def test_the_pointer_finds_values_in_all_charts(browser: Page, page: Path) -> None:
    browser.open(page)
    left, top, width, height = find(browser, ".plot")
    browser.hover(left + width / 2, top + height / 2)
    heads = texts(browser, ".at")
    assert len(heads) == 2 and all(head.startswith("step 1,5") and "epoch 25" in head for head in heads)
    loss, smoothed, rate = texts(browser, ".key b")
    assert loss.startswith("0.1") and "(0.1" in loss and smoothed.startswith("0.1") and rate == "0.00001"
    browser.evaluate("document.querySelector('.plot').focus()")
    browser.press("ArrowRight")
    assert texts(browser, ".at")[0] not in heads


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_asks_for_nothing(browser: Page, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    ink, paper = browser.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert (sum(map(int, ink[4:-1].split(","))) > sum(map(int, paper[4:-1].split(",")))) == dark
    assert browser.complaints() == []
    asked = {url.rpartition("/")[2] for url in browser.requests()}
    assert asked == {"index.html", "step-00000010.png", "step-00000030.png"}


def test_a_comparison_by_steps_or_by_samples_seen(browser: Page, page: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", lines(40), "optim.unet_lr=1e-5")
    write_sheet(other, 20, PROMPTS[:1])
    path = tmp_path / "compare.html"
    path.write_text(render_comparison(read_runs([page.parent, other]), path), encoding="utf-8")
    browser.open(path, width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390 and browser.complaints() == []
    visible = "['.by-steps', '.by-samples'].map((name) => document.querySelector(name).getClientRects().length)"
    assert browser.evaluate(visible) == [1, 0]
    browser.evaluate("document.getElementById('by-samples').click()")
    assert browser.evaluate(visible) == [0, 1]
    browser.evaluate("document.getElementById('step').focus()")
    for _ in range(2):
        browser.press("ArrowLeft")
    assert shown(browser, 0)[2].endswith("/run/samples/step-00000010.png") and shown(browser, 0)[3] == "step 10"
    assert shown(browser, 1)[3] == "not drawn yet"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_subset_fits_and_its_pictures_are_there(
    browser: Page, make_config: Callable[..., Config], tmp_path: Path, width: int
) -> None:
    words = ["{tag: food}", f"{{tag: {json.dumps(HOSTILE)}}}", f"{{tag: {'a_long_tag_' * 20}, exclude: true}}"]
    path = tmp_path / "subset.html"
    report = make_subset_report(make_config(f"data.subset_rules=[{', '.join(words)}]"))
    path.write_text(render_subset(report, HOSTILE, "a/very/long/path/" * 12 + HOSTILE), encoding="utf-8")
    browser.open(path, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") == width and browser.complaints() == []
    drawn = browser.evaluate("[...document.images].map((image) => image.naturalWidth > 0)")
    assert drawn == [True] * 24 and browser.evaluate("document.title") != "hit"

"""A run's page from what lies in its folder: few steps and many, samples by prompt, nothing of users' texts is HTML."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from support.html_reader import Reader
from support.run_on_disk import SIZE, view_of, write_run, write_sheet
from trainer.core.errors import UserError
from trainer.report.config_values import DEFAULTS, find_recipe, flatten_config
from trainer.report.pages import write_html
from trainer.report.run_page import RUN_GENERATOR, RunState, read_page_state, render_run
from trainer.report.sheets import WHOLE, Sheets, list_drawings, shelve, show_strips

HOSTILE = "<script>alert('1')</script>&\"x\" {{ 7 * 7 }} </style>"
PROMPTS = ["a cat", "a dog", "a cat", HOSTILE, "fifth"]


def lines(count: int, every: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": every * (number + 1), "train/loss": 1 / (number + 1), "lr/unet": 1e-5, "lr/text_encoder_1": 0.0,
         "train/grad_norm": None if number == 1 else 0.5, "perf/mfu": None, "progress/samples_seen": 4 * (number + 1),
         "progress/epoch": every * (number + 1) / 6, **more}
        for number in range(count)
    ]  # fmt: skip


def page_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_three_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run_a", lines(3))
    page = render_run(view_of(folder))
    read = Reader(page)
    assert "Running, 3 of 1,000 steps made" in read.text and "About 16 min 37 s left, at 1.0 s a step" in read.text
    assert (
        "No value yet: model FLOPs utilisation (the peak of this device" in read.text
        and "No checkpoint yet: one comes every 1000 steps" in read.text
    )
    titles = re.findall(r'aria-label="([^"]+)"', page)
    assert titles[:3] == ["Loss", "Learning rates", "Gradient norm"]  # no mfu, which has no value
    chart = page_data(page)["charts"][0]
    assert chart["series"] == [{"x": [1, 2, 3], "y": [1.0, 0.5, 0.3333]}] and (chart["low"], chart["high"]) == (0, 3)
    assert chart["epochs"][0] == [0, 0] and chart["epochs"][-1] == [3, 0.5]
    assert page_data(page)["charts"][2]["series"][0]["y"] == [0.5, None, 0.5]
    assert "The loss is noisy" not in read.text and "text_encoder_1" not in page.split('id="settings"')[0]


def test_no_step_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    read = Reader(render_run(view_of(folder)))
    assert "Running, 0 of 1,000 steps made" in read.text and "No metrics yet" in read.text
    assert "The time left is not known" in read.text and "None yet: they are drawn every 100 steps" in read.text
    assert (
        "None are drawn" in Reader(render_run(view_of(folder, "sampling.every_steps=null", "sampling.prompts=[]"))).text
    )


def test_130_000_steps_fit_a_small_page_and_keep_their_spikes(tmp_path: Path) -> None:
    many = lines(130_000)
    for number, line in enumerate(many):
        line |= {"train/loss": 0.1 + number % 7 / 100, "attempt": 1 if number < 40_000 else 2}
    many[77_777]["train/loss"] = 123.0
    folder = write_run(tmp_path / "run", many, firsts=(0, 40_000))
    page = render_run(view_of(folder, last=132_499))
    assert len(page.encode()) < 600_000
    loss = page_data(page)["charts"][0]["series"]
    assert len(loss) == 2 and all(len(series["x"]) <= 600 for series in loss) and 123.0 in loss[0]["high"]
    assert "cut off: greatest 123 at step 77,778" in page and "the mean of 3,000 steps" in Reader(page).text
    assert "About 41 min 39 s left, at 1.0 s a step: the pace of the last 100 steps" in Reader(page).text


def test_attempts_are_marked_and_what_they_made_twice_counts_once(tmp_path: Path) -> None:
    twice = [*lines(30), *lines(45)[20:]]
    for line in twice[30:]:
        line["attempt"] = 2
        line["train/loss"] = 5.0
    folder = write_run(tmp_path / "run", twice, firsts=(0, 20))
    page = render_run(view_of(folder))
    loss = page_data(page)["charts"][0]["series"][0]
    assert loss["x"] == list(range(1, 46)) and loss["y"][19:21] == [0.05, 5.0]
    assert page.count('<line class="mark"') == len(page_data(page)["charts"]) and "Dashed lines" in page
    assert "10 lines of metrics are of steps that a later attempt made again" in Reader(page).text
    rows = [row for row in Reader(page).rows if row[-2:-1] == ["1 x cpu"]]
    assert [row[:2] for row in rows] == [["1", "0"], ["2", "20"]]


@pytest.mark.parametrize(
    ("state", "heading"),
    [(RunState("finished"), "Finished, all 3 steps made"), (RunState("stopped"), "Stopped at step 3 of 3"),
     (RunState("failed", HOSTILE), "Failed after 3 of 3 steps")],
)  # fmt: skip
def test_how_it_ended(tmp_path: Path, state: RunState, heading: str) -> None:
    folder = write_run(tmp_path / "run", lines(3))
    read = Reader(render_run(view_of(folder, state=state, last=3)))
    assert heading in read.text and "left, at" not in read.text
    assert ("resume it" in read.text) == (state.kind != "finished") and (HOSTILE in read.text) == bool(state.message)


def test_hostile_texts_are_shown_and_are_no_html(tmp_path: Path) -> None:
    name = "<b>run &'\"{{ 1 }}"  # which no config may have, but a damaged file can
    folder = write_run(tmp_path / "run", lines(3, **{HOSTILE: 1.0, "a/<i>b": 2.0}), index_fingerprint=HOSTILE)
    write_sheet(folder, 2, PROMPTS)
    words = [f"run.stage={json.dumps(HOSTILE)}", f"data.shards={json.dumps(HOSTILE)}"]
    view = view_of(folder, *words, warnings=[HOSTILE], state=RunState("failed", HOSTILE))
    view.written["run"]["name"] = name
    page = render_run(view)
    read = Reader(page)
    assert read.tags.count("script") == 2 and "i" not in read.tags and read.tags.count("style") == 1
    facts = len(re.findall(r"<div><b>", page))
    assert read.tags.count("b") == facts + page.count('class="key ')
    for text in (name, HOSTILE, "a/<i>b"):
        assert text in read.text
    assert read.text.count(HOSTILE) >= 7
    data = re.search(r'id="page-data">(.*?)</script>', page, re.S)
    assert data is not None and not set("<>&'") & set(data[1])
    write_html(folder / "index.html", page, RUN_GENERATOR)
    write_html(folder / "index.html", page, RUN_GENERATOR)


def test_the_page_asks_for_nothing_but_its_pictures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines(3))
    write_sheet(folder, 2, PROMPTS)
    page = render_run(view_of(folder))
    read = Reader(page)
    assert not set(read.tags) & {"link", "iframe", "object", "embed", "base", "form", "image"}
    assert {value for tag, name, value in read.attributes if tag == "img" and name == "src"} == {
        "samples/step-00000002.png"
    }
    links = {value for tag, name, value in read.attributes if tag == "a" and name == "href" and value[0] != "#"}
    assert links == {"samples/step-00000002.png", "metrics.jsonl", "config.yaml", "run.json"}
    assert all((folder / link).is_file() for link in links)
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|innerHTML|eval\(", page)
    policy = next(value for tag, name, value in read.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/=]{44}'$", policy)


def test_what_has_no_value_is_said_in_words(tmp_path: Path) -> None:
    nothing = {"perf/checkpoint_seconds": None, "perf/sample_seconds": None, "train/loss_scale": None, "own/x": None}
    folder = write_run(tmp_path / "run", lines(3, **nothing))
    said = Reader(render_run(view_of(folder))).text
    assert "how long a checkpoint takes (none is made yet), how long samples take (none are drawn yet)" in said
    assert "loss scale (there is one in fp16 only), own/x." in said and "perf/" not in said
    write_sheet(folder, 3, PROMPTS)
    (folder / "checkpoints/step-00000003").mkdir(parents=True)
    (folder / "checkpoints/step-00000003/train_state.json").write_text("{}")
    said = Reader(render_run(view_of(folder))).text
    assert "how long" not in said and "No value yet: model FLOPs" in said
    assert "To make a model of the last checkpoint, where that is not done yet:" in said and "export it" in said
    said = Reader(render_run(view_of(folder, onward=["draw it", "publish it"]))).text
    assert "export it" not in said and "make a model" not in said and "draw it publish it" in said


def test_a_running_run_may_have_ended_without_a_word(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    page = render_run(view_of(folder, made=3, every_seconds=90.0))
    assert "written anew every 1 min 30 s or so" in page and "the same command resumes it" in page
    (folder / "index.html").write_text(page)
    assert read_page_state(folder / "index.html") == ("running", 3)
    assert read_page_state(folder / "run.json") is None and read_page_state(folder / "none") is None
    ended = render_run(view_of(folder, state=RunState("finished"), last=3, made=3))
    assert "without a word" not in ended and "first value" not in ended
    assert ("after step 10", "loss: first value, logging.every_steps") in facts_of(page)
    page = render_run(view_of(folder, "logging.every_steps=7", made=15))
    assert ("after step 21", "loss: first value, logging.every_steps") in facts_of(page)


def facts_of(page: str) -> list[tuple[str, str]]:
    return re.findall(r"<div><b>(.*?)</b><span>(.*?)</span></div>", page)


def test_samples_of_one_step_are_shown_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines(3))
    write_sheet(folder, 2, PROMPTS[:2])
    page = render_run(view_of(folder))
    assert page.count("<figure") == 2 and 'type="range"' not in page and "first, step" not in page
    write_sheet(folder, 3, PROMPTS[:2])
    page = render_run(view_of(folder))
    assert page.count("<figure") == 6 and 'type="range"' in page


def test_samples_are_cut_out_of_their_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines(3))
    for step in (1, 2, 3):
        write_sheet(folder, step, PROMPTS[: step + 2])
    sheets = view_of(folder).sheets
    drawings = list_drawings([sheets])
    assert drawings == [("a cat", 0), ("a dog", 0), ("a cat", 1), (HOSTILE, 0), ("fifth", 0)]
    strips = show_strips(sheets, drawings)
    assert [(strip.first.step, strip.newest.step) for strip in strips] == [(1, 3)] * 3 + [(2, 3), (3, 3)]
    for sheet in sheets:
        with Image.open(folder / "samples" / sheet.name) as image:
            for place, cell in enumerate(sheet.cells.values()):
                left, top = -cell.left / 100 * cell.width, -cell.top / 100 * cell.height
                box = (left, top, left + cell.width, top + cell.height)
                colours = image.crop(tuple(round(side) for side in box)).getcolors()
                assert colours == [(SIZE[0] * SIZE[1], (40 * place + 40, sheet.step, 0))]
                assert cell.zoom == pytest.approx(100 * image.width / cell.width)
    shelf = shelve(sheets, drawings, "samples/")
    assert shelf["layout"] == [0, 1, 2] and [len(layout) for layout in shelf["layouts"]] == [3, 4, 5]


def test_samples_of_older_versions_and_damaged_ones(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines(3))
    write_sheet(folder, 1, ["one", "two"], says=False)
    write_sheet(folder, 2, ["one"], says=False)
    (folder / "samples/step-00000003.png").write_bytes(b"no image")
    (folder / "samples/notes.png").write_bytes(b"mine")
    sheets = Sheets(folder)
    first, second = sheets.read(["one", "two"], SIZE)
    assert list(first.cells) == [("one", 0), ("two", 0)] and list(second.cells) == [WHOLE]
    assert sheets.unreadable == ["step-00000003.png"]
    page = Reader(render_run(view_of(folder, "sampling.prompts=[one, two]")))
    assert "No PNG images: step-00000003.png." in page.text and "their files do not say which prompts" in page.text
    write_sheet(folder, 3, ["one", "two"])
    assert [sheet.step for sheet in sheets.read(["one", "two"], SIZE)] == [1, 2, 3] and not sheets.unreadable


@pytest.mark.parametrize("said", ["", "{}", '"abc"', "[1, null]", "[" * 2000, "[]"])
def test_a_file_that_says_nonsense_is_shown_whole(tmp_path: Path, said: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    (tmp_path / "samples").mkdir()
    chunks = PngInfo()
    chunks.add_text("prompts", said)
    chunks.add_text("size", "8x")
    Image.new("RGB", (20, 10)).save(tmp_path / "samples/step-00000001.png", pnginfo=chunks)
    (sheet,) = Sheets(tmp_path).read(["one"], SIZE)
    assert list(sheet.cells) == [WHOLE] and sheet.cells[WHOLE].as_list() == [20, 10, 0.0, 0.0, 100.0]


def test_the_recipe_is_the_stages_own_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", lines(3))
    words = ["optim.unet_lr=1e-5", "data.posts=mine.jsonl", "sampling.prompts=[a]"]
    page = Reader(render_run(view_of(folder, *words)))
    assert "changes of configs/stage1_feature_alignment.yaml" in page.text
    assert ["optim.unet_lr", "7.5e-06", "1.0e-05"] in page.rows
    assert ["data.posts", "[data/stage1/posts.jsonl]", "[mine.jsonl]"] in page.rows
    assert not [row for row in page.rows if row[0] in ("run.name", "optim.betas", "data.global_batch_size")]
    assert "Nothing that the samples" in Reader(render_run(view_of(folder))).text
    values = flatten_config({"run": {"name": "x", "stage": "mine"}, "model": {"train_text_encoder_1": False}})
    assert find_recipe(values)[0] == "configs/stage2_refine_unet.yaml"  # trains the same parts
    odd = flatten_config({"run": {"stage": "mine"}, "model": {"train_unet": False}})
    assert find_recipe(odd)[0] == DEFAULTS


def test_a_page_of_somebody_else_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    for other in ("mine", '<meta name="generator" content="anime-base-trainer inspect_shards">'):
        path.write_text(other)
        with pytest.raises(UserError, match="is no page of train"):
            write_html(path, "new", RUN_GENERATOR)
        assert path.read_text() == other

"""Runs side by side: curves, figures, what configs, data and code differ in, samples; as a page and on the terminal."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.html_reader import Reader
from support.locks import held_by_another_process
from support.paths import REPOSITORY
from support.run_on_disk import view_of, write_run, write_sheet
from support.scripts import run_script
from trainer.config.load import load_config
from trainer.core.errors import UserError
from trainer.report.comparison import COMPARISON_GENERATOR, read_runs, render_comparison, summarise_runs
from trainer.report.config_values import find_differences, flatten_config
from trainer.report.pages import check_page_path
from trainer.report.run_page import RUN_GENERATOR, RunState, render_run

OLD_RUN = REPOSITORY / "tests/data/v0_2_0/runs/tiny"
PROMPTS = ["a cat", "<i>a dog</i>"]


def lines(count: int, batch: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": step, "train/loss": 1 / step, "train/grad_norm": 0.5, "lr/unet": 1e-5, "perf/images_per_second": 8.0,
         "progress/samples_seen": step * batch, "progress/epoch": step * batch / 24, **more}
        for step in range(1, count + 1)
    ]  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    words = ["run.stage='<b>mine</b>'"]
    first = write_run(tmp_path / "runs/first", lines(30, 4), *words)
    second = write_run(
        tmp_path / "runs/second", lines(12, 10), *words, "optim.unet_lr=2e-5", "data.global_batch_size=192",
        images=48, index_fingerprint="<b>other",
    )  # fmt: skip
    for step in (10, 20, 30):
        write_sheet(first, step, PROMPTS)
    write_sheet(second, 12, [PROMPTS[0]])
    return [first, second]


def data_of(page: str) -> Any:
    found = re.search(r'id="page-data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_damaged_lines_are_passed_over_with_a_note(two: list[Path], notes: Callable[[], str]) -> None:
    with (two[0] / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\xff\n[1]\n")
    read_runs(two)
    assert f"note: 2 damaged lines of {two[0] / 'metrics.jsonl'} were passed over" in notes()


def test_curves_lie_over_each_other_by_step_and_by_samples(two: list[Path], tmp_path: Path) -> None:
    page = render_comparison(read_runs(two), tmp_path / "compare.html")
    charts = data_of(page)["charts"]
    titles = re.findall(r'aria-label="([^"]+)"', page)
    assert titles[1:].count("Loss") == 2 and len(charts) == 2 * 4
    by_step, by_samples = charts[0], charts[4]
    assert [len(series["x"]) for series in by_step["series"]] == [30, 12] and by_step["high"] == 30
    assert by_samples["name"] == "sample" and by_samples["high"] == 120
    assert by_samples["series"][0]["x"][-1] == 120 and by_samples["series"][1]["x"] == list(range(10, 121, 10))
    assert by_step["series"][1]["y"] == by_samples["series"][1]["y"]


def test_what_differs(two: list[Path], tmp_path: Path) -> None:
    page = Reader(render_comparison(read_runs(two), tmp_path / "compare.html"))
    assert ["optim.unet_lr", "7.5e-06", "2.0e-05"] in page.rows
    assert ["data.global_batch_size", "96", "192"] in page.rows
    assert not [row for row in page.rows if row[0] in ("run.name", "optim.betas", "run.output_dir")]
    assert ["images", "24", "48"] in page.rows and ["index fingerprint", "cd", "<b>other"] in page.rows
    assert ["base", "base", "base"] in page.rows and ["steps", "30 of 1,000", "12 of 1,000"] in page.rows
    assert ["images per second, median", "8", "8"] in page.rows and ["samples seen", "120", "120"] in page.rows
    marked = page.attributes.count(("tr", "class", "differs"))
    assert marked == 2  # images and fingerprint
    assert not {"i", "u"} & set(page.tags) and "<i>a dog</i>" in page.text


def test_samples_by_prompt(two: list[Path], tmp_path: Path) -> None:
    page = render_comparison(read_runs(two), tmp_path / "pages" / "compare.html")
    data, read = data_of(page), Reader(page)
    assert data["steps"] == [10, 12, 20, 30]
    prefixes = [shelf["prefix"] for shelf in data["shelves"]]
    assert prefixes == ["../runs/first/samples/", "../runs/second/samples/"]
    assert "not drawn" in read.text  # the second prompt by the second run
    sources = [value for tag, name, value in read.attributes if tag == "img" and name == "src"]
    (tmp_path / "pages").mkdir()
    assert len(sources) == 3 and all((tmp_path / "pages" / source).is_file() for source in sources)


def test_the_table_on_the_terminal(two: list[Path]) -> None:
    rows = {line[:40].strip().split("  ")[0]: line.split()[-2:] for line in summarise_runs(read_runs(two)).splitlines()}
    assert rows["optim.unet_lr"] == ["7.5e-06", "2.0e-05"] and rows["images"] == ["24", "48"]
    assert rows["attempts"] == ["1", "1"] and "base" not in rows


def test_a_run_of_an_older_version_beside_a_new_one(two: list[Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(OLD_RUN, old)
    page = Reader(render_comparison(read_runs([old, *two]), tmp_path / "compare.html"))
    assert ["steps", "4", "30 of 1,000", "12 of 1,000"] in page.rows
    assert ["data.global_batch_size", "4", "96", "192"] in page.rows


def test_what_is_no_run_is_refused(two: list[Path], tmp_path: Path) -> None:
    first, second = two
    with pytest.raises(UserError, match="named twice"):
        read_runs([first, first.parent / "." / "first"])
    with pytest.raises(UserError, match="name 2 to 8 runs, not 1"):
        read_runs([first])
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no run\.json"):
        read_runs([first, tmp_path])
    (second / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"second has not trained yet: it has no metrics\.jsonl"):
        read_runs(two)
    (second / "metrics.jsonl").write_text("")
    for damaged in ("{", '{"attempts": [{}]}', '{"attempts": 3}', "[]"):
        (second / "run.json").write_text(damaged)
        with pytest.raises(UserError, match=r"second/run\.json is damaged"):
            read_runs(two)


def test_runs_without_any_line(two: list[Path], tmp_path: Path) -> None:
    for folder in two:
        (folder / "metrics.jsonl").write_text("")
    page = Reader(render_comparison(read_runs(two), tmp_path / "compare.html"))
    assert ["steps", "0 of 1,000", "0 of 1,000"] in page.rows and "over samples seen" not in page.text
    assert "loss at the end" in summarise_runs(read_runs(two))


def test_a_run_that_goes_on_or_was_killed_says_so(two: list[Path], tmp_path: Path) -> None:
    first, second = two
    (second / "metrics.jsonl").write_text("")
    (second / "index.html").write_text(render_run(view_of(second, made=17)))
    (first / "index.html").write_text(render_run(view_of(first, state=RunState("stopped"), made=30)))
    page = Reader(render_comparison(read_runs(two), tmp_path / "compare.html"))
    assert ["state", "stopped", "ended without a word"] in page.rows
    assert ["steps", "30 of 1,000", "17 of 1,000, last known"] in page.rows  # as the page has it
    assert page.text.count("-: no value: no line of metrics yet") == 1
    assert summarise_runs(read_runs(two)).count("-: no value: no line of metrics yet") == 1
    with held_by_another_process(second / ".lock"):
        assert read_runs(two)[1].state == "running"
    (second / "index.html").unlink()
    assert read_runs(two)[1].state == "not finished"
    assert [run.state for run in read_runs([OLD_RUN, first])] == ["-", "stopped"]


def test_the_command(two: list[Path], tmp_path: Path) -> None:
    done = run_script("scripts/compare_runs.py", "first", two[1], folder=tmp_path)  # one by its name
    assert done.returncode == 0, done.stderr
    assert "\npage: compare.html\n" in done.stdout and "optim.unet_lr" in done.stdout
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and 'src="runs/second/samples/step-00000012.png"' in page
    check_page_path(tmp_path / "compare.html", COMPARISON_GENERATOR)
    with pytest.raises(UserError, match="is no page of train"):
        check_page_path(tmp_path / "compare.html", RUN_GENERATOR)


def test_what_says_the_same_is_no_difference() -> None:
    """Of entries of lists and sections within sections, written in full, in short, or not at all."""
    stage = REPOSITORY / "configs/stage1_feature_alignment.yaml"
    plain = load_config([stage])
    short = load_config([stage, REPOSITORY / "configs/captions/animagine_3_0.yaml"], ["captions.mix={tags: 0}"])
    captions = plain.written["captions"]
    old = plain.written | {"captions": {name: captions[name] for name in captions if name not in ("template", "mix")}}
    flat = [flatten_config(each) for each in (plain.written, short.written, old)]
    assert find_differences(flat) == []
    other = load_config([stage], ["captions.template=[{tags: general, prefix: a}]", "captions.mix={tags: 1}"])
    said = {each.key: each.values[1] for each in find_differences([flat[0], flatten_config(other.written)])}
    assert said == {"captions.template": "[{tags: general, prefix: a}]", "captions.mix": "{tags: 1}"}

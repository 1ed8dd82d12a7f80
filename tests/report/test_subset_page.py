"""choose_subset.py: the file of keys, the page of thumbnails, and what neither may replace."""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.html_reader import Reader
from support.paths import REPOSITORY
from support.scripts import run_script
from support.set_on_disk import row, write_set
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.data.subset import open_chosen
from trainer.report.subset_page import make_subset_report, render_subset, summarise_subset

MakeConfig = Callable[..., Config]
RULES = "data.subset_rules=[{tag: food}, {column: original_width, below: 250}, {tag: menu, exclude: true}]"


def test_the_page_shows_both_sides(make_config: MakeConfig) -> None:
    config = make_config(RULES)
    report = make_subset_report(config)
    chosen = open_chosen(config.data, config.captions).table["key"].to_pylist()
    assert report.index.table["key"].to_pylist() == chosen and 0 < len(chosen) < 24
    assert [tile.row["key"] for tile in report.chosen] == chosen
    assert {tile.row["key"] for tile in report.left_out} == {
        *open_index(config.data.shards).table["key"].to_pylist()
    } - {*chosen}
    assert [(words, exclude) for words, exclude, _ in report.rules] == [
        ("tag: food", False), ("column: original_width, below: 250.0", False), ("tag: menu", True)]  # fmt: skip
    page = Reader(render_subset(report, "subset.txt", "runs/subset.txt"))
    pictures = [value for tag, name, value in page.attributes if tag == "img" and name == "src"]
    assert len(pictures) == 24 and all(str(value).startswith("data:image/jpeg;base64,") for value in pictures)
    for key in chosen:
        assert key in page.text
    assert f"{len(chosen)} chosen of the 24 images" in summarise_subset(report)


def test_percentiles_are_of_the_whole_set(make_config: MakeConfig, tmp_path: Path) -> None:
    shards = write_set(tmp_path / "set", [row(str(number), score=number, rating="g") for number in range(8)])
    words = "captions.quality=[{tag: best, above_percentile: 75}, {tag: plain}]"
    report = make_subset_report(make_config("data.subset_rules=[{tag: best}]", words, f"data.shards={shards}"))
    assert report.index.table["key"].to_pylist() == ["6", "7"]


def test_without_originals_latents_are_drawn_and_without_a_model_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(RULES)
    shards = shutil.copytree(config.data.shards, tmp_path / "shards")
    away = [f"data.shards={shards}", f"data.posts=[{tmp_path / 'gone.jsonl'}]"]
    report = make_subset_report(make_config(RULES, *away))
    assert all(tile.picture is not None for tile in (*report.chosen, *report.left_out)) and not report.missing
    bare = make_subset_report(make_config(RULES, *away, f"model.pretrained={tmp_path}"))
    assert all(tile.picture is None and "gone.jsonl" in tile.why_not for tile in bare.chosen)
    assert "no thumbnails of latents" in Reader(render_subset(bare, "a", "a")).text


def test_what_chooses_nothing_or_all_is_refused(make_config: MakeConfig) -> None:
    for words, said in (([], "by which rules"), (["data.subset_rules=[{column: original_width, above: 1}]"], "all 24")):
        with pytest.raises(UserError, match=said):
            make_subset_report(make_config(*words))


def test_the_command(tiny_settings: list[str], tmp_path: Path) -> None:
    words = [*tiny_settings, f"run.output_dir={tmp_path}", "run.name=run", "schedule.max_steps=1", RULES]
    words = ["--config", str(REPOSITORY / "configs/demo_stage1.yaml"), *words, "--out", "best.txt"]

    def run() -> subprocess.CompletedProcess[str]:
        return run_script("scripts/choose_subset.py", *words, folder=tmp_path)

    done = run()
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "best.txt").read_text()
    assert len(first.splitlines()) > 2 and (tmp_path / "best.html").is_file()
    following = shlex.split(next(line for line in done.stdout.splitlines() if "train.py" in line))
    assert {"data.subset=best.txt", "data.subset_rules=[]"} <= {*following} and RULES not in following
    assert run().returncode == 0 and (tmp_path / "best.txt").read_text() == first  # replaced
    (tmp_path / "best.txt").write_text("something else of mine\n")
    refused = run()
    assert refused.returncode != 0 and "lists no keys of" in refused.stderr
    assert (tmp_path / "best.txt").read_text() == "something else of mine\n"

"""The page and the table of inspect_shards: numbers against ones counted anew, nothing fetched, nothing unescaped."""

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer.report.data_page as report_module
from support.captions import compose_caption
from support.html_reader import Reader
from support.scripts import run_script
from support.set_on_disk import row, write_set
from trainer.config.schema import CaptionsConfig, Config
from trainer.core.errors import UserError
from trainer.data import shards
from trainer.data.buckets import fit_image
from trainer.data.index import open_index
from trainer.data.plan import Plan, build_plan
from trainer.data.template import ready_rules
from trainer.data.tokens import EOS_TOKEN, load_tokenizer
from trainer.model.base import find_base, find_tokenizers
from trainer.report.data_page import DATA_GENERATOR, make_report, render_data, summarise
from trainer.report.examples import thumbnail_size
from trainer.report.facts import Report, count_in_ranges, walk_run
from trainer.report.pages import environment, percent, write_html
from trainer.report.survey import (
    choose_rows,
    count_finished,
    count_rules,
    count_tags,
    find_duplicates,
    measure_fits,
)

HOSTILE = "<script>alert('1')</script>&\"x\""

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="module")
def tiny(tiny_settings: list[str]) -> Report:
    from trainer.config.load import load_config

    return make_report(load_config([], [*tiny_settings, "run.name=run", "schedule.epochs=3"]))


@pytest.fixture(scope="module")
def tiny_page(tiny: Report) -> Reader:
    return Reader(render_data(tiny))


def posts_of(report: Report) -> list[dict[str, Any]]:
    (path,) = report.config.data.posts or []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_buckets_and_fits_are_those_of_the_images(tiny: Report, tiny_page: Reader) -> None:
    settings = tiny.config.buckets
    records = [tiny.index.row(number) for number in range(len(tiny.index))]
    fits = [fit_image((r["original_width"], r["original_height"]), **vars(settings)) for r in records]
    shares = [1 - f.bucket[0] * f.bucket[1] / (f.resized[0] * f.resized[1]) for f in fits]
    assert np.allclose(tiny.fits.cropped, shares, atol=1e-12) and max(shares) > 0.1
    factors = [f.resized[0] / r["original_width"] for f, r in zip(fits, records, strict=True)]
    assert np.allclose(tiny.fits.factors, factors, rtol=0.01)
    for bucket, count in Counter(fit.bucket for fit in fits).items():
        (found,) = [cells for cells in tiny_page.rows if cells[0] == f"{bucket[0]} x {bucket[1]}"]
        assert found[2:4] == [str(count), percent(count, 24)]
    assert f"On average {np.mean(shares):.2%} of the resized pixels" in tiny_page.text


def test_tags_are_counted(tiny: Report, tiny_page: Reader) -> None:
    for category in ("general", "character", "copyright", "artist", "meta"):
        counts = Counter(tag for post in posts_of(tiny) for tag in post[f"tag_string_{category}"].split())
        best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:40]
        assert tiny.tags[category].top == best and tiny.tags[category].distinct == len(counts)
        for tag, count in best:
            assert [tag, str(count), percent(count, 24), ""] in tiny_page.rows
    assert tiny.tags["general"].top and not tiny.tags["meta"].top
    assert "No tags at all: character, meta." in tiny_page.text


def test_lengths_are_the_tokenizers(tiny: Report, tiny_page: Reader) -> None:
    folder = find_tokenizers(find_base(tiny.config.model.pretrained), None)[0]
    size = len(json.loads((folder / "vocab.json").read_text()))
    tokenizer = load_tokenizer(folder, size, EOS_TOKEN)
    expected = []
    for number in range(len(tiny.index)):
        fixed, _, free = compose_caption(tiny.index.row(number), ready_rules(tiny.config.captions)).partition("|||")
        tags = [tag.strip() for tag in [*fixed.split(","), *reversed(free.split(","))] if tag.strip()]
        expected.append(len(tokenizer.content_ids([", ".join(tags)])[0]))  # the order does not matter
    assert tiny.lengths is not None and tiny.lengths.tokens.tolist() == expected
    cut = sum(length > 75 for length in expected)
    assert f"{percent(cut, 24)} lose their end" in tiny_page.text
    assert ["up to 75", str(24 - cut), percent(24 - cut, 24), ""] in tiny_page.rows


def test_views_are_shown_by_what_weights_are_about(tmp_path: Path, make_config: MakeConfig) -> None:
    artists = ["ann bob", "ann", "", "ann", "zoe"]
    rows = [row(str(number), tags_artist=name, rating="e" if number == 4 else "g", year=2020 + number // 3)
            for number, name in enumerate(artists)]  # fmt: skip
    shards = write_set(tmp_path / "shards", rows)
    config = make_config(
        f"data.shards={shards}", "schedule.max_steps=null", "schedule.epochs=4", "data.global_batch_size=2",
        "data.weights=[{factor: 3, artist_count_below: 2}, {factor: 0, rating: e}, {factor: 2, column: x, above: 1}]",
    )  # fmt: skip
    report = make_report(config)
    seen = report.run.views.tolist()
    assert seen[4] == 0 and seen == pytest.approx([12, 4, 4, 4, 0], abs=2) and sum(seen) == 24
    assert report.views["Artist"] == [("ann", 3, seen[0] + seen[1] + seen[3]), ("bob", 1, seen[0]), ("zoe", 1, 0)]
    assert report.views["Rating"] == [("e", 1, 0), ("g", 4, 24)]
    assert report.views["Year"] == [("2020", 3, sum(seen[:3])), ("2021", 2, seen[3])]
    assert report.views["Character"] == []
    page = Reader(render_data(report))
    assert "1 image is never seen, 1 of them by a weight of 0 in data.weights." in page.text
    assert ["column: x, above: 1.0", "2.0", "0", "0.0%"] in page.rows
    assert [
        "ann",
        "3",
        str(seen[0] + seen[1] + seen[3]),
        f"{(24 - seen[2]) / 3:.1f}",
        percent(24 - seen[2], 24),
    ] in page.rows
    assert "weights: an epoch sees 6 samples of 5 images, 1 of them never seen (weight 0)" in summarise(report)


@pytest.mark.parametrize("length", ["schedule.epochs=3", "schedule.max_steps=1", "schedule.max_steps=29"])
def test_the_run_is_the_plans(make_config: MakeConfig, length: str) -> None:
    """Views and repeats against a walk over every step."""
    config = make_config("schedule.max_steps=null", length)
    report = make_report(config)
    plan = build_plan(report.index, 42, config.data)
    steps = config.schedule.max_steps or plan.steps_for_epochs(3)
    assert report.run.steps == steps
    compare_with_walk(plan, steps)
    if config.schedule.epochs:
        assert 3 <= report.run.epochs < 3.2
        assert report.run.steps_per_epoch == pytest.approx(24 / 4, abs=0.5)


def compare_with_walk(plan: Plan, steps: int) -> None:
    run = walk_run(plan, steps)
    views, units, repeating = (
        np.zeros(len(run.views), int),
        np.zeros(len(run.units), int),
        np.zeros(len(run.units), int),
    )
    for step in range(steps):
        for unit in plan.step_units(step):
            rows = [number for number, _ in plan.unit_samples(unit)]
            views += np.bincount(rows, minlength=len(views))
            units[unit.bucket] += 1
            repeating[unit.bucket] += max(Counter(rows).values()) > 1
    assert (run.views == views).all() and (run.units == units).all() and (run.repeating == repeating).all()


@pytest.mark.parametrize("steps", [1, 7, 8, 30, 211])
def test_buckets_that_a_unit_does_not_divide_repeat_across_passes(steps: int) -> None:
    """6 divides 12 and 18 images but not 13, 7 or 20; 2 and 5 are fewer than a unit."""
    counts = [12, 18, 13, 7, 20, 2, 5]
    sizes = np.repeat([[64, 64 * (place + 1)] for place in range(len(counts))], counts, axis=0)
    plan = Plan(sizes, seed=1, bucket_batch_size=6, global_batch_size=12)
    compare_with_walk(plan, steps)
    if steps == 211:
        repeating = walk_run(plan, steps).repeating
        assert (repeating > 0).tolist() == [False, False, True, True, True, True, True]


def test_the_page_fetches_nothing(tiny: Report, tiny_page: Reader) -> None:
    assert not set(tiny_page.tags) & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    references = [(tag, value) for tag, name, value in tiny_page.attributes if name in ("href", "src", "xlink:href")]
    assert {tag for tag, _ in references} == {"a", "image"}
    anchors = {value for _, name, value in tiny_page.attributes if name == "id"}
    for tag, value in references:
        assert value.startswith("data:image/jpeg;base64,") if tag == "image" else value.removeprefix("#") in anchors
    assert not [name for _, name, _ in tiny_page.attributes if name.startswith("on")]
    page = render_data(tiny)
    assert not re.search(r"url\(|@import|https?:", page)
    assert page.startswith("<!doctype html>") and page.isascii() is False and 'charset="utf-8"' in page
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


def test_a_bar_shows_the_share_beside_it(tiny: Report) -> None:
    shown = re.findall(
        r'<td class="n">([\d.]+)%</td>\s*<td><svg class="bar.*?class="fill" width="([\d.]+)"', render_data(tiny), re.S
    )
    assert len(shown) > 60 and len({share for share, _ in shown}) > 5
    assert all(float(width) == pytest.approx(float(share), abs=0.051) for share, width in shown)
    unknown = environment().get_template("pieces.html").module.bars("a", [("b", 3)], 0, "c")
    assert "-" in unknown and "svg" not in unknown  # of a whole that is not known


def test_samples_are_shown(tiny: Report, tiny_page: Reader) -> None:
    assert tiny_page.tags.count("image") == 24 and tiny_page.text.count("original, with the crop") == 12
    assert len({sample.row["key"] for sample in tiny.examples}) == 12
    for sample in tiny.examples:
        assert len(sample.captions) == 3 and all(caption in tiny_page.text for caption in sample.captions)
        left, top, width, height = sample.crop
        assert min(left, top) >= 0 and width > 0 and height > 0
        assert left + width <= 1.01 and top + height <= 1.01
        assert width * height == pytest.approx(1 - sample.cropped, abs=0.02)
    assert len({caption for sample in tiny.examples for caption in sample.captions}) > 12  # passes differ
    assert thumbnail_size((2048, 512)) == (320, 80) and thumbnail_size((100, 30)) == (100, 30)


def test_the_same_set_gives_the_same_page(tiny: Report, make_config: MakeConfig) -> None:
    again = make_report(make_config("schedule.max_steps=null", "schedule.epochs=3"))
    assert render_data(again) == render_data(tiny)


def test_hostile_text_is_escaped(make_config: MakeConfig, tmp_path: Path) -> None:
    tag = HOSTILE.replace(" ", "_")
    rows = [
        row(f"<b>key{number}</b>", rating="g", tags_general=f"{tag} ok", tags_artist=tag, source=HOSTILE)
        | ({"caption": f"{HOSTILE}, <i>free</i>"} if number % 2 else {})
        for number in range(6)
    ]
    counts = {"inputs": 7, "samples": 6, "set_aside": {HOSTILE: 1}, "notes": {}}
    folder = write_set(tmp_path / "<u>shards", rows, counts=counts)
    words = [f"data.shards={folder}", f"captions.ratings={{g: {json.dumps(HOSTILE)}}}"]
    page = Reader(render_data(make_report(make_config(*words))))
    assert not set(page.tags) & {"script", "u"} and page.tags.count("b") == 11 + 18  # facts, and captions' passes
    assert "i" not in page.tags or "<i>free</i>" in page.text
    for text in (HOSTILE, "<b>key0</b>", "<u>shards", "<i>free</i>"):
        assert text in page.text
    # composed by half of them; the rating's tag is counted whole, and captions cut at commas
    assert [tag, "3", "100.0%", ""] in page.rows and ["<i>free</i>", "3", "100.0%", ""] in page.rows
    assert [HOSTILE, "3", "100.0%", ""] in page.rows and [HOSTILE, "1", "14.3%", ""] in page.rows


def test_a_set_of_finished_captions_without_rules(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [row(str(number), caption="a cat, a mat") for number in range(4)])
    words = [f"data.shards={folder}", "captions.ratings={}", "captions.quality=[]", "captions.years=[]"]
    page = Reader(render_data(make_report(make_config(*words))))
    assert "The rules do not touch the 4 images that bring a finished caption." in page.text
    assert "No image gets a tag of" not in page.text
    assert page.rows.count(["tag", "images", "share", ""]) == 1  # of the captions: there are no rules
    assert ["a cat", "4", "100.0%", ""] in page.rows and "No tags at all: general, character" in page.text


def test_what_is_cut_off_of_finished_captions_is_counted_by_part(make_config: MakeConfig, tmp_path: Path) -> None:
    free = ", ".join(f"cat {number}" for number in range(60))
    captions = [f"one ||| {free} ||| the end", f"one ||| {free}", f"{free}, {free}", "one ||| two ||| three"]
    folder = write_set(tmp_path / "set", [row(str(number), caption=text) for number, text in enumerate(captions)])
    report = make_report(make_config(f"data.shards={folder}", "captions.max_token_length=75"))
    assert report.lengths is not None and report.lengths.truncated == 3
    assert report.lengths.cut == [("finished caption", 3), ("finished caption, its end", 1)]


def test_without_a_model(make_config: MakeConfig, tmp_path: Path) -> None:
    words = [f"model.pretrained={tmp_path / 'nowhere'}", f"data.images={tmp_path / 'gone'}"]
    report = make_report(make_config(*words))
    page = Reader(render_data(report))
    assert report.lengths is None and "image" not in page.tags
    assert f"Left out: no thumbnails of latents and no caption lengths: model.pretrained: {tmp_path}" in page.text
    assert page.text.count("No original: data.images: ") == 12 and "Unknown, because the tokenizer" in page.text
    assert "lengths unknown" in summarise(report) and "pass 2 " in page.text


def test_latents_of_another_vae_are_not_drawn(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [row(str(number)) for number in range(4)])
    report = make_report(make_config(f"data.shards={folder}"))
    assert report.missing == [
        "no thumbnails of latents: the latents were made by another VAE than the one that this config names"
    ]
    assert report.lengths is not None and report.lengths.tokens.tolist() == [0] * 4
    assert "4 are empty" in Reader(render_data(report)).text


def test_an_image_that_changed_is_not_shown(make_config: MakeConfig, tiny_settings: list[str], tmp_path: Path) -> None:
    config = make_config()
    shutil.copytree(config.data.images or "", tmp_path / "images")
    changed, missing = sorted((tmp_path / "images").iterdir())[:2]
    changed.write_bytes(changed.read_bytes() + b"\0")
    missing.unlink()
    (posts,) = config.data.posts or []
    lines = [json.loads(line)["file"] for line in Path(posts).read_text().splitlines()]
    origin = f"{Path(posts).name} line {lines.index(changed.name) + 1}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "SAMPLES", 24)
        report = make_report(make_config(f"data.images={tmp_path / 'images'}"))
    reasons = Counter(sample.why_not for sample in report.examples if sample.original is None)
    assert reasons == {
        f"{origin}: the image is not the one any more that was encoded": 1,
        "its image is not among the sources of posts any more": 1,
    }


def test_rules_are_counted_as_captions_apply_them(tmp_path: Path) -> None:
    rules = CaptionsConfig()
    generator = np.random.default_rng(5)
    rows = [
        row(
            str(number),
            caption="a, b" if number % 7 == 0 else None,
            rating=[None, "g", "s", "e"][number % 4],
            score=[None, *generator.integers(-20, 200, 9).tolist()][number % 10],
            year=[None, 1999, 2007, 2013, 2022, 2030][number % 6],
        )
        for number in range(300)
    ]
    table = open_index(write_set(tmp_path / "set", rows)).table
    found = count_rules(table, rules)
    assert (found.composed, found.finished) == (257, 43)
    ready = ready_rules(rules)
    captions = [compose_caption({**dict.fromkeys(shards.SCHEMA.names), **each}, ready) for each in rows]
    words = Counter(word.strip() for text in captions for word in text.split("|||")[-1].split(",") if "|||" in text)
    for tag, count in [*found.quality, *found.years]:
        assert tag == "" or words[tag] == count
    assert words["nsfw"] == dict(found.ratings)["rating: explicit, nsfw"] > 0
    for counts in (found.ratings, found.quality, found.years):
        assert sum(count for _, count in counts) == 257 and dict(counts)[""] > 0
    assert [tag for tag, _ in found.quality] == [*(rule.tag for rule in rules.quality), ""]
    finished = count_finished(table, "|||", 40)
    assert finished.top == [("a", 43), ("b", 43)] and finished.images == 43


@pytest.mark.parametrize("chunk", [1, 3, 7, 65536])
def test_counts_do_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(shards, "INDEX_ROWS", chunk)
    words = ["a b", " a  c ", "", None, "b\tb", "ü a"]
    rows = [row(f"{number:02}", tags_general=words[number % 6], content_hash=str(number % 9)) for number in range(20)]
    rows[4]["caption"] = "x ||| y, , x"
    table = open_index(write_set(tmp_path / "set", rows)).table
    assert table["key"].num_chunks == -(-20 // chunk)
    found = count_tags(table, "general", 2)
    expected = Counter(tag for each in rows if "caption" not in each for tag in (each["tags_general"] or "").split())
    assert found.top == sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:2]
    assert (found.distinct, found.images) == (len(expected), 13)  # 4 + 4 + 3 + 3, but for row 4
    assert count_finished(table, "|||", 9).top == [("x", 2), ("y", 1)]
    duplicates = find_duplicates(table)
    assert (duplicates.groups, duplicates.images) == (9, 20)
    assert duplicates.examples[0] == (3, ["00", "09", "18"]) and len(duplicates.examples) == 9


def test_images_that_kept_their_size_are_not_resized(tmp_path: Path) -> None:
    """buckets.upscale off: the crop is the centre of the unscaled image."""
    settings = {"base_resolution": 128, "min_side": 32, "max_side": 256, "step": 32, "upscale": False}
    sizes = [(100, 60), (128, 128), (127, 129), (256, 256), (40, 300), (129, 128), (500, 333), (64, 96), (90, 140)]
    rows, shares, factors = [], [], []
    for number, size in enumerate(sizes):
        fit = fit_image(size, **settings)
        names = ("bucket_width", "bucket_height", "original_width", "original_height", "crop_left", "crop_top")
        values = (*fit.bucket, *size, fit.left, fit.top)
        rows.append(row(str(number), **dict(zip(names, values, strict=True))))
        shares.append(1 - fit.bucket[0] * fit.bucket[1] / (fit.resized[0] * fit.resized[1]))
        factors.append(fit.resized[0] / size[0])
    fits = measure_fits(open_index(write_set(tmp_path / "set", rows)).table, upscale=False)
    assert np.allclose(fits.cropped, shares, atol=1e-12) and np.allclose(fits.factors, factors, rtol=0.01)
    assert factors.count(1.0) >= 5 and min(factors) < 0.6


def test_ranges_and_samples() -> None:
    ranges = {75: "a", 150: "b", 225: "c", np.inf: "d"}
    assert count_in_ranges(np.array([0, 75, 76, 150, 225, 226, 900]), ranges) == [
        ("a", 2),
        ("b", 2),
        ("c", 1),
        ("d", 2),
    ]
    ranges = {0.0: "none", 0.5: "some", np.inf: "more"}
    assert count_in_ranges(np.array([0.0, 1e-9, 1.0]), ranges) == [("none", 1), ("some", 1), ("more", 1)]
    assert choose_rows("a", 1, 5, 5).tolist() == [0, 1, 2, 3, 4]
    chosen = choose_rows("a", 1, 1000, 5)
    assert len(set(chosen.tolist())) == 5 and (np.diff(chosen) > 0).all()
    assert chosen.tolist() != choose_rows("a", 2, 1000, 5).tolist()
    shares = [percent(part, 10_000) for part in (0, 1, 5000, 9999, 10_000)]
    assert shares == ["0.0%", "0.010%", "50.0%", "99.990%", "100.0%"] and percent(0, 0) == "-"


def test_only_some_captions_of_a_large_set_are_tokenized(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "MAX_TOKENIZED", 10)
    report = make_report(make_config())
    assert report.lengths is not None and len(report.lengths.tokens) == 10
    assert "10 captions drawn at random" in Reader(render_data(report)).text
    assert "(10 captions looked at)" in summarise(report)


def test_only_a_page_of_ours_is_written_over(tiny: Report, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    write_html(page, render_data(tiny), DATA_GENERATOR)
    first = page.read_text(encoding="utf-8")
    write_html(page, render_data(tiny), DATA_GENERATOR)
    assert page.read_text(encoding="utf-8") == first and list(page.parent.iterdir()) == [page]
    notes = tmp_path / "notes.html"
    notes.write_text("<html>mine</html>")
    for path in (notes, tmp_path):
        with pytest.raises(UserError, match="is no page of inspect_shards"):
            write_html(path, "mine", DATA_GENERATOR)
    assert notes.read_text() == "<html>mine</html>"
    with pytest.raises(UserError, match="cannot be written"):
        write_html(notes / "page.html", "mine", DATA_GENERATOR)


def test_the_command(tiny_settings: list[str], tiny: Report, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {name: run}\nschedule: {epochs: 3}\n")
    folder = tmp_path / "shards"
    shutil.copytree(tiny.config.data.shards, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    words = ["--config", str(config), *tiny_settings, f"data.shards={folder}"]
    told = run_script("scripts/inspect_shards.py", *words)
    assert told.returncode == 0, told.stderr
    table, page = summarise(tiny), folder / "report.html"
    assert told.stdout.startswith(f"{table}\npage: {page}\n")
    assert shlex.join(words[1:]) in told.stdout  # in the next command
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path != page}
    (width, height), count = Counter(map(tuple, tiny.index.bucket_sizes.tolist())).most_common(1)[0]
    assert re.search(rf"{width}x{height} +{count} +{count / 24:.1%}", table)
    assert f"images: 24, each seen {tiny.run.views.min()}" in table and f"steps: {tiny.run.steps} in all" in table

"""Runs with every option of captions turned: resumed, on any processes, explained, and refused when changed."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.checkpoints import change_record
from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.data.loader import MicroBatches, load_batches
from trainer.data.plan import build_plan
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.tokens import load_tokenizers, tokenize_captions
from trainer.model.base import find_base, find_tokenizers, read_vocab_sizes
from trainer.model.checkpoint import find_newest, read_train_state
from trainer.prepare.prepare import prepare
from trainer.report.data_page import make_report, render_data
from trainer.report.explain import explain_step
from trainer.report.thresholds import find_caption_rules
from trainer.train.loop import train
from trainer.train.run import run_path

MakeConfig = Callable[..., Config]
TEMPLATE = (
    "[{tags: character, fixed: true, dropout: 0.3}, {tags: artist, fixed: true, prefix: 'by ', tag_dropout: 0.5}, "
    "{tags: general, max_tags: 3}, {column: source, dropout: 0.2}, {tag: year}, {text: drawn, fixed: true}]"
)
MIX = "{tags: 0.25, natural: 0.25, tags_natural: 0.25, natural_tags: 0.25}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_settings: list[str]) -> Path:
    """A set of 16 drawings with tags, of which three in four have captions in two fields, one of them with variants."""
    folder = tmp_path_factory.mktemp("captioned")
    posts = [json.loads(line) for line in (REPOSITORY / "demo/posts.jsonl").read_text().splitlines()][::9][:16]
    (folder / "images").mkdir()
    for number, post in enumerate(posts):
        shutil.copy(REPOSITORY / "demo/images" / post["file"], folder / "images" / post["file"])
        if number % 4:
            post |= {"short": [f"A drawing, number {number}.", "It is small."], "long": f"This shows {post['file']}"}
        if number % 5 == 0:
            post |= {"tag_string_general": "", "tag_string_copyright": "", "tag_string_artist": ""}
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    (folder / "tag_aliases.csv").write_text("antecedent_name,consequent_name,status\nfood,nice_food,active\n")
    (folder / "keep.txt").write_text("nice_food\n")
    prepare(load_config([], [*tiny_settings, *words_of(folder), "run.name=prepare", "schedule.max_steps=1"]))
    return folder


def words_of(folder: Path) -> list[str]:
    source = (
        f"{{kind: posts, path: {folder / 'posts.jsonl'}, images: {folder / 'images'}, lines: variants, "
        "caption_column: short, more_caption_columns: [long]}"
    )
    return [
        "data.posts=null", "data.images=null", f"data.sources=[{source}]", f"data.shards={folder / 'shards'}",
        f"captions.template={TEMPLATE}", f"captions.mix={MIX}", "captions.caption_dropout=0.1",
        "captions.frequent_tag_dropout=0.5", "captions.frequent_tag_share=0.2", "captions.max_token_length=300",
        f"captions.tag_aliases={folder / 'tag_aliases.csv'}", f"captions.protected_tags_file={folder / 'keep.txt'}",
    ]  # fmt: skip


def state_of(config: Config) -> dict[str, Any]:
    newest = find_newest(run_path(config))
    assert newest is not None
    return read_train_state(newest)


def open_batches(config: Config) -> MicroBatches:
    index, base = open_index(config.data.shards), find_base(config.model.pretrained)
    tokenizers = load_tokenizers(*find_tokenizers(base, None), read_vocab_sizes(base))
    rules, plan = find_caption_rules(config, index.table), build_plan(index, config.run.seed, config.data)
    return MicroBatches(plan, index, tokenizers, rules, config.diffusion, config.data.micro_batch_size)


def test_a_resumed_run_has_the_bits_of_one_never_stopped(make_config: MakeConfig, folder: Path) -> None:
    words = [*words_of(folder), "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    straight = make_config(*words, "run.name=straight", "schedule.max_steps=3")
    train(straight)
    train(make_config(*words, "run.name=resumed", "schedule.max_steps=1"))
    resumed = make_config(*words, "run.name=resumed", "schedule.max_steps=3", "data.loader_threads=2")
    train(resumed)
    assert state_of(straight)["files"] == state_of(resumed)["files"]
    assert "nice_food" in state_of(straight)["frequent_tags"]["tags"]


@pytest.mark.parametrize("threads", [0, 2])
def test_steps_are_the_same_on_any_number_of_processes(make_config: MakeConfig, folder: Path, threads: int) -> None:
    data = open_batches(make_config(*words_of(folder)))
    seen: list[list[tuple[str, bytes]]] = []
    for world in (1, 2):
        batches = [
            [*load_batches(data, first_step=1, last_step=6, rank=rank, world=world, threads=threads,
                           prefetch_factor=None, pin_memory=False)]
            for rank in range(world)
        ]  # fmt: skip
        ordered = [batch for together in zip(*batches, strict=True) for batch in together]
        seen.append([
            (key, batch.input_ids_1[chunks].numpy().tobytes())
            for batch in ordered for key, chunks in zip(batch.keys, batch.chunk_map, strict=True)
        ])  # fmt: skip
    assert seen[0] == seen[1] and len(seen[0]) == 5 * 4


def test_explain_says_the_kind_and_the_parts_that_the_loader_made(make_config: MakeConfig, folder: Path) -> None:
    config = make_config(*words_of(folder))
    data, kinds, left_out = open_batches(config), set(), 0
    for step in range(12):
        lines = [*explain_step(config, data.index, step)]
        batches = [data[step * data.per_step + place] for place in range(data.per_step)]
        for batch, part in zip(batches, (lines[:2], lines[2:]), strict=True):
            chunks = tokenize_captions([line["caption"] for line in part], data.tokenizers, 300)
            assert np.array_equal(chunks.input_ids_1, batch.input_ids_1.numpy())
        for line in lines:
            kinds.add(line["kind"])
            for part in line["parts"]:
                left_out += len(part["left_out"])
                assert all(tag in line["caption"] for tag in part["tags"])
    assert kinds == {"empty", "tags", "natural", "tags_natural", "natural_tags"} and left_out > 20


def test_what_a_run_began_with_is_compared_on_resume(make_config: MakeConfig, folder: Path, tmp_path: Path) -> None:
    words = words_of(folder)
    train(make_config(*words, "schedule.max_steps=1"))
    for change in ("captions.template=[{tags: general}]", "captions.frequent_tag_share=0.3", "captions.mix.tags=0.5"):
        more = ["captions.mix.natural=0"] if "mix" in change else []
        with pytest.raises(UserError, match=change.split("=")[0].removesuffix(".tags")):
            train(make_config(*words, "schedule.max_steps=2", change, *more))
    other = tmp_path / "tag_aliases.csv"
    other.write_text("antecedent_name,consequent_name,status\nfood,animal,active\n")
    with pytest.raises(UserError, match="was made with another choice of tag tables"):
        train(make_config(*words, "schedule.max_steps=2", f"captions.tag_aliases={other}"))
    with pytest.raises(UserError, match="was made with another choice of tag tables"):
        train(make_config(*words, "schedule.max_steps=2", "captions.protected_tags_file=null"))
    # where they lie, and what is not active, may change
    other.write_text("antecedent_name,consequent_name,status\ncat,dog,deleted\nfood,nice_food,active\n")
    train(make_config(*words, "schedule.max_steps=2", f"captions.tag_aliases={other}"))
    fork = make_config(*words, "run.name=fork", "schedule.max_steps=3", "captions.tag_aliases=null",
                       f"checkpoint.fork={tmp_path / 'runs/run'}")  # fmt: skip
    train(fork)
    assert "food" in state_of(fork)["frequent_tags"]["tags"]


def test_a_checkpoint_that_records_no_tables_had_none(make_config: MakeConfig, folder: Path) -> None:
    config = make_config("schedule.max_steps=1")
    train(config)
    checkpoint = find_newest(run_path(config))
    assert checkpoint is not None
    change_record(checkpoint, "tag_maps_sha256")
    with pytest.raises(UserError, match="was made with another choice of tag tables"):
        train(make_config("schedule.max_steps=2", f"captions.tag_aliases={folder / 'tag_aliases.csv'}"))
    train(make_config("schedule.max_steps=2"))


def test_the_page_counts_kinds_tables_and_what_is_cut(make_config: MakeConfig, folder: Path) -> None:
    config = make_config(*words_of(folder), "captions.max_token_length=75")
    report = make_report(config)
    assert report.kinds is not None
    lacking = (report.kinds.without_tags, report.kinds.without_caption, report.kinds.without_both)
    assert lacking == (3, 3, 1)
    # nine have both, and so each kind with a quarter; three have tags alone, three a caption alone, one neither
    expected = [round(9 / 4 + 3 + 1), round(9 / 4 + 3), round(9 / 4), round(9 / 4)]
    assert [count for _, count in report.kinds.kinds] == expected
    texts = [report.index.table[f"tags_{category}"].to_pylist() for category in TAG_CATEGORIES]
    food = sum("food" in (text or "").split() for column in texts for text in column)
    assert food and dict(report.mapped)["replaced"] == food
    assert "nice food" in report.frequent and report.rules.composed == 16 and report.rules.finished == 0
    assert report.lengths is not None and report.lengths.truncated > 0
    cut = dict(report.lengths.cut)
    assert max(cut.values()) <= report.lengths.truncated and "caption: natural" in cut
    page = render_data(report)
    for words in ("Kinds of captions expected in a pass", "What tables make of the set", "nice food", "by part"):
        assert words in page


def test_frequent_tags_are_those_that_the_run_recorded(make_config: MakeConfig) -> None:
    words = ["captions.frequent_tag_dropout=1", "captions.frequent_tag_share=0.2"]
    config = make_config(*words, "schedule.max_steps=1")
    table = open_index(config.data.shards).table
    before = find_caption_rules(config, table).frequent
    texts = [table[f"tags_{category}"].to_pylist() for category in TAG_CATEGORIES]
    counts = Counter(tag for column in texts for text in column for tag in (text or "").split())
    assert before == {tag.replace("_", " ") for tag, count in counts.items() if count > 0.2 * len(table)} != set()
    train(config)
    other = {"share": 0.2, "tags": ["never"]}
    checkpoint, record = find_newest(run_path(config)), run_path(config) / "run.json"
    assert checkpoint is not None
    change_record(checkpoint, frequent_tags=other)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"frequent_tags": other}))
    assert find_caption_rules(config, table).frequent == {"never"}
    train(make_config(*words, "schedule.max_steps=2"))
    assert state_of(config)["frequent_tags"] == other
    looser = make_config("captions.frequent_tag_dropout=1", "captions.frequent_tag_share=0.1")
    assert find_caption_rules(looser, table).frequent >= before  # of another share nothing is recorded

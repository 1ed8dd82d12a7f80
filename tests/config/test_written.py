"""What users write is what they get: text, paths with ~, and config files with any name."""

import dataclasses
from pathlib import Path

import pytest

from trainer.config.caption_fields import QualityRule
from trainer.config.command_line import config_parser, finish_command_line, parse_command_line
from trainer.config.load import load_config
from trainer.config.schema import Config, Place
from trainer.core.errors import UserError

MINIMAL = """
run: {name: tiny, stage: test}
model: {pretrained: base}
data: {shards: shards}
optim: {unet_lr: 1e-6}
schedule: {epochs: 1}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "minimal.yaml", MINIMAL)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- text


WRITTEN = ["2024_01", "010", "0x1F", "1e3", "2.50", "12", "12:30", "no", "On", "true", ".5", "2024-01-01"]


@pytest.mark.parametrize("text", [*WRITTEN, "a: b", "Base #2", "- a", "@someone", "%d", "&a", "*", "|", "!x", "a=b"])
def test_text_on_the_command_line_is_what_was_written(minimal: Path, text: str) -> None:
    config = load_config([minimal], [f"publish.title={text}", f"run.stage= {text} "])
    assert (config.publish.title, config.run.stage, config.written["publish"]["title"]) == (text, text, text)


@pytest.mark.parametrize("text", WRITTEN)
def test_text_in_files_and_lists_is_what_was_written(tmp_path: Path, minimal: Path, text: str) -> None:
    file = write(
        tmp_path / "text.yaml",
        f"sampling: {{prompts: [{text}, '{text}', a], every_steps: 5}}\n"
        f"captions:\n  ratings: {{g: {text}}}\n  people: &p [{text}]\n  quality: [{{tag: {text}, min_score: 012}}]\n"
        f"filters: {{required_tags: *p}}\npublish: {{<<: {{title: {text}, author: x}}, author: {text}}}\n",
    )
    config = load_config([minimal, file], [f"data.posts=[{text}, b]"])
    assert config.sampling.prompts == [text, text, "a"] and config.sampling.every_steps == 5
    assert config.captions.quality == [QualityRule(text, 10)]  # a number is YAML's, here in base 8
    assert (config.captions.ratings, config.captions.people, config.filters.required_tags) == (
        {"g": text},
        [text],
        [text],
    )
    assert (config.publish.title, config.publish.author, config.data.posts) == (text, text, [text, "b"])


def test_nothing_and_quotes_mean_what_they_mean_in_yaml(minimal: Path) -> None:
    words = ["publish.title=null", "model.vae=~", "publish.license_link=", "publish.author='null'", 'run.stage="a #1"']
    config = load_config([minimal], words)
    assert (config.publish.title, config.model.vae, config.publish.license_link) == (None, None, None)
    assert (config.publish.author, config.run.stage) == ("null", "a #1")


LISTS = [  # a text where a list of text is wanted
    ("data.posts", "my/posts.jsonl"), ("data.posts", "my pictures/posts, all.jsonl"), ("data.posts", "2024"),
    ("captions.people", "1girl, solo"), ("captions.people", "|||"), ("filters.required_tags", "no"),
    ("logging.trackers", "wandb"), ("publish.formats", "diffusers"), ("filters.ratings", "g"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), LISTS)
def test_a_text_in_place_of_a_list_is_a_list_of_one(tmp_path: Path, minimal: Path, key: str, text: str) -> None:
    section, name = key.split(".")
    file = write(tmp_path / "one.yaml", f"{section}:\n  {name}: {text if '|' not in text else repr(text)}\n")
    for files, words in (([file], []), ([], [f"{key}={text}"]), ([], [f"{key}='{text}'"]), ([], [f"{key}=['{text}']"])):
        config = load_config([minimal, *files], words)
        assert getattr(getattr(config, section), name) == [text], (files, words)
        assert config.written[section][name] == [text]


def test_lists_stay_lists(tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ABT_TEXT", "posts.jsonl")
    assert load_config([minimal], ["data.posts=[a b.jsonl,'c, d.jsonl', ~/e]"]).data.posts == [
        "a b.jsonl", "c, d.jsonl", str(tmp_path / "e"),
    ]  # fmt: skip
    assert load_config([minimal], ["data.posts=~/a b"]).data.posts == [str(tmp_path / "a b")]
    assert load_config([minimal], ["data.posts="]).data.posts is None
    assert load_config([minimal], ["data.posts=null"]).data.posts is None
    assert load_config([minimal], ["captions.people=[]"]).captions.people == []
    # an interpolation may give either
    words = ["data.posts=my/${oc.env:ABT_TEXT}", "captions.people=[a, b]", "filters.required_tags=${captions.people}"]
    config = load_config([minimal], words)
    assert config.data.posts == ["my/posts.jsonl"] and config.filters.required_tags == ["a", "b"]
    assert config.written["data"]["posts"] == "my/${oc.env:ABT_TEXT}"
    with pytest.raises(UserError, match=r"data\.posts\.0: must be text \(in quotes\), not None"):
        load_config([minimal], ["data.posts=[null]"])
    with pytest.raises(UserError, match=r"optim\.betas: must be a list, not '0\.9'"):
        load_config([minimal], ["optim.betas='0.9'"])


# --- paths

PLACES = [
    ("run.output_dir", "~/x"), ("model.pretrained", "~/x"), ("model.vae", "~/x"), ("model.tokenizer", "~/x"),
    ("data.shards", "~/x"), ("data.images", "~/x"), ("checkpoint.resume", "~/x"), ("checkpoint.fork", "~/x"),
    ("captions.thresholds_from", "~/x"), ("captions.protected_tags_file", "~/x"), ("captions.tag_aliases", "~/x"),
    ("captions.tag_implications", "~/x"), ("captions.tag_removals", "~/x"),
    ("publish.card_template", "~/x"), ("data.posts", "[~/x, a]"), ("data.subset", "~/x"),
    ("data.sources", "[{kind: posts, path: ~/x, images: ~/x}]"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), PLACES)
def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    section, name = key.split(".")
    # for thresholds_from and protected_tags_file
    needed = ["captions.quality=[{tag: a, above_percentile: 50}]", "captions.tag_dropout=0.1"]
    config = load_config([minimal], [f"{key}={value}", *needed])
    found = getattr(getattr(config, section), name)
    home = str(tmp_path / "x")
    match name:
        case "posts":
            assert found == [home, "a"]
        case "sources":
            assert (found[0].path, found[0].images) == (home, home)
        case _:
            assert found == home
    assert "~/x" in str(config.written[section][name])  # a file never says where the home folder is
    file = write(tmp_path / "file.yaml", f"{section}: {{{name}: {value}}}")
    assert getattr(getattr(load_config([minimal, file], needed), section), name) == found


def test_a_tilde_alone_is_the_home_folder_where_nothing_is_no_path(
    tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path / "home.yaml", "run: {output_dir: ~}\nmodel: {vae: ~}")
    for config in (load_config([minimal, file]), load_config([minimal], ["run.output_dir=~", "model.vae=~"])):
        assert (config.run.output_dir, config.model.vae) == (str(tmp_path), None)


def test_the_paths_above_are_all_that_there_are() -> None:
    places = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config) if section.name != "written"
        for field in dataclasses.fields(section.type)
        if Place.__metadata__[0] in repr(field.type) or field.name == "sources"
    }  # fmt: skip
    assert places == {key for key, _ in PLACES}


def test_a_home_folder_of_nobody_is_told_by_its_key(minimal: Path) -> None:
    with pytest.raises(UserError, match=r"data\.shards: ~nobody-of-this-name/x: there is no user"):
        load_config([minimal], ["data.shards=~nobody-of-this-name/x"])
    assert load_config([minimal], ["data.shards=./~x", "model.vae=owner/~name"]).data.shards == "./~x"


# --- the command line


def test_a_config_file_whose_name_holds_an_equals_sign(
    tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["lr=1e-3.yaml", "run.seed=3.yml", "seed=4", str(write(tmp_path / "x=y.yaml", "run: {stage: x}"))]
    for seed, name in enumerate(names[:3], start=2):
        write(tmp_path / name, f"run: {{seed: {seed}}}")
    for words in (names, [names[0], "run.stage=x", *names[1:3]]):
        arguments = parse_command_line("test", ["--config", str(minimal), *words, "optim.unet_lr=1e-3"])
        config = load_config(arguments.config, arguments.overrides)
        assert (config.run.seed, config.run.stage, config.optim.unet_lr) == (4, "x", 1e-3)
    assert parse_command_line("test", [f"--config={names[0]}"]).config == [names[0]]
    # what is no file, and what can only be a key, stays a word of the config
    words = ["run.seed=5.yaml", "lr=1e-3", "data.posts=[a/b.yaml]"]
    assert parse_command_line("test", ["--config", "a.yaml", *words]).overrides == words
    with pytest.raises(UserError, match=r"config file configs/lr=2\.yaml cannot be read"):
        load_config(parse_command_line("test", ["--config", "configs/lr=2.yaml"]).config)


def test_another_options_value_may_hold_an_equals_sign() -> None:
    parser = config_parser("test")
    parser.add_argument("--out")
    parser.add_argument("--check", action="store_true")
    arguments = finish_command_line(parser, ["--out", "lr=1e-3", "--config", "a.yaml", "--check", "run.seed=1"])
    assert (arguments.out, arguments.config, arguments.overrides) == ("lr=1e-3", ["a.yaml"], ["run.seed=1"])


@pytest.mark.parametrize("value", ["lowres, " * 60, "描" * 200, "x" * 5000])
def test_a_value_may_be_longer_than_a_file_name(value: str) -> None:
    words = [f"sampling.negative_prompt={value}"]
    assert parse_command_line("test", ["--config", "a.yaml", *words]).overrides == words
    with pytest.raises(SystemExit):
        parse_command_line("test", ["a.yaml", value])
    with pytest.raises(UserError, match="too long"):
        load_config([value])

"""Every problem of a config is told, at once, by its dotted name; secrets stay out of what is written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainer.config.caption_fields import QualityRule, YearRule
from trainer.config.command_line import parse_command_line
from trainer.config.load import load_config, resolved_values
from trainer.config.schema import Config
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


def problems_of(files: list[Path], *words: str) -> list[str]:
    """The lines of the message, one a problem."""
    with pytest.raises(UserError) as caught:
        load_config(files, words)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{len(lines)} problem{'' if len(lines) == 1 else 's'} in ")
    return [line.strip() for line in lines]


def message_of(files: list[Path], *words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(files, words)
    return str(caught.value)


def test_a_minimal_config_has_the_recipes_defaults(minimal: Path) -> None:
    config = load_config([minimal])
    assert (config.data.global_batch_size, config.data.bucket_batch_size, config.data.micro_batch_size) == (96, 48, 16)
    assert (config.captions.max_token_length, config.captions.keep_tokens_separator) == (225, "|||")
    assert config.optim.betas == [0.9, 0.99] and (config.optim.weight_decay, config.optim.max_grad_norm) == (0.1, 1)
    assert (config.diffusion.prediction_type, config.diffusion.noise_offset) == ("epsilon", 0)
    assert (config.schedule.lr, config.precision.compute, config.checkpoint.every_steps) == ("constant", "fp16", 1000)
    assert config.captions.quality[0] == QualityRule("masterpiece", 151)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1  # type: ignore[misc]


# --- shape: keys and types


def test_all_problems_at_once_by_dotted_name(tmp_path: Path) -> None:
    text = """
run: {nmae: tiny, stage: [3]}
model: {pretrained: base, train_unet: "yes", attention: flash}
data: {shards: shards, global_batch_size: "96", posts: {a: posts.jsonl}, micro_batch_size: 7}
captions: {ratings: none, quality: [{tag: good, min_scor: 1}]}
optm: {unet_lr: 1e-6}
schedule: {epochs: 1, max_steps: 1}
memory: on
"""
    found = problems_of([write(tmp_path / "bad.yaml", text)])
    assert found == sorted(found)
    assert dict(line.split(": ", 1) for line in found) == {
        "captions.quality.0.min_scor": "unknown key, did you mean min_score?",
        "captions.ratings": "must be a mapping, not 'none'",
        "data.global_batch_size": "must be a whole number, not '96'",
        "data.micro_batch_size": "7 does not divide data.bucket_batch_size 48",
        "data.posts": "must be a list, not {'a': 'posts.jsonl'}",
        "memory": "must be a section of key: value lines, not True",
        "model.attention": "must be one of sdpa, xformers, not 'flash'",
        "model.train_unet": "must be true or false, not 'yes'",
        "optm": "unknown key, did you mean optim?",
        "run.name": "missing",
        "run.nmae": "unknown key, did you mean name?",
        "run.stage": "must be text (in quotes), not [3]",
        "schedule.epochs": "set exactly one of schedule.epochs and schedule.max_steps",
        # the default true of model.train_unet, whose own value is wrong, says nothing about optim.unet_lr
    }


def test_what_is_missing_is_told_by_each_key(tmp_path: Path) -> None:
    found = problems_of([write(tmp_path / "empty.yaml", "")])
    missing = {line.split(":")[0] for line in found if line.endswith(": missing")}
    assert missing == {"run.name", "run.stage", "model.pretrained", "data.shards"}
    assert len(found) == 6  # and a rate, and a length


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("run.name=", "run.name: must be text (in quotes), not None"),
        ("run.name=null", "run.name: must be text (in quotes), not None"),
        ("run.name=[a]", "run.name: must be text (in quotes), not ['a']"),
        ("run.name={a: b}", "run.name: must be text (in quotes), not {'a': 'b'}"),
        ("run.seed='12'", "run.seed: must be a whole number, not '12'"),
        ("run.seed=1e3", "run.seed: must be a whole number, not 1000.0"),
        ("run.seed=true", "run.seed: must be a whole number, not True"),
        ("run.seed=null", "run.seed: must be a whole number, not None"),
        ("optim.unet_lr='1e-6'", "optim.unet_lr: must be a number, not '1e-6'"),
        ("optim.unet_lr=yes", "optim.unet_lr: must be a number, not True"),
        ("optim.unet_lr=.nan", "optim.unet_lr: must be a number, not nan"),
        ("optim.unet_lr=.inf", "optim.unet_lr: must be a number, not inf"),
        ("optim.betas=0.9", "optim.betas: must be a list, not 0.9"),
        ("optim.betas=[0.9, off]", "optim.betas.1: must be a number, not False"),
        ("model.train_unet=1", "model.train_unet: must be true or false, not 1"),
        (
            "captions.max_token_length=76",
            "captions.max_token_length: must be one of 75, 150, 225, 300, 375, 450, not 76",
        ),
        (
            "captions.max_token_length=225.0",
            "captions.max_token_length: must be one of 75, 150, 225, 300, 375, 450, not 225.0",
        ),
        ("precision.compute=no", "precision.compute: must be one of fp32, bf16, fp16, not 'no'"),
        ("logging.trackers=[wandb, mlflow]", "logging.trackers.1: must be one of wandb, tensorboard, not 'mlflow'"),
        ("captions.ratings={g: null}", "captions.ratings.g: must be text (in quotes), not None"),
        ("captions.people=[1girl, {}]", "captions.people.1: must be text (in quotes), not {}"),
        ("captions.years=[{first: 1, last: 2}]", "captions.years.0.tag: missing"),
        ("captions.years=[5]", "captions.years.0: must be a section of key: value lines, not 5"),
        ("optim=5", "optim: must be a section of key: value lines, not 5"),
        ("optim=null", "optim: must be a section of key: value lines, not None"),
        ("publish.title='???'", "publish.title: missing"),
        ("written.x=1", "written: unknown key"),
        ("data.shard=x", "data.shard: unknown key, did you mean shards?"),
        ("data.xyzzy=x", "data.xyzzy: unknown key"),
    ],
)
def test_wrong_shapes(minimal: Path, word: str, problem: str) -> None:
    assert problems_of([minimal], word) == [problem]


@pytest.mark.parametrize(
    ("word", "section", "field", "value"),
    [
        ("run.name='12'", "run", "name", "12"),
        ("run.name=2024-01-01", "run", "name", "2024-01-01"),  # not a date object
        ("run.stage='no'", "run", "stage", "no"),
        ("optim.unet_lr=1e-5", "optim", "unet_lr", 1e-5),  # PyYAML alone reads text here
        ("optim.eps=1", "optim", "eps", 1.0),
        ("optim.betas=[0, 0.5]", "optim", "betas", [0.0, 0.5]),
        ("model.compile=on", "model", "compile", True),
        ("captions.keep_tokens_separator='||'", "captions", "keep_tokens_separator", "||"),
        ("captions.keep_tokens_separator=|||", "captions", "keep_tokens_separator", "|||"),
        ("captions.quality=[{tag: good}]", "captions", "quality", [QualityRule("good")]),
        ("captions.years=[{first: 1, last: 2, tag: x}]", "captions", "years", [YearRule(1, 2, "x")]),
        ("captions.years=[]", "captions", "years", []),
        ("captions.ratings={g: safe}", "captions", "ratings", {"g": "safe"}),
        ("checkpoint.keep_every_steps=null", "checkpoint", "keep_every_steps", None),
        ("data.posts=[a, b]", "data", "posts", ["a", "b"]),
    ],
)
def test_right_shapes(minimal: Path, word: str, section: str, field: str, value: Any) -> None:
    built = getattr(getattr(load_config([minimal], [word]), section), field)
    assert built == value and type(built) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in built] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[1, 2]", "must hold sections"),
        (b"5", "holds only text"),
        (b"run: {name: [", "not valid YAML"),
        (b"run: {name: a, name: b}", "duplicate key"),
        (b"captions: {keep_tokens_separator: |||}", "not valid YAML"),
        (b"run: {name: \xff\xfe}", "not valid YAML"),
        (b"run: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"sampling: {prompts: [" + b"a," * 20_000 + b"]}", "10000"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    message = message_of([file])
    assert part in message and str(file) in message


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "none.yaml cannot be read: No such file" in message_of([tmp_path / "none.yaml"])
    assert "cannot be read" in message_of([tmp_path])


@pytest.mark.parametrize("word", ["captions.people=[|||]", "run.name=[a", "run.name={", "run.name='a", "run.seed=@1"])
def test_a_word_that_is_no_yaml_is_named(minimal: Path, word: str) -> None:
    assert message_of([minimal], word).startswith(f"{word} is not key=value")


def test_a_rule_about_a_wrong_value_stays_silent(minimal: Path) -> None:
    assert problems_of([minimal], "optim.unet_lr=fast") == ["optim.unet_lr: must be a number, not 'fast'"]
    assert problems_of([minimal], "data.micro_batch_size=[]", "data.bucket_batch_size=7") == [
        "data.bucket_batch_size: 7 does not divide data.global_batch_size 96",
        "data.micro_batch_size: must be a whole number, not []",
    ]


# --- layers, interpolations, what is written


def test_later_files_and_words_lie_over_earlier_ones(tmp_path: Path, minimal: Path) -> None:
    over = write(tmp_path / "over.yaml", "run: {seed: 7, stage: two}\ncaptions: {people: [a, b]}\noptim: {eps: 1e-6}")
    last = write(tmp_path / "last.yaml", "run: {stage: three}\ncaptions: {people: [c]}")
    config = load_config([minimal, over, last], ["optim.eps=1e-7", "data.posts=[x]"])
    assert (config.run.name, config.run.seed, config.run.stage) == ("tiny", 7, "three")
    assert config.captions.people == ["c"]  # lists are replaced
    assert (config.optim.unet_lr, config.optim.eps, config.data.posts) == (1e-6, 1e-7, ["x"])
    assert load_config([minimal, last, over]).run.stage == "two"
    assert load_config([minimal], ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_secret_is_used_and_never_written(tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-from-the-environment"
    monkeypatch.setenv("ABT_SECRET", secret)
    file = write(
        tmp_path / "secret.yaml",
        "logging: {project: '${oc.env:ABT_SECRET}'}\n"
        "publish: {author: 'by ${oc.env:ABT_SECRET}', title: '${logging.project}'}\n"
        "captions: {quality: [{tag: '${oc.env:ABT_SECRET}', min_score: 1}], ratings: {g: '${oc.env:ABT_SECRET}'}}\n"
        "data: {posts: ['${oc.env:ABT_SECRET}/posts.jsonl']}",
    )
    config = load_config([minimal, file], ["model.pretrained=${oc.env:ABT_SECRET}"])
    assert (config.logging.project, config.publish.author, config.publish.title) == (secret, f"by {secret}", secret)
    assert config.captions.quality == [QualityRule(secret, 1)] and config.captions.ratings == {"g": secret}
    assert (config.data.posts, config.model.pretrained) == ([f"{secret}/posts.jsonl"], secret)
    text = OmegaConf.to_yaml(OmegaConf.create(config.written))
    assert secret not in text and secret not in repr(config.written)
    assert text.count("${oc.env:ABT_SECRET}") == 6 and "${logging.project}" in text
    # only the resolved values, which are never written, hold it
    assert secret in repr(resolved_values(config))
    monkeypatch.setenv("ABT_SECRET", "another")
    again = load_config([write(tmp_path / "written.yaml", text)])
    assert (again.logging.project, again.model.pretrained) == ("another", "another")


def test_what_cannot_be_resolved_is_told_by_its_key(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABT_MISSING", raising=False)
    message = message_of([minimal], "publish.author=${oc.env:ABT_MISSING}")
    assert "publish.author" in message and "ABT_MISSING" in message
    assert "publish.author" in message_of([minimal], "publish.author=${no.such.key}")
    assert "publish.author" in message_of([minimal], "publish.author=${publish.author}")
    # a default for a missing variable is fine, and an interpolation is checked by what it gives
    assert load_config([minimal], ["publish.author='${oc.env:ABT_MISSING,me}'"]).publish.author == "me"
    assert problems_of([minimal], "run.seed=${run.name}") == ["run.seed: must be a whole number, not 'tiny'"]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run.name='12'", "run.stage='no'", "publish.title='${run.name}'", "publish.author='null'"],
        ["captions.keep_tokens_separator='|'", "captions.people=['yes', '1e3', ' a ', '']", "optim.betas=[0, 0]"],
        ["captions.quality=[{tag: 'on'}, {tag: b, min_score: -5}]", "captions.years=[]", "captions.ratings={g: 'no'}"],
        ["sampling.prompts=['a, b', 'c: d', '# e', 'ä ^_^']", "sampling.every_steps=5", "optim.eps=1.0e-15"],
    ],
    ids=" ".join,
)
def test_what_is_written_loads_as_the_same_config(tmp_path: Path, minimal: Path, words: list[str]) -> None:
    config = load_config([minimal], words)
    again = load_config([write(tmp_path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.written)))])
    assert again == config
    assert again.written == config.written
    assert resolved_values(again) == resolved_values(config)
    # complete: a default that changes in a later version does not change what this file says
    names = {field.name for field in dataclasses.fields(Config)} - {"written"}
    assert config.written.keys() == names
    for name in names:
        section = getattr(config, name)
        assert config.written[name].keys() == {field.name for field in dataclasses.fields(section)}


# --- the command line


@pytest.mark.parametrize(
    ("words", "files", "overrides"),
    [
        (["--config", "a.yaml"], ["a.yaml"], []),
        (["--config=a.yaml"], ["a.yaml"], []),
        (["--config", "a.yaml", "--config", "b.yaml"], ["a.yaml", "b.yaml"], []),
        (["--config", "a.yaml", "b.yaml", "--config", "c.yaml"], ["a.yaml", "b.yaml", "c.yaml"], []),
        (["--config", "a.yaml", "x.y=1", "z=2"], ["a.yaml"], ["x.y=1", "z=2"]),
        (["x.y=1", "--config", "a.yaml", "b.yaml", "z=-2"], ["a.yaml", "b.yaml"], ["x.y=1", "z=-2"]),
        (["--config", "a.yaml", "x=1", "b.yaml", "--config", "c.yaml", "u=http://h?a=b"],
         ["a.yaml", "b.yaml", "c.yaml"], ["x=1", "u=http://h?a=b"]),
        (["a.yaml"], ["a.yaml"], []),
        (["x=1", "a.yaml", "z=2", "b.yml"], ["a.yaml", "b.yml"], ["x=1", "z=2"]),
        (["b.yaml", "--config", "a", "--config=c", "--conf=d"], ["b.yaml", "a", "c", "d"], []),
    ],
)  # fmt: skip
def test_command_lines(words: list[str], files: list[str], overrides: list[str]) -> None:
    arguments = parse_command_line("test", words)
    assert arguments.config == files
    assert arguments.overrides == overrides


def test_of_two_words_for_one_key_the_last_wins(minimal: Path) -> None:
    for words in (
        ["--config", str(minimal), "run.seed=1", "run.seed=2"],
        ["run.seed=1", "--config", str(minimal), "run.seed=2"],
        ["run.seed=1", "run.seed=2", "--config", str(minimal)],
        ["--config", str(minimal), "run.seed=1", "--config", str(minimal), "run.seed=2"],
    ):
        arguments = parse_command_line("test", words)
        assert load_config(arguments.config, arguments.overrides).run.seed == 2, words


@pytest.mark.parametrize(
    "words",
    [[], ["x=1"], ["--config"], ["--config", "run.seed=1"], ["stray", "--config", "a.yaml"],
     ["stray"], ["a.yaml", "stray"], ["a.json"],
     ["--config", "a.yaml", "--x=1"], ["--config", "a.yaml", "--step", "1"]],
)  # fmt: skip
def test_command_lines_that_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line("test", words)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err

"""A config file that extends others is what they are with its own lines over them; messages name the file of a key."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.core.errors import UserError

BASE = """
run: {name: base, stage: test, seed: 1}
model: {pretrained: base}
data: {shards: shards}
optim: {unet_lr: 1e-6}
schedule: {epochs: 1}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message_of(file: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config([file], words)
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", BASE)


def test_a_files_own_lines_lie_over_what_it_extends(tmp_path: Path, base: Path) -> None:
    file = write(tmp_path / "my.yaml", "extends: base.yaml\nrun: {name: mine}\ncaptions: {people: [a]}\n")
    config = load_config([file])
    assert (config.run.name, config.run.seed, config.captions.people) == ("mine", 1, ["a"])
    assert config == load_config([base, write(tmp_path / "over.yaml", "run: {name: mine}\ncaptions: {people: a}")])
    assert load_config([file], ["run.name=word"]).run.name == "word"
    # what is written is the merged result: it stands alone, wherever it lies
    assert "extends" not in config.written
    alone = write(tmp_path / "elsewhere/config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.written)))
    base.unlink()
    assert load_config([alone]) == config


def test_lists_chains_and_several_files(tmp_path: Path, base: Path) -> None:
    write(tmp_path / "two.yaml", "extends: base.yaml\nrun: {seed: 2, stage: two}")
    write(tmp_path / "three.yaml", "run: {seed: 3}")
    file = write(tmp_path / "my.yaml", "run: {name: mine}\nextends: [two.yaml, three.yaml]")
    config = load_config([file])
    assert (config.run.name, config.run.stage, config.run.seed) == ("mine", "two", 3)
    write(file, "extends:\n- three.yaml\n- two.yaml\n")
    assert load_config([file]).run.seed == 2
    # the same file by two ways is no circle
    write(file, "extends: [base.yaml, two.yaml]")
    assert load_config([file, tmp_path / "three.yaml"]).run.seed == 3
    assert load_config([tmp_path / "three.yaml", file]).run.seed == 2


def test_interpolations_are_resolved_in_the_merged_config(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABT_TEXT", "from the environment")
    write(base, BASE + "publish: {title: 'by ${run.name}', author: '${oc.env:ABT_TEXT}'}")
    config = load_config([write(tmp_path / "my.yaml", "extends: base.yaml\nrun: {name: mine}")])
    assert (config.publish.title, config.publish.author) == ("by mine", "from the environment")
    assert config.written["publish"]["author"] == "${oc.env:ABT_TEXT}"


def test_where_an_extended_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path))
    stage1 = "configs/stage1_feature_alignment.yaml"
    file = write(tmp_path / "my pictures/my.yaml", f"extends: {stage1}\nrun: {{name: mine}}")
    assert load_config([file]).run.stage == "1, feature alignment"  # of the program, wherever one is
    write(here / stage1, BASE)
    assert load_config([file]).run.stage == "test"  # of the working folder
    monkeypatch.chdir(tmp_path)
    beside = write(file.parent / stage1, BASE.replace("seed: 1", "seed: 5"))
    assert load_config([file]).run.seed == 5
    monkeypatch.chdir(here)
    message = message_of(file)  # the first two differ
    assert message.startswith(f"{file}: extends: {stage1} may be {beside} or {here / stage1}, which differ")
    write(here / stage1, beside.read_text())
    assert load_config([file]).run.seed == 5
    write(here / stage1, BASE)
    for name in (str(beside), f"~/{beside.relative_to(tmp_path)}"):
        write(file, f"extends: '{name}'")
        assert load_config([file]).run.seed == 5


def test_every_config_of_the_program_can_be_extended_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in sorted((REPOSITORY / "configs").glob("*stage*.yaml")):
        file = write(tmp_path / "my.yaml", f"extends: configs/{path.name}")
        assert load_config([file]) == load_config([path])


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("extends: none.yaml", "extends: none.yaml is not there. It was looked for beside the file that names it"),
        ("extends: ~nobody-of-this-name/a.yaml", "extends: ~nobody-of-this-name/a.yaml: there is no user"),
        ("extends: .", "extends: . is not there"),
        ("extends: 5", "extends: must be the name of a config file, or a list of names, not 5"),
        (
            "extends:",
            "extends: names no file: name one, such as configs/stage1_feature_alignment.yaml, or take the line out",
        ),
        ("extends: ''", "extends: names no file"),
        ("extends: []", "extends: names no file"),
        ("extends: {a: b}", "extends: must be the name of a config file, or a list of names, not {'a': 'b'}"),
        ("extends: [base.yaml, 1.5]", "extends: must be the name of a config file, or a list of names, not 1.5"),
        ("extends: my.yaml", "extends: a circle: {file} extends {file}"),
    ],
)
def test_what_cannot_be_extended_is_said_by_file_and_key(tmp_path: Path, base: Path, text: str, part: str) -> None:
    file = write(tmp_path / "my.yaml", text)
    assert message_of(file).startswith(f"{file}: {part.replace('{file}', str(file))}")


def test_a_runs_folder_and_a_file_of_text_are_said_to_be_such(tmp_path: Path) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    write(tmp_path / "runs/a/config.yaml", "run: {name: a}")
    file = write(tmp_path / "my.yaml", "extends: runs/a")
    assert message_of(file) == f"{file}: extends: runs/a is a run's folder: {tmp_path}/runs/a/config.yaml?"
    for text in ("only words", "5", "'in quotes'"):
        write(file, text)
        assert "is not a mapping of sections (run:, model:, ...): it holds only text" in message_of(file)


def test_a_circle_and_a_broken_file_further_down_are_named(tmp_path: Path) -> None:
    one, two, three = (tmp_path / f"{name}.yaml" for name in ("one", "two", "three"))
    for file, extended in ((one, two), (two, three), (three, one)):
        write(file, f"extends: {extended.name}")
    assert message_of(one) == f"{three}: extends: a circle: {one} extends {two} extends {three} extends {one}"
    write(three, "run: {name: [")
    assert message_of(one).startswith(f"config file {three} is not valid YAML")
    write(three, "extends: gone.yaml")
    assert message_of(one).startswith(f"{three}: extends: gone.yaml is not there")


def test_messages_name_the_file_of_a_key_where_several_are_merged(tmp_path: Path, base: Path) -> None:
    write(base, BASE + "captions: {years: [{first: 1, last: 2}], people: 5}\npublish: {title: '${no.key}'}\n")
    over = write(tmp_path / "over.yaml", "data: {shard: x, bucket_batch_size: 7}\noptim: {unet_lr: fast}")
    file = write(tmp_path / "my.yaml", "extends: [base.yaml, over.yaml]\ncaptions: {shuffle: sometimes}")
    assert message_of(file).splitlines()[0].endswith(f"(in {base})")
    found = message_of(file, "publish.title=t", "run.seed=x").splitlines()
    assert found[0] == f"7 problems in {file}:"
    assert [line.strip() for line in found[1:]] == [
        f"captions.shuffle: must be true or false, not 'sometimes' (in {file})",
        f"captions.years.0.tag: missing (in {base})",
        f"data.bucket_batch_size: 7 does not divide data.global_batch_size 96 (in {over})",
        "data.micro_batch_size: 16 does not divide data.bucket_batch_size 7",
        f"data.shard: unknown key, did you mean shards? (in {over})",
        f"optim.unet_lr: must be a number, not 'fast' (in {over})",
        "run.seed: must be a whole number, not 'x' (on the command line)",
    ]

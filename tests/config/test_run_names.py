"""A run is named by its bare name, a path or its config, and a path that is there wins."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config.command_line import config_parser, finish_command_line, parse_command_line
from trainer.config.run_names import find_run_path, name_run, say_runs
from trainer.core.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine", "2024_01"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    (tmp_path / "runs/no_run").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mine", "runs/mine"),
        ("2024_01", "runs/2024_01"),
        ("runs/mine", "runs/mine"),
        ("runs/mine/", "runs/mine"),
        ("mine/checkpoints/step-00001000", "runs/mine/checkpoints/step-00001000"),
        ("mine/latest", "runs/mine/latest"),
        ("./mine", "mine"),
        ("no_run", "no_run"),
        ("none", "none"),
        ("owner/name", "owner/name"),
        (".", "."),
        ("~/x", "{home}/x"),
        ("none.yaml", "none.yaml"),
    ],
)
def test_what_a_word_means(here: Path, capsys: pytest.CaptureFixture[str], text: str, found: str) -> None:
    assert find_run_path(text) == found.replace("{home}", str(here))
    assert capsys.readouterr().err == ""


def test_a_path_that_is_there_wins_with_a_note(here: Path, notes: Callable[[], str]) -> None:
    (here / "mine").mkdir()
    (here / "mine/model_index.json").write_text("{}")
    assert find_run_path("mine") == "mine"
    assert notes() == "note: mine is a path here, which is taken, and also the name of a run: runs/mine is that run"
    (here / "2024_01").write_text("")
    assert find_run_path("2024_01") == "2024_01" and "note:" in notes()


@pytest.mark.parametrize("name", ["checkpoints", "unet", "a.safetensors", "train_state.json", "config.yaml"])
def test_a_folder_that_is_no_model_gives_way(here: Path, notes: Callable[[], str], name: str) -> None:
    (here / "mine").mkdir()
    (here / "mine/a.png").write_text("")
    assert find_run_path("mine") == "runs/mine" and name_run(Path("runs/mine")) == "mine" and notes() == ""
    assert find_run_path("./mine") == "mine" and find_run_path("mine/latest") == "runs/mine/latest"
    (here / "mine" / name).write_text("")
    assert find_run_path("mine") == "mine" and name_run(Path("runs/mine")) == "runs/mine"


def test_a_config_stands_for_its_run(here: Path) -> None:
    config = here / "my.yaml"
    config.write_text("extends: configs/stage1_feature_alignment.yaml\nrun: {name: mine}\n")
    assert find_run_path("my.yaml") == "runs/mine" == find_run_path("~/my.yaml")
    config.write_text(config.read_text().replace("name: mine", "name: mine, output_dir: ~/elsewhere"))
    with pytest.raises(UserError, match=r"my\.yaml names the run .*/elsewhere/mine, which is not there yet: .*train"):
        find_run_path("my.yaml")
    config.write_text("run: {nmae: mine}")
    with pytest.raises(UserError, match=r"run\.nmae: unknown key"):
        find_run_path("my.yaml")
    # a run that was moved is where its own config lies, whatever that says
    (here / "moved").mkdir()
    (here / "moved/config.yaml").write_text("run: {name: mine}")
    assert find_run_path("moved/config.yaml") == "moved"


def test_a_run_in_place_of_a_config_is_answered_with_its_config(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--check", "mine", "run.seed=1"])
    parser = config_parser("Train.")
    parser.add_argument("--check", action="store_true")
    for file in ("runs/mine/config.yaml", "mine.yaml"):
        with pytest.raises(SystemExit):
            finish_command_line(parser)
        assert "error: mine is a run: " in (said := capsys.readouterr().err)
        assert said.endswith(f" train.py --check {file} run.seed=1\n")
        (here / "mine.yaml").write_text("")
    with pytest.raises(SystemExit):
        finish_command_line(parser, ["no_run"])
    assert "unrecognized arguments: no_run" in capsys.readouterr().err


def test_several_files_are_said_in_their_order(here: Path, notes: Callable[[], str]) -> None:
    parse_command_line("Train.", ["a.yaml", "run.seed=1"])
    assert notes() == ""
    parse_command_line("Train.", ["a.yaml", "b.yaml", "c.yaml"])
    assert notes() == "note: a.yaml, then b.yaml over it, then c.yaml over it"


def test_the_runs_that_there_are_are_named(here: Path) -> None:
    assert say_runs() == "runs are: 2024_01, mine"
    for number in range(12):
        (here / f"runs/a{number:02}").mkdir()
        (here / f"runs/a{number:02}/config.yaml").write_text("")
    assert say_runs().endswith("a10 and 2 more") and say_runs().count(",") == 11
    assert say_runs(here / "none") == f"there is no run in {here / 'none'}"

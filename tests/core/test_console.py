"""How commands speak: what goes to stdout and what to stderr, for people, with --quiet and with --json."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.paths import REPOSITORY
from trainer.core import commands
from trainer.core.commands import command, config_words, find_python, find_script, training_command
from trainer.core.console import Output, Result, format_duration, print_result, suggest_value
from trainer.core.distributed import suggest_processes

PROGRAM = """
import sys
from pathlib import Path
from trainer.core.console import CommandParser, NextStep, Result, log
from trainer.core.errors import UserError, run_command

def main():
    parser = CommandParser("Try.")
    endings = ["result", "refusal", "interrupt", "full", "text", "bug", "pipe", "file"]
    parser.add_argument("--ending", choices=endings, default="result")
    arguments = parser.parse_args()
    print("what a library prints")
    log.info("note: a note")
    log.warning("warning: a warning")
    if arguments.ending == "refusal":
        raise UserError("mend this")
    if arguments.ending == "interrupt":
        raise KeyboardInterrupt
    if arguments.ending == "full":
        raise OSError(28, "No space left on device", "a/b")
    if arguments.ending == "bug":
        1 / 0
    if arguments.ending == "pipe":
        raise BrokenPipeError("of a worker")
    if arguments.ending == "file":
        raise FileNotFoundError(2, "gone")
    if arguments.ending == "text":
        return Result("lines\\nof text", facts={"lines": 2})
    return Result("made it", [Path("out/a b"), Path("out/c")], {"count": 2},
                  [NextStep("go on", "python next.py 'a b'")])

run_command(main, "the same command starts again")
"""


def run(*words: str, rank: str | None = None) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and the lines of stderr."""
    others = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**others, "PYTHONPATH": str(REPOSITORY), **({"RANK": rank} if rank else {})},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.splitlines()


def test_for_people_the_result_comes_last_and_the_next_command_can_be_copied() -> None:
    code, out, err = run()
    assert (code, err) == (0, ["note: a note", "warning: a warning"])
    assert out.splitlines() == ["what a library prints", "made it", "", "to go on:", "  python next.py 'a b'"]


def test_what_takes_a_while_says_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds, took in {0.4: "", 310.0: "took 0:05:10\n"}.items():
        print_result(Result("made it", [Path("out")]), Output(), seconds)
        assert capsys.readouterr().out == f"made it\n{took}"
        print_result(Result('{"a": 1}'), Output(), seconds)  # lines that a program may read
        assert capsys.readouterr().out == '{"a": 1}\n'


def test_quiet_leaves_warnings_and_the_paths() -> None:
    code, out, err = run("--quiet")
    assert (code, out) == (0, "out/a b\nout/c\n")
    assert err == ["what a library prints", "warning: a warning"]
    assert run("--quiet", "--ending", "text")[1] == "lines\nof text\n"  # what makes no file prints what it found


def test_json_is_one_object_and_all_else_is_on_stderr() -> None:
    code, out, err = run("--json")
    found = json.loads(out)
    assert code == 0 and len(out.splitlines()) == 1 and found.pop("seconds") >= 0
    assert found == {
        "paths": ["out/a b", "out/c"], "count": 2, "next": [{"to": "go on", "command": "python next.py 'a b'"}],
    }  # fmt: skip
    assert err == ["what a library prints", "note: a note", "warning: a warning"]
    assert run("--json", "--quiet")[2] == ["what a library prints", "warning: a warning"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--ending", "refusal"], 2, "mend this"),
        (["--ending", "interrupt"], 130, "interrupted: the same command starts again"),
        (["--ending", "full"], 2, "the disk is full while a/b was written: make room and start again"),
        (["--ending", "nothing"], 2, "argument --ending: invalid choice: 'nothing'"),
        (["--strange"], 2, "unrecognized arguments: --strange"),
    ],
    ids=["refusal", "interrupt", "full", "choice", "word"],
)
def test_an_error_is_json_where_the_result_would_be(words: list[str], code: int, message: str) -> None:
    got, out, err = run(*words, "--json")
    (said,) = json.loads(out).items()
    assert got == code and said[0] == "error" and said[1].startswith(message)
    assert message in err[-1] and not any("Traceback" in line for line in err)
    got, out, err = run(*words)
    assert got == code and "error" not in out and message in err[-1]


def test_an_error_of_the_program_is_json_too_and_its_traceback_is_shown() -> None:
    for ending, message in {"bug": "ZeroDivisionError: division by zero", "pipe": "BrokenPipeError: of a worker",
                            "file": "FileNotFoundError: [Errno 2] gone"}.items():  # fmt: skip
        code, out, err = run("--ending", ending, "--json")
        assert (code, json.loads(out), err[-1]) == (1, {"error": message}, message)
        assert any("Traceback" in line for line in err)
        code, out, err = run("--ending", ending)
        assert (code, out, err[-1]) == (1, "what a library prints\n", message)


@pytest.mark.parametrize("words", [[], ["--json"], ["--quiet"]])
def test_help_is_on_stdout_however_the_command_speaks(words: list[str]) -> None:
    code, out, err = run(*words, "--help")
    assert code == 0 and not err and "--ending" in out
    done = subprocess.run([sys.executable, "train.py", *words, "--help-config", "optim"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "unet_lr" in done.stdout and not done.stderr


def test_a_value_that_begins_with_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "-dash").mkdir()
    monkeypatch.chdir(tmp_path)
    message = "argument --data: expected one argument"
    for words, hint in {
        ("--data", "-dash"): ": --data=./-dash for a value that begins with a dash",
        ("--data", "-x y"): ": --data='-x y' for a value that begins with a dash",
        ("--data", "--model"): "",
        ("--data",): "",
        ("--data", "-h"): "",
    }.items():
        assert suggest_value(message, words) == hint
    assert suggest_value("unrecognized arguments: -dash", ["--data", "-dash"]) == ""


def test_only_the_main_process_speaks() -> None:
    for words in ([], ["--json"], ["--quiet"]):
        code, out, err = run(*words, rank="1")
        assert (code, err + out.splitlines()) == (0, ["what a library prints"])
    code, out, err = run("--ending", "refusal", "--json", rank="1")
    assert (code, out, err[-1]) == (2, "", "error on rank 1: mend this")
    assert run("--ending", "interrupt", "--quiet", rank="1")[2] == ["what a library prints"]


def test_every_command_takes_both_and_says_what_they_do(tmp_path: Path) -> None:
    scripts = [REPOSITORY / "train.py", *sorted((REPOSITORY / "scripts").glob("[!_]*.py"))]
    asked = [
        subprocess.Popen([sys.executable, path, "--help"], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        for path in scripts
    ]  # fmt: skip
    for path, process in zip(scripts, asked, strict=True):
        out, _ = process.communicate()
        assert "--quiet" in out and "one JSON object on stdout" in " ".join(out.split()), path.name


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (310, "0:05:10"), (97_200, "27:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# --- the next command


def test_words_come_back_as_they_were_typed() -> None:
    words = ["my run.yaml", "data.images=~/my images", "data.posts=[a, b]", "captions.keep_tokens_separator=|||"]
    line = command("scripts/export.py", *config_words(words[:1], words[1:]))
    assert shlex.split(line)[2:] == words and "'my run.yaml'" in line
    assert config_words(["a.yml", "b"], ["c=1"]) == ["--config", "a.yml", "b", "c=1"]  # b is no .yaml


def test_a_script_is_named_as_it_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert find_script("scripts/export.py") == "scripts/export.py"
    monkeypatch.chdir(REPOSITORY / "demo")
    assert find_script("train.py") == "../train.py"
    monkeypatch.chdir(tmp_path)
    assert find_script("train.py") == str(REPOSITORY / "train.py")
    (tmp_path / "train.py").symlink_to(REPOSITORY / "train.py")
    assert find_script("train.py") == "train.py"


def test_python_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / ".venv/bin/python3"
    own.parent.mkdir(parents=True)
    shutil.copy(shutil.which("true") or "/bin/true", own)
    shutil.copy(own, own.with_name("python"))
    monkeypatch.setattr(commands.sys, "executable", str(own))
    monkeypatch.setenv("PATH", "")
    assert find_python() == ".venv/bin/python3"  # not activated
    monkeypatch.setenv("PATH", str(own.parent))
    assert find_python() == "python"
    monkeypatch.setattr(commands.sys, "executable", "/usr/elsewhere/python3")
    assert find_python() == "/usr/elsewhere/python3"


def test_several_processes_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert training_command(["a b.yaml"], 2) == "accelerate launch --num_processes 2 train.py 'a b.yaml'"
    on_cpu = training_command(["a.yaml"], 3, on_cpu=True)
    assert on_cpu == "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 3 train.py a.yaml"
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert training_command(["a.yaml"], on_cpu=True) == training_command(["a.yaml"])
    assert training_command(["a.yaml"]).endswith(" train.py a.yaml")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # else the next run would take the GPU
    assert training_command(["a.yaml"], on_cpu=True) == f"ACCELERATE_USE_CPU=true {training_command(['a.yaml'])}"
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    suggested = [suggest_processes(None, 96, 12), suggest_processes(2, 96, 12), suggest_processes(None, 96, 16)]
    assert suggested == [4, 2, 1]  # 4 x 16 does not divide 96
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suggest_processes(None, 96, 12) == 1

"""What has no effect on a picture is refused, or named as the plain text that it is."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from trainer.config.schema import NEGATIVE_PROMPT, Config, SamplingConfig
from trainer.core.errors import UserError
from trainer.sample.pictures import OF_COMMAND, check_config_prompts, check_prompts, read_samples
from trainer.train.launch import build_accelerator, open_inputs


@pytest.fixture
def sample(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run scripts/sample.py with some words; exit code, what it printed, what it said beside."""

    def run(*words: str) -> tuple[int, str, str]:
        quick = ["--size", "64x64", "--steps", "1", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["sample.py", str(tiny_base), *quick, *words])
        try:
            runpy.run_path(str(REPOSITORY / "scripts" / "sample.py"), run_name="__main__")
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("1girl, solo --n lowres --w 64 --h 64 --d 5 --s 2", "--n, --w, --h, --d, --s"),
        ("1girl --l 7.5", "--l"),
        ("1girl --ar 2:3", "--ar"),  # of another program
        ("--cn a.png", "--cn"),
    ],
)
def test_options_in_a_prompt_are_refused(
    sample: Callable[..., tuple[int, str, str]], prompt: str, options: str
) -> None:
    code, out, err = sample("--prompt", "sea", f"--prompt={prompt}")
    assert (code, out) == (2, "") and f"words: {options}. Take them out" in err
    assert ("--n is --negative here" in err) == ("--n " in prompt)


def test_dashes_that_are_no_option() -> None:
    assert check_prompts(["1girl, t-shirt, --, a--b, -- x, 6+girls, :3, (:3), fate (series), [ ]"], "", "x", {}) is None


@pytest.mark.parametrize(
    "part",
    ["(smile:1.3)", "(long hair:.9)", "((solo))", "[cat:dog:0.5]", "[cat|dog]", "<lora:style:0.8>", "<lyco:x>",
     "embedding:easynegative", "BREAK", "AND", "{red|blue}", "__colour__", "\\("],
)  # fmt: skip
def test_other_programs_syntax_is_named_once_and_drawn_as_text(part: str) -> None:
    for prompts, negative in (([f"1girl, {part} sea", f"{part}"], "bad"), (["1girl"], f"x {part}")):
        note = check_prompts(prompts, negative, "prompts", OF_COMMAND)
        assert note == f"prompts: plain text here as in the captions, not a command: {part}"


def test_many_parts_are_one_short_note() -> None:
    note = check_prompts([f"(a{number}:1.1)" for number in range(20)], "", "prompts", OF_COMMAND)
    assert note is not None and note.endswith("(a7:1.1) and 12 more") and "\n" not in note


def test_the_note_of_a_drawing(sample: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = sample("--prompt", "1girl, (smile:1.3) BREAK sea")
    assert code == 0 and "(smile:1.3)  BREAK" in err
    assert [taken.prompt for taken in read_samples(tmp_path / "out")] == ["1girl, (smile:1.3) BREAK sea"]


def test_a_negative_prompt_at_guidance_1(sample: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = sample("--prompt", "sea", "--guidance", "1", "--negative", "bad")
    assert code == 2 and "--negative has no effect at --guidance 1" in err
    assert sample("--prompt", "sea", "--guidance", "1")[0] == 0
    (taken,) = read_samples(tmp_path / "out")
    assert taken.negative_prompt == ""  # what had no effect is not told of the image


def test_a_random_seed_is_printed(sample: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = sample("--prompt", "a", "b", "--seed", "-1")
    assert code == 0
    seed = int(out.splitlines()[0].removeprefix("random seed of the first image: "))
    assert [taken.settings["seed"] for taken in read_samples(tmp_path / "out")] == [seed, seed + 1]
    code, _, err = sample("--prompt", "a", "--seed", "-2")
    assert code == 2 and "--seed -2: a whole number from 0 on, or -1" in err


def test_a_configs_samples(make_config: Callable[..., Config], notes: Callable[[], str]) -> None:
    def open_with(*words: str) -> str:
        config = make_config("sampling.every_steps=1", *words)
        open_inputs(config, build_accelerator(config))
        return notes()

    assert "sampling.prompts: plain text here" in open_with("sampling.prompts=['(sea:1.2)']")
    assert open_with("sampling.prompts=[sea]") == ""
    with pytest.raises(UserError, match=r"sampling\.prompts: 'sea --d 1' holds .* --d is run\.seed here"):
        open_with("sampling.prompts=['sea --d 1']")
    with pytest.raises(UserError, match=r"sampling\.negative_prompt has no effect"):
        open_with("sampling.prompts=[sea]", "sampling.guidance_scale=1", "sampling.negative_prompt=bad")
    for negative in ("", NEGATIVE_PROMPT):
        assert check_config_prompts(SamplingConfig(guidance_scale=1, negative_prompt=negative)) is None

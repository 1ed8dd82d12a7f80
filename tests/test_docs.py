"""The examples of README and docs: links lead somewhere, commands and configs load, and, in the slow test, they run."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.captions import compose_caption
from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import CaptionsConfig, PublishConfig
from trainer.data.post import ImagePlace, read_post
from trainer.data.template import ready_rules

PAGES = sorted(
    [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "demo/README.md")] + [*REPOSITORY.glob("docs/*.md")]
)
GUIDES = [REPOSITORY / "README.md", *(REPOSITORY / f"docs/{name}.md" for name in (
    "data", "captions", "training", "machines", "publishing"))]  # fmt: skip
LAUNCHERS = ("make", "python", "accelerate")


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash", "sh") for line in block.splitlines() if line.strip()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub makes it: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target) or f'<a id="{anchor}">' in target.read_text(), link


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1000


def test_every_guide_is_named_in_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert [name_of(page) for page in PAGES if page.parent.name == "docs" and name_of(page) not in readme] == [
        "docs/traps.md"  # the design's
    ]


@pytest.fixture
def my_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that commands name, and the repository's beside them."""
    for name in ("configs", "scripts", "train.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("my", "my2"):
        text = f"extends: configs/stage1_feature_alignment.yaml\nrun: {{name: {name}}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_name_what_exists(page: Path, my_files: Path) -> None:
    found = commands(page)
    assert found or name_of(page) == "docs/captions.md"
    for command in found:
        assert command[0] in (*LAUNCHERS, "."), command
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
        script = next((word for word in command if word.endswith(".py")), None)
        if script is None:
            continue
        source = (REPOSITORY / script).read_text() + (REPOSITORY / "trainer/config/command_line.py").read_text()
        after = command[command.index(script) + 1 :]
        assert [word for word in after if word.startswith("--") and f'"{word}"' not in source] == []
        words = [word for word in after if "=" in word and " " not in word]
        if files := [word for word in after if word.endswith(".yaml") and script != "scripts/new_run.py"]:
            load_config(files, words)
        else:
            known = {field.name for field in dataclasses.fields(PublishConfig)}
            assert {word.partition("=")[0].removeprefix("publish.") for word in words} <= known


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_configs_load(page: Path, my_files: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        file = my_files / f"example{number}.yaml"
        extends = "" if "extends" in yaml.safe_load(block) else "extends: configs/stage1_feature_alignment.yaml\n"
        file.write_text(extends + block)
        load_config([file])


def test_the_example_post_is_read() -> None:
    data = REPOSITORY / "docs/data.md"
    post = read_post(json.loads(blocks(data, "json")[0]), source="docs", image=ImagePlace(Path("1.png")))
    record = {name: getattr(post, name) for name in ("caption", "rating", "score", "year")} | {"extra": None}
    record |= {f"tags_{kind}": getattr(post, f"tags_{kind}")
               for kind in ("general", "character", "copyright", "artist", "meta")}  # fmt: skip
    caption = compose_caption(record, ready_rules(CaptionsConfig()))
    assert f"\n{caption}\n" in (REPOSITORY / "docs/captions.md").read_text()


@pytest.mark.slow
def test_the_readmes_commands_run(tiny_base: Path, tmp_path: Path) -> None:
    """The commands for one's own images, in their order, on twelve drawings with captions and the tiny model."""
    for name in ("configs", "scripts", "train.py", "demo"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    posts = [json.loads(line) for line in (REPOSITORY / "demo/posts.jsonl").read_text().splitlines()]
    for folder, chosen in (("pictures", posts[:12]), ("best", posts[12:20])):
        (tmp_path / folder).mkdir()
        for post in chosen:
            shutil.copy(REPOSITORY / "demo/images" / post["file"], tmp_path / folder)
            caption = post["tag_string_general"].replace(" ", ", ")
            (tmp_path / folder / post["file"]).with_suffix(".txt").write_text(caption)
    steps = [command for command in commands(REPOSITORY / "README.md") if any(word.endswith(".py") for word in command)]
    scripts = [Path(next(word for word in command if word.endswith(".py"))).stem for command in steps]
    assert scripts == [
        "new_run", "build_shards", "inspect_shards", "train", "export", "sample", "publish", "new_run",
    ]  # fmt: skip
    for command in steps:
        words = command[next(i for i, word in enumerate(command) if word.endswith(".py")) :]
        words = [str(tiny_base) if word == "sdxl.safetensors" else word for word in words]
        words += {"scripts/sample.py": ["--steps", "1", "--size", "128x128"], "train.py": ["schedule.max_steps=2"]}.get(
            words[0], []
        )
        words += ["schedule.epochs=null"] if words[0] == "train.py" else []
        run = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        if words[0] == "scripts/publish.py":  # the licence's text is not part of the repository
            assert run.returncode == 2 and "faipl-1.0-sd.md" in run.stderr
            continue
        assert run.returncode == 0, f"{' '.join(words)}\n{run.stderr[-3000:]}"
    assert (tmp_path / "my2.yaml").exists()
    assert list((tmp_path / "runs/my/export").glob("my-step-00000002-*.safetensors"))


def test_each_promise_names_the_modules_that_try_to_break_it() -> None:
    rows = re.findall(
        r"^\| (P\d+) \|[^|]*\*[^|]*\| ([\w, ]+) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE
    )
    assert [name for name, _ in rows] == [f"P{number}" for number in range(1, 13)]
    named = {module: name for name, modules in rows for module in modules.split(", ")}
    folder = REPOSITORY / "tests/promises"
    assert named.keys() == {path.stem for path in folder.glob("test_*.py")}
    for module, name in named.items():
        assert re.match(rf'"""{name}[.:,]', (folder / f"{module}.py").read_text()), module

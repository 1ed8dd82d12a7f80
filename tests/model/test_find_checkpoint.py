"""A checkpoint is found by whatever somebody calls it; what is none is told what it is, and which ones there are."""

from pathlib import Path

import pytest

from trainer.core.errors import UserError
from trainer.model.checkpoint import OLD_FILES, find_checkpoint
from trainer.release.export import find_run_checkpoint
from trainer.release.request import read_publish_config

STEPS = ("step-00000100", "step-00000400", "step-00001000")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with three checkpoints and what else may lie there, named from the folder above."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/a")
    for name in STEPS[:2]:  # of version 0.2.0
        for file in (*OLD_FILES, "train_state.json"):
            write(folder / "checkpoints" / name / file)
    for file in ("model-00001.safetensors", "optimizer-00001.safetensors", "checkpoint.json"):
        write(folder / "checkpoints" / STEPS[2] / file)
    write(folder / "checkpoints/step-00002000/model-00001.safetensors")  # its record was lost
    write(folder / "checkpoints/old-step-00003000/train_state.json")  # was set aside
    write(folder / "run.json")
    write(folder / "config.yaml")
    write(folder / "export/a-step-00000400-fp16/model_index.json")
    write(folder / "export/a-step-00000400-fp16.safetensors")
    return folder


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


@pytest.mark.parametrize(
    ("reference", "step"),
    [
        ("runs/a", STEPS[2]), ("runs/a/", STEPS[2]), ("runs/a/checkpoints", STEPS[2]), ("runs/a/latest", STEPS[2]),
        ("runs/a/checkpoints/latest", STEPS[2]), ("runs/a/checkpoints/step-00000400", STEPS[1]),
        ("runs/a/checkpoints/step-00000400/model.safetensors", STEPS[1]), ("runs/a/step-00000400", STEPS[1]),
        ("runs/a/checkpoints/step-00001000/optimizer-00001.safetensors", STEPS[2]),
        ("runs/a/checkpoints/step-00001000/checkpoint.json", STEPS[2]),
        ("runs/a/400", STEPS[1]), ("runs/a/checkpoints/100", STEPS[0]), ("runs/a/step-400", STEPS[1]),
    ],
)  # fmt: skip
def test_what_names_a_checkpoint(run: Path, reference: str, step: str) -> None:
    assert find_checkpoint(reference) == run / "checkpoints" / step
    assert find_checkpoint(Path(reference).resolve(), Path("runs/b")) == (run / "checkpoints" / step).resolve()
    assert find_run_checkpoint(Path(reference)) == (run / "checkpoints" / step, run)


@pytest.mark.parametrize(
    ("word", "step"), [("latest", 2), ("newest", 2), ("step-00000400", 1), ("400", 1), ("step-100", 0), ("0100", 0)]
)
def test_a_word_alone_is_about_the_run_at_hand(
    run: Path, monkeypatch: pytest.MonkeyPatch, word: str, step: int
) -> None:
    assert find_checkpoint(word, run) == run / "checkpoints" / STEPS[step]
    monkeypatch.chdir(run)
    assert find_checkpoint(word) == Path("checkpoints") / STEPS[step]
    monkeypatch.chdir("checkpoints")
    assert find_run_checkpoint(Path(STEPS[1])) == (Path.cwd() / STEPS[1], Path.cwd().parent)


@pytest.mark.parametrize(
    ("reference", "what"),
    [
        ("runs/a/checkpoints/step-00002000", "is not a complete checkpoint: checkpoint.json is missing"),
        ("runs/a/step-00000500", "names neither a checkpoint nor a run"),
        ("runs/a/checkpoints/500", "names neither a checkpoint nor a run"),
        ("runs/a/export/a-step-00000400-fp16", "is a model in diffusers' folders, not a checkpoint"),
        ("runs/a/export/a-step-00000400-fp16.safetensors", "is a file, not a checkpoint"),
        ("runs/a/samples", "names neither a checkpoint nor a run"),
    ],
)
def test_what_is_none_is_told_what_it_is_and_which_there_are(run: Path, reference: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        find_checkpoint(reference)
    assert str(caught.value) == f"{reference} {what}. There are, in runs/a/checkpoints: {', '.join(STEPS)}"


@pytest.mark.parametrize(
    ("reference", "what"),
    [("latest", "names neither a checkpoint nor a run"), ("runs", "is neither a checkpoint nor a run"),
     ("runs/b", "has no complete checkpoint"), ("runs/c", "names neither a checkpoint nor a run")],
)  # fmt: skip
def test_runs_that_have_some_are_told(run: Path, reference: str, what: str) -> None:
    write(Path("runs/b/config.yaml"))
    with pytest.raises(UserError) as caught:
        find_checkpoint(reference, Path("runs/b"))
    assert str(caught.value) == f"{reference} {what}. Runs with checkpoints are: runs/a"


def test_where_there_is_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is none; a run's lie in its checkpoints/step-XXXXXXXX"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "inside", ["checkpoints/step-00000400", "checkpoints", "export/a-step-00000400-fp16", "latest"]
)
def test_publishing_asks_for_the_run_that_was_meant(run: Path, inside: str) -> None:
    with pytest.raises(UserError, match=r"is not a run: .* a run's newest step: name runs/a$"):
        read_publish_config(run / inside, [])
    with pytest.raises(UserError, match=r"Runs are: runs/a$"):
        read_publish_config(Path("latest"), [])

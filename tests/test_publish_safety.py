"""What other people's lineages, damaged exports and foreign samples could do to a publication; all of it is refused."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_publish import SOURCE, change, parts, request_of, run, stages, stand_in

from trainer.errors import UserError
from trainer.export import export
from trainer.lineage import complete_lineage, shorten_paths
from trainer.publish import Request, publish

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures

BASE = {"reference": "a/b", "revision": None, "sha256": "ab", "lineage": None}


def change_lineage(folder: Path, **fields: object) -> None:
    """Other words in the lineage of the first stage, which came with somebody else's file."""
    state = folder / "checkpoints/step-00000030/train_state.json"
    said = json.loads(state.read_text())
    said["lineage"]["base"]["lineage"].update(fields)
    state.write_text(json.dumps(said))


@pytest.mark.parametrize("name", ["x/../../../../../victim/config", "..", ".x", "a b", "", 7, "x\n"])
def test_a_foreign_runs_name_writes_nowhere_else(run: Path, request_of: Request, name: object) -> None:
    change_lineage(run, run=name)
    before = sorted(run.parent.rglob("*"))
    with pytest.raises(UserError, match=r"the lineage names a run .* which can name no file"):
        publish(request_of, [SOURCE])
    assert sorted(run.parent.rglob("*")) == before


def test_a_foreign_lineage_may_lack_what_is_only_told(run: Path, request_of: Request) -> None:
    lacking = dict.fromkeys(
        ("hours", "started_at", "hardware", "images", "step", "samples_seen", "code", "stage", "written_at",
         "index_fingerprint")
    )  # fmt: skip
    change_lineage(run, **lacking)
    folder, _ = publish(request_of, [SOURCE])
    card = (folder / "README.md").read_text()
    assert "None" not in card.split("## Training")[0] and "| hours (wall clock) | not recorded | 1.5 |" in card
    assert "not recorded optimizer steps" in (folder / "CHANGES.md").read_text()


@pytest.mark.parametrize(
    ("lineage", "part"),
    [
        ({"run": "a", "base": BASE}, "has no config"),
        ({"run": "a", "config": {"optim": 1}, "base": BASE}, "has no config"),
        ({"run": "a", "config": {}}, "does not say which base"),
        ({"run": "a", "config": {}, "base": {"reference": "x"}}, "does not say which base"),
        ({"run": "a", "config": {}, "base": BASE | {"lineage": {"run": "../b"}}}, "names a run '../b'"),
    ],
)
def test_a_lineage_must_lead_to_a_base(lineage: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        complete_lineage(lineage)


@pytest.mark.parametrize(
    "text",
    [r"\o/, fate/stay night, 1girl, blue/red", "~hatsune miku, fate/stay night", "/day/night/x", "/home/someone/x"],
)
def test_prompts_and_tags_are_no_paths(text: str) -> None:
    kept = {
        "sampling": {"prompts": [text], "negative_prompt": text}, "captions": {"people": [text]},
        "filters": {"required_tags": [text]}, "publish": {"title": text, "author": text}, "run": {"stage": text},
    }  # fmt: skip
    assert shorten_paths(kept) == kept


# --- damaged exports


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    "file",
    ["stage2-step-00000030-fp16.safetensors", "unet/diffusion_pytorch_model.safetensors",
     "text_encoder_2/model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
)  # fmt: skip
def test_damaged_weights_are_not_published(
    run: Path, request_of: Request, file: str, checkpoint: bool, damage: object
) -> None:
    _, diffusers = export(run)
    damage((diffusers if "/" in file else diffusers.parent) / file)  # type: ignore[operator]
    if not checkpoint:
        shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"damaged|not a readable") as caught:
        publish(request_of, [SOURCE])
    assert ("cannot be made anew" in str(caught.value)) == (not checkpoint) or damage is truncate
    assert not list((run / "published").glob("*"))


def test_a_folder_alone_is_compared_with_the_checkpoint(run: Path, request_of: Request) -> None:
    words = [SOURCE, "publish.formats=[diffusers]"]
    file, diffusers = export(run)
    file.unlink()
    folder, _ = publish(request_of, words)
    weights = diffusers / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"unet is damaged: .* is not what was exported; move that export away"):
        publish(change(request_of, out=folder.parent / "b"), words)


def test_without_a_checkpoint_a_title_cannot_be_changed(run: Path, request_of: Request) -> None:
    export(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="gone, so that its title cannot be changed any more"):
        publish(request_of, [SOURCE, "publish.title=Mine"])

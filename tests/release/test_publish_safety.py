"""What other people's lineages, damaged exports and foreign samples could do to a publication; all of it is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import change_record
from support.published_run import SOURCE, change, parts, request_of, run, stages, stand_in, write_png
from trainer.core.errors import UserError
from trainer.model.base import Base, find_base, hash_base
from trainer.model.checkpoint import read_train_state
from trainer.model.lineage import shorten_paths
from trainer.model.weights_file import LazyFile
from trainer.release.artefacts import write_tokenizer
from trainer.release.export import export
from trainer.release.folder import check_fit
from trainer.release.licence import Terms, find_base_refusals, find_terms, read_terms
from trainer.release.publish import Request, check_lineage, choose_weights, publish
from trainer.release.request import read_publish_config
from trainer.sample.drawing import default_folder

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures

BASE = {"reference": "a/b", "revision": None, "sha256": "ab", "lineage": None}


def change_lineage(folder: Path, **fields: object) -> None:
    """Other words in the lineage of the first stage, which came with somebody else's file."""
    checkpoint = folder / "checkpoints/step-00000030"
    lineage = read_train_state(checkpoint)["lineage"]
    lineage["base"]["lineage"].update(fields)
    change_record(checkpoint, lineage=lineage)


def test_a_base_that_is_given_in_vain_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    first = {"reference": "someone/first", "revision": None, "sha256": "0" * 64, "lineage": None}
    near = {"reference": str(base), "revision": None, "sha256": hash_base(find_base(str(base)))}
    lineage = {"base": near | {"lineage": {"run": "x", "base": first}}}
    assert find_terms(lineage, [], None).name == "openrail++"
    with pytest.raises(UserError, match="--base has no effect"):
        find_terms(lineage, [], "someone/else")


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
    assert "None" not in card.split("## Training")[0]
    assert "| hours (wall clock) | not recorded |" in card and "| hours (wall clock) | 1.5 |" in card
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
        check_lineage(lineage)


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


# --- what no stranger should see

PRIVATE = [
    ("a token", "a token hf_" + "A1" * 15), ("a token", "ghp_" + "b2" * 18), ("a token", "sk-proj-" + "c" * 24),
    ("a token", "AKIA" + "ABCD" * 4), ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ("a password or key", "api_key: 0123456789abcdef0123"), ("a password or key", "WANDB_API_KEY=0123456789abcdef0123"),
    ("a password or key", '"token": "0123456789abcdef01"'), ("a name and password", "https://me:pass@example.org/x"),
    ("an absolute path", "see /home/someone/models/x"), ("an absolute path", "images: /data/anime"),
    ("an absolute path", "'/mnt/a/b.txt'"), ("an absolute path", "~/models/x"), ("an absolute path", "file:///x"),
    ("a token", "npm_" + "a1" * 18), ("a token", "r8_" + "a1" * 18), ("a token", "sk_live_" + "a1" * 10),
    ("a token", "ya29." + "a1" * 18), ("a token", "api_org_" + "a1" * 15), ("a token", "Bearer " + "a1" * 12),
    ("a token", "my_hf_" + "a1" * 15), ("an absolute path", "C:\\\\Users\\\\someone\\\\m"),
    ("an absolute path", "C:/Users/someone/models"), ("an absolute path", "model:/home/someone/x/y"),
    ("an absolute path", ">/home/someone/x"), ("an absolute path", "**/home/someone/x**"),
    ("an absolute path", "//home/someone/x"), ("an absolute path", "/alpha/beta/gamma"),
    ("an absolute path", "https://example.org/a /home/someone/x"),
    ("an absolute path", "C:\\Users\\someone"), ("an absolute path", "\\\\server\\share"),
]  # fmt: skip
HARMLESS = [
    "https://example.org/a/b/c", "1girl/1boy", "and/or", "owner/name", "keep_tokens_separator: '|||'", "^_^ o/ \\o/",
    "max_token_length: 225", "${run.output_dir}/stage1/export", "[LICENSE.md](LICENSE.md)", "0123456789abcdef" * 4,
    "1girl, /o/, smile", "/day/night", "/a/", "x:\\d", "/s/ name", "secret: masterpiece_best_quality",
    "token: stage1_feature_alignment", "https://people.example.org/~me/model/", "https://example.org/#/models/12",
    "https://example.org/?d=/a/b", "https://example.org/?d=/mnt/x/y", "\\(fate\\)", "~hatsune miku, fate/stay night",
    "bos_token: <|startoftext|>", "masterpiece, best quality", "a ~ b", "10:30", "runs/x/export/y", "`configs/`",
]  # fmt: skip


@pytest.mark.parametrize(("what", "text"), PRIVATE)
def test_secrets_and_paths_are_found_in_every_kind_of_file(tmp_path: Path, what: str, text: str) -> None:
    (tmp_path / "CHANGES.md").write_text(f"first line\n{text}\n")
    (tmp_path / "lineage.json").write_text(json.dumps({"a": [{"b": text}]}))
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors", {"trainer.recipe": json.dumps({"c": {"d": text}})})
    with pytest.raises(UserError) as caught:
        check_fit(tmp_path, ["m.safetensors"])
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith(f"  {what}")]  # told once
    assert line.endswith("in CHANGES.md line 2, lineage.json a.0.b, m.safetensors trainer.recipe.c.d")
    if what != "an absolute path":
        assert text not in str(caught.value)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_are_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "CHANGES.md").write_text(f"{text}\n")
    (tmp_path / "lineage.json").write_text(json.dumps({"a": text}))
    check_fit(tmp_path, ["m.safetensors"])


def test_keys_and_tensor_names_are_read_too(tmp_path: Path) -> None:
    path = "/home/someone/x"
    (tmp_path / "lineage.json").write_text(json.dumps({"a": {path: 1}}))
    save_file({path: torch.zeros(1)}, tmp_path / "m.safetensors", {f"{path}/2": "x"})
    with pytest.raises(UserError) as caught:
        check_fit(tmp_path, ["m.safetensors"])
    for place in ("lineage.json a, a key", "m.safetensors tensor names", f"m.safetensors {path}/2"):
        assert place in str(caught.value)


@pytest.mark.parametrize("title", ["[Beta] Anime XL", "{x", "1girl, /o/, smile"])
def test_titles_may_look_like_something_else(request_of: Request, title: str) -> None:
    folder, _ = publish(request_of, [SOURCE, f"publish.title='{title}'"])
    (single,) = folder.glob("*.safetensors")
    assert LazyFile(single).metadata["modelspec.title"] == title


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
    with pytest.raises(
        UserError, match=r"holds a damaged export: |the lineage of .*fp16\.safetensors cannot be read"
    ) as caught:
        publish(request_of, [SOURCE])
    if "lineage" not in str(caught.value):  # which is read first where only a truncated single file could say it
        assert f"{file} is not what was exported" in str(caught.value)
        assert ("cannot be built again" in str(caught.value)) == (not checkpoint)
    assert not list((run / "published").glob("*"))


def test_a_folder_alone_is_proven_by_its_sums(run: Path, request_of: Request) -> None:
    words = [SOURCE, "publish.formats=[diffusers]"]
    file, diffusers = export(run)
    file.unlink()
    folder, _ = publish(request_of, words)
    weights = diffusers / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.safetensors is not what was exported; move"):
        publish(change(request_of, out=folder.parent / "b"), words)


# --- what else is refused or left out


@pytest.mark.parametrize(
    ("model", "fits"),
    [("stage2-step-00000030-fp16", True), ("stage2-step-00000020-fp16", False), ("other", False), (None, True)],
)
def test_samples_are_the_published_models(request_of: Request, tmp_path: Path, model: str | None, fits: bool) -> None:
    write_png(tmp_path / "drawn/a.png", prompt="x", settings=json.dumps({"model": model} if model else {}))
    request = change(request_of, samples=tmp_path / "drawn")
    if fits:
        assert publish(request, [SOURCE])[1].samples
    else:
        with pytest.raises(UserError, match=r"a\.png was drawn by .*, and step 30 of stage2 is published: draw it"):
            publish(request, [SOURCE])


def test_an_out_that_is_no_new_folder(request_of: Request) -> None:
    with pytest.raises(UserError, match=r"--out \. is a folder that exists"):
        publish(change(request_of, out=Path()), [SOURCE])


def test_a_blank_acknowledgement_is_none(request_of: Request) -> None:
    with pytest.raises(UserError, match="--acknowledge-base-terms is empty"):
        publish(change(request_of, acknowledged=" "), [SOURCE])


def test_a_card_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n", encoding="utf-8-sig")
    assert read_terms(tmp_path, "m").name == "cc-by-nc-4.0"
    told = find_base_refusals(Terms("m", "for non-commercial use"), "I do not care")
    assert "which forbids" in next(told)


def test_a_tokenizer_leaves_its_makers_disk_behind(tmp_path: Path, tiny_base: Path) -> None:
    source = Path(shutil.copytree(tiny_base / "tokenizer", tmp_path / "source"))
    write_tokenizer(tmp_path / "plain", source, "tokenizer")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "plain" / name, source / name)
    said = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(said | {"name_or_path": "/home/someone/x"}))
    write_tokenizer(tmp_path / "again", source, "tokenizer")
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text()) == said


def test_a_published_folder_takes_no_samples(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    source = SimpleNamespace(base=Base("m", tmp_path / "m.safetensors", None))
    with pytest.raises(UserError, match="say where with --out DIR"):
        default_folder([source])  # type: ignore[list-item]


def test_the_newest_export_is_found_by_its_whole_name(run: Path, request_of: Request) -> None:
    """A run's name may hold a step; a newer export that is not whole is refused, and no older one is taken."""
    config = read_publish_config(run, ["publish.formats=[diffusers]"])
    config = replace(config, run=replace(config.run, name="from-step-00001000"))
    _, whole = export(run)
    shutil.rmtree(run / "checkpoints")
    for step in ("00000010", "00000020"):
        shutil.copytree(whole, run / "export" / f"from-step-00001000-step-{step}-fp16")
    assert choose_weights(run, config).step == 20
    (run / "export/from-step-00001000-step-00000020-fp16/model_index.json").unlink()
    assert choose_weights(run, config).step == 20

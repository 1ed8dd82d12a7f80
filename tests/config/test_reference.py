"""Every field has a meaning, which --help-config and docs/config.md take from the schema."""

import dataclasses
import re

import pytest

from support.paths import REPOSITORY
from trainer.config.command_line import parse_command_line
from trainer.config.fixed import LENGTH_KEYS, fixed_values
from trainer.config.load import load_config
from trainer.config.reference import WIDTH, explain_config, read_comments, read_reference, write_reference
from trainer.config.schema import Config, RunConfig
from trainer.config.yaml_text import field_types
from trainer.core.errors import UserError


def test_every_section_and_field_has_a_meaning() -> None:
    sections = read_reference()
    assert [section.key for section in sections if not section.within] == list(field_types(Config))
    assert [section.key for section in sections if section.within] == [
        "data.sources", "data.subset_rules", "data.weights",
        "captions.template", "captions.mix", "captions.quality", "captions.years", "captions.columns",
    ]  # fmt: skip
    unsaid = [section.key for section in sections if not section.meaning]
    unsaid += [field.key for section in sections for field in section.fields if not field.meaning]
    assert unsaid == []


def test_the_page_is_what_the_schema_says_now() -> None:
    page = (REPOSITORY / "docs/config.md").read_text(encoding="utf-8")
    assert page == write_reference(), "run scripts/write_config_reference.py"
    links = re.findall(r"\]\(#(\w+)\)", page)
    assert links == list(field_types(Config)) and all(f"\n## {link}\n" in page for link in links)
    anchors = re.findall(r'<a id="([\w.]+)">', page)
    assert len(anchors) == len(set(anchors)) > 100 and "data.sources.kind" in anchors


def test_what_may_change_on_resume_is_said_as_it_is_checked() -> None:
    written = load_config([REPOSITORY / "configs/stage1_feature_alignment.yaml"]).written
    fixed = fixed_values(written, constant=False)
    for section in read_reference():
        for field in section.fields:
            if not section.within:
                length = "may change when the run resumes at a constant rate"
                fixed_words = length if field.key in LENGTH_KEYS else "fixed for the run"
                assert field.resume == (fixed_words if field.key in fixed else "may change when the run resumes")


def test_a_comment_belongs_to_the_field_after_or_beside_it() -> None:
    said = read_comments(
        'class A:\n    """What\n    it is."""\n\n    # of a, \n    # in two lines\n    a: int = 1  # and beside\n'
        "    b: str = f(\n        2,\n    )  # of b # too\n    c: int = 3\n\n    # of d\n    d: int = 4\n"
    )
    assert said == {
        "A": "What it is.", "A.a": "of a, in two lines and beside", "A.b": "of b # too", "A.c": "", "A.d": "of d",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("run.name", "text", ""),
        ("run.num_processes", "whole number or null", "null"),
        ("model.pretrained", "path", ""),
        ("model.vae", "path or null", "null"),
        ("data.posts", "list of path or null", "null"),
        ("data.sources", "list of sections or null", "null"),
        ("captions.keep_tokens_separator", "text", "'|||'"),
        ("captions.max_token_length", "75, 150, 225, 300, 375 or 450", "225"),
        ("captions.quality.rating", "g, s, q, e or none, or null", "null"),
        ("logging.trackers", "list of wandb or tensorboard", "[]"),
        ("optim.betas", "list of number or null", "[0.9, 0.99]"),
        ("model.train_unet", "true or false", "true"),
    ],
)
def test_types_and_defaults_in_words(key: str, kind: str, default: str) -> None:
    (field,) = (field for section in read_reference() for field in section.fields if field.key == key)
    assert (field.kind, field.default) == (kind, default)


def test_the_screen_shows_sections_fields_and_entries() -> None:
    overview = explain_config([])
    assert all(re.search(rf"^{name}: ", overview, re.MULTILINE) for name in field_types(Config))
    optim = explain_config(["optim"])
    assert optim.startswith("optim: The optimizer") and "\n  optim.max_grad_norm\n" in optim and "schedule" not in optim
    assert "data.sources.strip_prefix" in explain_config(["data"])
    assert "\n  data.sources.kind\n" in explain_config(["data.sources"])
    assert explain_config(["optim.betas"]).startswith("  optim.betas\n      of AdamW's")
    assert explain_config(["every_steps"]).count("\n  ") > 3  # of three sections
    everything = explain_config(list(field_types(Config)))
    assert max(map(len, everything.splitlines())) <= WIDTH
    for item in dataclasses.fields(RunConfig):
        assert f"\n  run.{item.name}\n" in everything


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("optm", ", did you mean optim?"),
        ("optim.unet_rate", ", did you mean optim.unet_lr?"),
        ("unet.lr", ", here it is optim.unet_lr, optim.text_encoder_1_lr and optim.text_encoder_2_lr (one for each"),
        ("optim.epochs", ", did you mean schedule.epochs?"),
        ("cache_latents", ": latents are always made before"),
        ("zzz", ""),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as caught:
        explain_config([name])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"--help-config {name}: no section or field is called so{near}")
    assert second.startswith("  sections are: run, model")


def test_it_needs_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help-config"], ["my.yaml", "x=1", "--help-config", "optim"], ["--help-config=run.seed"]):
        with pytest.raises(SystemExit) as caught:
            parse_command_line("test", words)
        assert caught.value.code == 0 and capsys.readouterr().out

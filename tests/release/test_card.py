"""The model card says what the config, the lineage and the records say, in the Hub's words, and nothing else."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markupsafe import Markup

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.core.errors import UserError
from trainer.model.lineage import Lineage
from trainer.model.lineage_rows import complete_stage
from trainer.release.card import Release, cell, describe_release, describe_use, write_card, write_changes
from trainer.release.licence import FAIPL, OPENRAIL, Terms
from trainer.sample.pictures import Sample

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_stage(place: int, name: str, base: dict[str, Any], step: int, images: int, **work: Any) -> Lineage:
    config = load_config([REPOSITORY / f"configs/{name}.yaml"])
    lineage = {
        "run": config.run.name, "stage": config.run.stage, "step": step, "images": images, "base": base,
        "samples_seen": step * config.data.global_batch_size, "index_fingerprint": f"fingerprint{place}",
        "written_at": "2024-01-10T00:00:00+00:00", "config": config.written,
        "code": {"version": "0.2.0", "commit": COMMIT, "dirty": place == 2}, **work,
    }  # fmt: skip
    return complete_stage(lineage)


def make_release(*words: str, **changes: Any) -> Release:
    first = {"reference": "Linaqruf/animagine-xl-2.0", "revision": "c0ffee", "sha256": "ab", "lineage": None}
    stage1 = make_stage(1, "stage1_feature_alignment", first, 132_499, 1_271_990, hours=504.0, hardware=["2 x A100"])
    second = {"reference": "export/stage1", "revision": None, "sha256": "cd", "lineage": stage1}
    stage2 = make_stage(2, "stage2_refine_unet", second, 521, 2_500)
    source = "publish.source_url=https://example.org/source"
    config = load_config([REPOSITORY / "configs/stage2_refine_unet.yaml"], [source, *words])
    release = Release(
        config=config, stages=[stage1, stage2], terms=Terms("Linaqruf/animagine-xl-2.0", OPENRAIL),
        license_files={"LICENSE.md": "FAIPL", "LICENSE-base.md": "Open RAIL"}, acknowledged=None, samples=[],
        base_id=None, weights="stage2_refine_unet.safetensors", full_precision=None,
    )  # fmt: skip
    return dataclasses.replace(release, **changes)


SAMPLES = [
    Sample(Path("a.png"), "1girl, |||, <b>", "lowres", {"steps": 28, "seed": 1}),
    Sample(Path("b.png"), "line\nbreak: 'quotes' \"too\"", "", {}),
]


def section(card: str, title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [part.strip() for part in line[1:]] for line in lines}


def test_the_hub_reads_the_header() -> None:
    card = ModelCard(write_card(make_release(samples=SAMPLES)))
    data = card.data.to_dict()
    assert data["license"] == "other" and data["license_name"] == FAIPL and data["license_link"] == "LICENSE.md"
    assert data["base_model"] == "Linaqruf/animagine-xl-2.0" and data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-to-image" and data["library_name"] == "diffusers"
    assert {"text-to-image", "stable-diffusion-xl"} <= set(data["tags"])
    assert [entry["output"]["url"] for entry in data["widget"]] == ["samples/a.png", "samples/b.png"]
    assert [entry["text"] for entry in data["widget"]] == [sample.prompt for sample in SAMPLES]
    assert "base_model: " in str(card) and not card.text.lstrip().startswith("---")


def test_knobs_of_the_header() -> None:
    card = write_card(make_release("publish.license_link=https://example.org/licence", "publish.title='My: model'",
                                   "publish.author=A. N. Other", "publish.repo_id=owner/name"))  # fmt: skip
    assert ModelCard(card).data.to_dict()["license_link"] == "https://example.org/licence"
    assert "\n# My: model\n" in card and "**Developed by**: A. N. Other" in card
    assert "from_pretrained(name, torch_dtype=torch.float16)" in card
    plain = [
        "publish.license_link=https://example.org/licence",
        "publish.title='My: model'",
        "publish.author=A. N. Other",
    ]
    assert write_card(make_release(*plain)) == card  # a folder built before its repository had a name can be uploaded
    assert "torch.bfloat16" in write_card(make_release("publish.dtype=bf16"))
    assert "from_pretrained" not in write_card(make_release("publish.formats=[single_file]"))


def test_a_base_that_the_hub_does_not_know_is_not_named_in_the_header() -> None:
    release = make_release()
    release.stages[0]["base"]["revision"] = None
    data = ModelCard(write_card(release)).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data and "widget" not in data
    assert "Linaqruf/animagine-xl-2.0, SHA-256 `ab`" in write_card(release)
    named = dataclasses.replace(release, base_id="owner/base")  # and checked by its hash
    assert ModelCard(write_card(named)).data.to_dict()["base_model"] == "owner/base"


def test_tables_of_tags_are_the_rules() -> None:
    tags = rows(section(write_card(make_release()), "Special tags"))
    assert tags["masterpiece"] == ["151 and above"] and tags["best quality"] == ["100 to 150"]
    assert tags["low quality"] == ["-5 to -1"] and tags["worst quality"] == ["below -5"]
    assert tags["questionable"] == ["rating: questionable, nsfw"]
    assert tags["newest"] == ["2022 to 2023"] and len(tags) == 7 + 4 + 5 + 3 + 1  # heads, and one row of dashes
    own = ["captions.quality=[{tag: fine, min_score: 10}, {tag: plain}]", "captions.years=[]", "captions.ratings={}"]
    tags = rows(section(write_card(make_release(*own)), "Special tags"))
    assert tags["fine"] == ["10 and above"] and tags["plain"] == ["below 10"] and len(tags) == 4
    assert "|" not in section(write_card(make_release("captions.quality=[]", *own[1:])), "Special tags")


def test_tables_of_tags_by_percentile_rating_and_column() -> None:
    release = make_release()
    other = load_config([REPOSITORY / f"configs/{name}.yaml" for name in ("stage2_refine_unet", "captions_3_1")])
    tags = rows(section(write_card(dataclasses.replace(release, config=other)), "Special tags"))
    assert tags["masterpiece"] == ["above that of 95% of the posts of its rating"]
    assert tags["best quality"] == ["above that of 85%, up to 95% of the posts of its rating"]
    assert tags["worst quality"] == ["up to 10% of the posts of its rating"]
    assert tags["very aesthetic"] == ["aesthetic_score", "above 0.71"]
    assert tags["very displeasing"] == ["aesthetic_score", "the rest"]
    assert tags["explicit"] == ["explicit, nsfw"] and tags["recent"] == ["2018 to 2020"]
    rules = "{tag: fine, min_score: 5, rating: g}, {tag: poor, rating: none}, {tag: good, min_score: 9}"
    tags = rows(section(write_card(make_release(f"captions.quality=[{rules}]")), "Special tags"))
    assert tags["fine"] == ["5 and above", "general"] and tags["poor"] == ["all", "none"]
    assert tags["good"] == ["9 and above", "all"]


def test_prompts_are_shown_as_they_are_and_only_tags_that_there_are() -> None:
    sample = Sample(Path("a.png"), "saber \\(fate\\), ^_^, *x*, a\\|b", "[x]", {})
    card = write_card(make_release("captions.years=[]", samples=[sample]))
    assert r"saber \\(fate\\), ^\_^, \*x\*, a\\\|b" in section(card, "Samples") and r"\[x\]" in section(card, "Samples")
    prompt = "\nmasterpiece, best quality, 1girl, character, series, everything else, rating: general\n"
    assert prompt in section(card, "Prompts")
    bare = section(write_card(make_release("captions.ratings={}", "captions.quality=[]")), "Prompts")
    assert "\n1girl, character, series, everything else, year tag\n" in bare and "careful" not in bare


def test_the_caution_about_quality_tags_is_in_the_captions_own_tags() -> None:
    said = section(write_card(make_release()), "Prompts")
    assert "careful with `masterpiece`, `best quality`" in said
    assert "Put `rating: general` into the prompt, and `nsfw`, `rating: sensitive` into the negative prompt." in said
    files = [REPOSITORY / f"configs/{name}.yaml" for name in ("stage2_refine_unet", "captions_3_1")]
    said = section(write_card(dataclasses.replace(make_release(), config=load_config(files))), "Prompts")
    assert "Put `safe` into the prompt, and `nsfw`, `sensitive` into the negative prompt." in said
    said = section(write_card(make_release("captions.ratings={q: nsfw, e: nsfw}")), "Prompts")
    assert "Put `nsfw` into the negative prompt." in said


def test_settings_and_sizes_are_the_configs() -> None:
    card = write_card(make_release("sampling.guidance_scale=5.5", "sampling.num_inference_steps=20"))
    settings = rows(section(card, "Recommended settings"))
    assert settings["steps"] == ["20"] and settings["guidance scale"] == ["5.5"]
    assert "lowres" in settings["negative prompt"][0] and "up to 225" in settings["tokens"][0]
    sizes = section(card, "Sizes")
    assert len(re.findall(r"\d+ x \d+", sizes)) == 33 + 1 and "832 x 1216" in sizes and "1536 x 640" in sizes


def test_training_is_told_stage_by_stage() -> None:
    table = rows(section(write_card(make_release()), "Training"))
    assert table["images"] == ["1,271,990", "2,500"] and table["optimizer steps"] == ["132,499", "521"]
    assert table["samples per step"] == ["96", "48"]
    assert table["epochs (samples seen / images)"] == ["10.00", "10.00"]
    assert table["learning rates"] == ["7.5e-6, 3.75e-6, 3.75e-6", "2e-6"]
    assert table["trained"] == ["UNet, text encoder 1, text encoder 2", "UNet"]
    assert table["noise offset"] == ["none", "0.0357"]
    assert table["hardware"] == ["2 x A100", "not recorded"] and table["hours (wall clock)"] == ["504", "not recorded"]
    assert table["index fingerprint"] == ["`fingerprint1`", "`fingerprint2`"]
    assert table["code"][1] == f"0.2.0, commit `{COMMIT}` with changes that were not committed"
    assert table["optimizer"][0] == "adamw, betas [0.9, 0.99], weight decay 0.1" and table["gradient norm"][0] == "1.0"
    release = make_release()
    original = {"name": "adafactor", "betas": None, "weight_decay": 0.0, "max_grad_norm": None}
    release.stages[0]["config"]["optim"] |= original
    table = rows(section(write_card(release), "Training"))
    assert table["optimizer"][0] == "adafactor, weight decay 0.0" and table["gradient norm"][0] == "not clipped"


def test_an_interpolation_stays_one_and_an_older_run_lacks_fields() -> None:
    release = make_release()
    release.stages[1]["config"]["optim"]["unet_lr"] = "${oc.env:SECRET_RATE}"
    del release.stages[1]["config"]["diffusion"]["min_snr_gamma"]
    table = rows(section(write_card(release), "Training"))
    assert table["learning rates"][1] == "${oc.env:SECRET_RATE}" and table["min-SNR gamma"][1] == "off"


def test_samples_are_told_with_their_settings() -> None:
    card = write_card(make_release(samples=SAMPLES))
    table = rows(section(card, "Samples"))
    assert table["![a](samples/a.png)"] == ["1girl, \\|\\|\\|, &lt;b>", "lowres", "steps 28, seed 1"]
    assert table["![b](samples/b.png)"][0] == "line break: 'quotes' \"too\""
    assert "## Samples" not in write_card(make_release())


def test_the_licence_in_plain_words() -> None:
    words = section(write_card(make_release()), "License")
    for part in ("not legal advice", "corresponding source", "not the data", "over a network", "30 days", "Eleven uses",
                 "the model draws is not covered", "Attachment A", "[LICENSE-base.md](LICENSE-base.md)"):  # fmt: skip
        assert part in words
    other = section(write_card(make_release(terms=Terms("m", FAIPL), license_files={"LICENSE.md": "x"})), "License")
    assert "RAIL" not in other and "LICENSE-base" not in other
    assert "says of the base's own terms: I &lt;hold> it" in write_card(make_release(acknowledged="I <hold> it"))


@pytest.mark.parametrize("full", [None, "stage2_refine_unet-fp32.safetensors"])
def test_full_precision_is_linked_or_offered(full: str | None) -> None:
    files = section(write_card(make_release(full_precision=full)), "Files")
    if full:
        assert f"[`{full}`]({full})" in files
    else:
        assert "The weights in full precision: offered at https://example.org/source" in files
    assert "optimizer's states" in files and "on request" in files


def test_changes_come_from_the_lineage() -> None:
    text = write_changes(make_release("model.vae=madebyollin/sdxl-vae-fp16-fix"))
    first, second = text.split("## ")[1:]
    assert "[Linaqruf/animagine-xl-2.0](https://huggingface.co/Linaqruf/animagine-xl-2.0), commit `c0ffee`" in first
    assert "weights of UNet, text encoder 1, text encoder 2" in first and "Not trained: VAE" in first
    assert "132,499 optimizer steps, 12,719,904 samples seen, of 1,271,990 images" in first
    assert (
        "Base: export/stage1, SHA-256 `cd`" in second and "Not trained: text encoder 1, text encoder 2, VAE" in second
    )
    assert "`fingerprint2`" in second and COMMIT in second and "configs/2-stage2_refine_unet.yaml" in second
    assert "converted to fp16" in second and "madebyollin/sdxl-vae-fp16-fix" in second


def test_a_cell_breaks_no_table() -> None:
    assert cell("a|b\n<c>  d") == "a\\|b &lt;c> d"


def test_v_prediction_is_said() -> None:
    assert "predicts v\n" in write_card(make_release("diffusion.prediction_type=v_prediction"))


# --- a template of the user's


def write_template(folder: Path, text: str) -> Path:
    path = folder / "mine.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_template_of_the_users(tmp_path: Path) -> None:
    stage = "{{ stage.name }}: {{ stage.rows['optimizer steps'] }}, {{ stage.base }}"
    text = f"---\n{{{{ header | safe }}}}---\n# {{{{ title }}}}\n{{% for stage in stages %}}\n{stage}\n{{% endfor %}}\n"
    template = write_template(tmp_path, text)
    card = write_card(make_release("publish.title='a|b <c>'", card_template=template))
    assert ModelCard(card).data.to_dict()["license_name"] == FAIPL
    assert "# a\\|b &lt;c>\n1, feature alignment: 132,499, [Linaqruf/animagine-xl-2.0](https://" in card
    shipped = REPOSITORY / "trainer/release/card.md"
    assert write_card(make_release(card_template=shipped)) == write_card(make_release())


def test_a_templates_head_names_all_that_it_may_read() -> None:
    head = (REPOSITORY / "trainer/release/card.md").read_text(encoding="utf-8").partition("#}")[0]
    names = [*describe_release(make_release()), *describe_use(make_release())]
    assert [name for name in names if not re.search(rf"\b{name}\b", head)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n{% if title %}\n", r"mine\.md fails in line 2: .*end of template"),
        ("a\n\n{{ titel }}\n", r"mine\.md fails in line 3: 'titel' is undefined"),
        ("{{ stages[0].rows['image'] }}", r"mine\.md fails in line 1: .*no attribute 'image'"),
        ("a\n{{ title / 2 }}", r"mine\.md fails in line 2: unsupported operand"),
        ("{{ title.__class__.__mro__ }}", r"mine\.md fails in line 1: access to attribute '__class__'"),
        ("{{ '%s'.format.__globals__ }}", r"mine\.md fails in line 1: access to attribute '__globals__'"),
        ("{% set _ = people.append('x') %}", r"mine\.md fails in line 1: access to attribute 'append'"),
        ("{% include 'card.md' %}", r"mine\.md fails in line 1: no loader"),
        ("{{ title | dictsort }}", r"mine\.md fails in line 1: "),
        ("{{ title | truncate(1) }}", r"mine\.md fails in line 1: "),
        ("{{ range(1000000) }}", r"mine\.md fails in line 1: Range too big"),
    ],
)
def test_a_template_that_fails_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_card(make_release(card_template=write_template(tmp_path, text)))


def test_a_template_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the template .*none\.md cannot be read: .*No such file"):
        write_card(make_release(card_template=tmp_path / "none.md"))


def test_a_template_is_given_values_only() -> None:
    """Of an object it could call methods: a Path can delete files."""

    def kinds(value: object) -> set[type]:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        return {type(value)}.union(*map(kinds, inner))

    allowed = {dict, list, str, Markup, int, float, bool, type(None)}
    release = make_release(samples=SAMPLES)
    assert kinds(describe_release(release) | describe_use(release)) <= allowed


def test_without_tags_of_people_none_are_named() -> None:
    said = section(write_card(make_release("captions.people=[]")), "Prompts")
    assert "captions: characters, series" in said and "who" not in said

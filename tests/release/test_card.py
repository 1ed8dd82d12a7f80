"""The model card says what the config, the lineage and the records say, in the Hub's words, and nothing else."""

import dataclasses
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markupsafe import Markup

from support.card_release import COMMIT, make_release, rows, section
from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.core.errors import UserError
from trainer.data.index import CAPTION_FIELDS
from trainer.release.card import Release, describe_release, describe_use, write_card, write_changes
from trainer.release.licence import FAIPL, Terms
from trainer.release.markdown import cell
from trainer.sample.pictures import Sample

SAMPLES = [
    Sample(Path("a.png"), "1girl, |||, <b>", "lowres", {"steps": 28, "seed": 1}),
    Sample(Path("b.png"), "line\nbreak: 'quotes' \"too\"", "", {}),
]


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
    words = ["publish.license_link=https://example.org/licence", "publish.title='My: model'"]
    card = write_card(make_release(*words, "publish.author=A. N. Other", "publish.repo_id=owner/name"))
    assert ModelCard(card).data.to_dict()["license_link"] == "https://example.org/licence"
    assert "\n# My: model\n" in card and "**Developed by**: A. N. Other" in card
    assert '\nmodel = "owner/name"  # or the path' in card and "OWNER/NAME" not in card
    bare = write_card(make_release())
    assert '\nmodel = "OWNER/NAME"  # put in this repository\'s name, or the path' in bare and "owner/name" not in bare
    assert "**Developed by**: not recorded" in bare and "\n# stage2_refine_unet\n" in bare
    assert "torch.bfloat16 if device" in write_card(make_release("publish.dtype=bf16"))
    assert "from_pretrained" not in write_card(make_release("publish.formats=[single_file]"))


def test_a_base_that_the_hub_does_not_know_is_not_named_in_the_header() -> None:
    release = make_release()
    release.stages[0]["base"]["revision"] = None
    data = ModelCard(write_card(release)).data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data and "widget" not in data
    assert '**Finetuned from**: a local folder "animagine-xl-2.0", SHA-256 `ab`' in write_card(release)
    named = dataclasses.replace(release, base_id="owner/base")  # and checked by its hash
    assert ModelCard(write_card(named)).data.to_dict()["base_model"] == "owner/base"


def test_tables_of_tags_are_the_rules() -> None:
    tags = rows(section(write_card(make_release()), "Special tags"))
    assert tags["masterpiece"] == ["151 and above"] and tags["best quality"] == ["100 to 150"]
    assert tags["low quality"] == ["-5 to -1"] and tags["worst quality"] == ["below -5"]
    assert tags["rating: questionable, nsfw"] == ["questionable"]
    assert tags["newest"] == ["2022 to 2023"] and len(tags) == 7 + 4 + 5 + 3 + 1  # heads, and one row of dashes
    headings = re.findall(r"^#### (.*)", write_card(make_release()), flags=re.MULTILINE)
    assert headings == ["Quality modifiers", "Rating modifiers", "Year modifiers"]
    own = ["captions.quality=[{tag: fine, min_score: 10}, {tag: plain}]", "captions.years=[]", "captions.ratings={}"]
    tags = rows(section(write_card(make_release(*own)), "Special tags"))
    assert tags["fine"] == ["10 and above"] and tags["plain"] == ["below 10"] and len(tags) == 4
    assert "Special tags" not in write_card(make_release("captions.quality=[]", *own[1:]))


def test_tables_of_tags_by_percentile_rating_and_column() -> None:
    release = make_release()
    other = load_config([REPOSITORY / f"configs/{name}.yaml" for name in ("stage2_refine_unet", "captions_3_1")])
    tags = rows(section(write_card(dataclasses.replace(release, config=other)), "Special tags"))
    assert tags["masterpiece"] == ["above that of 95% of the posts of its rating"]
    assert tags["best quality"] == ["above that of 85%, up to 95% of the posts of its rating"]
    assert tags["worst quality"] == ["up to 10% of the posts of its rating"]
    assert tags["very aesthetic"] == ["aesthetic_score above 0.71"]
    assert tags["very displeasing"] == ["aesthetic_score, the rest"]
    assert tags["explicit, nsfw"] == ["explicit"] and tags["recent"] == ["2018 to 2020"]
    rules = "{tag: fine, min_score: 5, rating: g}, {tag: poor, rating: none}, {tag: good, min_score: 9}"
    tags = rows(section(write_card(make_release(f"captions.quality=[{rules}]")), "Special tags"))
    assert tags["fine"] == ["5 and above", "general"] and tags["poor"] == ["all", "none"]
    assert tags["good"] == ["9 and above", "all"]


def test_prompts_are_shown_as_they_are_and_only_tags_that_there_are() -> None:
    sample = Sample(Path("a.png"), "saber \\(fate\\), ^_^, *x*, a\\|b", "[x]", {})
    card = write_card(make_release("captions.years=[]", samples=[sample]))
    assert "```\nsaber \\(fate\\), ^_^, *x*, a\\|b\n```" in card and "\n```\n[x]\n```\n" in card
    assert "| saber (fate), ^\\_^, \\*x\\*, a\\|b |\n" in card
    prompt = "\nmasterpiece, best quality, 1girl, character, series, everything else, rating: general\n"
    assert prompt.strip() in " ".join(section(card, "Tag ordering").split())
    bare = section(write_card(make_release("captions.ratings={}", "captions.quality=[]")), "Usage guidelines")
    assert "\n1girl, character, series, everything\nelse, year tag\n" in bare and "careful" not in bare
    assert "By custom" not in bare


def test_the_caution_about_quality_tags_is_in_the_captions_own_tags() -> None:
    said = section(write_card(make_release()), "Usage guidelines")
    assert "careful with `masterpiece`, `best quality`**" in said
    assert "Put `rating: general` into the prompt, and `nsfw`, `rating: sensitive` into the negative prompt." in said
    files = [REPOSITORY / f"configs/{name}.yaml" for name in ("stage2_refine_unet", "captions_3_1")]
    said = section(write_card(dataclasses.replace(make_release(), config=load_config(files))), "Usage guidelines")
    assert "Put `safe` into the prompt, and `nsfw`, `sensitive` into the negative prompt." in said
    said = section(write_card(make_release("captions.ratings={q: nsfw, e: nsfw}")), "Usage guidelines")
    assert "Put `nsfw` into the negative prompt." in said


BARE = dict.fromkeys(["caption", *CAPTION_FIELDS], 0)


def test_of_finished_captions_no_tag_is_taught() -> None:
    words = ["sampling.prompts=['a red fox, snow']", "sampling.negative_prompt=''"]
    card = write_card(taught({"caption": 40}, {"caption": 12}, *words))
    for word in ("masterpiece", "best quality", "rating:", "newest", "Special tags", "Tag ordering", "1girl",
                 "Danbooru", "Rating tags", "careful", "Sentences"):  # fmt: skip
        assert word not in card, word
    assert "trained on finished captions in 2 stages and prompted in their manner." in card
    assert "- **Text**: finished captions, as written: no tag of quality, rating or date was added\n" in card
    assert "| captions made of | finished captions, as written (12 samples) |" in card
    assert "\n```\na red fox, snow\n```\n" in section(card, "Prompts")


def test_a_field_that_no_sample_had_has_no_tags() -> None:
    card = write_card(taught({"tags_general": 9, "score": 9}, {"tags_general": 5, "rating": 5, "caption": 2}))
    assert re.findall(r"^#### (.*)", card, flags=re.MULTILINE) == ["Quality modifiers", "Rating modifiers"]
    assert "made of a post's score, rating, which some posts had." in card
    order = section(card, "Tag ordering")
    assert "`1boy` and so on), everything else, the latter" in order and "Some training captions were finished" in order
    assert "\nmasterpiece, best quality, 1girl,\neverything else, rating: general\n" in order
    assert "composed of general (9), score (9)" in card


def test_a_stage_that_did_not_record_it_keeps_all_tables() -> None:
    assert write_card(taught({"caption": 40}, None)).count("\n#### ") == 3
    fork = {"run": "other", "step": 7, "samples_seen": 9, "lineage": {"caption_fields": BARE | {"year": 3}}}
    release = taught({"caption": 40}, {"caption": 12})
    release.stages[1]["fork"] = fork
    assert re.findall(r"^#### (.*)", write_card(release), flags=re.MULTILINE) == ["Year modifiers"]
    fork["lineage"] = {"run": "of an older version"}
    assert write_card(release).count("\n#### ") == 3


def test_no_prompt_begins_with_tags_that_were_not_taught() -> None:
    drawn = [Sample(Path("a.png"), "masterpiece, best quality, a fox", "", {}), Sample(Path("b.png"), "a cat", "", {})]
    release = dataclasses.replace(taught({"caption": 40}, {"caption": 2}), samples=drawn)
    assert '\nprompt = "a cat"\n' in write_card(release)
    assert [each["text"] for each in ModelCard(write_card(release)).data.to_dict()["widget"]] == ["a cat"]
    assert "| a fox | a cat |" in write_card(release)  # the gallery shows all that was drawn
    alone = write_card(dataclasses.replace(release, samples=drawn[:1]))
    assert '\nprompt = "a red fox, snow"\n' in alone
    assert ModelCard(alone).data.to_dict()["widget"] == [{"text": "a red fox, snow"}]
    bare = write_card(taught({"caption": 40}, {"caption": 2}, "sampling.prompts=['masterpiece, best quality, a fox']"))
    assert '\nprompt = "a fox"\n' in bare


def taught(first: dict[str, int] | None, second: dict[str, int] | None, *words: str) -> Release:
    """A release whose stages had so many samples with each field."""
    release = make_release(*(words or ["sampling.prompts=['a red fox, snow']"]))
    for stage, counts in zip(release.stages, (first, second), strict=True):
        stage["caption_fields"] = None if counts is None else BARE | counts
    return release


def test_settings_and_sizes_are_the_configs() -> None:
    words = ["sampling.guidance_scale=5.5", "sampling.num_inference_steps=20", "sampling.width=null"]
    card = write_card(make_release(*words))
    settings = section(card, "Recommended settings")
    assert "\nEuler ancestral (Euler a), 20 steps, guidance scale 5.5, 1024 x 1216, prompts of up to 225" in settings
    negative = re.search(r"Negative prompt:\n\n```\n(.*?)\n```", settings, flags=re.DOTALL)
    assert negative and " ".join(negative[1].split()) == make_release().config.sampling.negative_prompt
    assert max(map(len, negative[1].splitlines())) <= 40  # a phone's
    sizes = section(card, "Sizes")
    assert len(re.findall(r"\d+ x \d+", sizes)) == 33 + 1 and "832 x 1216" in sizes and "1536 x 640" in sizes
    assert "No negative prompt." in section(
        write_card(make_release("sampling.negative_prompt=''")), "Recommended settings"
    )


def tables_of_training(release: Release) -> list[dict[str, list[str]]]:
    """One table a stage, of two columns."""
    stages = re.findall(r"<details>\n<summary>Hyper.*?</details>", write_card(release), flags=re.DOTALL)
    tables = [rows(stage) for stage in stages]
    assert all(len(values) == 1 for table in tables for values in table.values())
    return tables


def test_training_is_told_stage_by_stage() -> None:
    release = make_release()
    first, second = tables_of_training(release)
    table = {name: [*first[name], *second[name]] for name in first.keys() & second.keys()}
    assert table["images"] == ["1,271,990", "2,500"] and table["optimizer steps"] == ["132,499", "521"]
    assert table["samples per step"] == ["96", "48"]
    assert table["epochs (samples seen / images)"] == ["10.00", "10.00"]
    assert table["learning rates"] == ["7.5e-6, 3.75e-6, 3.75e-6", "2e-6"]
    assert table["trained"] == ["UNet, text encoder 1, text encoder 2", "UNet"]
    assert table["noise offset"] == ["none", "0.0357"]
    assert table["hardware"] == ["2 x A100", "not recorded"] and table["hours (wall clock)"] == ["504", "not recorded"]
    assert table["index fingerprint"] == ["`fingerprint1`", "`fingerprint2`"]
    assert table["code"][1] == f"0.2.0, commit `{COMMIT[:12]}…` with changes that were not committed"
    assert (
        table["optimizer"][0] == r"adamw, betas \[0.9, 0.99\], weight decay 0.1" and table["gradient norm"][0] == "1.0"
    )
    assert "- **1, feature alignment**: 132,499 steps of 96 samples over 1,271,990 images; trained" in write_card(
        release
    )
    original = {"name": "adafactor", "betas": None, "weight_decay": 0.0, "max_grad_norm": None}
    release.stages[0]["config"]["optim"] |= original
    table = tables_of_training(release)[0]
    assert table["optimizer"] == ["adafactor, weight decay 0.0"] and table["gradient norm"] == ["not clipped"]


@pytest.mark.parametrize(("count", "said"), [(1, "in 1 stage and"), (2, "in 2 stages and"), (3, "in 3 stages and")])
def test_any_number_of_stages(count: int, said: str) -> None:
    release = make_release()
    stages = [*release.stages, dict(release.stages[1], stage="3, *aesthetic*")][:count]
    card = write_card(dataclasses.replace(release, stages=stages))
    assert said in card and card.count("<summary>Hyperparameters of ") == count
    assert ("Hyperparameters of the stage<" in card) == (count == 1)
    assert (r"| 3, \*aesthetic\* |  |" in card) == (count == 3)


def test_a_fork_says_what_it_branched_off() -> None:
    release = make_release()
    release.stages[1] |= {"fork": {"run": "other_run", "step": 7, "samples_seen": 9, "lineage": None}}
    assert tables_of_training(release)[1]["run"] == ["stage2_refine_unet, forked from other_run at step 7"]


def test_an_interpolation_stays_one_and_an_older_run_lacks_fields() -> None:
    release = make_release()
    release.stages[1]["config"]["optim"]["unet_lr"] = "${oc.env:SECRET_RATE}"
    del release.stages[1]["config"]["diffusion"]["min_snr_gamma"]
    table = tables_of_training(release)[1]
    assert table["learning rates"] == ["${oc.env:SECRET_RATE}"] and table["min-SNR gamma"] == ["off"]


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
        'Base: a local folder "stage1", SHA-256 `cd`' in second
        and "Not trained: text encoder 1, text encoder 2, VAE" in second
    )
    assert "`fingerprint2`" in second and COMMIT in second and "configs/2-stage2_refine_unet.yaml" in second
    assert "converted to fp16" in second and "madebyollin/sdxl-vae-fp16-fix" in second


def test_a_cell_breaks_no_table() -> None:
    assert cell("a|b\n<c>  d") == "a\\|b &lt;c> d"


def test_v_prediction_is_said() -> None:
    card = write_card(make_release("diffusion.prediction_type=v_prediction"))
    assert "predicts v\n" in card and "a tensor in it, `v_pred`, that it predicts v.\n" in card
    assert "v_pred" not in write_card(make_release())


@pytest.mark.parametrize(
    ("upcast", "said"), [(True, "asks for fp32, in which diffusers"), (False, "lets it run in fp16.")]
)
def test_what_the_vaes_config_says(upcast: bool, said: str) -> None:
    card = write_card(make_release("model.vae=null", vae_upcast=upcast))
    assert f"The VAE in these files is the base's own; its config {said}" in card


@pytest.mark.parametrize("form", ["single_file", "diffusers"])
def test_one_format_alone(form: str) -> None:
    weights = "a-fp16.safetensors" if form == "single_file" else None
    card = write_card(make_release(f"publish.formats=[{form}]", weights=weights))
    assert ("ComfyUI" in card) == (form == "single_file") and ("```python" in card) == (form == "diffusers")
    assert "ComfyUI" not in write_card(make_release(sdxl_shapes=False))


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


EARLIER = """---
{{ header | safe -}}
---
# {{ title }} {{ prediction }} {{ vae or "own" }} {{ weights }} {{ full_precision or "no fp32" }} {{ torch_dtype }}
[FAIPL]({{ license_link }}) {{ acknowledged or "-" }} {{ openrail }} {{ sdxl_shapes }}
{{ config.publish.author or "?" }}
{% for stage in stages %}
{{ stage.name }} {{ stage.config_file }} {{ stage.base }} {{ stage.rows["hours (wall clock)"] }}
{% endfor %}
{{ people | codes }} {{ best | codes }} {{ example | join(", ") | safe }} 
{{ caution.general | codes }} {{ caution.unsafe | codes }}
{{ sizes | join(", ") }} {{ quality.by_rating }} {{ quality.rows[0] | map("cell") | join(" ") }}
{{ ratings[0] | join(" ") }}
{% for sample in samples %}
| ![{{ sample.name }}]({{ sample.file }}) | {{ sample.prompt | plain }} |
{{- sample.negative_prompt | plain }} | {{ sample.settings }} |
{% endfor %}
{% for name, what in license_files.items() %}
{{ name }}: {{ what }}
{% endfor %}
"""  # all that a template could read in version 0.2, and its three filters


def test_a_template_of_an_older_version_still_renders(tmp_path: Path) -> None:
    card = write_card(make_release(samples=SAMPLES, card_template=write_template(tmp_path, EARLIER)))
    assert ModelCard(card).data.to_dict()["license_name"] == FAIPL
    assert '2, refine UNet configs/2-stage2_refine_unet.yaml a local folder "stage1", SHA-256 `cd` not recorded' in card
    assert "| ![a](samples/a.png) | 1girl, \\|\\|\\|, &lt;b> |lowres | 28 steps, seed 1 |" in card
    assert "masterpiece 151 and above\ngeneral rating: general" in card and "LICENSE-base.md: Open RAIL" in card


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
    said = section(write_card(make_release("captions.people=[]")), "Usage guidelines")
    assert "captions: characters, series" in said and "who" not in said


def test_the_order_of_a_template_is_the_cards() -> None:
    """Of Animagine XL 4.0: rating after the series, quality last; what no part asks for is not taught."""
    files = [REPOSITORY / f"configs/{name}.yaml" for name in ("stage2_refine_unet", "captions/animagine_4_0")]
    words = ["captions.mix={tags: 0.75, natural_tags: 0.25}", "sampling.prompts=['1girl, solo']"]
    config = load_config(files, words)
    card = write_card(dataclasses.replace(make_release(), config=config))
    order = " ".join(section(card, "Tag ordering").split())
    assert (
        "in the order of the training captions: who, characters, series, rating, artists, everything else, tags of the "
        "file, year and tags from numbers in any order, quality. " in order
    )
    assert "1girl, character, series, everything else, year tag, safe, masterpiece, best quality" in order
    assert "of several kinds: tags alone (75%); a description, then tags (25%)." in order
    assert "1girl, solo, masterpiece, best quality" in card
    bare = load_config(files[:1], ["captions.template=[{tags: general}]", "sampling.prompts=[a]"])
    card = write_card(dataclasses.replace(make_release(), config=bare))
    assert "Special tags" not in card and "careful" not in card and "everything else." in section(card, "Tag ordering")

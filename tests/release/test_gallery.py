"""What a stranger sees first: pictures with short captions, how they were drawn, and the author's own words."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from support.card_release import make_release, section
from trainer.core.errors import UserError
from trainer.release.card import write_card, write_changes
from trainer.release.gallery import caption_of, line_of_all, make_thumbnail_address, settings_line
from trainer.release.markdown import fenced, string
from trainer.sample.pictures import Sample, write_png

SPECIAL = ["masterpiece", "best quality", "rating: general", "newest"]


def make_sample(name: str, prompt: str = "1girl, smile", negative: str = "", **settings: Any) -> Sample:
    said = {"sampler": "Euler ancestral", "steps": 28, "guidance": 7.0, "size": "832x1216", "seed": 42}
    return Sample(Path(name), prompt, negative, said | {"versions": {"torch": "2.13.0"}, "dtype": "fp16"} | settings)


def test_the_gallery_comes_first_and_fits_a_phone() -> None:
    samples = [make_sample(f"{place}.png", f"masterpiece, tag {place}", seed=place) for place in range(3)]
    card = write_card(make_release("publish.title=Mine", "publish.base_only=false", samples=samples))
    lines = [line for line in ModelCard(card).text.splitlines() if line]
    assert lines[0] == "# Mine" and lines[1].startswith("A text-to-image model for anime")
    assert lines[2:7] == [
        "| ![tag 0](samples/0.png) | ![tag 1](samples/1.png) |", "| :---: | :---: |", "| tag 0 | tag 1 |",
        "| ![tag 2](samples/2.png) |", "| tag 2 |",
    ]  # fmt: skip
    assert lines[7] == "Euler ancestral, 28 steps, guidance 7, 832 x 1216, seeds 0, 1, 2."
    assert "**1**: Euler ancestral, 28 steps, guidance 7, 832 x 1216, seed 1\n\n```\nmasterpiece, tag 1\n```" in card
    assert "2.13" not in card  # versions are in lineage.json and in each file
    empty = write_card(make_release())
    assert "samples/" not in empty and "prompts in full" not in empty


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("masterpiece, best quality, 1girl, saber \\(fate\\), newest", "1girl, saber (fate)"),
        ("masterpiece, best quality", "masterpiece, best quality"),
        ("a, " * 40 + "b", ", ".join(["a"] * 15) + ", …"),
        ("a girl who stands at the sea and looks at ships", "a girl who stands at the sea and looks at …"),
        ("x" * 200, "…"),
        ("", ""),
        (" , ,", ""),
        ("Best Quality, two\nlines", "two lines"),
    ],
)  # fmt: skip
def test_captions(prompt: str, caption: str) -> None:
    assert caption_of(prompt, SPECIAL) == caption


def test_settings_are_one_line_and_only_what_is_recorded() -> None:
    assert settings_line({}) == "" and settings_line({"seed": 3, "cfg": 9}) == "seed 3"
    assert settings_line({"guidance": 5.5, "size": "axb", "steps": [1]}) == "[1] steps, guidance 5.5, axb"
    both = [make_sample("a.png"), make_sample("b.png", size="1216x832", seed=43)]
    assert line_of_all(both) == "Euler ancestral, 28 steps, guidance 7, sizes 832 x 1216, 1216 x 832, seeds 42, 43"
    assert line_of_all([make_sample("a.png"), make_sample("b.png", steps=20)]) == (
        "Euler ancestral, guidance 7, 832 x 1216, seed 42"
    )
    assert line_of_all([Sample(Path("a.png"), "x", "", {})]) == "" == line_of_all([])


def test_a_sample_says_its_negative_prompt_once() -> None:
    own = make_release().config.sampling.negative_prompt
    card = write_card(make_release(samples=[make_sample("a.png", negative=own), make_sample("b.png", negative="[x]")]))
    details = card.partition("<details>")[2].partition("</details>")[0]
    assert details.count('the one under "Recommended settings"') == 1 and "```\n[x]\n```" in details
    assert "No negative prompt." in write_card(make_release(samples=[make_sample("a.png")]))


@pytest.mark.parametrize(
    ("words", "size", "said"),
    [
        ([], "640x1536", "640 x 1536"),  # a sample's
        ([], "640x99999", "832 x 1216"),
        ([], "7x9", "832 x 1216"),
        ([], None, "832 x 1216"),  # drawn while training
        (["sampling.prompts=[]", "sampling.every_steps=null"], None, "832 x 1216"),  # one of the sizes
        (["sampling.prompts=[]", "sampling.every_steps=null", "sampling.width=800"], None, "1024 x 1024"),
        (["sampling.prompts=[]", "sampling.every_steps=null", "buckets={base_resolution: 128, min_side: 64, "
          "max_side: 256, step: 32, upscale: true}"], None, "128 x 128"),  # as the demo has it
    ],
)  # fmt: skip
def test_the_size_to_begin_with_is_one_that_the_model_knows(words: list[str], size: str | None, said: str) -> None:
    samples = [make_sample("a.png", size=size)] if size else []
    card = write_card(make_release(*words, samples=samples))
    width, _, height = said.partition(" x ")
    assert f", {said}, prompts of up to" in card and f"    width={width},\n    height={height},\n" in card


# --- the author's own words


def test_a_base_to_build_on_says_so_and_nothing_is_guessed() -> None:
    """The stages of the Base say it in their configs; of a run that does not, nobody guesses it."""
    card = write_card(make_release())
    assert "> **A base to build on, not for inference.**" in card.partition("## ")[0]
    assert "- A base to build on" in section(card, "Limitations")
    assert "base to build on" not in write_card(make_release("publish.base_only=false"))


def test_notes_and_thanks_stand_as_they_are() -> None:
    notes = "Made *by hand*, see <b>here</b>:\n\n---\nlicense: mit\n---\n\n| a | b |\n| - | - |\n{{ config }} {% raw %}"
    thanks = "- [Someone](https://example.org)"
    card = write_card(make_release(f"publish.notes={notes}", f"publish.acknowledgements={thanks}"))
    assert f"\n## Notes\n\n{notes}\n\n## Model details\n" in card and f"\n{thanks}\n\n## License\n" in card
    assert ModelCard(card).data.to_dict()["license"] == "other"
    assert "## Notes" not in write_card(make_release()) and "Acknowledgements" not in write_card(make_release())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("```python\nx", "opens a code block (```) and does not close it"),
        ("~~~~\n~~~\n```", "opens a code block (~~~~)"),
        ("a <!-- b", "opens a comment"),
        ("<details>\n<summary>x</summary>", "has 1 <details> and 0 </details>"),
        ("x </DIV>", "has 0 <div> and 1 </div>"),
        ("<script>alert(1)</script>", "holds '<script>', which pages neither run nor show"),
        ("<img src=x onerror=alert(1)>", "onerror="),
        ("see [x](JavaScript:alert(1))", "holds 'JavaScript:'"),
        ("<iframe src='https://example.org'>", "<iframe"),
        ("`<script>` and <style>", "holds '<style>'"),
    ],
)
@pytest.mark.parametrize("field", ["notes", "acknowledgements"])
def test_what_would_swallow_the_card_is_refused(field: str, text: str, part: str) -> None:
    with pytest.raises(UserError, match=rf"publish\.{field}: .*{re.escape(part)}"):
        make_release(f"publish.{field}={text}")


@pytest.mark.parametrize(
    "text",
    ["```\n<script>\n<!--\n```", "~~~\n```\n~~~", "`<script>` is not run", "<!-- a\nb -->",
     "<details>\n\na\n</details>", "a < b, 1 on x=2", "````\n```\n````", "``` one line ```",
     "# A heading\n\n- a: b\n- 'c'"],
)  # fmt: skip
def test_other_text_is_the_authors_own(text: str) -> None:
    assert make_release(f"publish.notes={text}").config.publish.notes == text


# --- hostile words

HOSTILE = (
    "</details><script>x</script> ![p](https://evil.example/t.png) | `x` **b** [a](javascript:x)\n"
    "---\nlicense: mit\n```\n"
)


def test_hostile_words_are_words() -> None:
    release = make_release(samples=[make_sample("a.png", HOSTILE, HOSTILE, sampler=HOSTILE, seed=HOSTILE)])
    for stage in release.stages:
        stage["stage"] = HOSTILE  # a run's name can be no such thing: check_lineage
        stage["hardware"] = [HOSTILE]
        stage["base"]["reference"] = HOSTILE
    for text in (write_card(release), write_changes(release)):
        body = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", ModelCard(text).text, flags=re.DOTALL | re.MULTILINE)  # code is code
        assert "<script" not in body and "javascript" in body and not re.search(r"(?<!\\)\]\((https://evil|java)", body)
        assert body.count("<details>") == body.count("</details>")
    data = ModelCard(write_card(release)).data.to_dict()
    assert data["license"] == "other" and data["widget"][0]["text"] == HOSTILE


@pytest.mark.parametrize("title", ["a|b <c> *d*", "[x](javascript:y)", "---", "`x", "# y", "{{ header }}"])
def test_hostile_titles(title: str) -> None:
    card = write_card(make_release(f"publish.title='{title}'", f"publish.author='{title}'"))
    (line,) = re.findall(r"^# .*", ModelCard(card).text, flags=re.MULTILINE)
    assert "<c>" not in line and not re.search(r"(?<!\\)[*\[`]", line)


@pytest.mark.parametrize("text", ["", "a `` b ``` c", "x\n```\ny", "long word " * 30, "w" * 99, 'quote " and \\ back'])
def test_code_blocks_and_strings_hold_any_text(text: str) -> None:
    fence, *lines, end = str(fenced(text)).splitlines()
    assert fence == end and set(fence) == {"`"} and fence not in lines and " ".join(lines) == " ".join(text.split())
    assert eval(str(string(text))) == " ".join(text.split())


# --- the thumbnail


def test_the_thumbnail_is_small_square_and_nothing_but_pixels(tmp_path: Path) -> None:
    image = Image.new("RGBA", (832, 1216), "white")
    image.paste("red", (0, 0, 832, 600))
    write_png(tmp_path / "a.png", image, {"prompt": "secret", "comment": "secret"})
    address = make_thumbnail_address(tmp_path / "a.png")
    assert address == make_thumbnail_address(tmp_path / "a.png")
    prefix, _, encoded = address.partition(",")
    written = base64.b64decode(encoded, validate=True)
    assert prefix == "data:image/jpeg;base64" and b"secret" not in written and len(written) < 30_000
    with Image.open(io.BytesIO(written)) as small:
        assert small.format == "JPEG" and small.size == (256, 256) and not small.getexif()
        red, green, _ = small.getpixel((128, 10))  # type: ignore[misc]
        assert red > 200 > 50 > green  # the upper part
    Image.new("RGB", (64, 32)).save(tmp_path / "b.png")
    with Image.open(
        io.BytesIO(base64.b64decode(make_thumbnail_address(tmp_path / "b.png").partition(",")[2]))
    ) as small:
        assert small.size == (32, 32)  # never enlarged

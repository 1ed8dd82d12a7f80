"""Licences are known by their words, and every refusal names its clause and the way out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from support.paths import LICENCE_TEXT
from trainer.core.errors import UserError
from trainer.model.base import find_base, hash_base
from trainer.model.lineage import LINEAGE_KEY
from trainer.release import licence
from trainer.release.licence import (
    FAIPL,
    OPENRAIL,
    Terms,
    fetch_terms,
    find_refusals,
    find_terms,
    known_name,
    read_licence_files,
    read_terms,
    recognise,
)

SOURCE = "https://example.org/source"


@pytest.fixture(scope="module")
def faipl() -> str:
    if not LICENCE_TEXT.is_file():
        pytest.skip("the licence's text is not part of this repository and is not beside it (shared/licenses)")
    return LICENCE_TEXT.read_text(encoding="utf-8")


def test_the_licence_is_known_whatever_its_form(faipl: str) -> None:
    assert recognise(faipl) == FAIPL
    assert recognise(" ".join(faipl.split())) == FAIPL  # no line breaks
    plain = faipl.replace("#", "").replace("*", "").replace("[Notices](#notices)", "Notices").replace("\u2019", "'")
    assert plain != faipl and recognise(plain) == FAIPL
    assert recognise(faipl.replace("\n- ", "\n* ").replace("\n", "\r\n")) == FAIPL


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("within 30 days", "within 60 days"),
        ("You must ensure that everyone", "You should ensure that everyone"),
        ("provide medical advice", "provide advice"),
        ("## Output\n", "## Output\nYou may not sell images. "),
        ("## Output\n", "## Output\n画像の販売は禁止。"),
        ("No contributor can revoke", "Any contributor can revoke"),
    ],
)
def test_a_changed_sentence_is_seen(faipl: str, before: str, after: str) -> None:
    assert before in faipl and recognise(faipl.replace(before, after)) is None


def test_the_users_file_must_be_a_licence_word_for_word(faipl: str, tmp_path: Path) -> None:
    file = tmp_path / "LICENSE"
    file.write_text(faipl, encoding="utf-8")
    assert read_licence_files([file]) == {FAIPL: faipl}
    file.write_text(faipl.replace("30 days", "3 days"), encoding="utf-8")
    with pytest.raises(UserError, match=r"LICENSE is neither FAIPL-1\.0-SD nor .* word for word.*freedevproject"):
        read_licence_files([file])
    with pytest.raises(UserError, match=r"--license-file .*none\.md cannot be read"):
        read_licence_files([tmp_path / "none.md"])


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("faipl-1.0-sd", FAIPL), ("fair-ai-public-license-1.0-sd", FAIPL), ("Fair AI Public License 1.0-SD", FAIPL),
        ("openrail++", OPENRAIL), ("CreativeML Open RAIL++-M License", OPENRAIL),
        ("creativeml-openrail-m", "creativeml-openrail-m"), ("openrail", "openrail"), ("mit", "mit"),
    ],
)  # fmt: skip
def test_names(name: str, known: str) -> None:
    assert known_name(name) == known


def card(**header: str) -> str:
    return "---\n" + "".join(f"{key}: {value}\n" for key, value in header.items()) + "---\n# A model\n"


def test_a_folder_says_it_in_its_card_or_its_licence_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licence, "KNOWN_WORDS", {digest_of("be kind"): FAIPL, digest_of("be good"): OPENRAIL})
    assert read_terms(tmp_path, "m") == Terms("m", None)
    (tmp_path / "README.md").write_text(card(license="openrail++"))
    assert read_terms(tmp_path, "m") == Terms("m", OPENRAIL)
    (tmp_path / "LICENSE.md").write_text("Be **good**.")
    assert read_terms(tmp_path, "m") == Terms("m", OPENRAIL, {"LICENSE.md": "Be **good**."})
    (tmp_path / "README.md").write_text(card(license="other", license_name="fair-ai-public-license-1.0-sd"))
    assert read_terms(tmp_path, "m").name == FAIPL  # SDXL's licence may travel along
    (tmp_path / "README.md").unlink()
    assert read_terms(tmp_path, "m") == Terms("m", OPENRAIL, {"LICENSE.md": "Be **good**."})
    (tmp_path / "licence.txt").write_text("be kind")
    assert read_terms(tmp_path, "m").name == FAIPL
    for name in ("LICENSE.md", "licence.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "LICENSE").write_text("all mine")
    assert read_terms(tmp_path, "m") == Terms("m", "LICENSE", {"LICENSE": "all mine"})


def test_terms_beyond_a_known_licence_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licence, "KNOWN_WORDS", {digest_of("be kind"): FAIPL})
    (tmp_path / "README.md").write_text(card(license="other", license_name=FAIPL, extra_gated_prompt="sign"))
    assert "extra_gated_prompt" in read_terms(tmp_path, "m").extra[0]
    (tmp_path / "README.md").write_text(card(license="other", license_name=FAIPL))
    (tmp_path / "LICENSE").write_text("be kind, and do not sell")
    assert read_terms(tmp_path, "m").extra == ("LICENSE is not the text of a licence that is known here",)
    (tmp_path / "LICENSE").write_text("be kind")
    assert read_terms(tmp_path, "m").extra == ()
    (tmp_path / "README.md").write_text(card(license="openrail++"))
    assert "names openrail++, but its licence text is that of faipl" in read_terms(tmp_path, "m").extra[0]
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(UserError, match=r"README\.md: the header is not YAML"):
        read_terms(tmp_path, "m")


def test_a_single_file_says_it_in_its_header(tmp_path: Path) -> None:
    said = {"modelspec.license": "CreativeML Open RAIL++-M License"}
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", said)
    assert read_terms(tmp_path / "a.safetensors", "m") == Terms("m", OPENRAIL)
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert read_terms(tmp_path / "b.safetensors", "m") == Terms("m", None)
    # what the maker of an export of ours wanted is not what its base asks
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors", said | {LINEAGE_KEY: "{}"})
    assert read_terms(tmp_path / "c.safetensors", "m") == Terms("m", None)


def digest_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(" ".join(licence.licence_words(text)).encode()).hexdigest()


ABSENT, FREE, RAIL = Terms("m", None), Terms("m", FAIPL), Terms("m", OPENRAIL)
BOTH = {FAIPL: "text", OPENRAIL: "text"}
REFUSALS = [  # terms, texts, words over the good ones, what must be told
    (FREE, {}, {}, ["the text of FAIPL-1.0-SD is missing", "Notices, first paragraph", "--license-file FILE"]),
    (FREE, BOTH, {"source_url": None}, ["publish.source_url is not set", "corresponding source", "Notices, first and"]),
    (ABSENT, BOTH, {}, ["m does not say under which licence", "Copyright; Notices", "--acknowledge-base-terms"]),
    (Terms("m", "mit"), BOTH, {}, ["m is under mit, which this tool does not know", "--acknowledge-base-terms"]),
    (Terms("m", FAIPL, extra=("a price",)), BOTH, {}, ["with more: a price", "third paragraph", "--acknowledge-base"]),
    (RAIL, {FAIPL: "text"}, {}, ["the text of CreativeML Open RAIL++-M is missing", "Section III", "--license-file"]),
    (FREE, BOTH, {"acknowledged": "fine"}, ["--acknowledge-base-terms has no effect"]),
    *[(Terms("m", name), BOTH, {"acknowledged": "I do not care"}, [f"m is under {name}, which forbids", "Copyright"])
      for name in ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "CC BY-NC 4.0", "non-commercial", "cc_by_nc_4.0",
                   "CC BY\u2011NC", "Non_Commercial", "cc-by-sa-nc-4.0",
                   "Stability AI Non-Commercial Research", "flux-1-dev-non-commercial-license")],
    # a name is no guess at what it may mean: these ask for an acknowledgement
    *[(Terms("m", name), BOTH, {}, [f"m is under {name}, which this tool does not know", "--acknowledge-base-terms"])
      for name in ("sai-nc-community", "all rights reserved", "cc-by-4.0", "openrail", "creativeml-openrail-m")],
]  # fmt: skip


@pytest.mark.parametrize(("terms", "texts", "words", "parts"), REFUSALS)
def test_refusals(terms: Terms, texts: dict[str, str], words: dict[str, str], parts: list[str]) -> None:
    good = {"source_url": SOURCE, "acknowledged": None}
    (told,) = find_refusals(terms, texts, **{**good, **words})
    assert [part for part in parts if part not in told] == []


@pytest.mark.parametrize(
    ("terms", "acknowledged"),
    [
        (FREE, None),
        (RAIL, None),
        (ABSENT, "ours"),
        (Terms("m", "mit"), "it may"),
        (Terms("m", FAIPL, extra=("x",)), "y"),
    ],
)
def test_what_is_fine(terms: Terms, acknowledged: str | None) -> None:
    told = find_refusals(terms, BOTH, source_url=SOURCE, acknowledged=acknowledged)
    assert list(told) == []


def test_all_reasons_are_told_at_once() -> None:
    told = find_refusals(ABSENT, {}, source_url=None, acknowledged=None)
    assert len(list(told)) == 3


# --- along the lineage


def lineage_of(reference: str, sha256: str, *, revision: str | None = None, before: dict | None = None) -> dict:
    return {"base": {"reference": reference, "sha256": sha256, "revision": revision, "lineage": before}}


def test_the_nearest_base_that_says_something_decides(tiny_base: Path, tmp_path: Path) -> None:
    """Two stages: the second began with an export, which says nothing; the first with a base that does or does not."""
    sha256 = hash_base(find_base(str(tiny_base)))
    export = tmp_path / "export"
    export.symlink_to(tiny_base)
    first = lineage_of("models/tiny", sha256)
    second = lineage_of("export/stage1", sha256, before=first)
    with pytest.raises(UserError, match=r"the base models/tiny \(SHA-256 .*say where it is with --base"):
        find_terms(second, [str(export)], None)
    assert find_terms(second, [str(export)], str(tiny_base)) == Terms(str(tiny_base), None)
    found = find_terms(first, [str(tiny_base)], None)  # messages name the place, and what is published does not
    assert found == Terms(str(tiny_base), None) and found.shown == 'a local folder "tiny"'
    with pytest.raises(UserError, match=r"--base .* is another model: SHA-256 .* names 00ff"):
        find_terms(lineage_of("models/tiny", "00ff"), [], str(tiny_base))
    # other weights under the name are not the base, whatever they say
    with pytest.raises(UserError, match=r"is not where the run found it"):
        find_terms(lineage_of(str(tiny_base), "00ff"), [], None)


def test_a_run_that_is_still_here_knows_where_its_base_lies(tiny_base: Path, tmp_path: Path) -> None:
    """The lineage has only the last two parts of a path; the run's own run.json has all of it."""
    sha256 = hash_base(find_base(str(tiny_base)))
    export = tmp_path / "runs/stage1/export/stage1-step-00000001-fp16"
    export.parent.mkdir(parents=True)
    export.symlink_to(tiny_base)
    (tmp_path / "runs/stage1/run.json").write_text(json.dumps({"base": {"reference": str(tiny_base)}}))
    second = lineage_of("export/stage1", sha256, before=lineage_of("models/tiny", sha256))
    assert find_terms(second, [str(export)], None) == Terms(str(tiny_base), None)


def test_a_repository_is_asked_for_its_card_and_licence_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(reference: str, **words: object) -> str:
        asked.append((reference, words))
        return str(tmp_path)

    monkeypatch.setattr(licence, "snapshot_download", snapshot)
    (tmp_path / "README.md").write_text(card(license="openrail++"))
    base = lineage_of("owner/sdxl", "ab", revision="c0ffee")
    assert find_terms(base, [], None) == Terms("owner/sdxl", OPENRAIL)
    assert asked == [("owner/sdxl", {"revision": "c0ffee", "allow_patterns": licence.LICENCE_PATTERNS})]
    # a stage that began with a published model does not ask further down
    second = lineage_of("owner/model", "cd", revision="beef", before=lineage_of("gone", "ef"))
    assert find_terms(second, [], None) == Terms("owner/model", OPENRAIL)


def test_offline_the_cache_answers_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(reference: str, *, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            raise OSError("no route to the hub")
        return str(tmp_path)

    monkeypatch.setattr(licence, "snapshot_download", snapshot)
    with pytest.raises(UserError, match=r"licence of owner/sdxl is not here .* no route to the hub"):
        fetch_terms("owner/sdxl", "c0ffee")
    (tmp_path / "README.md").write_text(card(license="openrail++"))
    assert fetch_terms("owner/sdxl", "c0ffee") == Terms("owner/sdxl", OPENRAIL)


def test_a_part_of_a_snapshot_is_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, the library gives what it has of a commit as if it had asked."""

    def no_answer(*_: object, **__: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(licence, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(licence.HfApi, "model_info", no_answer)
    with pytest.raises(UserError, match="could not be fetched from the hub: no route"):
        fetch_terms("owner/sdxl", "c0ffee")

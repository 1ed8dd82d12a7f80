"""What a base's licence asks and allows, where it is found, and what FAIPL-1.0-SD asks of whoever publishes.

A text is recognised by the SHA-256 of its words: line breaks and Markdown do not matter, a changed word does. A name is
known where it is stated as one of those in the table, and is no guess. The texts themselves are not ours to ship; they
come from the base, or from a file that the user gives. None of this is legal advice.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, snapshot_download

from trainer.config.yaml_text import YAML_ERRORS
from trainer.core.errors import UserError, shorten
from trainer.core.files import read_regular, sha256_bytes
from trainer.model.base import find_base, hash_base
from trainer.model.exports import find_run
from trainer.model.hub import HUB_ERRORS
from trainer.model.lineage import LINEAGE_KEY, Lineage
from trainer.model.lineage_rows import list_stages, name_base
from trainer.model.run_records import read_run
from trainer.model.weights_file import LazyFile
from trainer.train.run import locate_from_run

FAIPL, OPENRAIL = "faipl-1.0-sd", "openrail++"  # as the Hub's model cards name them
KNOWN_WORDS = {
    "68aca8ee6a3c4ea06eb4caa1f81b7bd6da3d80e9b7eed31c9dfd2ccd9d3de183": FAIPL,
    "431140dde2d68f805ca04746ddf23e76b732a2640470190abda51333300785a9": OPENRAIL,  # SDXL's, dated July 26, 2023
}
KNOWN_NAMES = {  # in lower case, as cards and the headers of single files state them
    FAIPL: FAIPL,
    "fair-ai-public-license-1.0-sd": FAIPL,
    "fair ai public license 1.0-sd": FAIPL,
    OPENRAIL: OPENRAIL,
    "creativeml open rail++-m": OPENRAIL,
    "creativeml open rail++-m license": OPENRAIL,
}
FORBIDDING = re.compile(r"\bnon ?commercial|\bcc by (\w+ )*n[cd]\b")  # words of names that state it themselves
LICENCE_FILE = re.compile(r"(?i)(un)?licen[cs]e([-_.][\w+.-]*)?|copying(\.\w+)?")
LICENCE_PATTERNS = ["LICENSE*", "LICENCE*", "License*", "Licence*", "license*", "licence*", "COPYING*", "README.md"]
MAX_LICENCE = 2**20  # bytes of a licence
ACKNOWLEDGE = '--acknowledge-base-terms "what they are, and why you may publish"'


@dataclass(frozen=True)
class Terms:
    """What a model says about its licence."""

    where: str  # the model, for messages: the place as the user knows it
    name: str | None  # FAIPL, OPENRAIL, or whatever else it says; None: it says nothing
    texts: dict[str, str] = field(default_factory=dict)  # its licence files, by name
    extra: tuple[str, ...] = ()  # what it asks beyond a licence that is known here
    shown: str = field(default="", compare=False)  # what strangers call it


def licence_words(text: str) -> list[str]:
    """A text's words, without the targets of Markdown links; case, punctuation and markup do not matter."""
    plain = unicodedata.normalize("NFKC", re.sub(r"\]\([^)\s]*\)", "] ", text)).casefold()
    return re.findall(r"\w+", plain.replace("_", " "))


def recognise(text: str) -> str | None:
    """FAIPL or OPENRAIL when the text is that licence, word for word; None for any other."""
    return KNOWN_WORDS.get(sha256_bytes(" ".join(licence_words(text)).encode()))


def known_name(name: str) -> str:
    """The one name under which a licence is known here; other names stay. CreativeML Open RAIL-M is another licence."""
    return KNOWN_NAMES.get(name.strip().lower(), name)


def read_licence_files(files: Sequence[Path]) -> dict[str, str]:
    """The texts that the user gives, by the licence that each is.

    Raises:
        UserError: for a file that is neither licence, word for word.
    """
    texts = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--license-file {file} cannot be read: {error}") from error
        if (licence := recognise(text)) is None:
            raise UserError(
                f"--license-file {file} is neither FAIPL-1.0-SD nor CreativeML Open RAIL++-M, word for word. "
                "FAIPL-1.0-SD is published by the Freedom of Development Project, freedevproject.org; give it as "
                "Markdown or plain text"
            )
        texts[licence] = text
    return texts


def find_refusals(
    terms: Terms, texts: Mapping[str, str], source_url: str | None, acknowledged: str | None
) -> Iterator[str]:
    """Why a model must not be published like this, each with the clause that says so and what to do.

    ``texts`` are the licence texts at hand, by licence; ``acknowledged``: what the publisher says of the base's terms.
    """
    yield from find_base_refusals(terms, acknowledged)
    if FAIPL not in texts:
        yield (
            f"the text of FAIPL-1.0-SD is missing: {terms.where} does not contain it, and whoever gets a copy must "
            "get it too (FAIPL-1.0-SD, Notices, first paragraph). Take it from its publisher, freedevproject.org, "
            "and add --license-file FILE"
        )
    if terms.name == OPENRAIL and OPENRAIL not in texts:
        yield (
            f"the text of CreativeML Open RAIL++-M is missing: {terms.where} is under it, and everyone who gets a "
            "model derived from it must get a copy (Open RAIL++-M, Section III, Distribution and Redistribution). It "
            "is LICENSE.md of stabilityai/stable-diffusion-xl-base-1.0: add --license-file FILE"
        )
    if source_url is None:
        yield (
            "publish.source_url is not set: whoever gets the model, or uses it over a network, must have a way to "
            "the corresponding source, which is the model and the changed software but not the data (FAIPL-1.0-SD, "
            "Notices, first and second paragraph). Add publish.source_url=https://..."
        )


def find_base_refusals(terms: Terms, acknowledged: str | None) -> Iterator[str]:
    """Why the base's own terms do not allow a publication, or not yet."""
    name = terms.name
    if acknowledged is not None and not acknowledged.strip():
        yield f"--acknowledge-base-terms is empty: say what they are: {ACKNOWLEDGE}"
    elif name is None:
        if acknowledged is None:
            yield (
                f"{terms.where} does not say under which licence it is, and FAIPL-1.0-SD can only be given to what its "
                f"makers license (Copyright; Notices, third paragraph). If you hold the rights: {ACKNOWLEDGE}"
            )
    elif name not in (FAIPL, OPENRAIL) and FORBIDDING.search(" ".join(licence_words(name))):
        yield (
            f"{terms.where} is under {name}, which forbids what FAIPL-1.0-SD must allow everyone: use and changes for "
            "any purpose but its prohibited uses (Copyright; Notices, third paragraph). A model derived from it "
            f"cannot be published under {FAIPL}"
        )
    elif acknowledged is None and name not in (FAIPL, OPENRAIL):
        yield (
            f"{terms.where} is under {name}, which this tool does not know: whether it lets derived models be "
            f"published under {FAIPL} (Notices, third paragraph) is for you to read. If it does: {ACKNOWLEDGE}"
        )
    elif acknowledged is None and terms.extra:
        yield (
            f"{terms.where} is under {name} with more: {'; '.join(terms.extra)}. Added terms bind you, and "
            "FAIPL-1.0-SD does not let you drop them (Notices, third paragraph). Read them, and if you keep them: "
            f"{ACKNOWLEDGE}"
        )
    elif acknowledged is not None and name in (FAIPL, OPENRAIL) and not terms.extra:
        yield f"--acknowledge-base-terms has no effect: {terms.where} is under {name} and asks nothing beyond it"


def find_terms(lineage: Lineage, places: Sequence[str], given: str | None) -> Terms:
    """The licence of the nearest model of the lineage that says which it is under, else of the first.

    Exports of ours say nothing themselves, so that the chain leads to the base that somebody else made.

    Args:
        places: where the base of the last stage may lie; the lineage shortens absolute paths.
        given: where the first base lies now, if the user says it.

    Raises:
        UserError: when the first base is not where the lineage says, or is another; or when it is given in vain.
    """
    stages = list_stages(lineage)
    for made in reversed(stages):
        base, is_first = made["base"], made is stages[0]
        named = next((place for place in places if Path(place).name == Path(base["reference"]).name), base["reference"])
        if is_first and given is not None:
            return terms_of_given(given, base)
        here: Path | None = None
        if base["revision"] is not None:
            terms = fetch_terms(base["reference"], base["revision"])
        elif here := locate([*places, base["reference"]], base["sha256"]):
            terms = read_terms(here, str(here))
        elif is_first:
            raise UserError(
                f"the base {named} (SHA-256 {base['sha256']}), whose licence decides, is not where the run "
                "found it: say where it is with --base PATH_OR_HUB_ID"
            )
        else:
            terms = Terms(named, None)
        if terms.name is not None or is_first:
            if given is not None:
                raise UserError(f"--base has no effect: {terms.where} itself says under which licence it is")
            return dataclasses.replace(terms, shown=name_base(base))
        run = find_run(here.parent) if here is not None else None  # RUN/export/..., which knows its own base's place
        places = [locate_from_run(run[0], read_run(run[0])["base"]["reference"])] if run is not None else []
    raise AssertionError("the first stage returns or raises")


def locate(places: Sequence[str], sha256: str) -> Path | None:
    """The first of these places that holds these very weights; None where none does."""
    here = (find_base(place) for place in dict.fromkeys(places) if Path(place).expanduser().exists())
    return next((found.path for found in here if hash_base(found) == sha256), None)


def terms_of_given(place: str, base: dict[str, Any]) -> Terms:
    """The terms of ``--base``.

    Raises:
        UserError: when it holds other weights than the lineage names.
    """
    found = find_base(place)
    if (sha256 := hash_base(found)) != base["sha256"]:
        raise UserError(f"--base {place} is another model: SHA-256 {sha256}, and the lineage names {base['sha256']}")
    if found.revision is not None:
        return dataclasses.replace(fetch_terms(place, found.revision), shown=place)
    return dataclasses.replace(read_terms(found.path, place), shown=name_base(base))


def read_terms(path: Path, where: str) -> Terms:
    """What a diffusers folder (licence files, README.md) or a single file (its header) says about its licence.

    A single file of ours says under which licence its maker wanted to publish, not what its base asks: that is passed
    over, and its lineage leads on to the base.

    Raises:
        UserError: for a README.md whose header is no YAML.
    """
    if path.is_file():
        metadata = LazyFile(path).metadata
        named = None if LINEAGE_KEY in metadata else metadata.get("modelspec.license")
        return Terms(where, known_name(named) if named else None)
    files = sorted(file for file in path.iterdir() if file.is_file() and LICENCE_FILE.fullmatch(file.name))
    texts = {file.name: read_own_text(file) for file in files}
    header = read_card_header(path / "README.md")
    named = header.get("license_name") if header.get("license") in (None, "other") else header["license"]
    if not isinstance(named, str | None):  # of references to references text could be made without end
        raise UserError(f"{path / 'README.md'}: its header must name the licence by a text")
    found = {name: recognise(text) for name, text in texts.items()}
    unknown = [name for name, licence in found.items() if licence is None]
    recognised = {licence for licence in found.values() if licence}
    extra = [f"{name} is not the text of a licence that is known here" for name in unknown]
    if "extra_gated_prompt" in header:
        extra.append("its README.md asks for more before a download (extra_gated_prompt)")
    if named is None:
        own = FAIPL if FAIPL in recognised else OPENRAIL if recognised else ", ".join(unknown) or None
        return Terms(where, own, texts, tuple(extra) if recognised else ())
    if known_name(named) == OPENRAIL and FAIPL in recognised:
        extra.append(f"its README.md names {OPENRAIL}, but its licence text is that of {FAIPL}")
    return Terms(where, known_name(named), texts, tuple(extra))


def read_own_text(file: Path) -> str:
    """A text of the model, which is published with what is made of it.

    Raises:
        UserError: where it is a link that leads elsewhere, as to a private file; the hub's cache has links to ``blobs``
            beside ``snapshots``. And where it is too long for a licence.
    """
    folder, real = file.parent.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.parent not in (folder, blobs):
        raise UserError(f"{file} is a link to {real}, which is not the model's: put the licence's text in its place")
    try:
        return read_regular(real, MAX_LICENCE).decode("utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{file} is no licence's text: {error.strerror}") from error


def read_card_header(card: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty where there is none.

    Raises:
        UserError: when it cannot be read.
    """
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    match = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, flags=re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else {}
    except YAML_ERRORS as error:  # of dates that are none, and of deep nesting
        raise UserError(
            f"{card}: the header is not YAML, so that it does not say which licence: {shorten(str(error))}"
        ) from error
    return header if isinstance(header, dict) else {}


def fetch_terms(reference: str, revision: str) -> Terms:
    """What a hub repository says about its licence at a commit: from the hub, or from the cache where it is complete.

    Raises:
        UserError: when neither can be asked.
    """
    try:
        folder = Path(snapshot_download(reference, revision=revision, allow_patterns=LICENCE_PATTERNS))
        terms = read_terms(folder, reference)
        if terms.name is None and not terms.texts:  # offline, a part of a snapshot is given as if it were all
            HfApi().model_info(reference, revision=revision)
        return terms
    except HUB_ERRORS as error:
        reason = shorten(str(error))
    try:
        cached = read_terms(Path(snapshot_download(reference, revision=revision, local_files_only=True)), reference)
    except HUB_ERRORS:
        cached = Terms(reference, None)
    if cached.name is None:
        raise UserError(f"the licence of {reference} is not here and could not be fetched from the hub: {reason}")
    return cached

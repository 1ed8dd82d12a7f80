"""What a base's licence asks and allows, and what FAIPL-1.0-SD asks of whoever publishes. Not legal advice.

A text is recognised by the SHA-256 of its words: line breaks and Markdown do not matter, a changed word does. The texts
themselves are not ours to ship; they come from the base, or from a file that the user gives.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.core.errors import UserError

FAIPL, OPENRAIL = "faipl-1.0-sd", "openrail++"  # as the Hub's model cards name them
KNOWN_WORDS = {
    "68aca8ee6a3c4ea06eb4caa1f81b7bd6da3d80e9b7eed31c9dfd2ccd9d3de183": FAIPL,
    "431140dde2d68f805ca04746ddf23e76b732a2640470190abda51333300785a9": OPENRAIL,  # SDXL's, dated July 26, 2023
}
OTHER_NAMES = {
    "fair ai public license 1 0 sd": FAIPL,
    "faipl 1 0 sd": FAIPL,
    "openrail": OPENRAIL,  # only with its two plus signs, see known_name
    "creativeml open rail m": OPENRAIL,
}
FORBIDDING = re.compile(
    r"\b(n[cd]|non ?commercial|(no|not for) commercial|research|no ?derivatives|all rights reserved|proprietary)\b"
)
ACKNOWLEDGE = '--acknowledge-base-terms "what they are, and why you may publish"'


@dataclass(frozen=True)
class Terms:
    """What a model says about its licence."""

    where: str  # the model, for messages
    name: str | None  # FAIPL, OPENRAIL, or whatever else it says; None: it says nothing
    texts: dict[str, str] = field(default_factory=dict)  # its licence files, by name
    extra: tuple[str, ...] = ()  # what it asks beyond a licence that is known here


def licence_words(text: str) -> list[str]:
    """A text's words, without the targets of Markdown links; case, punctuation and markup do not matter."""
    plain = unicodedata.normalize("NFKC", re.sub(r"\]\([^)\s]*\)", "] ", text)).casefold()
    return re.findall(r"\w+", plain.replace("_", " "))


def recognise(text: str) -> str | None:
    """FAIPL or OPENRAIL when the text is that licence, word for word; None for any other."""
    return KNOWN_WORDS.get(hashlib.sha256(" ".join(licence_words(text)).encode()).hexdigest())


def known_name(name: str) -> str:
    """The one name under which a licence is known here; other names stay."""
    words = " ".join(licence_words(name)).removesuffix(" license")
    known = OTHER_NAMES.get(words, name)
    return name if known == OPENRAIL and "++" not in name else known  # CreativeML Open RAIL-M is another licence


def read_licence_files(files: list[Path]) -> dict[str, str]:
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
        licence = recognise(text)
        if licence is None:
            raise UserError(
                f"--license-file {file} is neither FAIPL-1.0-SD nor CreativeML Open RAIL++-M, word for word. "
                "FAIPL-1.0-SD is published by the Freedom of Development Project, freedevproject.org; give it as "
                "Markdown or plain text"
            )
        texts[licence] = text
    return texts


def find_refusals(
    terms: Terms,
    texts: Mapping[str, str],
    *,
    source_url: str | None,
    acknowledged: str | None,
) -> Iterator[str]:
    """Why a model must not be published like this, each with the clause that says so and what to do.

    ``texts`` are the licence texts at hand, by licence; ``acknowledged``: what the publisher says of the base's terms.
    """
    yield from find_base_refusals(terms, acknowledged)
    if FAIPL not in texts:
        yield (
            f"the text of FAIPL-1.0-SD is missing: {terms.where} does not bring it, and everyone who gets a copy must "
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
        return
    if name is None:
        if acknowledged is None:
            yield (
                f"{terms.where} does not say under which licence it is, and FAIPL-1.0-SD can only be given to what its "
                f"makers license (Copyright; Notices, third paragraph). If you hold the rights: {ACKNOWLEDGE}"
            )
        return
    if name not in (FAIPL, OPENRAIL) and FORBIDDING.search(" ".join(licence_words(name))):
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

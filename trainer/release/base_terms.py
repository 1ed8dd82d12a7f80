"""Where a base's licence is found: in its folder, its file's header, its repository, or in what it was made from."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, snapshot_download

from trainer.core.errors import UserError
from trainer.core.layout import RUN_FILE
from trainer.model.base import find_base, hash_base
from trainer.model.hub import HUB_ERRORS
from trainer.model.lineage import LINEAGE_KEY, Lineage
from trainer.model.lineage_rows import list_stages
from trainer.model.weights_file import LazyFile
from trainer.release.licence import FAIPL, OPENRAIL, Terms, known_name, recognise
from trainer.train.run import locate_from_run

LICENCE_FILE = re.compile(r"(?i)(un)?licen[cs]e([-_.][\w+.-]*)?|copying(\.\w+)?")
LICENCE_PATTERNS = ["LICENSE*", "LICENCE*", "License*", "Licence*", "license*", "licence*", "COPYING*", "README.md"]


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
        if is_first and given is not None:
            return terms_of_given(given, base)
        here = None if base["revision"] is not None else locate([*places, base["reference"]], base["sha256"])
        terms: Terms | None = None
        if base["revision"] is not None:
            terms = fetch_terms(base["reference"], base["revision"])
        elif here is not None:
            terms = read_terms(here, base["reference"])
        if terms is not None and (terms.name is not None or is_first):
            if given is not None:
                raise UserError(f"--base has no effect: {base['reference']} itself says under which licence it is")
            return terms
        if is_first:
            raise UserError(
                f"the base {base['reference']} (SHA-256 {base['sha256']}), whose licence decides, is not where the run "
                "found it: say where it is with --base PATH_OR_HUB_ID"
            )
        places = places_of_run(here)
    raise AssertionError("the first stage returns or raises")


def locate(places: Sequence[str], sha256: str) -> Path | None:
    """The first of these places that holds these very weights; None where none does."""
    for place in dict.fromkeys(places):
        if Path(place).expanduser().exists():
            found = find_base(place)
            if hash_base(found) == sha256:
                return found.path
    return None


def places_of_run(export: Path | None) -> list[str]:
    """Where the run that made an export, RUN/export/..., found its own base, if that run is still here."""
    run = export.parent.parent / RUN_FILE if export is not None else None
    if run is None or not run.is_file():
        return []
    return [locate_from_run(run.parent, json.loads(run.read_text(encoding="utf-8"))["base"]["reference"])]


def terms_of_given(place: str, base: dict[str, Any]) -> Terms:
    """The terms of ``--base``.

    Raises:
        UserError: when it holds other weights than the lineage names.
    """
    found = find_base(place)
    if (sha256 := hash_base(found)) != base["sha256"]:
        raise UserError(f"--base {place} is another model: SHA-256 {sha256}, and the lineage names {base['sha256']}")
    # named as in the lineage: the place is the user's own and does not belong into a card
    return read_terms(found.path, base["reference"]) if found.revision is None else fetch_terms(place, found.revision)


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
    texts = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files}
    header = read_header(path / "README.md")
    named = header.get("license_name") if header.get("license") in (None, "other") else header["license"]
    found = {name: recognise(text) for name, text in texts.items()}
    unknown = [name for name, licence in found.items() if licence is None]
    recognised = {licence for licence in found.values() if licence}
    extra = [f"{name} is not the text of a licence that is known here" for name in unknown]
    if "extra_gated_prompt" in header:
        extra.append("its README.md asks for more before a download (extra_gated_prompt)")
    if named is None:
        own = FAIPL if FAIPL in recognised else OPENRAIL if recognised else ", ".join(unknown) or None
        return Terms(where, own, texts, tuple(extra) if recognised else ())
    if known_name(str(named)) == OPENRAIL and FAIPL in recognised:
        extra.append(f"its README.md names {OPENRAIL}, but its licence text is that of {FAIPL}")
    return Terms(where, known_name(str(named)), texts, tuple(extra))


def read_header(card: Path) -> dict[str, Any]:
    """The YAML header of a model card; empty where there is none.

    Raises:
        UserError: when it cannot be read.
    """
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    match = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, flags=re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise UserError(f"{card}: the header is not YAML, so that it does not say which licence: {error}") from error
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
        reason = " ".join(str(error).split())[:300]
    try:
        cached = read_terms(Path(snapshot_download(reference, revision=revision, local_files_only=True)), reference)
    except HUB_ERRORS:
        cached = Terms(reference, None)
    if cached.name is None:
        raise UserError(f"the licence of {reference} is not here and could not be fetched from the hub: {reason}")
    return cached

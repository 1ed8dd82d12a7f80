"""A run -> the folder to publish: weights, model card, licence, configs, changes, sums; and with --upload, the Hub.

    python scripts/publish.py NAME publish.source_url=https://... [publish.key=value ...] [--license-file FILE]
    python scripts/publish.py NAME ... publish.repo_id=owner/name --upload

NAME is runs/NAME where no such path lies here; a config, such as my.yaml, stands for its run. The folder is
RUN/published/NAME, or has the repository's name where publish.repo_id gives one. It is checked against what the
licences of the base and of the publication require; this is not legal advice. Nothing in it is overwritten, and nothing
is sent without --upload.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.run_names import find_run_path
from trainer.core.commands import command
from trainer.core.console import CommandParser, NextStep, Result
from trainer.core.disk import format_bytes
from trainer.core.errors import UserError, run_command
from trainer.core.files import expand_home, home_path
from trainer.core.progress import format_count
from trainer.release.request import Request, read_publish_config, remark_on_card

if TYPE_CHECKING:
    from trainer.release.card import Release


def main() -> Result:
    arguments = parse()
    request = Request(
        run=Path(find_run_path(arguments.run)), out=arguments.out,
        license_files=arguments.license_file, base=arguments.base, acknowledged=arguments.acknowledge_base_terms,
        samples=arguments.samples, full_precision=arguments.full_precision,
    )  # fmt: skip
    read_publish_config(request.run, arguments.overrides)  # what it refuses, it refuses at once
    from trainer.release.folder import check_published  # torch takes seconds to import
    from trainer.release.publish import publish
    from trainer.release.upload import upload

    folder, release = publish(request, arguments.overrides)
    config = release.config.publish
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    facts = {"folder": str(folder), "files": len(files), "bytes": size, "repository": None, "private": None}
    said = f"the folder: {folder}, {format_count(len(files), 'file')}, {format_bytes(size)}"
    said = "\n".join([said, *remark(folder, release, request)])
    words = [word for word in sys.argv[1:] if word not in ("--json", "--quiet")]  # as they were typed
    if not arguments.upload:
        if config.repo_id is None:  # which changes the card, so that a folder given by --out would be another
            words = [*without_option(words, "--out"), "publish.repo_id=owner/name"]
        words.append("--upload")
        said += "\nnothing was uploaded"
        return Result(said, [folder], facts, [NextStep("upload it", command("scripts/publish.py", *words))])
    if config.repo_id is None:
        raise UserError("--upload needs publish.repo_id=owner/name")
    check_published(folder, release.config)
    address = upload(folder, config.repo_id, private=config.private, replace=arguments.replace)
    said += f"\nuploaded and verified: {address} ({'private: look at it' if config.private else 'public'})"
    facts |= {"repository": address, "private": config.private}
    public = command("scripts/publish.py", *words, "publish.private=false")
    return Result(said, [folder], facts, [NextStep("make it public", public)] if config.private else [])


def parse() -> argparse.Namespace:
    parser = CommandParser("Build the folder in which a run is published, and upload it with --upload.")
    parser.add_argument("run", metavar="RUN", help="the run's name, folder or config")
    parser.add_argument(
        "overrides", nargs="*", metavar="publish.key=value", help="instead of the values in the run's config.yaml"
    )
    parser.add_argument("--license-file", type=home_path, action="append", default=[], metavar="FILE",
                        help="the text of FAIPL-1.0-SD, or of the base's Open RAIL++-M; may be repeated")  # fmt: skip
    parser.add_argument("--acknowledge-base-terms", metavar="TEXT",
                        help="the terms of a base whose licence is not known, for the card")  # fmt: skip
    parser.add_argument(
        "--base", type=expand_home, metavar="PATH_OR_HUB_ID", help="where the first base is now, if it was moved"
    )
    parser.add_argument("--samples", type=home_path, metavar="DIR", help="default: RUN/export/samples")
    parser.add_argument("--full-precision", action="store_true", help="add the fp32 weights")
    parser.add_argument("--out", type=home_path, metavar="DIR", help="default: RUN/published/NAME")
    parser.add_argument(
        "--upload", action="store_true", help="send the folder to publish.repo_id on the Hub, in one commit"
    )
    parser.add_argument("--replace", action="store_true", help="with --upload: replace other files there")
    arguments = parser.parse_intermixed_args()
    if strange := [word for word in arguments.overrides if "=" not in word]:
        parser.error(f"{strange[0]} is not publish.key=value")
    if arguments.replace and not arguments.upload:
        parser.error("--replace has no effect without --upload")
    return arguments


def without_option(words: list[str], option: str) -> list[str]:
    """The words without an option and its value, however it was written."""
    if option in words:
        place = words.index(option)
        return words[:place] + words[place + 2 :]
    return [word for word in words if not word.startswith(f"{option}=")]


def remark(folder: Path, release: Release, request: Request) -> Iterator[str]:
    """What to do with the folder, and what it may lack."""
    yield f"  read its README.md first; then cd {shlex.quote(str(folder))} && sha256sum --check SHA256SUMS"
    if not release.full_precision:
        yield ("  the licence's corresponding source includes the weights in full precision: the card offers them at "
               f"{release.config.publish.source_url}; --full-precision adds them to the folder")  # fmt: skip
    if not release.samples:
        yield "  no sample images: draw some with scripts/sample.py into RUN/export/samples, or give --samples DIR"
    if release.base_model is None:
        way = "--base names one too" if request.base else "if it is on the Hub, --base owner/name says so"
        yield ("  no base_model in the card's header: the run found its base in a folder; CHANGES.md has its hash; "
               + way)  # fmt: skip
    for said in remark_on_card(release.config.publish):
        yield f"  {said}"


if __name__ == "__main__":
    run_command(main, "nothing is half written or half sent; the same command starts again")

"""A run -> a folder for strangers: weights, model card, licence, configs, changes, sums; and, only when asked, the Hub.

    python scripts/publish.py runs/NAME publish.source_url=https://... [publish.key=value ...] [--license-file FILE]
    python scripts/publish.py runs/NAME ... publish.repo_id=owner/name --upload

The folder is RUN/published/NAME. It is checked against what the licences of the base and of the publication ask;
this is not legal advice. Nothing that lies there is overwritten, and nothing is sent without --upload.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import UserError, run_command
from trainer.core.files import expand_home, home_path
from trainer.release.request import Request, read_publish_config

if TYPE_CHECKING:
    from trainer.release.card import Release


def main() -> None:
    arguments = parse()
    request = Request(
        run=arguments.run, out=arguments.out, license_files=arguments.license_file, base=arguments.base,
        acknowledged=arguments.acknowledge_base_terms, samples=arguments.samples,
        full_precision=arguments.full_precision,
    )  # fmt: skip
    read_publish_config(request.run, arguments.overrides)  # what it refuses, it refuses at once
    from trainer.release.publish import check_published, publish  # torch takes seconds to import
    from trainer.release.upload import upload

    folder, release = publish(request, arguments.overrides)
    config = release.config.publish
    tell(folder, release, request)
    if not arguments.upload:
        missing = "--upload" if config.repo_id else "publish.repo_id=owner/name --upload"
        print(f"nothing was uploaded; to do that, add {missing}")
        return
    if config.repo_id is None:
        raise UserError("--upload needs publish.repo_id=owner/name")
    check_published(folder, release.config)
    address = upload(folder, config.repo_id, private=config.private, replace=arguments.replace)
    state = "private: look at it, then publish.private=false makes it public" if config.private else "public"
    print(f"uploaded and verified: {address} ({state})")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the folder of a run that strangers get; upload it when asked.")
    parser.add_argument("run", type=home_path, metavar="RUN")
    parser.add_argument("overrides", nargs="*", metavar="publish.key=value", help="over the run's config.yaml")
    parser.add_argument("--license-file", type=home_path, action="append", default=[], metavar="FILE",
                        help="the text of FAIPL-1.0-SD, or of the base's Open RAIL++-M; may be repeated")  # fmt: skip
    parser.add_argument("--acknowledge-base-terms", metavar="TEXT",
                        help="what the base's terms are, where they are not known ones; for the card")  # fmt: skip
    parser.add_argument(
        "--base", type=expand_home, metavar="PATH_OR_HUB_ID", help="where the first base lies now, if it was moved"
    )
    parser.add_argument("--samples", type=home_path, metavar="DIR", help="instead of RUN/export/samples")
    parser.add_argument("--full-precision", action="store_true", help="put the fp32 weights in too")
    parser.add_argument("--out", type=home_path, metavar="DIR", help="instead of RUN/published/NAME")
    parser.add_argument("--upload", action="store_true", help="send it to publish.repo_id on the Hub, in one commit")
    parser.add_argument("--replace", action="store_true", help="with --upload: in place of other files there")
    arguments = parser.parse_intermixed_args()
    if strange := [word for word in arguments.overrides if "=" not in word]:
        parser.error(f"{strange[0]} is not publish.key=value")
    if arguments.replace and not arguments.upload:
        parser.error("--replace has no effect without --upload")
    return arguments


def tell(folder: Path, release: Release, request: Request) -> None:
    """Where it lies, and what may be missing; what was given is not asked for."""
    print(f"the folder: {folder}")
    print(f"  look at README.md first; cd {folder} && sha256sum --check SHA256SUMS")
    if not release.full_precision:
        print("  the licence's corresponding source includes the weights in full precision: the card offers them at "
              f"{release.config.publish.source_url}; --full-precision puts them into the folder")  # fmt: skip
    if not release.samples:
        print("  no sample images: draw some with scripts/sample.py into RUN/export/samples, or give --samples DIR")
    if release.base_model is None:
        way = "--base names one too" if request.base else "if it is on the Hub, --base owner/name says so"
        print("  no base_model in the card's header: the run found its base in a folder; CHANGES.md has its hash; "
              + way)  # fmt: skip


if __name__ == "__main__":
    run_command(main)

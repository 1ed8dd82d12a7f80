"""A run -> a folder that can be given to strangers: weights, card, licence, configs, changes, sums.

Nothing is written under the folder's name before it is complete and checked; nothing that lies there is overwritten.
"""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.core.files import copy_rest, write_json, write_text
from trainer.core.layout import (
    EXPORT_FOLDER,
    LINEAGE_FILE,
    PUBLISHED_FOLDER,
    SAMPLES_FOLDER,
    SUMS_FILE,
    export_name,
)
from trainer.core.progress import format_count
from trainer.model.base import find_base, read_config
from trainer.model.checkpoint import check_fit_to_use, find_newest, read_train_state, step_of, verify_checkpoint
from trainer.model.lineage import Lineage, read_lineage, shorten_paths
from trainer.model.lineage_rows import list_stages
from trainer.model.run_records import is_base, is_config, is_run_name
from trainer.model.sdxl import DTYPES
from trainer.release.artefacts import check_export, copy_with_metadata, hash_files, put_whole, split_sums, write_sums
from trainer.release.card import Release, stage_config_file, write_card, write_changes
from trainer.release.export import Export, build_export, has_sdxl_shapes, write_formats, write_single_file
from trainer.release.folder import check_fit, weights_file_name, weights_file_names
from trainer.release.licence import FAIPL, OPENRAIL, Terms, find_refusals, find_terms, read_licence_files, recognise
from trainer.release.modelspec import listing_entries
from trainer.release.request import Request, read_publish_config
from trainer.sample.pictures import Sample, read_samples
from trainer.train.run import locate_from_run

LICENCE_NAMES = {FAIPL: "Fair AI Public License 1.0-SD", OPENRAIL: "CreativeML Open RAIL++-M, of the base"}


@dataclass(frozen=True)
class Weights:
    """What is published of a run: its newest step, copied from its export or built from the checkpoint."""

    step: int
    lineage: Lineage
    checkpoint: Path | None
    exported: list[Path]  # the single file, the folder, or both, where they are copied; else empty


def publish(request: Request, overrides: Sequence[str] = ()) -> tuple[Path, Release]:
    """Build and check the folder; it is there when this returns, and the same when it was there already.

    Raises:
        UserError: with every reason not to publish; for a lineage that cannot be followed; for contents that strangers
            must not see; or where something else lies under the folder's name.
    """
    config = read_publish_config(request.run, overrides)
    weights = choose_weights(request.run, config)
    check_lineage(weights.lineage)
    if request.base and weights.lineage["base"]["lineage"] is None:  # the weights' own base; its hash is compared
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=request.base))
    places = [config.model.pretrained]
    if weights.checkpoint is not None:
        reference = read_train_state(weights.checkpoint)["base"]["reference"]  # the lineage shortens paths
        places.insert(0, locate_from_run(request.run, reference))
    terms = find_terms(weights.lineage, places, request.base)
    texts = {licence: text for text in terms.texts.values() if (licence := recognise(text))}
    texts |= read_licence_files(request.license_files)
    if reasons := list(find_refusals(terms, texts, config.publish.source_url, request.acknowledged)):
        listed = "\n".join(f"  {reason}" for reason in reasons)
        raise UserError(f"{request.run} is not published, for {format_count(len(reasons), 'reason')}:\n{listed}")
    licences = collect_licences(terms, texts)
    template = config.publish.card_template
    release = Release(
        config=config,
        stages=list_stages(weights.lineage),
        terms=terms,
        license_files={name: what for name, (what, _) in licences.items()},
        acknowledged=request.acknowledged,
        base_id=request.base if request.base and not Path(request.base).expanduser().exists() else None,
        samples=read_samples(request.samples or request.run / EXPORT_FOLDER / SAMPLES_FOLDER),
        weights=weights_file_name(config, config.publish.dtype) if "single_file" in config.publish.formats else None,
        full_precision=name_full_precision(config, weights, request.full_precision),
        card_template=Path(locate_from_run(request.run, template)) if template else None,
    )
    write_card(release)  # what its template refuses, it refuses before the weights are copied
    if request.samples and not release.samples:
        raise UserError(f"--samples {request.samples} holds no PNG")
    check_samples(release.samples, weights, config.run.name)
    name = (config.publish.repo_id or config.run.name).rpartition("/")[2]
    folder = request.out or request.run / PUBLISHED_FOLDER / name
    if not folder.name or folder.name == "..":
        raise UserError(f"--out {folder} is a folder that exists: name a new one")
    return build_folder(folder, release, weights, {name: text for name, (_, text) in licences.items()}), release


def check_samples(samples: Sequence[Sample], weights: Weights, run: str) -> None:
    """Refuse images that say that another model drew them; those that say nothing of it pass.

    Raises:
        UserError: naming the first.
    """
    own = [None, run, *(export_name(run, weights.step, dtype) for dtype in DTYPES)]  # no set: any JSON may be sought
    for sample in samples:
        if (model := sample.settings.get("model")) not in own:
            raise UserError(
                f"{sample.path} was drawn by {model}, and step {weights.step} of {run} is published: draw it again "
                "with scripts/sample.py, or take it out of the folder"
            )


def name_full_precision(config: Config, weights: Weights, wanted: bool) -> str | None:
    """The fp32 file's name; None where it is not published.

    Raises:
        UserError: when it is wanted, and all is fp32 already, or there is no checkpoint to build it from.
    """
    if config.publish.dtype == "fp32":
        if wanted:
            raise UserError("--full-precision has no effect: publish.dtype is fp32")
        return weights_file_name(config, "fp32") if "single_file" in config.publish.formats else "unet"
    if wanted and weights.checkpoint is None:
        raise UserError("--full-precision needs the run's checkpoint, and only the export is there")
    return weights_file_name(config, "fp32") if wanted else None


def choose_weights(run: Path, config: Config) -> Weights:
    """The newest step of a run. Its export is copied where sums prove it, or where its checkpoint is gone.

    Raises:
        UserError: when there is neither a checkpoint nor a whole export.
    """
    checkpoint, dtype = find_newest(run), config.publish.dtype
    pattern = re.compile(rf"{re.escape(config.run.name)}-step-(\d{{8,}})-{dtype}(\.safetensors)?")
    here = [path for path in (run / EXPORT_FOLDER).glob("*") if not path.is_symlink()]  # damaged ones too
    exports = [int(match[1]) for path in here if (match := pattern.fullmatch(path.name))]
    step = max([*exports, step_of(checkpoint) if checkpoint else 0])
    if step == 0:
        raise UserError(f"{run} has neither a complete checkpoint nor an export in {dtype}: nothing to publish")
    suffixes = {"single_file": ".safetensors", "diffusers": ""}
    name = export_name(config.run.name, step, dtype)
    exported = [run / EXPORT_FOLDER / f"{name}{suffixes[form]}" for form in config.publish.formats]
    whole = all(path.exists() and not path.is_symlink() for path in exported)
    if checkpoint is not None and step_of(checkpoint) == step:
        lineage = shorten_paths(read_train_state(checkpoint)["lineage"])
        return Weights(step, lineage, checkpoint, exported if whole and split_sums(exported)[0] else [])
    if not whole:
        missing = f"lacks one of publish.formats {config.publish.formats}, and its checkpoint is gone"
        raise UserError(f"{run / EXPORT_FOLDER / name} {missing}")
    if (found := read_lineage(exported[0])) is None:
        raise UserError(f"{exported[0]} says nothing about its lineage, so that its card cannot be written")
    return Weights(step, found, None, exported)


def collect_licences(terms: Terms, texts: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Licence files of the folder: name -> (what it is, text). The base's own texts travel along."""
    licences = {"LICENSE.md": (LICENCE_NAMES[FAIPL], texts[FAIPL])}
    others = [(LICENCE_NAMES[OPENRAIL], texts[OPENRAIL])] if OPENRAIL in texts else []
    others += [(f"{name} of {terms.shown}", text) for name, text in terms.texts.items() if recognise(text) is None]
    for place, (what, text) in enumerate(others):
        licences[f"LICENSE-base{f'-{place + 1}' if place else ''}.md"] = (what, text)
    return licences


def check_lineage(lineage: Lineage) -> None:
    """Refuse what no card can be written of, at any stage; earlier ones come from other people's files.

    Raises:
        UserError: for a run's name that can name no file, or where config or base are missing.
    """
    made: Lineage | None = lineage
    while made is not None:
        name, config, base = made.get("run"), made.get("config"), made.get("base")
        if not is_run_name(name):
            raise UserError(
                f"the lineage names a run {name!r}, which can name no file (letters, digits, . _ and -): it is "
                "damaged, or its base's file was not made by this trainer"
            )
        if not is_config(config):
            raise UserError(f"the lineage of {name} has no config, without which its card cannot be written")
        if not isinstance(base, dict) or not is_base(base) or not isinstance(base.get("lineage"), dict | None):
            raise UserError(f"the lineage of {name} does not say which base it began with (reference, sha256, lineage)")
        made = base.get("lineage")


def build_folder(folder: Path, release: Release, weights: Weights, licences: dict[str, str]) -> Path:
    """Write everything beside the final name, check it, and move it.

    Raises:
        UserError: see :func:`publish`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # what is copied: an export that is still to be made says itself what it needs
    copied = [*weights.exported, *(sample.path for sample in release.samples)]
    needed = sum(file.stat().st_size for path in copied for file in (path, *path.rglob("*")) if file.is_file())
    with put_whole(folder, needed) as temporary:
        write_weights(temporary, release, weights)
        written = find_base(str(temporary / release.weights if release.weights else temporary))
        upcast = read_config(written, "vae").get("force_upcast", True)
        release = dataclasses.replace(release, sdxl_shapes=has_sdxl_shapes(written), vae_upcast=bool(upcast))
        write_json(temporary / LINEAGE_FILE, weights.lineage)
        for place, made in enumerate(release.stages):
            settings = yaml.safe_dump(made["config"], sort_keys=False, allow_unicode=True, width=120)
            write_text(temporary / stage_config_file(place, made), settings)
        for name, text in licences.items():
            write_text(temporary / name, text)
        for sample in release.samples:
            (temporary / SAMPLES_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(sample.path, temporary / SAMPLES_FOLDER / sample.path.name, follow_symlinks=False)
        write_text(temporary / "CHANGES.md", write_changes(release))
        write_text(temporary / "README.md", write_card(release))
        check_fit(temporary, weights_file_names(release.config), folder)
        write_sums(temporary / SUMS_FILE, hash_files(temporary))
    return folder


def write_weights(folder: Path, release: Release, weights: Weights) -> None:
    """The formats of ``publish.formats``, copied or built from the checkpoint; and fp32, where it is another file."""
    config, checkpoint = release.config, weights.checkpoint
    fp32 = release.full_precision if config.publish.dtype != "fp32" else None
    if weights.exported:
        remedy = "move that export away, and it is built again from the checkpoint"
        if checkpoint is None:
            remedy = "its checkpoint is gone, so that it cannot be built again"
        check_export(weights.exported, weights.lineage, remedy)
    for path in sorted(weights.exported):  # the folder first
        if path.is_dir():
            copy_folder(path, folder)
        else:
            folder.mkdir(exist_ok=True)
            copy_with_metadata(path, folder / str(release.weights), listing_entries(release))
    if checkpoint is None or (weights.exported and not fp32):
        return
    verify_checkpoint(checkpoint)
    state, run = read_train_state(checkpoint), checkpoint.parent.parent
    check_fit_to_use(checkpoint, state)
    if not weights.exported:
        made = list_export(build_export(checkpoint, state, config, config.publish.dtype, run), release)
        write_formats(made, sorted(config.publish.formats), folder / str(release.weights), folder)
    if fp32:
        single = dataclasses.replace(config, publish=dataclasses.replace(config.publish, formats=["single_file"]))
        made = list_export(build_export(checkpoint, state, single, "fp32", run), release)
        write_single_file(folder / fp32, made)


def list_export(made: Export, release: Release) -> Export:
    """An export with the entries of a published file in its metadata."""
    said = made.metadata | listing_entries(release)
    return dataclasses.replace(made, metadata={key: text for key, text in said.items() if text is not None})


def copy_folder(source: Path, target: Path) -> None:
    """A copy of a folder's files and links. (shutil.copytree goes on after an error and hides that a disk is full.)"""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            shutil.copyfile(path, copy, follow_symlinks=False)
        elif not path.is_dir():
            with path.open("rb") as file, copy.open("xb") as copied:
                copy_rest(file, path, copied)

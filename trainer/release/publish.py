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
from trainer.core.files import sync_file, sync_folder, write_json, write_text
from trainer.core.layout import EXPORT_FOLDER, LINEAGE_FILE, PUBLISHED_FOLDER, RUN_FILE
from trainer.model.base import LazyFile, find_base
from trainer.model.checkpoint import find_newest, read_train_state, step_of, verify_checkpoint
from trainer.model.lineage import Lineage, read_lineage, shorten_paths
from trainer.model.lineage_rows import list_stages
from trainer.release.artefacts import copy_with_metadata, hash_files, room_beside
from trainer.release.card import Release, config_file, write_card, write_changes
from trainer.release.export import build_export, write_diffusers, write_single_file
from trainer.release.export_check import check_export
from trainer.release.folder import check_folder, read_sums, write_sums
from trainer.release.licence import FAIPL, OPENRAIL, Terms, find_refusals, find_terms, read_licence_files, recognise
from trainer.release.metadata import publish_entries
from trainer.release.request import Request, read_publish_config
from trainer.release.shapes import has_sdxl_shapes
from trainer.sample.pictures import Sample, read_samples
from trainer.train.run import locate_from_run, read_work

RUN_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")
LICENCE_NAMES = {FAIPL: "Fair AI Public License 1.0-SD", OPENRAIL: "CreativeML Open RAIL++-M, of the base"}


@dataclass(frozen=True)
class Weights:
    """What is published of a run: its newest step, from an export that lies there or from the checkpoint."""

    step: int
    lineage: Lineage
    checkpoint: Path | None
    exported: Path | None  # RUN/export/<run>-step-XXXXXXXX-<dtype>, with or without .safetensors


def publish(request: Request, overrides: Sequence[str] = ()) -> tuple[Path, Release]:
    """Build and check the folder; it is there when this returns, and the same when it was there already.

    Raises:
        UserError: with every reason not to publish; for a lineage that cannot be followed; for contents that strangers
            must not see; or where something else lies under the folder's name.
    """
    config = read_publish_config(request.run, overrides)
    weights = find_weights(request.run, config)
    check_lineage(weights.lineage)
    places = [config.model.pretrained]
    if weights.checkpoint is not None:
        reference = read_train_state(weights.checkpoint)["base"]["reference"]  # the lineage shortens paths
        places.insert(0, locate_from_run(request.run, reference))
    terms = find_terms(weights.lineage, places, request.base)
    given = read_licence_files(list(request.license_files))
    brought = {licence: text for text in terms.texts.values() if (licence := recognise(text))}
    refusals = find_refusals(
        terms, brought | given, source_url=config.publish.source_url, acknowledged=request.acknowledged,
    )  # fmt: skip
    if reasons := list(refusals):
        listed = "\n".join(f"  {reason}" for reason in reasons)
        raise UserError(f"{request.run} is not published, for {len(reasons)} reason(s):\n{listed}")
    licences = collect_licences(terms, brought | given)
    template = config.publish.card_template
    release = Release(
        config=config,
        stages=find_stages(request.run, weights.lineage),
        terms=terms,
        license_files={name: what for name, (what, _) in licences.items()},
        acknowledged=request.acknowledged,
        base_id=request.base if request.base and not Path(request.base).expanduser().exists() else None,
        samples=read_samples(request.samples or request.run / EXPORT_FOLDER / "samples"),
        weights=f"{config.run.name}.safetensors" if "single_file" in config.publish.formats else None,
        full_precision=name_full_precision(config, request.full_precision),
        card_template=Path(locate_from_run(request.run, template)) if template else None,
    )
    write_card(release)  # what its template refuses, it refuses before the weights are copied
    if request.samples and not release.samples:
        raise UserError(f"--samples {request.samples} holds no PNG")
    check_samples(release.samples, weights, config.run.name)
    folder = request.out or request.run / PUBLISHED_FOLDER / config.run.name
    if not folder.name or folder.name == "..":
        raise UserError(f"--out {folder} is a folder that exists: name a new one")
    texts = {name: text for name, (_, text) in licences.items()}
    return build_folder(folder, release, weights, texts), release


def check_samples(samples: Sequence[Sample], weights: Weights, run: str) -> None:
    """Refuse images that say that another model drew them; those that say nothing of it pass.

    Raises:
        UserError: naming the first.
    """
    for sample in samples:
        model = sample.settings.get("model")
        exports = {f"{run}-step-{weights.step:08d}-{dtype}" for dtype in ("fp16", "bf16", "fp32")}
        if model is not None and model not in {*exports, run}:
            raise UserError(
                f"{sample.path} was drawn by {model}, and step {weights.step} of {run} is published: draw it again "
                "with scripts/sample.py, or take it out of the folder"
            )


def name_full_precision(config: Config, wanted: bool) -> str | None:
    """The fp32 file's name; None where it is not published.

    Raises:
        UserError: when it is wanted, and all is fp32 already.
    """
    if config.publish.dtype == "fp32":
        if wanted:
            raise UserError("--full-precision has no effect: publish.dtype is fp32")
        return f"{config.run.name}.safetensors" if "single_file" in config.publish.formats else "unet"
    return f"{config.run.name}-fp32.safetensors" if wanted else None


def find_weights(run: Path, config: Config) -> Weights:
    """The newest step of a run, and where its weights come from: an export of it if there is one, else the checkpoint.

    Raises:
        UserError: when there is neither.
    """
    checkpoint, dtype = find_newest(run), config.publish.dtype
    pattern = re.compile(rf"{re.escape(config.run.name)}-step-(\d{{8,}})-{dtype}(\.safetensors)?")
    exports = {
        int(match[1]): path.with_name(path.name.removesuffix(".safetensors"))
        for path in run.glob("export/*")
        if (match := pattern.fullmatch(path.name)) and not path.is_symlink()
    }
    step = max([*exports, step_of(checkpoint) if checkpoint else 0])
    if step == 0:
        raise UserError(f"{run} has neither a complete checkpoint nor an export in {dtype}: nothing to publish")
    of_step = checkpoint if checkpoint and step_of(checkpoint) == step else None
    exported = exports.get(step)
    complete = exported is not None and all(path.exists() for path in exported_paths(exported, config))
    if not complete and of_step is None:
        raise UserError(f"{exported} lacks one of publish.formats {config.publish.formats}, and its checkpoint is gone")
    if of_step is not None:
        lineage = shorten_paths(read_train_state(of_step)["lineage"])
    else:
        found = read_lineage(exported_paths(exported, config)[0])  # type: ignore[arg-type]
        if found is None:
            raise UserError(f"{exported} says nothing about its lineage, so that its card cannot be written")
        lineage = found
    return Weights(step, lineage, of_step, exported if complete else None)


def exported_paths(exported: Path, config: Config) -> list[Path]:
    """What an export consists of in the formats of the config."""
    names = {"single_file": f"{exported.name}.safetensors", "diffusers": exported.name}
    return [exported.with_name(names[form]) for form in config.publish.formats]


def collect_licences(terms: Terms, texts: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Licence files of the folder: name -> (what it is, text). The base's own texts travel along."""
    licences = {"LICENSE.md": (LICENCE_NAMES[FAIPL], texts[FAIPL])}
    others = [(LICENCE_NAMES[OPENRAIL], texts[OPENRAIL])] if OPENRAIL in texts else []
    others += [(f"{name} of {terms.where}", text) for name, text in terms.texts.items() if recognise(text) is None]
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
        if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
            raise UserError(
                f"the lineage names a run {name!r}, which can name no file (letters, digits, . _ and -): it is "
                "damaged, or its base's file was not made by this trainer"
            )
        if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
            raise UserError(f"the lineage of {name} has no config, without which its card cannot be written")
        known = isinstance(base, dict) and all(isinstance(base.get(key), str) for key in ("reference", "sha256"))
        if not isinstance(base, dict) or not known or not isinstance(base.get("lineage"), dict | None):
            raise UserError(f"the lineage of {name} does not say which base it began with (reference, sha256, lineage)")
        made = base.get("lineage")


def find_stages(run: Path, lineage: Lineage) -> list[Lineage]:
    """The stages of the lineage, the first of them first; their work from the lineage, else from the run's records."""
    stages = list_stages(lineage)
    folder: Path | None = run
    for place in reversed(range(len(stages))):
        made = stages[place]
        if made is not stages[-1]:
            folder = run_of_export(stages[place + 1]["base"]["reference"], made["run"])
        if made["hours"] is None and folder is not None and made["step"] is not None:
            work = read_work(folder, made["step"])
            stages[place] = made | {"hours": work.hours, "hardware": list(work.hardware)}
    return stages


def run_of_export(reference: str, name: str) -> Path | None:
    """The run's folder whose export a later stage began with; None where it is not here."""
    folder = Path(reference).expanduser().parent.parent
    return folder if (folder / RUN_FILE).is_file() and folder.name == name else None


def build_folder(folder: Path, release: Release, weights: Weights, licences: dict[str, str]) -> Path:
    """Write everything beside the final name, check it, and move it.

    Raises:
        UserError: see :func:`publish`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with room_beside(folder, count_copied(release, weights)) as temporary:
        write_weights(temporary, release, weights)
        if release.weights:
            shapes = has_sdxl_shapes(find_base(str(temporary / release.weights)))
            release = dataclasses.replace(release, sdxl_shapes=shapes)
        write_json(temporary / LINEAGE_FILE, weights.lineage)
        for place, made in enumerate(release.stages):
            settings = yaml.safe_dump(made["config"], sort_keys=False, allow_unicode=True, width=120)
            write_text(temporary / config_file(place, made), settings)
        for name, text in licences.items():
            write_text(temporary / name, text)
        for sample in release.samples:
            (temporary / "samples").mkdir(exist_ok=True)
            shutil.copyfile(sample.path, temporary / "samples" / sample.path.name, follow_symlinks=False)
        write_text(temporary / "CHANGES.md", write_changes(release))
        write_text(temporary / "README.md", write_card(release))
        check_folder(temporary, release.config.run.name, folder)
        write_sums(temporary)
        if not folder.exists():
            for path in temporary.rglob("*"):
                sync_file(path)  # folders too; what was copied is not on the disk yet
            sync_folder(temporary)
            temporary.rename(folder)
            sync_folder(folder.parent)
        elif folder.is_symlink() or not folder.is_dir() or hash_files(folder) != hash_files(temporary):
            reason = "exists and is not what would be published now; it is left alone"
            raise UserError(f"{folder} {reason}: move it away, or use --out DIR")
    return folder


def count_copied(release: Release, weights: Weights) -> int:
    """Bytes of what is copied; an export that is still to be made says itself what it needs."""
    exported = exported_paths(weights.exported, release.config) if weights.exported else []
    files = [file for path in exported for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in (*files, *(sample.path for sample in release.samples)) if file.is_file())


def write_weights(folder: Path, release: Release, weights: Weights) -> None:
    """The single file and the diffusers layout, from the export that lies there, else from the checkpoint; and fp32."""
    config = release.config
    if weights.exported is not None:
        paths = exported_paths(weights.exported, config)
        check_export(paths, weights.lineage, weights.checkpoint, config)
        for path in paths:
            if path.is_dir():
                shutil.copytree(path, folder, symlinks=True, dirs_exist_ok=True)
            else:
                folder.mkdir(exist_ok=True)
                copy_single_file(path, folder / str(release.weights), config)
    if weights.exported is not None and (not release.full_precision or config.publish.dtype == "fp32"):
        return
    if weights.checkpoint is None:
        raise UserError("--full-precision needs the run's checkpoint, and only the export is there")
    verify_checkpoint(weights.checkpoint)
    state = read_train_state(weights.checkpoint)
    if weights.exported is None:
        made = build_export(weights.checkpoint, state, config, config.publish.dtype, weights.checkpoint.parent.parent)
        if "diffusers" in config.publish.formats:
            write_diffusers(folder, made)
        if release.weights:
            write_single_file(folder / release.weights, made)
    if release.full_precision and config.publish.dtype != "fp32":
        single = dataclasses.replace(config, publish=dataclasses.replace(config.publish, formats=["single_file"]))
        run_folder = weights.checkpoint.parent.parent
        made = build_export(weights.checkpoint, state, single, "fp32", run_folder)
        write_single_file(folder / release.full_precision, made)


def copy_single_file(source: Path, target: Path, config: Config) -> None:
    """An exported file, with the title, author and licence that are to be published now."""
    said = LazyFile(source).metadata
    changes = {key: value for key, value in publish_entries(config).items() if said.get(key) != value}
    if changes:
        copy_with_metadata(source, target, changes)
    else:
        shutil.copyfile(source, target, follow_symlinks=False)


def check_published(folder: Path, config: Config) -> None:
    """What an upload sends: the folder as it was built, not as somebody changed it since."""
    check_folder(folder, config.run.name)
    read_sums(folder)

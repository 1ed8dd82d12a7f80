"""Where weights come from: a diffusers folder, a single .safetensors file, or a hub id that becomes a folder.

Components are "unet", "text_encoder", "text_encoder_2" and "vae"; tensors always come under diffusers' classic names
(``text_model.`` in both encoders), on the CPU, in the dtype in which they are stored, and complete: a tensor that is
missing or unknown is an error here, not a random weight later. Nothing pickled is ever opened.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import ModelConfig
from trainer.core.errors import UserError
from trainer.core.files import sha256_bytes, sha256_file
from trainer.core.json_text import check_object, decode_json, read_json
from trainer.core.layout import COMPONENT_FILE, MODEL_INDEX_FILE, TOKENIZER_SETTINGS
from trainer.core.progress import BYTES, Meter
from trainer.model.component_configs import check_component, describe_left_out
from trainer.model.diffusion import SILENT, Prediction, file_predictions, scheduler_prediction, write_scheduler
from trainer.model.exports import find_export, find_run, suggest_exports
from trainer.model.hub import STEMS, fetch, find_cached, find_weights, refuse_pickled
from trainer.model.latents import LatentScale, check_vae_config
from trainer.model.recognise import check_model_file, check_model_folder
from trainer.model.single_file import (
    NAME_PREFIXES,
    check_layout,
    check_names,
    is_extra,
    iterate_component,
    tensor_names,
)
from trainer.model.weights_file import LazyFile, check_each, measure_tensors

CONFIGS_KEY = "trainer.configs"  # our single files carry their component configs under this metadata key, as JSON
CLIP_VOCABULARY = 49_408
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Base:
    """A model to start from: what the user wrote, and where it lies."""

    reference: str
    path: Path  # diffusers folder, or .safetensors file
    revision: str | None  # the commit of a hub id


@dataclass(frozen=True)
class VaeWeights:
    config: dict[str, Any]
    state: dict[str, Tensor]
    sha256: str  # of the tensors: see hash_tensors
    scale: LatentScale


def find_base(
    reference: str,
    revision: str | None = None,
    key: str = "model.pretrained",
    *,
    parts: Sequence[str] = tuple(STEMS),
    runs: Path = Path("runs"),
) -> Base:
    """What ``model.pretrained`` names: a local folder or file, a run or checkpoint, else a hub id, which is downloaded.

    ``key`` is what messages call it; ``parts`` are those whose weights are needed, which alone are fetched and looked
    at; ``runs`` is the folder whose runs are suggested where the reference names nothing.

    Raises:
        UserError: for anything else, pickled weights and models of other kinds included, saying what it is.
    """
    path = Path(reference).expanduser()
    if path.exists() and revision is not None:
        raise UserError(
            f"model.revision is {revision!r}, but {reference} is local: a revision is of a hub id; remove it"
        )
    if path.is_file():
        refuse_pickled(path)
        if path.suffix != ".safetensors":
            raise UserError(f"{reference} is neither a diffusers folder nor a .safetensors file")
        check_model_file(path)
        return Base(reference, path, None)
    run = None if (path / MODEL_INDEX_FILE).is_file() else find_run(path)
    if path.is_dir() or run is not None:
        if run is not None:
            path = find_export(*run)
            reference = str(path)  # a later export must not take its place
        check_model_folder(path, parts)
        return Base(reference, path, None)
    folder = fetch(reference, revision, key, parts, hint=suggest_exports(reference, runs))
    check_model_folder(folder, parts)
    return Base(reference, folder, folder.name)


def config_file(component: str) -> str:
    """Where a component's config lies in a diffusers folder; also of "scheduler" and "model_index"."""
    names = {"scheduler": "scheduler/scheduler_config.json", "model_index": MODEL_INDEX_FILE}
    return names.get(component, f"{component}/config.json")


def read_config(base: Base, component: str) -> dict[str, Any]:
    """The config of a component, of the "scheduler" or of the pipeline ("model_index").

    A single file without configs of its own is SDXL; then its markers and metadata say how it predicts.
    """
    if (said := read_said_config(base, component)) is not None:
        return check_component(component, said, f"{base.path}: {config_file(component)}")
    file = LazyFile(base.path)
    config = read_sdxl_config(component)
    if component == "scheduler":
        said = file_predictions(file, file.metadata)
        return write_scheduler(config, next(iter(said.values()), Prediction()))
    return config


def read_said_config(base: Base, component: str) -> dict[str, Any] | None:
    """A config as the base has it, whatever it holds; None of a single file without."""
    if base.path.is_dir():
        return read_json(base.path / config_file(component), infinity=component == "scheduler")
    return carried_configs(LazyFile(base.path)).get(component)


def carried_configs(file: LazyFile) -> dict[str, dict[str, Any]]:
    """The component configs in a single file of ours, whatever they hold; none in others.

    Raises:
        UserError: where they are no JSON objects.
    """
    where = f"{file.path}: {CONFIGS_KEY}"
    try:
        configs = check_object(decode_json(file.metadata.get(CONFIGS_KEY, "{}"), infinity=True), where)
    except ValueError as error:
        raise UserError(f"{where} cannot be read as JSON: {error}") from error
    return {name: check_object(config, f"{where}, {name}") for name, config in configs.items()}


def note_configs(base: Base, tokenizers: Sequence[Path] = ()) -> list[str]:
    """What the configs of a base and of tokenizers say that is left out, a note for each file."""
    found = [
        (config_file(component), component, said)
        for component in ("model_index", "scheduler", *STEMS)
        if (base.path.is_file() or (base.path / config_file(component)).is_file())
        and (said := read_said_config(base, component)) is not None
    ]
    files = [folder / name for folder in tokenizers for name in TOKENIZER_SETTINGS if (folder / name).is_file()]
    found += [(f"{file.parent.name}/{file.name}", "tokenizer", read_json(file)) for file in files]
    return [
        f"{base.reference}: {file} says {names}, which is left out, of what is trained and of what is exported"
        for file, component, said in found
        if (names := describe_left_out(component, said)) is not None
    ]


def read_sdxl_config(component: str) -> dict[str, Any]:
    """SDXL base 1.0's own config, from the package."""
    return json.loads(
        (resources.files("trainer.model") / "assets/sdxl" / config_file(component)).read_text(encoding="utf-8")
    )


def read_predictions(base: Base) -> dict[str, Prediction]:
    """What a base says that it predicts, by where it says so, the strongest first; never empty.

    Raises:
        UserError: for a prediction or noise schedule of which nothing is known here.
    """
    try:
        if base.path.is_dir():
            return {f"by {config_file('scheduler')}": scheduler_prediction(read_config(base, "scheduler"))}
        file = LazyFile(base.path)
        said = file_predictions(file, file.metadata)
        if "scheduler" in carried_configs(file):
            said[f"by {CONFIGS_KEY}"] = scheduler_prediction(read_config(base, "scheduler"))
        return said or {SILENT: Prediction()}
    except UserError as error:
        raise UserError(f"{base.reference}: {error}") from error


def note_weights(base: Base) -> str | None:
    """That weights are stored in fp8, which loads, but has lost what fp16 would hold; None where none are."""
    paths = [base.path] if base.path.is_file() else [
        path
        for component in ("unet", "text_encoder", "text_encoder_2")
        for path in find_weights(base.path / component, STEMS[component])
    ]  # fmt: skip
    parts = []
    for path in paths:
        file = LazyFile(path)
        if count := sum(file.dtype(name).startswith("F8_") for name in file):
            where = "the file" if path == base.path else path.relative_to(base.path).as_posix()
            parts.append(f"{count} of {len(file)} tensors of {where}")
    if not parts:
        return None
    lost = "with 3 or 2 bits of mantissa: prefer the model in fp16, bf16 or fp32"
    return f"{base.reference}: {', '.join(parts)} are stored in fp8, {lost}"


def read_state(base: Base, component: str) -> dict[str, Tensor]:
    """A component's tensors under classic names, on the CPU, in the dtype as stored.

    Raises:
        UserError: on missing or unknown tensors, naming a few, and on values that are not finite.
    """
    return dict(iterate_state(base, component))


def iterate_state(base: Base, component: str, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """What ``read_state`` reads, (name, tensor), one at a time as they are asked for; only the ``wanted``, if given.

    Raises:
        UserError: as ``read_state``; names are compared before anything is read.
    """
    config = read_config(base, component)
    try:
        if base.path.is_file():
            size = measure_tensors(base.path, NAME_PREFIXES[component])
            with Meter(f"read {component}", size if wanted is None else None, BYTES) as meter:
                file = LazyFile(base.path, meter)
                check_layout(file)
                yield from check_each(iterate_component(component, file, config, wanted=wanted), component)
        else:
            yield from check_each(iterate_component_folder(base.path / component, component, config, wanted), component)
    except UserError as error:
        raise UserError(f"{base.path}: {error}") from error


def iterate_component_folder(
    folder: Path, component: str, config: Mapping[str, Any], wanted: Collection[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """A component's tensors from its diffusers folder, whatever version of the libraries wrote it."""
    paths = find_weights(folder, STEMS[component])
    size = sum(path.stat().st_size for path in paths) if wanted is None else None
    with Meter(f"read {component}", size, BYTES) as meter:
        stored = {name: file for file in [LazyFile(path, meter) for path in paths] for name in file}
        for name, old in normalise(component, stored, config).items():
            if wanted is None or name in wanted:
                yield name, stored[old][old]


def normalise(component: str, stored: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Classic name -> what older or newer libraries called it, in the order of ``tensor_names``."""
    state = {name: name for name in stored if not is_extra(f".{name}")}
    if component == "vae":
        for old, new in OLD_VAE_NAMES.items():
            state = {name.replace(old, new) if ".attentions." in name else name: state[name] for name in state}
    elif component != "unet" and not any(name.startswith("text_model.") for name in state):  # transformers 5
        state = {name if name.startswith("text_projection.") else f"text_model.{name}": state[name] for name in state}
    names = tensor_names(component, config)
    check_names(component, names, state)
    return {name: state[name] for name in names}


def hash_base(base: Base) -> str:
    """SHA-256 that names the weights and configs, the same for every copy: of the file, or of a list of the files."""
    if base.path.is_file():
        return sha256_file(base.path)
    files: list[Path] = []
    for component, stem in STEMS.items():
        if (base.path / component / COMPONENT_FILE).is_file():
            files += [base.path / component / COMPONENT_FILE, *find_weights(base.path / component, stem)]
    lines = sorted(f"{path.relative_to(base.path).as_posix()} {sha256_file(path)}\n" for path in files)
    return sha256_bytes("".join(lines).encode())


def find_tokenizers(base: Base, tokenizer: str | None, key: str = "model.tokenizer") -> tuple[Path, Path]:
    """The folders of both tokenizers: of ``model.tokenizer`` (folder or hub id) if given, else of the base.

    ``key`` is what messages call it.

    Raises:
        UserError: when there are none, which says what to set.
    """
    folder = base.path
    if tokenizer is not None:
        folder = Path(tokenizer).expanduser()
        if not folder.exists():
            folder = fetch(tokenizer, base.revision if tokenizer == base.reference else None, key, ())
    first, second = folder / "tokenizer", folder / "tokenizer_2"
    for found in (first, second):
        has_words = (found / "vocab.json").is_file() and (found / "merges.txt").is_file()
        if not has_words and not (found / "tokenizer.json").is_file():
            raise UserError(
                f"no tokenizer in {found}: set {key} to a folder or hub id with tokenizer/ and tokenizer_2/ "
                "(any SDXL model in diffusers layout; single files carry none)"
            )
    return first, second


def read_vocab_sizes(base: Base) -> tuple[int, int]:
    """Vocabulary sizes of both text encoders; transformers leaves out of a config what is CLIP's."""
    sizes = [
        read_config(base, name).get("vocab_size") or CLIP_VOCABULARY for name in ("text_encoder", "text_encoder_2")
    ]
    return sizes[0], sizes[1]


def read_vae(vae: str | None, base: Base, revision: str | None = None) -> VaeWeights:
    """The VAE: of ``model.vae`` if given (folder, single file with or without prefix, hub id), else of the base.

    ``revision`` is ``model.vae_revision``: the branch, tag or commit of a hub id.

    Raises:
        UserError: when it is missing, incomplete or pickled, not finite, or has numbers that are not known here.
    """
    if vae is not None:
        path = find_vae(vae, revision)
        own = read_config(base, "vae") if path.is_file() and has_vae(base) else None
        return load_vae(vae, path, own)
    if not has_vae(base):
        raise UserError(f"{base.reference} has no VAE: set model.vae")
    config, state = read_config(base, "vae"), read_state(base, "vae")
    try:
        return VaeWeights(config, state, hash_tensors(state), check_vae_config(config))
    except UserError as error:
        raise UserError(f"{base.reference}: {error}") from error


def read_vae_alone(model: ModelConfig) -> VaeWeights:
    """The VAE for a preparation, which needs nothing else: of a base only its VAE is fetched or looked at.

    Where ``model.vae`` names one, the base may be absent. A single file without a config of its own then takes the
    base's as far as that lies here, else SDXL's.

    Raises:
        UserError: as ``read_vae``.
    """
    if model.vae is None:
        return read_vae(None, find_base(model.pretrained, model.revision, parts=("vae",)))
    path = find_vae(model.vae, model.vae_revision)
    return load_vae(model.vae, path, find_vae_config(model) if path.is_file() else None)


def find_vae_config(model: ModelConfig) -> dict[str, Any] | None:
    """The config of the base's VAE, if it lies here; the hub is not asked."""
    if Path(model.pretrained).expanduser().exists():
        base = find_base(model.pretrained, model.revision, parts=())
        return read_config(base, "vae") if has_vae(base) else None
    cached = find_cached(model.pretrained, model.revision, config_file("vae"))
    return None if cached is None else check_component("vae", read_json(cached), str(cached))


def find_vae(vae: str, revision: str | None) -> Path:
    """Where ``model.vae`` lies: a folder or a file."""
    path = Path(vae).expanduser()
    refuse_pickled(path)
    if path.exists() and revision is not None:
        raise UserError(f"model.vae_revision is {revision!r}, but {vae} is local: a revision is of a hub id; remove it")
    return path if path.exists() else fetch(vae, revision, "model.vae", ("", "vae"))


def load_vae(vae: str, path: Path, config: dict[str, Any] | None) -> VaeWeights:
    """A separate VAE: of its own folder, of the vae/ of a whole model, or of a file in any of three namings.

    ``config`` is for a file that carries none; without it SDXL's is taken.
    """
    try:
        if path.is_dir():
            folder = path / "vae" if (path / "vae").is_dir() else path
            config = check_component("vae", read_json(folder / COMPONENT_FILE), COMPONENT_FILE)
            tensors = iterate_component_folder(folder, "vae", config)
        else:
            file = LazyFile(path)
            if carried := carried_configs(file).get("vae"):
                config = check_component("vae", carried, CONFIGS_KEY)
            config = config or read_sdxl_config("vae")
            prefix = NAME_PREFIXES["vae"] if any(name.startswith(NAME_PREFIXES["vae"]) for name in file) else ""
            as_diffusers = not prefix and any(".mid_block." in name for name in file)
            if as_diffusers:
                tensors = ((name, file[old]) for name, old in normalise("vae", file, config).items())
            else:
                tensors = iterate_component("vae", file, config, prefix)
        state = dict(check_each(tensors, "the VAE"))
        return VaeWeights(config, state, hash_tensors(state), check_vae_config(config))
    except UserError as error:
        raise UserError(f"model.vae {vae}: {error}") from error


def has_vae(base: Base) -> bool:
    """Whether a base has a VAE."""
    if base.path.is_dir():
        return (base.path / "vae").is_dir()
    return any(name.startswith(NAME_PREFIXES["vae"]) for name in LazyFile(base.path))


def hash_tensors(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, shape and value rounded to fp16: an fp16 copy of fp32 weights is the same model.

    So the latents of stage 1's VAE stay those of stage 2, which starts from an export in fp16.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].to(torch.float16).contiguous()
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

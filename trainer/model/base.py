"""Where weights come from: a diffusers folder, a single .safetensors file, or a hub id that becomes a folder.

Components are "unet", "text_encoder", "text_encoder_2" and "vae"; tensors always come under diffusers' classic names
(``text_model.`` in both encoders), on the CPU, in the dtype in which they are stored, and complete: a tensor that is
missing or unknown is an error here, not a random weight later. Nothing pickled is ever opened.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.core.errors import UserError
from trainer.core.files import sha256_file
from trainer.model.hub import STEMS, fetch, find_weights, read_json, refuse_pickled
from trainer.model.single_file import PREFIXES, check_names, from_single_file, is_extra, read_component, tensor_names

CONFIGS_KEY = "trainer.configs"  # our single files carry their component configs under this metadata key, as JSON
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


class LazyFile(Mapping[str, Tensor]):
    """A .safetensors file whose tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable .safetensors file: {error}") from error
        self.names = dict.fromkeys(self.file.keys())
        self.metadata: dict[str, str] = self.file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        # a copy: the file is mapped, where tensors lie at odd addresses, on which the last bits of products depend
        return self.file.get_tensor(name).clone()

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def find_base(reference: str, revision: str | None = None, key: str = "model.pretrained") -> Base:
    """What ``model.pretrained`` names: a local folder or file, a run, else a hub id, whose files are downloaded.

    ``key`` is what messages call it.

    Raises:
        UserError: for anything else, pickled weights included.
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
        return Base(reference, path, None)
    if path.is_dir():
        if not (path / "model_index.json").is_file() and (path / "run.json").is_file():
            path = find_export(path)
            reference = str(path)  # a later export must not take its place
        check_folder(path)
        return Base(reference, path, None)
    folder = fetch(reference, revision, key)
    check_folder(folder)
    return Base(reference, folder, folder.name)


def find_export(run: Path) -> Path:
    """A run's newest exported diffusers folder, ``export/<run>-step-XXXXXXXX-<dtype>``.

    Raises:
        UserError: when there is none, or the newest step was exported in several dtypes.
    """
    found = sorted(path for path in run.glob("export/*-step-*") if (path / "model_index.json").is_file())
    if not found:
        raise UserError(f"{run} is a run without an exported diffusers folder: python scripts/export.py {run}")
    newest = [path for path in found if path.name.rpartition("-")[0] == found[-1].name.rpartition("-")[0]]
    if len(newest) > 1:
        raise UserError(f"{run} has several exports of its newest step; name one: {', '.join(map(str, newest))}")
    return newest[0]


def check_folder(folder: Path) -> None:
    """Refuse what is not SDXL's diffusers layout with safetensors weights."""
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a diffusers folder: it has no model_index.json")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if not (folder / component / "config.json").is_file():
            raise UserError(f"{folder} is not an SDXL model: {component}/config.json is missing")
        find_weights(folder / component, STEMS[component])


def config_file(component: str) -> str:
    """Where a component's config lies in a diffusers folder; also of "scheduler" and "model_index"."""
    names = {"scheduler": "scheduler/scheduler_config.json", "model_index": "model_index.json"}
    return names.get(component, f"{component}/config.json")


def read_config(base: Base, component: str) -> dict[str, Any]:
    """The config of a component, of the "scheduler" or of the pipeline ("model_index").

    A single file without configs of its own is SDXL; then ``v_pred`` and ``ztsnr`` tensors say how it predicts.
    """
    if base.path.is_dir():
        return read_json(base.path / config_file(component))
    file = LazyFile(base.path)
    carried = json.loads(file.metadata.get(CONFIGS_KEY, "{}"))
    if component in carried:
        return carried[component]
    config = read_sdxl_config(component)
    if component == "scheduler" and "v_pred" in file:
        config["prediction_type"] = "v_prediction"
        if "ztsnr" in file:
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def read_sdxl_config(component: str) -> dict[str, Any]:
    """SDXL base 1.0's own config, from the package."""
    return json.loads(
        (resources.files("trainer.model") / "assets/sdxl" / config_file(component)).read_text(encoding="utf-8")
    )


def read_state(base: Base, component: str) -> dict[str, Tensor]:
    """A component's tensors under classic names, on the CPU, in the dtype as stored.

    Raises:
        UserError: on missing or unknown tensors, naming a few.
    """
    config = read_config(base, component)
    try:
        if base.path.is_file():
            return from_single_file(LazyFile(base.path), {component: config})[component]
        return read_folder(base.path / component, component, config)
    except UserError as error:
        raise UserError(f"{base.path}: {error}") from error


def read_folder(folder: Path, component: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A component's tensors from its diffusers folder, whatever version of the libraries wrote it."""
    stored: dict[str, Tensor] = {}
    for path in find_weights(folder, STEMS[component]):
        stored |= LazyFile(path)
    return normalise(component, stored, config)


def normalise(component: str, stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Classic names for what older and newer libraries wrote, in the order of ``tensor_names``."""
    state = {name: tensor for name, tensor in stored.items() if not is_extra(f".{name}")}
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
        if (base.path / component / "config.json").is_file():
            files += [base.path / component / "config.json", *find_weights(base.path / component, stem)]
    lines = sorted(f"{path.relative_to(base.path).as_posix()} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def read_vae(vae: str | None, base: Base) -> VaeWeights:
    """The VAE: of ``model.vae`` if given (folder, single file with or without prefix, hub id), else of the base.

    Raises:
        UserError: when it is missing, incomplete or pickled.
    """
    if vae is None:
        if not has_vae(base):
            raise UserError(f"{base.reference} has no VAE: set model.vae")
        config, state = read_config(base, "vae"), read_state(base, "vae")
    else:
        path = Path(vae).expanduser()
        refuse_pickled(path)
        path = path if path.exists() else fetch(vae, None, "model.vae", ("", "vae"))
        try:
            config, state = read_vae_file(path, base) if path.is_file() else read_vae_folder(path)
        except UserError as error:
            raise UserError(f"model.vae {vae}: {error}") from error
    return VaeWeights(config, state, hash_tensors(state))


def has_vae(base: Base) -> bool:
    """Whether a base brings a VAE of its own."""
    if base.path.is_dir():
        return (base.path / "vae").is_dir()
    return any(name.startswith(PREFIXES["vae"]) for name in LazyFile(base.path))


def read_vae_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A VAE's config and tensors from its own folder, or from the vae/ of a whole model."""
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(folder / "config.json")
    return config, read_folder(folder, "vae", config)


def read_vae_file(path: Path, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A VAE from a single file: its own config if it carries one, else the base's; any of the three namings."""
    file = LazyFile(path)
    config = json.loads(file.metadata.get(CONFIGS_KEY, "{}")).get("vae")
    if config is None:
        config = read_config(base, "vae") if has_vae(base) else read_sdxl_config("vae")
    if any(name.startswith(PREFIXES["vae"]) for name in file):
        return config, read_component("vae", file, config)
    if any(".mid_block." in name for name in file):
        return config, normalise("vae", file, config)
    return config, read_component("vae", file, config, prefix="")


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

"""Which files of a diffusers folder or a hub repository hold the weights, and how they get here from the hub.

Pickled files are never chosen: opening them could run code.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from trainer.core.errors import UserError, shorten
from trainer.core.json_text import read_json
from trainer.core.layout import COMPONENT_FILE, MODEL_INDEX_FILE

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
PICKLED = {".ckpt", ".pt", ".pth", ".bin"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# HfHubHTTPError derives from the HTTP library's own HTTPError (httpx or httpx2), which a lost connection raises
HUB_ERRORS: tuple[type[BaseException], ...] = (HfHubHTTPError.__bases__[0], OSError, HFValidationError)


def fetch(
    reference: str, revision: str | None, key: str, folders: Sequence[str] = tuple(STEMS), hint: str = ""
) -> Path:
    """Download a hub id's needed files, or find them in the cache; returns the snapshot's folder, named by commit.

    ``key`` is the config's, for messages, to which ``hint`` is added where nothing was found; ``folders`` are those
    with weights ("" the top, for a VAE alone).

    Raises:
        UserError: when it is no hub id, or neither the hub nor the cache has it.
    """
    if not HUB_ID.fullmatch(reference) or Path(reference).suffix in {".safetensors", *PICKLED}:
        raise UserError(f"{key}: {reference} does not exist, and is not a hub id (owner/name) either{hint}")
    try:
        names = list_hub_files(reference, revision, key, folders)
        return Path(snapshot_download(reference, revision=revision, allow_patterns=choose_files(names, folders)))
    except HUB_ERRORS as error:
        reason = shorten(str(error))
    try:
        cached = Path(snapshot_download(reference, revision=revision, local_files_only=True))
    except HUB_ERRORS as error:
        message = f"{key}: {reference} does not exist here, and could not be fetched from the hub: {reason}{hint}"
        raise UserError(message) from error
    if absent := find_absent(cached, folders):
        raise UserError(
            f"{key}: the cache holds only a part of {reference} ({', '.join(absent)} is missing), and the rest could "
            f"not be fetched from the hub: {reason}"
        )
    return cached


def list_hub_files(
    reference: str, revision: str | None, key: str, folders: Sequence[str] = tuple(STEMS), timeout: float | None = None
) -> list[str]:
    """The names of a hub id's files; the hub is asked, for ``timeout`` seconds at most, and nothing is fetched.

    Raises:
        UserError: when it is no model in diffusers' layout, where a whole one is wanted.
        HUB_ERRORS: when the hub has no such model, or cannot be asked.
    """
    names = [
        file.rfilename for file in HfApi().model_info(reference, revision=revision, timeout=timeout).siblings or []
    ]
    if "unet" in folders and MODEL_INDEX_FILE not in names:
        files = sorted(name for name in names if name.endswith(".safetensors"))
        has = f"it holds {', '.join(files[:6])}: download one and name the file" if files else "it holds no weights"
        raise UserError(f"{key}: {reference} is not a model in diffusers layout (model_index.json is missing); {has}")
    return names


def find_absent(snapshot: Path, folders: Sequence[str]) -> list[str]:
    """The parts that an incomplete snapshot in the cache lacks: a preparation fetches no more than the VAE."""
    if "" in folders:  # a VAE alone, at the top or in vae/
        return [] if any((snapshot / folder / COMPONENT_FILE).is_file() for folder in folders) else [COMPONENT_FILE]
    needed = [folder for folder in folders if folder != "vae" or len(folders) == 1]  # a base may have no VAE
    return [folder for folder in needed if not pick_weights(list_names(snapshot / folder), STEMS[folder])]


def find_cached(reference: str, revision: str | None, file: str) -> Path | None:
    """One file of a hub id where it is in the cache; the hub is not asked."""
    if not HUB_ID.fullmatch(reference):
        return None
    found = try_to_load_from_cache(reference, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def choose_files(names: list[str], folders: Sequence[str] = tuple(STEMS)) -> list[str]:
    """Of a repository's files, those that are needed: configs, tokenizers, and one set of weights a component."""
    chosen = [name for name in names if re.fullmatch(r"(scheduler/|tokenizer(_2)?/)?[\w.-]+\.(json|txt)", name)]
    if folders:  # of the parts whose weights are not needed the configs, which say what the model is
        chosen += [name for name in names if re.fullmatch(r"(unet|vae|text_encoder(_2)?)/config\.json", name)]
    for folder in folders:
        inside = {Path(name).name: name for name in names if Path(name).parent == Path(folder)}
        weights = pick_weights(list(inside), STEMS[folder or "vae"])
        needed = [name for name in inside if name in (COMPONENT_FILE, *weights) or is_shard(name, weights)]
        chosen += [inside[name] for name in needed]
    return sorted(set(chosen))


def pick_weights(names: list[str], stem: str) -> list[str]:
    """Of one folder's file names, the weights to read: the plain file, else the index of shards, else a variant."""
    variant = re.compile(rf"{stem}\.[\w-]+\.safetensors|{stem}\.safetensors\.index\.[\w-]+\.json")
    variants = sorted(name for name in names if variant.fullmatch(name) and "-of-" not in name)
    preferred = [f"{stem}.safetensors", f"{stem}.safetensors.index.json",
                 f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json", *variants]  # fmt: skip
    return [name for name in preferred if name in names][:1]


def is_shard(name: str, weights: list[str]) -> bool:
    """Whether a file is one of the shards of the chosen index; a variant's shards carry its name."""
    if not weights or not weights[0].endswith(".json"):
        return False
    stem, _, rest = weights[0].partition(".safetensors.index.")
    variant = rest.removesuffix("json").removesuffix(".")
    return bool(re.fullmatch(rf"{stem}{'.' + variant if variant else ''}-\d+-of-\d+\.safetensors", name))


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The files that hold one component's tensors.

    Raises:
        UserError: when there are none, or only pickled ones.
    """
    names = list_names(folder)
    for name in pick_weights(names, stem):
        if not name.endswith(".json"):
            return [folder / name]
        listed = read_json(folder / name).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()) or not listed:
            raise UserError(f"{folder / name} lists no files: weight_map must name one for each tensor")
        shards = sorted(set(listed.values()))
        if absent := [shard for shard in shards if shard not in names]:
            raise UserError(f"{folder}: {', '.join(absent[:4])} is missing, which {name} lists")
        return [folder / shard for shard in shards]
    if pickled := sorted(name for name in names if Path(name).suffix in PICKLED):
        raise UserError(f"{folder} holds only pickled weights ({pickled[0]}), which could run code: convert them first")
    raise UserError(f"{folder} has no weights: {stem}.safetensors is missing")


def list_names(folder: Path) -> list[str]:
    """The names in a folder; none where there is no folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def refuse_pickled(path: Path) -> None:
    """Pickles can run code when they are opened."""
    if path.suffix in PICKLED:
        raise UserError(f"{path} is pickled and could run code when opened: convert it to .safetensors first")

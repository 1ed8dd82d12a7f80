"""What may lie in a published folder: files of an allow-list, without links, secrets or paths of the user's machine."""

import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.config.schema import Config, Dtype
from trainer.core.errors import UserError
from trainer.core.layout import SUMS_FILE
from trainer.model.sdxl import DTYPES
from trainer.model.weights_file import read_frame
from trainer.release.artefacts import find_changed, hash_files, read_sums
from trainer.release.gallery import THUMBNAIL_PREFIX
from trainer.sample.pictures import SAMPLE_CHUNKS, read_chunks

ALLOWED = (
    r"README\.md|LICENSE\.md|LICENSE-base(-\d+)?\.md|CHANGES\.md|SHA256SUMS|lineage\.json|model_index\.json"
    r"|scheduler/scheduler_config\.json|(unet|vae)/(config\.json|diffusion_pytorch_model\.safetensors)"
    r"|text_encoder(_2)?/(config\.json|model\.safetensors)"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer_config\.json|special_tokens_map\.json)"
    r"|configs/\d+-[A-Za-z0-9_][\w.-]*\.yaml|samples/[A-Za-z0-9_][\w.-]*\.png"
)
VOCABULARY = {"vocab.json", "merges.txt"}  # every letter and sign of the language, no sentence of anyone's
# strings that look random, in which digits and letters mix: words joined by _ or - do not
RANDOM = (
    r"(?:(?=(?:[\w/+-]*?\d){3})(?=[\w/+-]*[A-Za-z])|(?=[\w/+-]*\d)(?=(?:[\w/+-]*?[A-Z]){2})(?=(?:[\w/+-]*?[a-z]){2}))"
    r"[\w/+-]{16,}"
)
ROOTS = (
    "home|Users|mnt|media|data|datasets|root|work|workspace|tmp|var|opt|srv|content|kaggle|scratch|usr|etc|private"
    "|Volumes|run|proc|dev|notebooks|storage|export|exports|nfs|gpfs|lustre|projects"
)
SECRETS = {
    "a token": re.compile(
        r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}"
        r"|glpat-[\w-]{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|npm_[A-Za-z0-9]{30,}"
        r"|r8_[A-Za-z0-9]{30,}|[sr]k_live_[A-Za-z0-9]{16,}|ya29\.[\w-]{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}"
        r"|[Bb]earer\s+(?=[\w.~+/-]*\d)[\w.~+/-]{16,})"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a password or key": re.compile(
        r"(?i:api[_-]?key|access[_-]?key|secret|passw(?:or)?d|token)[\"']?\s*[:=]\s*[\"']?" + RANDOM
    ),
    "a name and password in an address": re.compile(r"://[^/\s:@]+:[^/\s@]+@"),
    "an absolute path": re.compile(
        # a known root and something in it; three parts of two letters or more, so that /o/ and /day/night are none
        rf"(?<![\w./~}}<-])/{{1,2}}(?:{ROOTS})/+[\w.@+-]"
        r"|(?<![\w./~})\]<-])/(?:[\w.@+-]{2,}/){2,}[\w.@+-]{2,}"
        r"|\bfile://|(?<![\w~])~(?:[\w-]+/[\w.]{2,}|/[\w.-]{2,})"
        r"|(?<!\w)[A-Za-z]:(?:\\{1,4}[\w.-]{2,}|/[\w.-]{2,}/[\w.-]{2,})|(?<![\w\\:])\\{2,4}[\w.-]{2,}\\{1,2}[\w.$-]{2,}"
    ),
}
THUMBNAIL = re.compile(rf"{THUMBNAIL_PREFIX}[A-Za-z0-9+/=]+")  # pixels, in which anything may be read
MAX_STEM = 80
ADDRESS = re.compile(r"https?://[^\s\"'<>`|)\]}]+")  # paths in it are the web's
FOLDER_REMEDY = (
    "a text that the training wrote (lineage.json, configs/, the weights' headers) stands in the checkpoint: change it "
    "there, in checkpoint.json, then python scripts/lineage.py CHECKPOINT --seal, move RUN/export away and publish "
    "again; a sample is drawn again or taken out; what publish.* or --acknowledge-base-terms says is said otherwise"
)


def weights_file_name(config: Config, dtype: Dtype) -> str:
    """What a published single file is called: by the title, the repository or the run, the first that there is."""
    publish = config.publish
    decomposed = unicodedata.normalize("NFKD", (publish.title or "").lower())
    title = re.sub(r"[^a-z0-9._]+", "-", decomposed.encode("ascii", "ignore").decode())
    repository = (publish.repo_id or "").rpartition("/")[2]
    stems = (stem[:MAX_STEM].strip("-._") for stem in (title, repository))
    return f"{next((stem for stem in stems if stem), config.run.name)}-{dtype}.safetensors"


def weights_file_names(config: Config) -> set[str]:
    """The names that single files of a published folder may have, those of version 0.2 included."""
    old = {f"{config.run.name}.safetensors", f"{config.run.name}-fp32.safetensors"}
    return old | {weights_file_name(config, dtype) for dtype in DTYPES}


def check_fit(folder: Path, weights: Collection[str], named: Path | None = None) -> None:
    """Refuse a folder that holds anything but what is published, before it gets its name and before an upload.

    Args:
        weights: names that single files may have.
        named: what messages call the folder, while it has another name.

    Raises:
        UserError: naming all files that do not belong there, links, or texts with secrets or paths in them.
    """
    allowed = re.compile(ALLOWED)
    problems: list[str] = []
    found: dict[tuple[str, str], list[str]] = {}  # the same text stands in several files: it is reported once
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(f"{name} is a link")
        elif path.is_dir():
            continue
        elif not path.is_file() or not (name in weights or allowed.fullmatch(name)):
            problems.append(f"{name} is not a file that is published")
        else:
            if path.suffix == ".png" and (strange := read_chunks(path).keys() - SAMPLE_CHUNKS):
                own = ", ".join(sorted(SAMPLE_CHUNKS))
                problems.append(f"{name} holds {', '.join(sorted(strange))} beside {own}: draw it with "
                                "scripts/sample.py, or take it out")  # fmt: skip
            for what, text, place in find_secrets(path):
                found.setdefault((what, text), []).append(f"{name} {place}")
    for (what, text), places in found.items():
        shown = f" ({text})" if "path" in what else ""  # a secret is not repeated; a path is, so that it can be found
        problems.append(f"{what}{shown} in {', '.join(places)}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        remedy = f"\n{FOLDER_REMEDY}" if found else ""
        raise UserError(f"{named or folder} is not fit to be published:\n{listed}{remedy}")


def check_published(folder: Path, config: Config) -> None:
    """What an upload sends: the folder as it was built, not as somebody changed it since.

    Raises:
        UserError: when a file is missing, added or changed, or does not belong there.
    """
    check_fit(folder, weights_file_names(config))
    found = hash_files(folder)
    found.pop(SUMS_FILE, None)
    if wrong := find_changed(read_sums(folder / SUMS_FILE), found):
        raise UserError(f"{folder} is not what its {SUMS_FILE} says: {wrong}; build it again")


def find_secrets(path: Path) -> Iterator[tuple[str, str, str]]:
    """What no stranger should read in a file, the text itself, and where it stands: a line, or a key."""
    for place, text in read_texts(path):
        for what, pattern in SECRETS.items():
            searched = ADDRESS.sub("", text) if "path" in what else text
            if match := pattern.search(searched):
                line = searched.count("\n", 0, match.start()) + 1
                shown = re.match(r"[^\s\"'`|,;)*\]}>]*", searched[match.start() :])
                yield what, shown[0] if shown else match[0], place or f"line {line}"


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(key, text) of everything in a file that is text; no key where it is text as a whole."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = read_frame(file)
        for key, value in header.pop("__metadata__", {}).items():
            if not THUMBNAIL.fullmatch(value):
                yield from texts_of(parse(value), key)
        yield "tensor names", "\n".join(header)
    elif path.suffix == ".png":
        for key, value in read_chunks(path).items():
            yield from texts_of(parse(value), key)
    elif path.suffix == ".json" and path.name not in VOCABULARY:
        yield from texts_of(json.loads(path.read_text(encoding="utf-8")), "")
    elif path.name not in VOCABULARY:
        yield "", path.read_text(encoding="utf-8")


def parse(text: str) -> object:
    """A text's JSON value if it is an object or a list, else the text: a title may begin with a bracket too."""
    try:
        return json.loads(text) if text.startswith(("{", "[")) else text
    except (ValueError, RecursionError):
        return text


def texts_of(value: object, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all texts in a JSON value and of its keys.

    A text comes with its own key before it, because "token: ..." says what a text is.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            yield f"{key}, a key" if key else "a key", name
            yield from texts_of(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from texts_of(item, f"{key}.{number}")
    elif isinstance(value, str):
        yield key, f"{key.rpartition('.')[2]}: {value}"

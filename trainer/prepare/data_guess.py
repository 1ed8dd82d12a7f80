"""What lies in a folder or a file that somebody calls their data: every kind of source is tried, and the best is taken.

Nothing is known here of the formats: a kind fits where its own code finds posts with images.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.schema import BucketsConfig, CaptionsConfig, DataConfig, SourceConfig
from trainer.core.errors import UserError, shorten
from trainer.core.progress import format_count, metered
from trainer.data.buckets import Size, list_buckets, nearest_bucket
from trainer.data.caption_draws import whole_caption
from trainer.data.formats import is_image_name
from trainer.data.images import BadImage, read_bytes, read_image_header
from trainer.data.post import Post
from trainer.data.sites import TAG_CATEGORIES
from trainer.data.sources import iterate_sources
from trainer.data.sources.folders import CAPTIONS, POSTS
from trainer.data.sources.record_files import strip_compression
from trainer.data.sources.records import Item, Reject, explain_reason
from trainer.data.sources.tars import is_compressed
from trainer.data.template import ready_rules
from trainer.prepare.inputs import describe_post, read_place

RECORD_ENDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
DATASET_FILES = (
    "state.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
)  # of the package datasets
TRIED_ITEMS = 300  # of each candidate
MOST_FILES, MOST_FOLDERS = 8, 8  # of a folder that are tried as posts files, and as their images
MEASURED = 1000  # images whose size is read, and captions that prompts are chosen from
IN_WORDS = {
    "posts": "posts in a file, images in a folder",
    "folder": "images with captions or posts beside them",
    "tars": "tars of images with captions or posts",
    "dataset": "a dataset of the package datasets",
    "kohya": "metadata of sd-scripts, images in a folder",
}


@dataclass
class DataGuess:
    """A source, and what was counted of it."""

    source: SourceConfig
    captions: int = 0  # posts with a finished caption
    tags: int = 0  # posts whose caption is composed of tags
    wordless: int = 0  # posts with neither
    set_aside: Counter[str] = field(default_factory=Counter)  # inputs that become no sample, by reason
    unread: Counter[str] = field(default_factory=Counter)  # files that no one reads, by kind
    endings: Counter[str] = field(default_factory=Counter)  # of sidecars
    sizes: list[Size] = field(default_factory=list)  # of the first images
    first: list[dict[str, Any]] = field(default_factory=list)  # rows of the first posts
    others: list[str] = field(default_factory=list)  # what else would have been possible
    unreadable: str = ""  # the first image that cannot be read, and why

    @property
    def images(self) -> int:
        """Posts with an image."""
        return self.captions + self.tags + self.wordless

    @property
    def share_set_aside(self) -> float:
        """The share of inputs that become no sample."""
        aside = self.set_aside.total()
        return aside / (aside + self.images)

    def describe(self) -> str:
        """As in ``412 images, 398 captions (.txt), 14 without a caption``."""
        endings = f" ({', '.join(f'.{end}' for end, _ in self.endings.most_common())})" if self.endings else ""
        beside = self.set_aside["no_sidecar"]  # images too
        parts = [format_count(self.images + beside, "image")]
        parts += [format_count(self.captions, "caption") + endings] if self.captions else []
        tags = f"{format_count(self.tags, 'post')} with tags{endings if not self.captions else ''}"
        parts += [tags] if self.tags else []
        parts += [f"{format_count(self.wordless, 'post')} without a word"] if self.wordless else []
        return ", ".join(parts + [f"{count:,} {explain_reason(why)}" for why, count in self.set_aside.items()])

    def count_buckets(self, buckets: BucketsConfig) -> Counter[Size]:
        """Images by bucket, estimated from those whose size was read."""
        known = list_buckets(buckets.base_resolution, buckets.min_side, buckets.max_side, buckets.step)
        counted = Counter(nearest_bucket(size, known) for size in self.sizes)
        share = self.images / max(1, len(self.sizes))
        return Counter({bucket: round(count * share) for bucket, count in counted.items()})

    def choose_prompts(self, rules: CaptionsConfig, count: int) -> list[str]:
        """Captions of some posts, as a model would see them unshuffled, from the beginning to the end."""
        ready = ready_rules(rules)
        texts = [whole_caption(row, ready) for row in self.first]
        texts = list(dict.fromkeys(filter(None, texts)))
        return [texts[place * len(texts) // count] for place in range(count)] if len(texts) > count else texts

    def list_notes(self) -> Iterator[str]:
        """What somebody may not expect."""
        if self.others:
            yield f"also there, and not used: {', '.join(self.others)}"
        if self.unread:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.unread.most_common(4))
            yield f"not read: {kinds}"
        folder = Path(self.source.path)
        counted = [each.name for each in folder.glob("*_*") if each.is_dir() and each.name.partition("_")[0].isdigit()]
        if counted and self.source.kind == "folder":
            yield f"the number in {min(counted)} is not read as repeats: data.sources has repeats for each folder"


def guess_data(path: Path, images: Path | None = None) -> DataGuess:
    """The source that ``path`` is. ``images`` is the folder of a posts file's images, where that cannot be guessed.

    Raises:
        UserError: when nothing that is tried finds a post with an image that can be read, saying why each did not.
    """
    if not path.exists():
        raise UserError(f"--data {path}: there is no such file or folder")
    found: list[tuple[int, SourceConfig]] = []
    why: dict[str, str] = {}  # by file or folder: of a posts file, whose images may lie in many, the first is said
    for source in list_candidates(path, images):
        if source.kind == "dataset" and found:
            continue  # the package builds a cache of what it opens
        place = f"{source.kind} {source.path}"
        try:
            tried = try_source(source)
        except UserError as error:
            why.setdefault(place, re.sub(r"^data\.sources\.0: ", "", str(error)))
            continue
        if tried.posts:
            found.append((tried.posts, source))
        elif tried.aside:
            why.setdefault(place, explain_tried(source, tried))
    if not found:
        own = f"folder {path}"
        if len(why) > 1 and own in why and not any(map(is_image_name, map(str, path.rglob("*.*")))):
            del why[own]  # that it holds no images is no news where its posts or tars were looked at
        said = list(dict.fromkeys(why.values())) or [f"{path} holds neither images nor posts"]
        end = f" {said[0]}" if len(said) == 1 else "".join(f"\n  {line}" for line in said)
        raise UserError(f"--data {path}: nothing in it can be trained on:{end}")
    most = max(posts for posts, _ in found)
    chosen = next(source for posts, source in found if posts == most)
    others = [f"{each.kind} {each.path}" for _, each in found if (each.kind, each.path) != (chosen.kind, chosen.path)]
    guess = count_source(chosen, list(dict.fromkeys(others)))
    if not guess.images:
        unreadable = guess.set_aside.total() - guess.set_aside["no_sidecar"]
        none = "the image" if unreadable == 1 else f"none of the {unreadable:,} images"
        raise UserError(f"--data {path}: {none} can{'not' if unreadable == 1 else ''} be read: {guess.unreadable}")
    return guess


@dataclass
class Tried:
    """What the first inputs of a source are."""

    posts: int = 0  # with an image
    aside: Counter[str] = field(default_factory=Counter)  # by reason
    first: Reject | None = None


def try_source(source: SourceConfig) -> Tried:
    """Look at a source's first inputs, and on until there is a post."""
    tried = Tried()
    for number, item in enumerate(iterate_input_rows(source)):
        if number >= TRIED_ITEMS and tried.posts:
            break
        tried.posts += isinstance(item, dict)
        if isinstance(item, Reject):
            tried.aside[item.reason] += 1
            tried.first = tried.first or item
    return tried


def explain_tried(source: SourceConfig, tried: Tried) -> str:
    """Why nothing of a source is of use."""
    assert tried.first is not None
    if source.kind == "folder" and set(tried.aside) == {"no_sidecar"}:
        image = Path(tried.first.origin)
        return (
            f"{format_count(tried.aside.total(), 'image')}, and none has a caption ({image.stem}.txt beside "
            f"{image.name}) or a post ({image.stem}.json)"
        )
    beside = f" with images in {source.images}" if source.images else ""
    counted = ", ".join(f"{count:,} {explain_reason(reason)}" for reason, count in tried.aside.most_common())
    return f"{source.path}{beside}: {counted}, such as {tried.first.origin}: {shorten(tried.first.detail)}"


def list_candidates(path: Path, images: Path | None) -> Iterator[SourceConfig]:
    """What the path may be, the most telling first."""
    if path.is_file():
        if path.suffix.lower() == ".tar":
            yield SourceConfig("tars", str(path))
            return
        yield from list_records([path], path.parent, images)
        return
    names = sorted(each.name for each in path.iterdir() if each.is_file())
    pictures = {name.rpartition(".")[0] for name in names if is_image_name(name)}
    sidecars = {*pictures, *(name for name in names if is_image_name(name))}
    records = [
        path / name for name in names
        if strip_compression(name).endswith(RECORD_ENDS) and name.rpartition(".")[0] not in sidecars
        and name not in DATASET_FILES
    ]  # fmt: skip
    yield from list_records(records[:MOST_FILES], path, images)
    yield SourceConfig("folder", str(path))
    if any(each.name.lower().endswith(".tar") or is_compressed(each.name) for each in path.rglob("*.t*")):
        yield SourceConfig("tars", str(path))
    if any((path / name).is_file() for name in DATASET_FILES) or next(path.rglob("*.parquet"), None):
        yield SourceConfig("dataset", str(path))


def list_records(files: list[Path], beside: Path, images: Path | None) -> Iterator[SourceConfig]:
    """Posts files and metadata of sd-scripts, with each folder in which their images may lie."""
    below = sorted(each for each in beside.iterdir() if each.is_dir() and not each.name.startswith("."))
    folders = [images] if images else [beside, *below[:MOST_FOLDERS]]
    for file in files:
        for folder in folders:
            yield SourceConfig("posts", str(file), str(folder))
            if file.suffix.lower() == ".json":
                yield SourceConfig("kohya", str(file), str(folder))


def iterate_input_rows(source: SourceConfig) -> Iterator[dict[str, Any] | Item]:
    """What a source yields, posts as rows of the inputs; a row's image is a file that is there."""
    for item in iterate_sources(DataConfig(shards="", sources=[source])):
        yield describe_post(item) if isinstance(item, Post) else item


def count_source(source: SourceConfig, others: list[str]) -> DataGuess:
    """Read a source once."""
    guess = DataGuess(source, others=others)
    for item in metered(iterate_input_rows(source), f"look at {source.path}", "post"):
        if isinstance(item, Reject):
            guess.set_aside[item.reason] += 1
        elif isinstance(item, dict):
            add_row(guess, item)
        else:
            assert not isinstance(item, Post)
            guess.unread[item.kind] += item.count
    return guess


def list_endings(image: Path) -> Iterator[str]:
    """The extensions of captions and posts beside an image."""
    for end in (*CAPTIONS, *POSTS):
        if image.with_suffix(f".{end}").exists() or image.with_name(f"{image.name}.{end}").exists():
            yield end


def add_row(guess: DataGuess, row: dict[str, Any]) -> None:
    """Count a post; of the first ones the image's size is read too."""
    place = read_place(row["image"])
    if len(guess.first) < MEASURED:
        try:
            guess.sizes.append(read_image_header(read_bytes(place)))
        except BadImage as error:
            guess.set_aside[error.reason] += 1
            guess.unreadable = guess.unreadable or f"{row['origin']}: {shorten(error.detail)}"
            return
        guess.first.append(row)
        if guess.source.kind == "folder":
            guess.endings.update(list_endings(place.path))
    if row["caption"] is not None and row["caption"].strip():
        guess.captions += 1
    elif row["caption"] is None and any(row[f"tags_{name}"] for name in TAG_CATEGORIES):
        guess.tags += 1
    else:
        guess.wordless += 1

"""webdataset tars as posts: an image with a post (.json), a finished caption (.txt) or both, under one key.

Read by a walk of our own. Only sidecars are read; an image is a stretch of its tar.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from trainer.core.errors import UserError
from trainer.data.post import Post, TarMember, encode_key
from trainer.data.sources.folders import walk_files
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, Reject, read_sidecars, show_name
from trainer.data.sources.tar_headers import Damage, Member, walk_tar

IMAGES = ("jpg", "jpeg", "png", "webp")  # what webdataset's own tools call images, as far as we read them
SIDECARS = ("json", "txt")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass
class Sample:
    """Members that lie one behind the other and share webdataset's key."""

    key: str  # their path up to the first dot of its last part
    members: dict[str, Member] = field(default_factory=dict)  # by extension in lower case
    refused: list[str] = field(default_factory=list)  # what is wrong with it
    beside_damage: bool = False  # a member may be lost

    @property
    def sidecars(self) -> list[str]:
        return [name for name in SIDECARS if name in self.members]


def iterate_tars(path: Path, source: str) -> Iterator[Post | Reject]:
    """The samples of a tar, or of all tars of a folder in the order of their paths.

    Raises:
        UserError: when there is no tar, or one cannot be read at all or is compressed.
    """
    if not path.is_dir():
        yield from iterate_tar(path, path.name, source)
        return
    tars = 0
    for found in walk_files(path):
        if is_compressed(found.name):
            refuse_compressed(path / found.name)
        if found.name.lower().endswith(".tar"):
            tars += 1
            yield from iterate_tar(path / found.name, found.name, source)
    if not tars:
        raise UserError(f"{path} holds no .tar files")


def is_compressed(name: str) -> bool:
    """Whether a file's name is a compressed tar's."""
    return name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def refuse_compressed(file: Path) -> None:
    raise UserError(f"{file} is compressed: images are read at their place in the tar, so decompress it first")


@contextmanager
def open_tar(file: Path) -> Iterator[BinaryIO]:
    """A tar file opened for reading.

    Raises:
        UserError: when it is no regular file, cannot be read or is compressed.
    """
    if not file.is_file():  # a pipe would wait for ever
        raise UserError(f"{file} is neither a tar file nor a folder")
    try:
        opened = file.open("rb")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    with opened as tar:
        if any(tar.read(8).startswith(magic) for magic in COMPRESSED for _ in [tar.seek(0)]):
            refuse_compressed(file)
        yield tar


def iterate_tar(file: Path, name: str, source: str) -> Iterator[Post | Reject]:
    """The samples of one tar, whose relative path is ``name``."""
    with open_tar(file) as tar:
        for item in judge_damage(group_members(walk_tar(tar))):
            if isinstance(item, Damage):
                reason = "bad_tar" if item.name is None else "refused_member"
                where = f"byte {item.offset}" if item.name is None else item.name
                yield Reject(None, show_name(f"{name}: {where}"), reason, show_name(item.detail))
            else:
                stem = name.removesuffix(".tar")
                yield read_tar_sample(tar, file, item, stem, show_name(f"{name}: {item.key}"), source)


def judge_damage(items: Iterator[Sample | Damage]) -> Iterator[Sample | Damage]:
    """Refuse samples that may have lost a sidecar: what it said would be missing from their captions without a word.

    A sample beside a damaged stretch counts only with the same sidecars as the last sound sample before it, or, at a
    tar's beginning, the first one behind it.
    """
    usual: list[str] | None = None
    waiting: list[Sample] = []
    for item in items:
        if isinstance(item, Damage):
            yield item
            continue
        if not item.beside_damage:
            usual = item.sidecars
        waiting.append(item)
        if usual is not None:
            yield from compare_sidecars(waiting, usual)
            waiting = []
    yield from compare_sidecars(waiting, usual)


def compare_sidecars(samples: list[Sample], usual: list[str] | None) -> Iterator[Sample]:
    for sample in samples:
        if sample.beside_damage and sample.sidecars != usual:
            sample.refused.append("beside a damaged stretch, and not with the sidecars of sound samples")
        yield sample


def group_members(items: Iterator[Member | Damage]) -> Iterator[Sample | Damage]:
    """Samples as webdataset groups them; what lies between those of one sample does not part it."""
    sample: Sample | None = None
    damaged = False  # since the last member
    for item in items:
        key, extension = split_name(item.name or "")
        if isinstance(item, Damage):
            damaged = damaged or item.name is None
            if sample is not None and key == sample.key:
                sample.refused.append(f"{item.name}: {item.detail}")
            yield item
            continue
        if key is None:
            continue
        if sample is not None:
            sample.beside_damage |= damaged
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = Sample(key, beside_damage=damaged)
        damaged = False
        if extension in sample.members:
            sample.refused.append(f"two members called .{extension}")
        sample.members[extension] = item
    if sample is not None:
        sample.beside_damage |= damaged
        yield sample


def split_name(name: str) -> tuple[str | None, str]:
    """webdataset's key and extension; no key for what it passes over: folders, hidden files, names without a dot."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return (folder + slash + stem if stem and dot else None), extension.lower()


def read_tar_sample(tar: BinaryIO, file: Path, sample: Sample, stem: str, origin: str, source: str) -> Post | Reject:
    """The post of one sample."""
    key = encode_key(os.fsencode(f"{stem}/{sample.key}"))
    try:
        if sample.refused:
            raise BadRecord("bad_sample", "; ".join(sample.refused))
        images = [extension for extension in IMAGES if extension in sample.members]
        if not images:
            raise BadRecord("no_image", f"only {', '.join(sorted(sample.members))}; images are {', '.join(IMAGES)}")
        if len(images) > 1:
            raise BadRecord("image_ambiguous", f"several images: {', '.join(images)}")
        sidecars = {name: read_member(tar, sample.members[name]) for name in sample.sidecars}
        if not sidecars:
            raise BadRecord("no_sidecar", "no caption (.txt) and no post (.json) beside the image")
        image = sample.members[images[0]]
        place = TarMember(file, image.offset, image.length)
        caption, record = sidecars.get("txt"), sidecars.get("json")
        return read_sidecars(caption, record, key=key, source=source, image=place, origin=origin)
    except BadRecord as error:
        return Reject(key, origin, error.args[0], show_name(error.args[1]))
    except ValueError as error:  # UnicodeDecodeError is one
        return Reject(key, origin, "bad_record", str(error))


def read_member(tar: BinaryIO, member: Member) -> bytes:
    """A sidecar's bytes."""
    if member.length > MAX_SIDECAR:
        raise BadRecord("bad_record", f"{member.name} has {member.length} bytes, above {MAX_SIDECAR}")
    tar.seek(member.offset)
    return tar.read(member.length)

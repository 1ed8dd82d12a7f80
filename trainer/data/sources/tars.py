"""webdataset tars as posts: an image with a post (.json), a finished caption (.txt) or both, under one key.

Only sidecars are read; an image is a stretch of its tar.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from trainer.core.errors import UserError
from trainer.data.fields import show_text
from trainer.data.formats import image_extensions
from trainer.data.post import ImagePlace, Post, encode_key
from trainer.data.sources.folders import (
    CAPTIONS,
    PACKAGE_OF,
    SIDECARS,
    Walk,
    check_inside,
    extension_of,
    is_system_folder,
    remark_file,
)
from trainer.data.sources.record_files import DECOMPRESSORS, read_start
from trainer.data.sources.records import MAX_SIDECAR, BadRecord, Item, Reject, Remark, Sidecar, read_sidecars, reject
from trainer.data.sources.tar_headers import Damage, Member, walk_tar


@dataclass
class TarSample:
    """Members that follow each other and share webdataset's key."""

    key: str  # their path up to the first dot of its last part
    members: dict[str, Member] = field(default_factory=dict)  # by extension in lower case, from that dot on
    refused: list[str] = field(default_factory=list)  # what is wrong with it
    beside_damage: bool = False  # a member may be lost

    @property
    def sidecars(self) -> list[str]:
        return sorted(name for name in self.members if extension_of("." + name) in SIDECARS)


def iterate_tars(path: Path, source: str, follow_links: bool = False) -> Iterator[Item]:
    """The samples of a tar, or of all tars of a folder in the order of their paths, and remarks on what is not read.

    Raises:
        UserError: when there is no tar, or one cannot be read at all or is compressed.
    """
    if not path.is_dir():
        yield from iterate_tar(path, path.name, source)
        return
    tars, walk = 0, Walk(path, source, follow_links)
    for found in walk.files():
        if is_compressed(found.name):
            refuse_compressed(path / found.name)
        if found.name.lower().endswith(".tar"):
            if not found.plain and (remark := refuse_link(path, found.name, source, follow_links)):
                yield remark
                continue
            tars += 1
            yield from iterate_tar(path / found.name, found.name, source)
        else:
            yield remark_file(source, found.last, found.name)
    yield from walk.skipped
    if not tars:
        raise UserError(f"{path} holds no .tar files")


def refuse_link(folder: Path, tar: str, source: str, follow_links: bool) -> Remark | None:
    """A remark on a tar that is a link, where it leads out of the folder and links are not followed, or nowhere."""
    try:
        check_inside(folder, tar, follow_links)
    except BadRecord as error:
        return Remark(source, "linked tars, not read", 1, show_text(tar), error.args[1])
    return None


def is_compressed(name: str) -> bool:
    """Whether a file's name is a compressed tar's."""
    return name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def refuse_compressed(file: Path) -> None:
    raise UserError(f"{file} is compressed: images are read at their place in the tar, so decompress it first")


def open_tar(file: Path) -> BinaryIO:
    """A tar file opened for reading.

    Raises:
        UserError: when it is no regular file, cannot be read or is compressed.
    """
    if not file.is_file():  # a pipe would wait for ever
        raise UserError(f"{file} is neither a tar file nor a folder")
    if read_start(file).startswith(tuple(DECOMPRESSORS)):
        refuse_compressed(file)
    return file.open("rb")


def iterate_tar(file: Path, name: str, source: str) -> Iterator[Item]:
    """The samples of one tar, whose relative path is ``name``. Those that lack a part come last, with the reason."""
    incomplete: list[tuple[TarSample, Reject]] = []
    with open_tar(file) as tar:
        for item in judge_damage(group_members(walk_tar(tar))):
            match item:
                case Damage():
                    yield reject_damage(item, name)
                case Member():
                    yield remark_member(source, item.name, f"{name}: {item.name}")
                case TarSample():
                    read = read_tar_sample(tar, file, item, name, source)
                    if isinstance(read, Post):
                        yield read
                        yield from remark_others(item, source, name)
                    elif read.reason in ("no_image", "no_sidecar"):
                        incomplete.append((item, read))
                    else:
                        yield read
    yield from explain_scattered(incomplete)


def reject_damage(damage: Damage, tar: str) -> Reject:
    """A damaged stretch, or a refused member, of the tar of this name."""
    reason, where = ("bad_tar", f"byte {damage.offset}") if damage.name is None else ("refused_member", damage.name)
    return Reject(None, show_text(f"{tar}: {where}"), reason, show_text(damage.detail))


def remark_member(source: str, member: str, origin: str) -> Remark:
    """A member of no sample: a hidden one, or one of a folder in which no one's images lie."""
    *folders, last = member.split("/")
    if any(is_system_folder(each) for each in folders):
        return Remark(source, "member of a hidden or system folder, not read", origin=show_text(origin))
    return remark_file(source, last, origin)


def remark_others(sample: TarSample, source: str, tar: str) -> Iterator[Remark]:
    """Members of a good sample that are not read."""
    for extension in sorted(sample.members.keys() - set(choose_members(sample))):
        name = sample.members[extension].name
        second = extension in sample.sidecars
        yield remark_file(source, name[name.rfind("/") + 1 :], f"{tar}: {name}", second=second)


def explain_scattered(incomplete: list[tuple[TarSample, Reject]]) -> Iterator[Reject]:
    """Samples without image or sidecar, which may lie elsewhere in the tar."""
    parts: dict[str, list[list[str]]] = {}
    for sample, _ in incomplete:
        parts.setdefault(sample.key, []).append(sorted(sample.members))
    for sample, why in incomplete:
        if len(parts[sample.key]) > 1:
            there = show_text(", ".join(name for part in parts[sample.key] for name in part))
            advice = f"its members ({there}) do not follow each other in the tar: write it again, sorted by name"
            why = replace(why, detail=f"{why.detail}; {advice}")
        yield why


def judge_damage(items: Iterator[TarSample | Damage | Member]) -> Iterator[TarSample | Damage | Member]:
    """Refuse samples that may have lost a sidecar: what it said would be missing from their captions without a word.

    A sample beside a damaged stretch counts only with the same sidecars as the last sound sample before it, or, at a
    tar's beginning, the first one after it.
    """
    usual: list[str] | None = None
    waiting: list[TarSample] = []
    for item in items:
        if not isinstance(item, TarSample):
            yield item
            continue
        usual = usual if item.beside_damage else item.sidecars
        waiting.append(item)
        if usual is not None:
            yield from compare_sidecars(waiting, usual)
            waiting = []
    yield from compare_sidecars(waiting, usual)


def compare_sidecars(samples: list[TarSample], usual: list[str] | None) -> Iterator[TarSample]:
    for sample in samples:
        if sample.beside_damage and sample.sidecars != usual:
            sample.refused.append("beside a damaged stretch, and not with the sidecars of sound samples")
        yield sample


def group_members(items: Iterator[Member | Damage]) -> Iterator[TarSample | Damage | Member]:
    """Samples as webdataset groups them; what lies between those of one sample does not part it."""
    sample: TarSample | None = None
    damaged = False  # since the last member
    for item in items:
        key, extension = split_name(item.name or "")
        if isinstance(item, Damage):
            damaged = damaged or item.name is None
            if sample is not None and key == sample.key:
                sample.refused.append(f"{item.name}: {item.detail}")
            yield item
        elif key is None:
            if not item.name.endswith("/"):  # a folder is nothing to read
                yield item
        else:
            if sample is None or key != sample.key:
                if sample is not None:
                    sample.beside_damage |= damaged
                    yield sample
                sample = TarSample(key)
            sample.beside_damage |= damaged
            damaged = False
            if extension in sample.members:
                sample.refused.append(f"two members called .{extension}")
            sample.members[extension] = item
    if sample is not None:
        sample.beside_damage |= damaged
        yield sample


def split_name(name: str) -> tuple[str | None, str]:
    """webdataset's key and extension; no key for what it passes over (folders, hidden files, names without a dot), and
    for what lies in a hidden or system folder."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or any(is_system_folder(each) for each in folder.split("/")):
        return None, extension.lower()
    return folder + slash + stem, extension.lower()


def choose_members(sample: TarSample) -> tuple[str, str | None, str | None]:
    """Which members are read, by extension: the image, its caption and its post, of which ``txt`` and ``json`` come
    before other spellings.

    Raises:
        BadRecord: where there is no image, no sidecar, or it is not clear which.
    """
    images = [name for name in image_extensions() if name in sample.members]
    if not images:
        raise BadRecord("no_image", explain_extensions(sample))
    if len(images) > 1:
        raise BadRecord("image_ambiguous", f"several images: {', '.join(images)}")
    (image,) = images
    captions = [name for name in (*CAPTIONS, *(f"{image}.{end}" for end in CAPTIONS)) if name in sample.members]
    posts = [name for name in ("json", f"{image}.json") if name in sample.members]
    if not captions and not posts:
        raise BadRecord("no_sidecar", f"no caption ({', '.join(CAPTIONS)}) and no post (json) beside the image")
    if len(captions) > 1 and captions[0] != CAPTIONS[0]:
        raise BadRecord("caption_ambiguous", f"several captions: {', '.join(captions)}; keep one of them")
    return image, captions[0] if captions else None, posts[0] if posts else None


def explain_extensions(sample: TarSample) -> str:
    """Why a sample has no image."""
    why = f"only {', '.join(sorted(sample.members))}; images are {', '.join(image_extensions())}"
    ends = {extension_of("." + name) for name in sample.members}
    if ends & set(image_extensions()):
        why += f"; the key ends at the first dot of a name, here after {sample.key!r}: let names have no other dot"
    return why + "".join(f"; {end}: pip install {PACKAGE_OF[end]}" for end in sorted(ends & PACKAGE_OF.keys()))


def read_tar_sample(tar: BinaryIO, file: Path, sample: TarSample, name: str, source: str) -> Post | Reject:
    """The post of one sample of the tar whose relative path is ``name``."""
    key = encode_key(os.fsencode(f"{name.removesuffix('.tar')}/{sample.key}"))
    origin = show_text(f"{name}: {sample.key}")
    try:
        if sample.refused:
            raise BadRecord("bad_sample", "; ".join(sample.refused))
        image, *sidecars = choose_members(sample)
        caption, record = (None if each is None else read_member(tar, sample.members[each]) for each in sidecars)
        place = ImagePlace(file, sample.members[image].offset, sample.members[image].length)
        return read_sidecars(caption, record, key=key, source=source, image=place, origin=origin)
    except ValueError as error:
        return reject(key, origin, error)


def read_member(tar: BinaryIO, member: Member) -> Sidecar:
    """A sidecar."""
    if member.length > MAX_SIDECAR:
        raise BadRecord("bad_record", f"{member.name} has {member.length} bytes, above {MAX_SIDECAR}")
    tar.seek(member.offset)
    return Sidecar(member.name, tar.read(member.length))

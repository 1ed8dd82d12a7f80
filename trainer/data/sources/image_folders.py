"""Folders of images: listed once, and then asked for the image that a record names. No name leads out.

Images are files, or members of tars that lie in the folder; those are read at their place. A file comes before a
member, so that a folder with its own tars beside it is what it was.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.core.errors import UserError
from trainer.data.fields import show_text
from trainer.data.formats import is_image_name
from trainer.data.post import ImagePlace
from trainer.data.sources.folders import Walk, check_inside, is_system_folder, remark_file, without_extension
from trainer.data.sources.image_names import md5_in, plain_path, relative_path, stem_or_id, strip_start
from trainer.data.sources.records import BadRecord, Reject, Remark
from trainer.data.sources.tar_headers import Damage, Member, walk_tar
from trainer.data.sources.tars import is_compressed, open_tar, refuse_compressed, refuse_link, reject_damage


@dataclass
class NameCounts:
    """What became of the file names of one source."""

    names: int = 0
    stripped: int = 0  # names that began with strip_prefix
    prefixes: Counter[str] = field(default_factory=Counter)  # without which names that lead nowhere would be found


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder by the name that a record may give: the file's stem, or the id in gallery-dl's name."""

    path: Path
    by_stem: dict[str, str | list[str]] = field(default_factory=dict)  # stem or id -> name, or several
    links: set[str] = field(default_factory=set)  # names that are no plain files
    members: dict[str, ImagePlace] = field(default_factory=dict)  # by name: the tar's path, a slash and the member's
    by_md5: dict[str, list[str]] = field(default_factory=dict)  # made when it is first asked for
    source: str = ""  # what the first source that asks is called
    follow_links: bool = False  # a link may lead to a file elsewhere
    used: set[str] = field(default_factory=set)  # names that records led to
    damages: list[Reject | Remark] = field(default_factory=list)  # what of it is not read
    strip_prefix: str | None = None  # the source's
    counts: NameCounts = field(default_factory=NameCounts)

    def of_source(self, strip_prefix: str | None) -> "ImageFolder":
        """The same images, asked by one source."""
        return replace(self, strip_prefix=strip_prefix and plain_path(strip_prefix), counts=NameCounts())

    def add(self, name: str) -> None:
        stem = stem_or_id(name)
        before = self.by_stem.setdefault(stem, name)
        if isinstance(before, list):
            before.append(name)
        elif before is not name:
            self.by_stem[stem] = [before, name]

    def all_of(self, stem: str) -> list[str]:
        """The names of all images of this stem or id."""
        found = self.by_stem.get(stem, [])
        return [found] if isinstance(found, str) else found

    def names(self) -> Iterator[str]:
        """The names of all images."""
        return (name for stem in self.by_stem for name in self.all_of(stem))

    def find(self, stem: str) -> list[str]:
        """The names of the images of this stem or id; of members of tars only where there is no file."""
        return self.prefer_files(self.all_of(stem))

    def find_md5(self, md5: str) -> list[str]:
        """The names of the images whose own name ends with this md5 sum."""
        if not self.by_md5:
            self.by_md5[""] = []  # made, even where no name has one
            for name in self.names():
                if (stated := md5_in(name)) is not None:
                    self.by_md5.setdefault(stated, []).append(name)
        return self.prefer_files(self.by_md5.get(md5, []))

    def prefer_files(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self.members] or names if self.members else names

    def inner(self, name: str) -> str:
        """An image's path in its folder or in its tar."""
        if name not in self.members:
            return name
        return name[len(os.fspath(self.members[name].path.relative_to(self.path))) + 1 :]

    def place(self, name: str) -> ImagePlace:
        """The image of this name, which must stay inside the folder.

        Raises:
            BadRecord: image_missing or outside_folder.
        """
        self.used.add(name)
        if name in self.members:
            return self.members[name]
        if name in self.links or name not in self.all_of(stem_or_id(name)):
            return ImagePlace(check_inside(self.path, name, self.follow_links))
        return ImagePlace(self.path / name)

    def locate(self, path: str, *, bare: bool = False) -> str:
        """The name of the image that a path leads to, as another machine may have written it.

        Args:
            bare: the path may lack its extension, and a name without folder may lie in any.

        Raises:
            BadRecord: when there is none, more than one, or it lies outside the folder; the detail says which prefix
                would have to go.
        """
        self.counts.names += 1
        if path in self.all_of(stem_or_id(path)):  # also a file whose own name holds a backslash
            return path
        plain = plain_path(path)
        try:
            inner = relative_path(self.strip(plain), self.path)
            found = self.match(inner, bare)
            if len(found) > 1:
                raise BadRecord("image_ambiguous", f"{path!r} may be {', '.join(found)}")
            if not found and bare:
                raise BadRecord("image_missing", f"no image in the folder is called {path!r}")
            if not found:
                check_inside(self.path, inner, self.follow_links)
            return found[0] if found else inner
        except BadRecord as error:
            raise BadRecord(error.args[0], error.args[1] + self.suggest(plain, bare)) from error

    def strip(self, path: str) -> str:
        """The path without the source's strip_prefix, where it begins with it."""
        rest = strip_start(path, self.strip_prefix) if self.strip_prefix else None
        self.counts.stripped += rest is not None
        return path if rest is None else rest

    def match(self, inner: str, bare: bool) -> list[str]:
        """The images that a path below the folder, or below a tar in it, may mean."""
        near = self.near(inner, bare)
        found = [name for name in near if inner in (name, near[name])]
        if bare and not found:
            found = [name for name in near if without_extension(near[name]) == inner]
        if bare and not found and "/" not in inner:
            found = [name for name in near if without_extension(near[name]).endswith("/" + inner)]
        return self.prefer_files(found)

    def near(self, path: str, bare: bool) -> dict[str, str]:
        """Images with a path's last part and their inner paths, sorted. A bare one's last dot may be no extension's."""
        stems = {stem_or_id(path), stem_or_id(path + ".x")} if bare else {stem_or_id(path)}
        return {name: self.inner(name) for name in sorted({name for stem in stems for name in self.all_of(stem)})}

    def suggest(self, path: str, bare: bool) -> str:
        """Which folders before a path would have to go for its image to be found, counted and in words."""
        ends = set(self.near(path, bare).values())
        ends |= {without_extension(end) for end in ends} if bare else set()
        prefixes = {path[: -len(end) - 1] for end in ends if path.endswith("/" + end)} - {""}
        self.counts.prefixes.update(prefixes)
        return f"; strip_prefix: {min(prefixes, key=len)!r} would find it" if prefixes else ""

    def remark_unused(self) -> Iterator[Remark]:
        """After the last post of all sources: the images that no record led to."""
        if unused := [name for name in self.names() if name not in self.used]:
            yield Remark(self.source, "images without a post", len(unused), show_text(unused[0]))

    def judge_names(self) -> None:
        """After a source's last post: refuse a strip_prefix without effect, and names that all come from elsewhere.

        Raises:
            UserError: with the prefix that would be right.
        """
        counts = self.counts
        best = min(counts.prefixes, key=lambda each: (-counts.prefixes[each], len(each)), default=None)
        if best is not None and 2 * counts.prefixes[best] > counts.names:
            raise UserError(
                f"{counts.prefixes[best]} of {counts.names} names of images begin with {show_text(best)!r}, which is "
                f"not in {self.path}, where the rest of each is found: set strip_prefix: {show_text(best)!r} for this "
                "source in data.sources"
            )
        if self.strip_prefix and not counts.stripped:
            why = f"none of {counts.names} names of images begins with it" if counts.names else "no record names a file"
            raise UserError(f"strip_prefix {self.strip_prefix!r} has no effect: {why}")


def list_images(folder: Path, source: str = "", follow_links: bool = False, read: Collection[str] = ()) -> ImageFolder:
    """List a folder of images once; after that no name of a plain file in it costs another look at the disk.

    Args:
        source: what remarks on it are counted under.
        read: names of files in it that are read otherwise.

    Raises:
        UserError: when the folder or a tar in it cannot be read, or its tars are compressed.
    """
    listed, walk = ImageFolder(folder, source=source, follow_links=follow_links), Walk(folder, source, follow_links)
    unread, compressed = dict[str, Remark](), list[str]()
    for found in walk.files():
        if is_image_name(found.last):
            if not found.plain:
                listed.links.add(found.name)
            listed.add(found.name)
        elif found.name.lower().endswith(".tar"):
            if not found.plain and (remark := refuse_link(folder, found.name, source, follow_links)):
                listed.damages.append(remark)
            else:
                list_tar(listed, found.name)
        elif is_compressed(found.name):
            compressed.append(found.name)
        elif found.name not in read:
            # records and not sidecars say which images there are, so that a sidecar lacks none
            add_up(unread, remark_file(source, found.last, found.name, sidecars=False))
    listed.damages.extend((*walk.skipped, *unread.values()))
    if compressed:
        if not listed.by_stem:
            refuse_compressed(folder / compressed[0])
        example = show_text(compressed[0])
        listed.damages.append(Remark(source, "compressed tars, not read", len(compressed), example))
    return listed


def add_up(sums: dict[str, Remark], remark: Remark) -> None:
    """Sum remarks by kind, where there may be as many as images; the first one is the example."""
    before = sums.get(remark.kind)
    sums[remark.kind] = replace(before, count=before.count + remark.count) if before else remark


def list_tar(listed: ImageFolder, tar: str) -> None:
    """Add the images of a tar, and what else is in it. Of two members of one name the later counts."""
    others: dict[str, list[str]] = {}
    path = listed.path / tar
    with open_tar(path) as file:
        for item in walk_tar(file):
            if isinstance(item, Damage):
                listed.damages.append(reject_damage(item, tar))
            elif (kind := add_member(listed, tar, item, path)) is not None:
                others.setdefault(kind, []).append(item.name)
    for kind, names in others.items():
        listed.damages.append(Remark(listed.source, kind, len(names), show_text(f"{tar}: {names[0]}")))


def add_member(listed: ImageFolder, tar: str, member: Member, path: Path) -> str | None:
    """Add a member of a tar that is an image; what one is that is not read, or stands for an earlier one."""
    *folders, last = member.name.split("/")
    if any(is_system_folder(each) for each in folders):
        return "members of hidden or system folders in tars, not read"
    if not is_image_name(last):
        return None if member.name.endswith("/") else "members of tars that are no images"
    name = f"{tar}/{plain_path(member.name)}"
    again = name in listed.members
    if not again:
        listed.add(name)
    listed.members[name] = ImagePlace(path, member.offset, member.length)
    return "members of tars written again later, not read" if again else None

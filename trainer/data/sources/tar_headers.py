"""A strict walk over the 512-byte headers of a tar file. What is damaged is reported, and the walk resumes after it.

The standard library's reader, which is webdataset's too, stops at a damaged header or passes over it in silence, and
takes a damaged pax record, which no checksum covers, for none: its member then has a name cut short (Python 3.11).
Nothing is ever extracted: a member is only a name and a stretch of the file.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAGIC = slice(257, 262)  # where a header says "ustar"
EXTENDED = {  # types of headers that describe the member after them
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
}  # fmt: skip
MAX_EXTENDED_BYTES = 2**20  # of such a header; names are shorter
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=\n]+)=")
REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
OTHER_TYPES = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.GNUTYPE_SPARSE: "a sparse file",
}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A file in a tar, or a folder, whose name ends with a slash."""

    name: str
    offset: int  # of its bytes
    length: int


@dataclass(frozen=True)
class Damage:
    """What cannot be used: a stretch that makes no sense (no name), or a member that is refused."""

    offset: int
    detail: str
    name: str | None = None


def walk_tar(file: BinaryIO) -> Iterator[Member | Damage]:
    """Members and damages of an open tar file, in order; its bytes are skipped, not read."""
    end = os.fstat(file.fileno()).st_size
    lasting: dict[str, str] = {}  # what global pax headers say of all members after them
    described: dict[str, str] = {}  # what extended headers say of the next member
    position = 0
    while position < end:
        file.seek(position)
        block = file.read(BLOCK)
        start = position + len(block)
        if not block.strip(b"\0"):  # the end, unless tars were joined: zeros are passed over
            position = start
            continue
        try:
            info = parse_header(block)
            said = lasting | described
            size = parse_size(said["size"]) if "size" in said else info.size  # above 8 GiB it stands there
            if start + size > end:
                raise tarfile.HeaderError(f"{info.name!r} would end beyond the end of the file")
            if info.type not in EXTENDED:
                yield judge_member(info, said, start, size)
                described = {}
            elif size > MAX_EXTENDED_BYTES:
                raise tarfile.HeaderError(f"an extended header of {size} bytes")
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                described["path"] = file.read(size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif info.type != tarfile.GNUTYPE_LONGLINK:  # links are refused, wherever they lead
                (lasting if info.type == tarfile.XGLTYPE else described).update(parse_pax(file.read(size)))
            position = start + size + -size % BLOCK
        except tarfile.HeaderError as error:
            described = {}
            resumed = find_header(file, start)
            yield Damage(position, f"bytes {position} to {resumed} are no member: {error}")
            position = resumed


def parse_header(block: bytes) -> tarfile.TarInfo:
    """One header, whose checksum holds.

    Raises:
        tarfile.HeaderError: when it is none.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (ValueError, OverflowError) as error:
        raise tarfile.HeaderError(str(error)) from error
    if info.size < 0:
        raise tarfile.HeaderError(f"{info.name!r} has a negative size")
    return info


def parse_size(text: str) -> int:
    """The number of a pax record."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise tarfile.HeaderError(f"a size of {text[:30]!r}")
    return int(text)


def parse_pax(payload: bytes) -> dict[str, str]:
    """Records of ``length name=value``, each ending in a newline."""
    records: dict[str, str] = {}
    start = 0
    while start < len(payload) and payload[start]:
        matched = PAX_RECORD.match(payload, start)
        stop = start + int(matched[1]) if matched else 0
        if matched is None or not matched.end() < stop <= len(payload) or payload[stop - 1] != ord("\n"):
            raise tarfile.HeaderError("a pax header that makes no sense")
        value = payload[matched.end() : stop - 1]
        records[matched[2].decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return records


def judge_member(info: tarfile.TarInfo, said: dict[str, str], offset: int, size: int) -> Member | Damage:
    """The member whose bytes begin at ``offset``, if it is a regular file whose name stays inside."""
    name = said.get("path") or info.name
    if info.isdir():
        return Member(name.rstrip("/") + "/", offset, 0)
    kind = tarfile.GNUTYPE_SPARSE if any(each.startswith("GNU.sparse") for each in said) else info.type
    if kind not in REGULAR:
        what = OTHER_TYPES.get(kind, f"a member of type {kind!r}")
        return Damage(offset - BLOCK, f"{what}, not a regular file", name)
    if "\0" in name or name.startswith("/") or ".." in name.split("/"):
        return Damage(offset - BLOCK, "its name does not stay inside a folder", name)
    return Member(name, offset, size)


def find_header(file: BinaryIO, start: int) -> int:
    """Where the next header with a good checksum lies from ``start`` on, block by block; else the file's end."""
    file.seek(start)
    while block := file.read(BLOCK):
        try:
            if block[MAGIC] == b"ustar" and parse_header(block):
                return start
        except tarfile.HeaderError:
            pass
        start += len(block)
    return start

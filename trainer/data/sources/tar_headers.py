"""A strict walk over the 512-byte headers of a tar file. What is damaged is told, and the walk goes on behind it.

The standard library's and webdataset's readers stop at the first bad header and lose all that follows; extraction is
never done, so that a member is only ever a name and a stretch of the file.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAGIC_AT = 257  # where a header says "ustar"
MAX_EXTENSION = 2**20  # bytes of a pax or GNU header; names are shorter
CHUNK = 2**20  # bytes read at a time while looking for the next header
PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=\n]+)=")


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int  # of its bytes
    length: int


@dataclass(frozen=True)
class Damage:
    """What cannot be used: a stretch that makes no sense (no name), or a member that is refused."""

    offset: int
    detail: str
    name: str | None = None


class BadHeader(Exception):
    """Why a header cannot be used."""


@dataclass
class Extensions:
    """What pax and GNU headers say about the member behind them."""

    values: dict[str, str] = field(default_factory=dict)
    lasting: dict[str, str] = field(default_factory=dict)  # of a global pax header

    def get(self, name: str) -> str | None:
        return self.values.get(name, self.lasting.get(name))


def walk_tar(file: BinaryIO) -> Iterator[Member | Damage]:
    """Members and damages of an open tar file, in order; its bytes are skipped, not read."""
    end = os.fstat(file.fileno()).st_size
    extensions, position = Extensions(), 0
    while position < end:
        file.seek(position)
        block = file.read(BLOCK)
        if not block.strip(b"\0"):  # the end, unless tars were joined: zeros are passed over
            position += BLOCK
            continue
        try:
            info = read_header(block)
            size = whole_number(extensions.get("size"), info.size)
            after = position + BLOCK + size + -size % BLOCK
            if position + BLOCK + size > end:
                raise BadHeader(f"{info.name!r} would end behind the end of the file")
            if is_extension(info):
                if size > MAX_EXTENSION:
                    raise BadHeader(f"an extended header of {size} bytes")
                read_extension(info, file.read(size), extensions)
            else:
                yield judge_member(info, extensions, position, size)
                extensions.values = {}
            position = after
        except BadHeader as error:
            extensions.values = {}
            next_one = find_header(file, position + BLOCK, end)
            yield Damage(position, f"bytes {position} to {next_one} are no member: {error}")
            position = next_one


def read_header(block: bytes) -> tarfile.TarInfo:
    """One header, whose checksum holds."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise BadHeader(str(error)) from error
    if info.size < 0:
        raise BadHeader(f"{info.name!r} has a negative size")
    return info


def whole_number(text: str | None, otherwise: int) -> int:
    """A pax record's number; a size above 8 GiB stands there."""
    if text is None:
        return otherwise
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise BadHeader(f"a size of {text[:30]!r}")
    return int(text)


def is_extension(info: tarfile.TarInfo) -> bool:
    """Whether the block describes the member behind it."""
    return info.type in (
        tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
    )  # fmt: skip


def read_extension(info: tarfile.TarInfo, payload: bytes, extensions: Extensions) -> None:
    """Add what an extended header says."""
    match info.type:
        case tarfile.GNUTYPE_LONGNAME:
            extensions.values["path"] = payload.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        case tarfile.GNUTYPE_LONGLINK:
            pass  # links are refused, wherever they lead
        case tarfile.XGLTYPE:
            extensions.lasting |= parse_pax(payload)
        case _:
            extensions.values |= parse_pax(payload)


def parse_pax(payload: bytes) -> dict[str, str]:
    """Records of ``length name=value``, each ending in a newline."""
    records: dict[str, str] = {}
    start = 0
    while start < len(payload) and payload[start]:
        matched = PAX_RECORD.match(payload, start)
        stop = start + int(matched[1]) if matched else 0
        if matched is None or not matched.end() < stop <= len(payload) or payload[stop - 1] != ord("\n"):
            raise BadHeader("a pax header that makes no sense")
        value = payload[matched.end() : stop - 1]
        records[matched[2].decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        start = stop
    return records


def judge_member(info: tarfile.TarInfo, extensions: Extensions, position: int, size: int) -> Member | Damage:
    """The member, if it is a regular file whose name stays inside."""
    name = extensions.get("path") or info.name
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(each.startswith("GNU.sparse") for each in extensions.values)
    if info.isdir():
        return Member(name.rstrip("/") + "/", position + BLOCK, 0)
    if sparse or info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe"}
        kinds |= {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device"}
        kind = "a sparse file" if sparse else kinds.get(info.type, f"a member of type {info.type!r}")
        return Damage(position, f"{kind}, not a regular file", name)
    if "\0" in name or name.startswith("/") or ".." in name.split("/"):
        return Damage(position, "its name does not stay inside a folder", name)
    return Member(name, position + BLOCK, size)


def find_header(file: BinaryIO, start: int, end: int) -> int:
    """Where the next header with a good checksum lies; the end where there is none."""
    while start < end:
        file.seek(start)
        chunk = file.read(CHUNK + BLOCK)
        at = chunk.find(b"ustar", MAGIC_AT)
        while at >= 0 and at - MAGIC_AT < CHUNK:
            offset = at - MAGIC_AT
            if offset % BLOCK == 0 and is_header(chunk[offset : offset + BLOCK]):
                return start + offset
            at = chunk.find(b"ustar", at + 1)
        start += CHUNK
    return end


def is_header(block: bytes) -> bool:
    """Whether a block is a header whose checksum holds."""
    try:
        read_header(block)
    except BadHeader:
        return False
    return True

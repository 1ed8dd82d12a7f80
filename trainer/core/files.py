"""Write whole or not at all: temporary name, fsync, rename. And hash what was written."""

import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.core.disk import disk_space
from trainer.core.errors import UserError
from trainer.core.progress import BYTES, Meter

READ_BYTES = 1 << 20  # at a time, of what is hashed or copied
TEMPORARY_PREFIX = ".tmp-"
MAX_LIST = 2**30  # bytes of a list of keys or tags


def is_file(path: str | Path) -> bool:
    """Whether a file lies there. Path's own method raises for what is too long for a name, as a value may be."""
    return os.path.isfile(path)  # noqa: PTH113


def home_path(text: str) -> Path:
    """A path as a user writes it: ``~`` is the home folder.

    Raises:
        UserError: see :func:`expand_home`.
    """
    return Path(expand_home(text))


def expand_home(text: str) -> str:
    """A path, or a hub id, with the home folder in place of a leading ``~`` or ``~user``.

    Raises:
        UserError: when there is no such user.
    """
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise UserError(f"{text}: there is no user of that name; a folder that begins with ~ is ./{text}") from error


def temporary_path(path: Path) -> Path:
    """A fresh name beside ``path``, on the same file system, so that a rename is atomic."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")


def set_aside(path: Path, word: str) -> Path:
    """Give something another name, ``<name>.<word>``, or with a number where that is taken; where it lies now."""
    names = (f"{path.name}.{word}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    aside = next(free for name in names if not os.path.lexists(free := path.with_name(name)))
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def shown_name(path: Path) -> str:
    """What people call a file: its folder and its name, as they will be where they are temporary ones."""
    temporary = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(.*)-[0-9a-f]{{8}}")
    return "/".join(temporary.sub(r"\1", part) for part in (path.parent.name, path.name) if part)


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a folder's entries are forced to the disk by the same call


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, then put it under its name; an old file stays until then.

    Raises:
        FullDisk: naming the file; nothing of it is left.
    """
    with disk_space(path.parent, str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            write(temporary)
            temporary.chmod(0o644)  # safetensors writes 0600
            sync_file(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` under ``path``, whole or not at all."""
    write_file(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under ``path``, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON under ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def open_regular(path: Path) -> BinaryIO | None:
    """A regular file opened for reading; None for anything else: a pipe would never open, and a device never end."""
    # opening a pipe for reading would wait for ever without O_NONBLOCK
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)  # a folder can be opened, but makes no file object
        return None
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """All bytes of a regular file of at most so many.

    Raises:
        OSError: for anything else.
    """
    if (file := open_regular(path)) is None:
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(errno.EINVAL, f"it has {size:,} bytes, more than {most:,}", str(path))
        return file.read()


def read_listed(path: Path) -> list[str]:
    """The lines of a list, such as one of keys or of tags, without what is empty.

    Raises:
        OSError: as ``read_regular``.
        UnicodeDecodeError: for what is not UTF-8.
    """
    lines = read_regular(path, MAX_LIST).decode("utf-8-sig").splitlines()
    return [word for line in lines if (word := line.strip())]


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return sha256_rest(file, path)


def sha256_rest(file: BinaryIO, path: Path) -> str:
    """The SHA-256 of what follows in the open file ``path``, in hex."""
    digest = hashlib.sha256()
    for part in stream_bytes(file, path, "hash"):
        digest.update(part)
    return digest.hexdigest()


def copy_rest(file: BinaryIO, path: Path, target: BinaryIO) -> None:
    """Copy what follows in the open file ``path``."""
    for part in stream_bytes(file, path, "copy"):
        target.write(part)


def stream_bytes(file: BinaryIO, path: Path, what: str) -> Iterator[memoryview]:
    """What follows in the open file ``path``, in parts that are gone with the next one; a meter says how far it is."""
    buffer = memoryview(bytearray(READ_BYTES))
    with Meter(f"{what} {shown_name(path)}", path.stat().st_size - file.tell(), BYTES) as meter:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            yield buffer[:count]
            meter.update(count)


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """The SHA-256 of a value's canonical JSON (sorted keys, no spaces), in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return sha256_bytes(text.encode())

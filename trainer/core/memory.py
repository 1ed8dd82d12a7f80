"""The host's memory that a process may still take: the machine's, and that of the control groups which hold it."""

from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def free_memory(proc: Path = Path("/proc"), groups: Path = GROUPS) -> int | None:
    """Bytes that are free, or in caches that give way; None where the system does not say."""
    found = [*free_on_machine(proc / "meminfo"), *free_in_groups(proc / "self/cgroup", groups)]
    return min(found, default=None)


def free_on_machine(meminfo: Path) -> Iterator[int]:
    """The kernel's own estimate."""
    for line in read_kernel_file(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def free_in_groups(membership: Path, groups: Path) -> Iterator[int]:
    """What each control group above this process leaves it, versions 1 and 2; file caches give way."""
    for line in read_kernel_file(membership):
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = groups / controllers if controllers else groups
        limit, used, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        group = root / place.lstrip("/")
        for folder in (group, *group.parents):
            if folder in (root, *root.parents):
                folder = root
            most, now = read_number(folder / limit), read_number(folder / used)
            if most is not None and now is not None:
                stats = dict(line.split(maxsplit=1) for line in read_kernel_file(folder / "memory.stat"))
                yield max(0, most - now + int(stats.get(cache, 0)))
            if folder == root:
                break


def read_kernel_file(path: Path) -> list[str]:
    """The lines of one of the kernel's files; none where there is none."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def read_number(path: Path) -> int | None:
    """A file's only number; None where there is no such file, or it says that there is no limit."""
    text = "".join(read_kernel_file(path))
    return int(text) if text.isdigit() else None

"""What the promises' tests share: how often each was tried, and how often it failed, is printed at the end."""

from collections.abc import Callable, Iterator

import pytest

from support.fork_server import ForkServer, serving

Count = Callable[[str, bool], None]


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Real training processes without their imports."""
    with serving() as started:
        yield started


@pytest.fixture
def count_try(record_property: Callable[[str, object], None]) -> Count:
    """A function that notes one try of something and whether it held; the summary adds them up."""

    def note(what: str, held: bool) -> None:
        record_property("try", (what, held))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each thing that was tried; properties of tests come here from the processes of pytest-xdist too."""
    tries: dict[str, list[bool]] = {}
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for name, value in report.user_properties if report.when == "call" else []:
            if name == "try":
                tries.setdefault(value[0], []).append(value[1])
    if tries:
        terminalreporter.section("promises: tries and failures")
    for what, held in sorted(tries.items()):
        terminalreporter.line(f"{len(held):6,} tries, {held.count(False):4,} failures: {what}")

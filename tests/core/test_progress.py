"""The meter of long work: a bar on a terminal, lines elsewhere, nothing where nobody asked."""

import fcntl
import hashlib
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from trainer.core import progress
from trainer.core.files import sha256_file, shown_name, temporary_path
from trainer.core.progress import (
    BAR,
    BYTES,
    NO_BAR,
    NO_TOTAL,
    SECONDS,
    Meter,
    describe_state,
    fit_line,
    format_count,
    format_rate,
    measure_files,
    metered,
    watch_writing,
)

Notes = Callable[[], str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that lets seconds pass; nothing else does."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ((1234, 5000, "image", 12.3, 100), "1,234 of 5,000 images, 12.3 images/s, 0:05:06 left"),
        ((1, 1, "image", 0.2, 5), "1 of 1 image, 5.0 s/image, 0:00:05"),
        ((3.1e9, 6.9e9, BYTES, 4e8, 8), "3.1 of 6.9 GB, 400.0 MB/s, 0:00:10 left"),
        ((3.1e8, 6.9e9, BYTES, 4e8, 8), "310.0 MB of 6.9 GB, 400.0 MB/s, 0:00:16 left"),
        ((7e6, None, BYTES, 1e6, 7), "7.0 MB, 1.0 MB/s, 0:00:07"),
        ((7, None, "post", 1, 7), "7 posts, 1.0 posts/s, 0:00:07"),
        ((0, 10, "step", 0, 3), "0 of 10 steps"),
        ((0, None, SECONDS, 0, 75), "0:01:15"),
    ],
)
def test_states_in_words(state: tuple, text: str) -> None:
    assert describe_state(*state) == text


def test_counts_and_rates() -> None:
    assert [format_count(1, "shard"), format_count(2e6, "shard"), format_count(0, "shard")] == [
        "1 shard", "2,000,000 shards", "0 shards",
    ]  # fmt: skip
    assert [format_rate(1, "step"), format_rate(0.25, "step")] == ["1.0 steps/s", "4.0 s/step"]


def test_a_line_now_and_then(clock: Callable[[float], None], notes: Notes) -> None:
    with Meter("encode", 100, "image") as meter:
        for _ in range(100):
            clock(0.125)
            meter.update()
    assert notes().splitlines() == ["encode: 40%, 40 of 100 images, 8.0 images/s, 0:00:08 left",
                                    "encode: 80%, 80 of 100 images, 8.0 images/s, 0:00:02 left",
                                    "encode: 100 images in 0:00:12"]  # fmt: skip
    with Meter("slow", 1000, "step", done=500) as meter:
        for _ in range(6):
            clock(20)  # too slow for a tenth: each half minute
            meter.update(1, "loss 0.1")
    assert [line.partition(",")[0] for line in notes().splitlines()] == [
        *["slow: 50%"] * 3, "slow: 6 steps in 0:02:00",
    ]  # fmt: skip


def test_what_is_short_says_nothing(clock: Callable[[float], None], notes: Notes) -> None:
    for _ in metered(range(1000), "read", "post"):
        clock(0.004)
    assert notes() == ""


def test_the_note_stays_to_the_end(clock: Callable[[float], None], notes: Notes) -> None:
    with Meter("verify", None, "shard") as meter:
        clock(31)
        meter.update(1, "1 problem")
    assert notes().splitlines() == ["verify: 1 shard, 31.0 s/shard, 0:00:31, 1 problem",
                                    "verify: 1 shard in 0:00:31, 1 problem"]  # fmt: skip


def test_without_a_command_nothing_is_shown(clock: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    with Meter("encode", 3, "image") as meter:
        clock(99)
        meter.update()
    assert list(metered("abc", "read", "post")) == ["a", "b", "c"] and caplog.text == ""


def test_an_error_passes_and_ends_the_meter(notes: Notes) -> None:
    with pytest.raises(ValueError, match="inside"), Meter("encode", 3, "image"):
        raise ValueError("inside")


def test_hashing_says_which_file(
    tmp_path: Path, clock: Callable[[float], None], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "unet" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(bytes(3_000_000))
    monkeypatch.setattr(progress.Meter, "is_due", lambda _: True)
    assert sha256_file(file) == hashlib.sha256(bytes(3_000_000)).hexdigest()
    first, *_, last = notes().splitlines()
    assert first.startswith("hash unet/model.safetensors: 34%, 1.0 of 3.0 MB")
    assert last == "hash unet/model.safetensors: 3.0 MB in 0:00:00"
    assert shown_name(temporary_path(temporary_path(tmp_path / "a-b") / "c.x")) == "a-b/c.x"


def test_writing_is_seen_from_the_disk(tmp_path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's one call, in the file that it fills: the rest is added when it returns."""
    monkeypatch.setattr(progress, "WATCH_SECONDS", 0.001)
    seen: list[int] = []
    update = Meter.update
    monkeypatch.setattr(Meter, "update", lambda meter, *more: (seen.append(meter.done), update(meter, *more))[1])
    (tmp_path / "before").write_bytes(bytes(50_000))
    assert measure_files(tmp_path) >= 50_000 and measure_files(tmp_path / "none") == 0
    with watch_writing(tmp_path, "a.bin", 1_000_000):
        (tmp_path / "a.bin").write_bytes(os.urandom(600_000))
        os.sync()
        for _ in range(10_000):
            if seen and seen[-1] >= 600_000:
                break
            progress.time.sleep(0.001)
    assert 600_000 <= seen[-1] <= 1_000_000


def on_terminal(*command: str, columns: int = 100) -> str:
    """What a command shows on a terminal of its own, with its control characters."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=other, stdout=other, stderr=other, close_fds=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def verify(tiny_settings: list[str], *words: str) -> list[str]:
    """A real command, which shows its bar however short it takes."""
    shards = next(word for word in tiny_settings if word.startswith("data.shards=")).partition("=")[2]
    program = (
        "import runpy, sys; from trainer.core import progress; progress.SHORT = 0.0; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [sys.executable, "-c", program, "scripts/verify_shards.py", shards, *words]


def test_a_terminal_has_a_bar(tiny_settings: list[str]) -> None:
    shown = on_terminal(*verify(tiny_settings))
    assert re.search(r"\rverify: 100%\|█+\| \d+\.\d of \d+\.\d kB, .*/s, 0:00:0\d", shown)
    assert "24 samples in 1 shard, " in shown
    assert "\rverify" not in on_terminal(*verify(tiny_settings, "--quiet"))


TRAINING = """
import logging, sys
from trainer.core import console, progress
progress.SHORT = 0.0
with console.speaking(console.Output()), progress.Meter(sys.argv[1], 30, "step") as meter:
    for number in range(8):
        progress.time.sleep(0.15)
        meter.update(1, f"loss 0.{number}234, 12.34 images/s, scale 65536, 3 skipped")
"""


@pytest.mark.parametrize(("columns", "name"), [(80, "a" * 20), (80, "my"), (100, "a" * 20), (140, "my")])
def test_a_narrow_terminal_shows_what_matters(columns: int, name: str) -> None:
    shown = on_terminal(sys.executable, "-c", TRAINING, name, columns=columns)
    *_, last = [line for line in re.split("[\r\n]+", shown.replace("\x1b[A", "")) if " of 30 steps" in line]
    assert len(last.rstrip()) <= columns
    assert re.search(rf"^{name}:  27%.* 8 of 30 steps, .*0:00:\d\d left, loss 0.7234", last), last
    assert ("|" in last) == ("steps/s" in last) == ("skipped" in last) == (columns == 140), last


def test_a_terminal_of_unknown_width_has_lines(tiny_settings: list[str]) -> None:
    """As one of docker exec -t, and of script without a terminal around it."""
    program = TRAINING.replace(
        "import console, progress\n", "import console, progress\nprogress.BETWEEN_SECONDS = 0.1\n"
    )
    shown = on_terminal(sys.executable, "-c", program, "my", columns=0).replace("\r\n", "\n")
    assert "\r" not in shown and re.search(r"^my: \d+%, \d of 30 steps, .* left, loss 0.\d234", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("columns", "total", "layout", "state"),
    [
        (120, True, BAR, "8 of 30 steps, 1.0 steps/s, 0:00:22 left, loss 0.1, 2 images/s"),
        (80, True, NO_BAR, "8 of 30 steps, 1.0 steps/s, 0:00:22 left, loss 0.1, 2 images/s"),
        (63, True, NO_BAR, "8 of 30 steps, 0:00:22 left, loss 0.1, 2 images/s"),
        (50, True, NO_BAR, "8 of 30 steps, 0:00:22 left, loss 0.1"),
        (10, True, NO_BAR, "8 of 30 steps, 0:00:22 left, loss 0.1"),
        (70, False, NO_TOTAL, "8 of 30 steps, 1.0 steps/s, 0:00:22 left, loss 0.1, 2 images/s"),
    ],
)
def test_what_is_left_out_first(columns: int, total: bool, layout: str, state: str) -> None:
    parts = ("8 of 30 steps", "1.0 steps/s", "0:00:22 left")
    assert fit_line(columns, total, parts, "loss 0.1, 2 images/s") == (layout, state)


def test_a_log_has_no_carriage_returns(tiny_settings: list[str]) -> None:
    done = subprocess.run(
        verify(tiny_settings), cwd=REPOSITORY, capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert b"\r" not in done.stdout + done.stderr and b"all as written" in done.stdout

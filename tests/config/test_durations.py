"""Times in configs: as people write them, and as SLURM does; a number alone is none."""

import pytest

from trainer.config.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("11h30m", 41_400), ("90m", 5_400), ("45s", 45), ("2d", 172_800), ("1d2h3m4s", 93_784),
     ("11:30:00", 41_400), ("1-11:30:00", 127_800), ("100:00:00", 360_000)],
)  # fmt: skip
def test_a_time_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "11:30", "1.5h", "30m11h", "-5m", "0s", "h", "11 h", "1:2:3", "null"])
def test_what_could_mean_two_things_is_none(text: str) -> None:
    assert parse_duration(text) is None

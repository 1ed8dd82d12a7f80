"""Lengths of time as people write them in a config."""

import re

UNITS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
WITH_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
AS_IN_SLURM = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def parse_duration(text: str) -> int | None:
    """Seconds of a time such as ``11h30m`` or, as SLURM has it, ``1-11:30:00``; None where it is neither, or nothing.

    A number alone is none: of SLURM's it would be minutes, elsewhere seconds.
    """
    match = WITH_UNITS.fullmatch(text) or AS_IN_SLURM.fullmatch(text)
    if match is None:
        return None
    return (
        sum(int(number or 0) * seconds for number, seconds in zip(match.groups(), UNITS.values(), strict=True)) or None
    )

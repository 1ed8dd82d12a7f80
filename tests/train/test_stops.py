"""When a run says that it is time; real stops are in tests/promises/test_signals.py."""

import time

from trainer.train.stops import Deadline, Stops


def test_time_that_was_up_stays_up() -> None:
    """What it looks ahead by shrinks when a save ends, and batches or samples may have been given up for it by then."""
    stops = Stops(Deadline(time.monotonic() + 100, "the limit"), None, None)
    stops.save_seconds = 10.0
    assert not stops.asked()
    stops.pace.saving_since = time.monotonic()
    stops.save_seconds = 60.0
    assert stops.asked()
    stops.pace.saving_since, stops.save_seconds = None, 0.0
    assert stops.asked() and stops.agree() and stops.reason == "the limit"

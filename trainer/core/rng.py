"""Random generators from names. No random state is kept anywhere: a draw is a function of what it is for.

NumPy's Philox is used rather than torch's CPU generator, which keeps 32 bits of a seed and gives other
bits on machines without AVX2.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def philox_key(purpose: str, *names: int | str) -> int:
    """The 128-bit Philox key of a named draw, e.g. ``philox_key("noise", seed, pass_, key)``.

    Names are hashed with their types and lengths, so that (1, "23") and (12, "3") differ.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in (purpose, *names):
        # a NumPy integer would be equal, and have another key
        assert type(name) in (int, str), f"{name!r} is a {type(name).__name__}"
        digest.update(name_bytes(name))
    return int.from_bytes(digest.digest(), "little")


def name_bytes(name: int | str) -> bytes:
    """What is hashed of a name."""
    text = f"{type(name).__name__}:{name}".encode()
    return len(text).to_bytes(8, "little") + text


def hash_keys(keys: Iterable[str], purpose: str, *names: int | str) -> np.ndarray:
    """A number for each of many keys, uint64 (n,): the lower half of ``philox_key(purpose, *names, key)``.

    Two microseconds each, where a generator takes ten.
    """
    before = hashlib.blake2b(digest_size=16)
    for name in (purpose, *names):
        before.update(name_bytes(name))
    lower = bytearray()
    for key in keys:
        digest = before.copy()
        digest.update(name_bytes(key))
        lower += digest.digest()[:8]
    return np.frombuffer(bytes(lower), dtype="<u8")


class KeySeed(ISeedSequence):
    """A Philox key as a seed. ``Philox(key=...)`` makes the same generator, but reads the system's entropy first."""

    def __init__(self, key: int) -> None:
        self._words = np.frombuffer(key.to_bytes(16, "little"), dtype="<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The key's two words, for which Philox asks."""
        assert (n_words, dtype) == (2, np.uint64)
        return self._words


def rng(purpose: str, *names: int | str) -> np.random.Generator:
    """A generator that only depends on its names."""
    return np.random.Generator(np.random.Philox(KeySeed(philox_key(purpose, *names))))  # type: ignore[arg-type]

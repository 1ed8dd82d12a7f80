"""Draws are functions of their names and of nothing else, and stay the same from version to version."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.rng import philox_key, rng

names = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=8), max_size=4)


def test_golden_draws() -> None:
    """If one of these changes, every run of every user sees other data, noise and timesteps."""
    assert philox_key("noise", 42, 0, "123456") == 0xB40DF934D3C33BF084DFCBAAF4298863
    assert rng("timestep", 42, 3, "7").integers(0, 1000, 4).tolist() == [983, 692, 344, 96]
    assert rng("order", 42, 0, 832, 1216).permutation(8).tolist() == [2, 3, 0, 6, 1, 5, 4, 7]
    noise = rng("noise", 42, 0, "7").standard_normal(2, dtype=np.float32)
    assert [float(x).hex() for x in noise] == ["0x1.f3a2ca0000000p-1", "-0x1.62e4360000000p+0"]


def test_a_draw_depends_on_its_names_alone() -> None:
    first = rng("noise", 42, 1, "a").standard_normal(64)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    other = rng("noise", 42, 1, "b")
    other.standard_normal(10)
    assert np.array_equal(rng("noise", 42, 1, "a").standard_normal(64), first)


@given(names, names)
def test_different_names_have_different_keys(one: list[int | str], two: list[int | str]) -> None:
    assert (philox_key("x", *one) == philox_key("x", *two)) == (one == two)
    assert philox_key("x", *one) < 2**128


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("noise", 1, "23"), ("noise", 12, "3")),  # where a name ends
        (("noise", "1"), ("noise", 1)),  # what type it has
        (("noise", "1", ""), ("noise", "1")),  # how many there are
        (("noise", "ab"), ("noisea", "b")),
        (("noise", 1, 2), ("noise", 2, 1)),
        (("noise", 1), ("timestep", 1)),
        (("noise", "int:1"), ("noise", 1)),
    ],
)
def test_types_lengths_and_order_matter(one: tuple[str, ...], two: tuple[str, ...]) -> None:
    assert philox_key(*one) != philox_key(*two)
    assert rng(*one).integers(2**63) != rng(*two).integers(2**63)


@pytest.mark.parametrize("name", [np.int64(1), np.str_("a"), True, 1.0, None])
def test_a_name_that_only_looks_like_a_number_is_refused(name: object) -> None:
    """np.int64(1) == 1, but it would be hashed by another type's name and give another draw."""
    with pytest.raises(AssertionError, match=type(name).__name__):
        rng("noise", name)  # type: ignore[arg-type]


def test_draws_of_neighbouring_names_are_independent() -> None:
    draws = np.stack([rng("noise", 42, 0, str(key)).standard_normal(2000) for key in range(20)])
    correlations = np.corrcoef(draws) - np.eye(20)
    assert abs(correlations).max() < 5 / 2000**0.5
    assert abs(draws.mean()) < 5 / draws.size**0.5
    assert abs(draws.var() - 1) < 5 * (2 / draws.size) ** 0.5


@given(names)
def test_the_generator_is_philox_with_the_names_key(some: list[int | str]) -> None:
    by_key = np.random.Generator(np.random.Philox(key=philox_key("x", *some)))
    assert str(rng("x", *some).bit_generator.state) == str(by_key.bit_generator.state)
    assert np.array_equal(rng("x", *some).standard_normal(16), by_key.standard_normal(16))

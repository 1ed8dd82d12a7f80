"""fp32 in 16 bits: the split loses nothing, and stochastic rounding is unbiased and depends on the place alone."""

import pytest
import torch
from torch import nn

from trainer.train.rounding import draw_random, join_fp32, place_key, round_stochastically, signed, split_fp32, step_key
from trainer.train.weights import FlatWeights, Piece, Portion, Span, cut_portions, lay_out

CPU = torch.device("cpu")


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    halves = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split_fp32(values.clone(), *halves)
    return halves


def as_fp32(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def test_a_split_is_exact_for_a_million_patterns_of_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator)
    assert torch.equal(join_fp32(*split(as_fp32(bits))).view(torch.int32), bits.int())


def test_a_split_is_exact_for_ties_subnormals_and_extremes() -> None:
    upper = torch.arange(-(2**15), 2**15).repeat_interleave(5) << 16  # every bf16, and what is a tie or nearly one
    lower = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(2**16)
    values = as_fp32(upper | lower)
    weight, remainder = split(values)
    assert torch.equal(join_fp32(weight, remainder).view(torch.int32), values.view(torch.int32))
    # and the bf16 is a nearest one: the same as torch's, or the other neighbour of a tie
    other = (weight.view(torch.int16) != values.bfloat16().view(torch.int16)) & values.isfinite()
    assert other.sum() > 0 and bool((lower[other] == 0x8000).all())
    assert (
        (values[other].double() - weight[other].double())
        .abs()
        .equal((values[other].double() - values.bfloat16()[other].double()).abs())
    )


def test_the_hash_is_the_one_of_whole_numbers() -> None:
    """Wrapped 32-bit arithmetic of tensors, against Python's."""

    def mix(place: int, key: int) -> int:
        x = place & 0xFFFFFFFF
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x ^= key & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return signed(x ^ x >> 16)

    places = [0, 1, 2, 77, 2**31 - 1, -1, -(2**31), -12345]
    drawn = draw_random(torch.tensor(places, dtype=torch.int32), -987654321).view(torch.int32)
    assert drawn.tolist() == [mix(place, -987654321) for place in places]


def test_the_random_numbers_of_a_place_stay_what_they_are() -> None:
    """A later version that drew others would not continue a run."""
    assert (place_key(42, "unet.conv_in.weight"), step_key(42, 7)) == (160847577, 518918052)
    places = torch.arange(3, dtype=torch.int32).bitwise_xor_(160847577)
    assert draw_random(places, 518918052).tolist() == [-2584, -20705, 7035, -12840, 32486, -30682]


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(60, generator=generator), torch.tensor([1e-39, -1e-39, 3.3e38, 0.0])])
    count = 4000
    down = as_fp32(values.view(torch.int32) & -0x10000)  # towards zero
    away = as_fp32((values.view(torch.int32) & -0x10000) + 0x10000)
    total = torch.zeros(len(values), dtype=torch.float64)
    for step in range(count):
        rounded = torch.empty_like(values, dtype=torch.bfloat16)
        round_stochastically(
            values.clone(), draw_random(torch.arange(32, dtype=torch.int32), step_key(0, step)), rounded
        )
        assert bool(((rounded == down) | (rounded == away)).all())
        total += rounded.double()
    gap = (away.double() - down.double()).abs()
    share = (values.double() - down.double()) / (away.double() - down.double())
    # of a fair coin with that chance, five standard deviations
    assert bool(
        ((total / count - values.double()).abs() <= 5 * gap * (share * (1 - share) / count).sqrt() + 1e-45).all()
    )


def test_a_value_that_bf16_holds_stays() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2)).bfloat16()
    rounded = torch.empty_like(values)
    round_stochastically(values.float(), draw_random(torch.arange(500, dtype=torch.int32), 5), rounded)
    assert torch.equal(rounded, values)


def test_steps_parameters_and_neighbours_draw_apart() -> None:
    """No two streams resemble each other more than chance lets them."""
    places = torch.arange(50_000, dtype=torch.int32)
    keys = [place_key(3, "a"), place_key(3, "b"), place_key(4, "a")]
    streams = [draw_random(places ^ key, step_key(3, step)).double() for key in keys for step in (0, 1)]
    streams.append(streams[0].roll(1))
    streams.append(streams[0].roll(2))
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / len(streams[0]) ** 0.5
    for stream in streams:
        assert abs(float(stream.mean())) < 5 * 2**16 / 12**0.5 / len(stream) ** 0.5
        assert float(stream.unique().numel()) / 2**16 == pytest.approx(
            1 - 2.718281828 ** -(len(stream) / 2**16), abs=0.01
        )


# --- the same numbers whatever is cut how


@pytest.fixture
def places() -> dict[str, Span]:
    shapes = {"one": (3, 77), "two": (5,), "three": (130, 33), "four": (), "five": (64,)}
    generator = torch.Generator().manual_seed(0)
    return lay_out({name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()})


def test_parameters_begin_aligned_and_do_not_overlap(places: dict[str, Span]) -> None:
    assert [(place.start, place.stop, place.end) for place in places.values()] == [
        (0, 231, 256), (256, 261, 320), (320, 4610, 4672), (4672, 4673, 4736), (4736, 4800, 4800)]  # fmt: skip


@pytest.mark.parametrize("size", [64, 128, 192, 320, 1024, 2**20])
def test_chunks_cover_each_element_once(places: dict[str, Span], size: int) -> None:
    portions = list(cut_portions(places.values(), size))
    assert all(
        0 < portion.stop - portion.start <= size and (portion.stop - portion.start) % 2 == 0 for portion in portions
    )
    seen = [(piece.span.name, piece.first + number) for portion in portions for piece in portion.pieces
            for number in range(piece.stop - piece.start)]  # fmt: skip
    assert seen == [(name, number) for name, place in places.items() for number in range(place.parameter.numel())]


def updated(places: dict[str, Span], size: int, step: int = 3) -> dict[str, torch.Tensor]:
    """Weights after an update by a constant, in portions."""
    copies = lay_out({name: nn.Parameter(place.parameter.detach().clone()) for name, place in places.items()})
    flat = FlatWeights(list(copies.values()), torch.bfloat16, CPU, seed=42)
    flat.step = step
    flat.expect(cut_portions(copies.values(), size))
    for portion in cut_portions(copies.values(), size):
        flat.write(portion, flat.read(portion.start, portion.stop).add_(1e-3))
    return {name: place.parameter.detach().clone() for name, place in copies.items()}


def test_random_numbers_do_not_depend_on_chunks(places: dict[str, Span]) -> None:
    whole = updated(places, 2**20)
    for size in (64, 128, 192, 320, 1024):
        for name, value in updated(places, size).items():
            assert torch.equal(value, whole[name])
    alone = {name: value for name in places for value in updated({name: places[name]}, 128).values()}
    assert all(torch.equal(alone[name], whole[name]) for name in whole)
    assert any(not torch.equal(value, whole[name]) for name, value in updated(places, 64, step=4).items())


def test_a_slice_of_a_parameter_draws_what_the_whole_does(places: dict[str, Span]) -> None:
    flat = FlatWeights(list(places.values()), torch.bfloat16, CPU, seed=42)
    place = places["three"]
    whole, part = (
        Portion([Piece(place, 0, place.start, place.stop)]),
        Portion([Piece(place, 1024, place.start + 1024, place.start + 2048)]),
    )
    flat.expect([whole, part])
    assert torch.equal(flat.find_places(part), flat.find_places(whole)[512:1024])


def test_weights_are_put_and_got_bit_by_bit(places: dict[str, Span]) -> None:
    values = {name: place.parameter.detach().clone() for name, place in places.items()}
    flat = FlatWeights(list(places.values()), torch.bfloat16, CPU)
    assert all(torch.equal(flat.get(place.parameter), values[name]) for name, place in places.items())
    flat.put(places["one"].parameter, values["one"] * 3)
    assert torch.equal(flat.get(places["one"].parameter), values["one"] * 3)
    assert places["one"].parameter.dtype == torch.bfloat16
    assert torch.equal(flat.get(places["two"].parameter), values["two"])

"""fp32 in 16 bits: an exact split into two halves, and stochastic rounding whose bits depend on their place alone.

All is integer arithmetic on 32 bits that wraps around, the same on every device. Tensors are flat: (n,).
"""

import torch
from torch import Tensor

from trainer.core.rng import philox_key

HALF = 0x8000  # of the last place of a bf16, in the bits of an fp32
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)  # the lower and the upper halves of 32-bit numbers, little endian


def split_fp32(values: Tensor, weights: Tensor, remainder: Tensor) -> None:
    """fp32 into bf16 ``weights``, the nearest ones, and int16 ``remainder``, what they lack; ``values`` are lost.

    With half a place added, the upper half of an fp32 is the nearest bf16, and the lower half is what brings the fp32
    back: every 32 bits have exactly one pair. Hence a tie is rounded away from zero: rounded to even, an even number
    would own both of its ties, and the remainder would need a 17th bit.
    """
    halves = values.view(torch.int32).add_(HALF).view(torch.int16)
    weights.view(torch.int16).copy_(halves[ODD])
    remainder.copy_(halves[EVEN])


def join_fp32(weights: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 values that ``split_fp32`` split, bit by bit."""
    bits = torch.empty(weights.shape, dtype=torch.int32, device=weights.device)
    halves = bits.view(torch.int16)
    halves[ODD] = weights.view(torch.int16)
    halves[EVEN] = remainder
    return bits.sub_(HALF).view(torch.float32)


def round_stochastically(values: Tensor, random: Tensor, weights: Tensor) -> None:
    """fp32 into bf16 ``weights``: one of the two neighbours, the nearer the likelier; ``values`` are lost.

    ``random`` is int16, all its numbers equally likely: carried into the upper half as often as the lower half says.
    """
    bits = values.view(torch.int32).add_(random).add_(HALF)  # what is added is 0 .. 0xFFFF
    weights.view(torch.int16).copy_(bits.view(torch.int16)[ODD])


def place_key(seed: int, name: str) -> int:
    """The 32 bits by which a parameter's random numbers differ from another's."""
    return signed(philox_key("rounding", seed, name))


def step_key(seed: int, step: int) -> int:
    """The 32 bits by which a step's random numbers differ from another's."""
    return signed(philox_key("rounding", seed, step))


def draw_random(places: Tensor, key: int) -> Tensor:
    """int16 (2n,), equally likely: a hash of ``places`` (n,), which are lost, and the step's ``key``.

    A place stands for two elements of a parameter, 2p and 2p + 1: it is p with the parameter's key added by xor.

    The multipliers and shifts are those of a 32-bit mixer without notable bias, lowbias32 of the hash prospector
    (nullprogram.com, 2018); the step comes in halfway, so that steps are no shuffles of each other.
    """
    mixed = shift_xor(places, 16).mul_(0x7FEB352D).bitwise_xor_(key)
    mixed = shift_xor(mixed, 15).mul_(signed(0x846CA68B))
    return shift_xor(mixed, 16).view(torch.int16)


def shift_xor(bits: Tensor, shift: int) -> Tensor:
    """``bits ^ (bits >> shift)`` in place, zeros shifted in."""
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def signed(number: int) -> int:
    """The last 32 bits as int32 has them."""
    return (number & 0xFFFFFFFF) - ((number & 0x80000000) << 1)

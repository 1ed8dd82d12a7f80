"""Trained weights and gradients in few bits: flat tensors that a model's parameters are views of.

A 16-bit weight cannot take up the small changes of a step, so an update needs the fp32 value behind it. ``FlatWeights``
reads and writes that value, a portion at a time; ``FlatGradients`` adds up the gradients of the micro-steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config.schema import GradientDtype
from trainer.model.weights_file import check_finite
from trainer.train.rounding import (
    draw_random,
    join_fp32,
    place_key,
    round_stochastically,
    split_fp32,
    step_key,
)

ALIGNMENT = 64  # elements: a parameter begins at a multiple of 128 bytes, as if it had memory of its own
STRETCH = 2**26  # elements of gradients that are averaged or clipped at once


@dataclass(frozen=True)
class Span:
    """Where the elements of a parameter lie in the flat tensors."""

    name: str  # the checkpoint's
    parameter: nn.Parameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    @property
    def end(self) -> int:
        """Where the next parameter begins."""
        return round_up(self.stop)

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's elements in its own shape."""
        return flat[self.start : self.stop].view(self.parameter.shape)


def round_up(place: int) -> int:
    """The first place from here on at which a parameter may begin."""
    return -(-place // ALIGNMENT) * ALIGNMENT


def lay_out(parameters: Mapping[str, nn.Parameter]) -> dict[str, Span]:
    """Places one after the other, by name."""
    spans: dict[str, Span] = {}
    end = 0
    for name, parameter in parameters.items():
        spans[name] = Span(name, parameter, end)
        end = spans[name].end
    return spans


@dataclass(frozen=True)
class Piece:
    """Some elements of a parameter, at ``start`` of the flat tensors; ``first`` of them is which of its own."""

    span: Span
    first: int
    start: int
    stop: int

    def cut(self, whole: Tensor) -> Tensor:
        """These elements of a tensor of the parameter's shape."""
        return whole.view(-1)[self.first : self.first + self.stop - self.start]


@dataclass(frozen=True)
class Portion:
    """What is updated at once: pieces one after the other, and the gaps between them."""

    pieces: list[Piece]

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        """With the gap after the last piece, so that all are whole pairs of elements."""
        return round_up(self.pieces[-1].stop)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each piece's part of a flat tensor of this portion."""
        return [flat[piece.start - self.start : piece.stop - self.start] for piece in self.pieces]


def cut_portions(spans: Iterable[Span], size: int) -> Iterator[Portion]:
    """Portions of at most ``size`` elements, a multiple of ALIGNMENT; large parameters are cut."""
    pieces: list[Piece] = []
    for span in spans:
        start = span.start
        while start < span.stop:
            limit = (pieces[0].start if pieces else start) + size
            stop = min(span.stop, limit)
            pieces.append(Piece(span, start - span.start, start, stop))
            start = stop
            if min(span.end, limit) == limit:
                yield Portion(pieces)
                pieces = []
    if pieces:
        yield Portion(pieces)


class FlatWeights:
    """16-bit weights of a model's trained parameters, and what brings back the fp32 values behind them.

    For bf16 that is the remainder of an exact split, or with ``seed`` nothing: the weights are all there is, and
    updates are rounded stochastically. For fp16, whose range is another, it is the fp32 values themselves.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        dtype: torch.dtype,
        device: torch.device,
        seed: int | None = None,
        filled: bool = True,  # whether parameters have values, which are put; else all are put later
    ):
        assert dtype == torch.bfloat16 or seed is None
        self.seed, self.step, self.spans = seed, 0, {span.parameter: span for span in spans}
        self.origins: dict[int, Tensor] = {}  # see find_origins; by the portion's start
        size = spans[-1].end
        self.weights = torch.zeros(size, dtype=dtype, device=device)
        behind = torch.float32 if dtype == torch.float16 else torch.int16
        self.behind = torch.zeros(size, dtype=behind, device=device) if seed is None else None
        for span in spans:
            values = span.parameter.detach()
            span.parameter.data = span.view(self.weights)
            if filled:
                self.put(span.parameter, values)

    def put(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Set a parameter to fp32 values, rounded to the nearest 16-bit ones.

        Raises:
            UserError: when they are beyond fp16.
        """
        span = self.spans[parameter]
        self._write(span.start, span.stop, values.to(self.weights.device, torch.float32, copy=True).flatten())
        if parameter.dtype == torch.float16:
            remedy = "fp16 does not hold them: set precision.weights to autocast"
            check_finite({span.name: parameter.detach()}, "trained weights in fp16", remedy)

    def get(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's fp32 values, where the weights are; for fp16 the very ones that are kept."""
        span = self.spans[parameter]
        return self.read(span.start, span.stop).view(parameter.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """The fp32 values behind a stretch; for fp16 they are where they are kept."""
        weights = self.weights[start:stop]
        if self.behind is None:
            return weights.float()
        behind = self.behind[start:stop]
        return behind if behind.dtype == torch.float32 else join_fp32(weights, behind)

    def write(self, portion: Portion, values: Tensor) -> None:
        """Set a portion to updated values, which are lost."""
        if self.seed is None:
            self._write(portion.start, portion.stop, values)
            return
        random = draw_random(self.find_places(portion), step_key(self.seed, self.step))
        round_stochastically(values, random, self.weights[portion.start : portion.stop])

    def expect(self, portions: Iterable[Portion]) -> None:
        """Before the first ``write``: what comes from the host for it; a step waits for no copy."""
        if self.seed is not None:
            for portion in portions:
                self.origins[portion.start] = find_origins(portion, self.seed).to(self.weights.device)

    def find_places(self, portion: Portion) -> Tensor:
        """What ``draw_random`` makes the portion's random numbers of."""
        counts, shifts, keys = self.origins[portion.start].unbind()
        pairs = (portion.stop - portion.start) // 2
        places = torch.arange(pairs, dtype=torch.int32, device=self.weights.device)
        places += torch.repeat_interleave(shifts, counts, output_size=pairs)
        return places.bitwise_xor_(torch.repeat_interleave(keys, counts, output_size=pairs))

    def _write(self, start: int, stop: int, values: Tensor) -> None:
        weights, behind = self.weights[start:stop], None if self.behind is None else self.behind[start:stop]
        if behind is None:
            weights.copy_(values)
        elif behind.dtype == torch.float32:
            weights.copy_(behind.copy_(values))
        else:
            split_fp32(values, weights, behind)


def find_origins(portion: Portion, seed: int) -> Tensor:
    """Of each piece: pairs of elements, the first one's number less its place in the portion, key; int32 (3, N)."""
    stops = [piece.start for piece in portion.pieces[1:]] + [portion.stop]
    counts = [(stop - piece.start) // 2 for piece, stop in zip(portion.pieces, stops, strict=True)]
    shifts = [(piece.first - piece.start + portion.start) // 2 for piece in portion.pieces]
    keys = [place_key(seed, piece.span.name) for piece in portion.pieces]
    return torch.tensor([counts, shifts, keys], dtype=torch.int32)


class FlatGradients:
    """The gradients of a step: sums over its micro-steps, in fp32 or in bf16.

    Autograd makes a gradient in the weight's own 16 bits. In fp32 it is added to the sum at once and freed; in bf16 the
    sum is the parameter's ``grad``, to which autograd adds.
    """

    def __init__(self, spans: Sequence[Span], dtype: GradientDtype, device: torch.device):
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.flat = torch.zeros(spans[-1].end, dtype=kind, device=device)
        self.views = [span.view(self.flat) for span in spans]
        for span, view in zip(spans, self.views, strict=True):
            if span.parameter.dtype == kind:
                span.parameter.grad = view
            else:
                span.parameter.register_post_accumulate_grad_hook(add_to(view))

    def average(self, all_mean: Callable[[Tensor], Tensor]) -> None:
        """Average over the processes, in fp32, whatever the sums are in."""
        for part in self.flat.split(STRETCH):
            part.copy_(all_mean(part.float()))

    def clip(self, max_norm: float) -> Tensor:
        """Clip all together; the norm before, fp32. The arithmetic is that of torch's clip_grad_norm_."""
        norm = torch.linalg.vector_norm(self.norms())
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for part in self.flat.split(STRETCH):  # in bf16 the product would round the factor first
            part.copy_(part.float().mul_(factor))
        return norm

    def norms(self) -> Tensor:
        """The norm of each parameter's gradient, fp32."""
        if self.flat.device.type != "cpu" or self.flat.dtype == torch.float32:
            return torch.stack(torch._foreach_norm(self.views, 2.0, dtype=torch.float32))
        # bf16 on the CPU: each is made of a copy in fp32, and results that are new memory come to lie between the
        # copies' places, so that the next copy does not fit there: 5 GB in stage 1
        norms = torch.empty(len(self.views), dtype=torch.float32)
        for view, norm in zip(self.views, norms, strict=True):
            torch.linalg.vector_norm(view, dtype=torch.float32, out=norm)
        return norms

    def zero(self) -> None:
        self.flat.zero_()


def add_to(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to ``total`` and frees it."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add

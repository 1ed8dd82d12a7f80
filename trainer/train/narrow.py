"""The optimizer of 16-bit weights: gradients are added up and weights updated as if they were fp32.

There is neither autocast nor DDP around such a model: nothing has to be cast, and DDP would average gradients in 16
bits at a time at which they are not added up yet. Gradients lie in one flat tensor, which is averaged here.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config.schema import OptimConfig, PrecisionConfig
from trainer.model.sdxl import DTYPES, trained_parameters
from trainer.train.optim import build_groups, choose_optimizer
from trainer.train.weights import FlatGradients, FlatWeights, Piece, Portion, Span, cut_portions, lay_out

PORTION = 2**23  # elements that are updated at once: about 150 MB of fp32 values, gradients and random numbers


class NarrowOptimizer(Optimizer):
    """An optimizer of the config over a model that it moves to the device and makes 16-bit.

    The model is not to be moved afterwards: its trained parameters are views of the flat tensors.
    ``param_groups`` hold stand-ins for the weights, whose ``grad`` are the sums of the gradients, so that loss scaling
    finds those. ``state`` belongs to the model's own parameters, as a plain optimizer's does, and is fp32 or 8-bit
    as there. Fused AdamW's kernel gets portions of fp32 values; the other optimizers one whole parameter at a time.
    """

    _step_supports_amp_scaling = True  # torch's scaler leaves its flag in found_inf

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        precision: PrecisionConfig,
        seed: int,
        device: torch.device,
        filled: bool = True,  # see FlatWeights
    ):
        dtype = DTYPES[precision.compute]
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(device, dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        groups = build_groups(model, config)
        names = {value: name for name, value in trained_parameters(model).items()}
        owned = [parameter for group in groups for parameter in group["params"]]
        spans = list(lay_out({names[parameter]: parameter for parameter in owned}).values())
        stochastic = precision.weights == "stochastic"
        self.weights = FlatWeights(spans, dtype, device, seed if stochastic else None, filled)
        self.gradients = FlatGradients(spans, precision.gradients, device)
        own_state: defaultdict[Any, Any] = defaultdict(dict)
        stand_ins = {span.parameter: stand_in(view) for span, view in zip(spans, self.gradients.views, strict=True)}
        by_parameter = {span.parameter: span for span in spans}
        placed = [[by_parameter[parameter] for parameter in group["params"]] for group in groups]
        for group in groups:
            group["params"] = [stand_ins[parameter] for parameter in group["params"]]
        self.inner = choose_optimizer(groups, config)
        super().__init__(self.inner.param_groups, {})
        self.param_groups, self.state = self.inner.param_groups, own_state
        self.fused = isinstance(self.inner, torch.optim.AdamW)
        self.portions = [self.cut(some) for some in placed]
        self.weights.expect(portion for portions in self.portions for portion in portions)

    def cut(self, spans: list[Span]) -> list[Portion]:
        """What is updated at once of a group."""
        if self.fused:
            return list(cut_portions(spans, PORTION))
        return [Portion([Piece(span, 0, span.start, span.stop)]) for span in spans]

    def begin(self, step: int, all_mean: Callable[[Tensor], Tensor] | None) -> None:
        """After the micro-steps: which step this is, and the gradients of all processes."""
        self.weights.step = step
        if all_mean:
            self.gradients.average(all_mean)

    def clip(self, max_norm: float) -> Tensor:
        """Clip the gradients together; the norm before, fp32."""
        return self.gradients.clip(max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the sums to zero; they are never given up."""
        self.gradients.zero()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # none is ever given
        """Update unless ``found_inf`` says otherwise, as fused AdamW does."""
        flag: Tensor | None = getattr(self, "found_inf", None)
        if self.fused:
            self.step_fused(torch.zeros((), device=self.weights.weights.device) if flag is None else flag)
        elif flag is None or not bool(flag):
            self.step_whole()

    def step_fused(self, flag: Tensor) -> None:
        """AdamW: torch's own kernel over portions; the steps of its state are counted here, once for each parameter."""
        for span in self.weights.spans.values():
            if not self.state[span.parameter]:
                self.state[span.parameter].update(new_moments(span.parameter))
        steps = [self.state[parameter]["step"] for parameter in self.weights.spans]
        torch._foreach_add_(steps, 1)
        for group, portions in zip(self.param_groups, self.portions, strict=True):
            for portion in portions:
                values = self.weights.read(portion.start, portion.stop)
                gradients = self.gradients.flat[portion.start : portion.stop].float()
                states = [self.state[piece.span.parameter] for piece in portion.pieces]
                first, second = (
                    [piece.cut(state[name]) for state, piece in zip(states, portion.pieces, strict=True)]
                    for name in ("exp_avg", "exp_avg_sq")
                )
                counted = [state["step"] for state in states]
                torch._fused_adamw_(
                    portion.views(values), portion.views(gradients), first, second, [], counted,
                    lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                    weight_decay=group["weight_decay"], amsgrad=False, maximize=False, grad_scale=None, found_inf=flag,
                )  # fmt: skip
                self.weights.write(portion, values)
        torch._foreach_sub_(steps, [flag] * len(steps))

    def step_whole(self) -> None:
        """Any optimizer: it gets one parameter at a time, made of fp32 values, with the state of the 16-bit one."""
        groups = self.inner.param_groups
        for group, portions in zip(groups, self.portions, strict=True):
            for portion in portions:
                (piece,) = portion.pieces
                values = self.weights.read(portion.start, portion.stop)
                whole = nn.Parameter(portion.views(values)[0].view(piece.span.parameter.shape))
                whole.grad = piece.span.view(self.gradients.flat).float()
                self.inner.param_groups = [{**group, "params": [whole]}]
                self.inner.state[whole] = self.state[piece.span.parameter]
                self.inner.step()
                del self.inner.state[whole]
                self.weights.write(portion, values)
        self.inner.param_groups = groups


def stand_in(gradient: Tensor) -> nn.Parameter:
    """A parameter of the gradient's shape and dtype that has the gradient and, in itself, one element of memory."""
    parameter = nn.Parameter(gradient.new_zeros(()).expand(gradient.shape))
    parameter.grad = gradient
    return parameter


def new_moments(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter that has not been updated, as torch makes it for an fp32 one."""
    like = torch.zeros_like(parameter, dtype=torch.float32)
    return {"step": like.new_zeros(()), "exp_avg": like, "exp_avg_sq": torch.zeros_like(like)}

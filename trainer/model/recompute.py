"""What the backward pass finds of the forward, and what it computes again: nothing, all but the products, or all."""

from collections.abc import Callable
from functools import partial
from typing import Any, assert_never

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.config.schema import MemoryPolicy

KEPT = frozenset(
    {
        *(f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "linear", "convolution")),
        *(
            f"aten::_scaled_dot_product_{variant}"
            for variant in (
                "flash_attention",
                "flash_attention_for_cpu",
                "efficient_attention",
                "cudnn_attention",
                "fused_attention_overrideable",
            )
        ),
    }
)
XFORMERS_FORWARDS = ("efficient_attention_forward", "flash_fwd", "fwd")  # beginnings, in namespaces of its own


def is_product(op: Any) -> bool:
    """Whether an operation as PyTorch dispatches it is a matrix product, a convolution or attention, forward."""
    name = op._schema.name if hasattr(op, "_schema") else ""
    namespace, _, short = name.partition("::")
    return name in KEPT or (namespace.startswith(("xformers", "flash_attn")) and short.startswith(XFORMERS_FORWARDS))


def keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """For ``create_selective_checkpoint_contexts``: the results of products are kept, and nothing else is."""
    return CheckpointPolicy.MUST_SAVE if is_product(op) else CheckpointPolicy.PREFER_RECOMPUTE


keep_products_contexts = partial(create_selective_checkpoint_contexts, keep_products)


def use_policy(part: Any, policy: MemoryPolicy, compiled: bool = False) -> None:
    """Set what one part's blocks keep: diffusers' UNet, or a text encoder of transformers; called once.

    ``compiled`` says that the UNet's transformer blocks are to be compiled.
    """
    match policy:
        case "none":
            return
        case "full":
            options: dict[str, Any] = {"use_reentrant": False}
        case "selective":
            options = {"use_reentrant": False, "context_fn": keep_products_contexts}
        case "auto":
            raise AssertionError("auto is resolved before a model is built")
        case _:
            assert_never(policy)
    if not hasattr(part, "enable_gradient_checkpointing"):  # transformers' word for the same
        part.activation_checkpointing_enable(options)
        return
    part.enable_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, **options))
    if compiled and policy == "selective":
        checkpoint_inside(part, options)


def checkpoint_inside(unet: nn.Module, options: dict[str, Any]) -> None:
    """Put the checkpoints of the blocks that are to be compiled into them.

    Outside, a compiled block is one operation to a checkpoint, which is computed again as a whole.
    """
    owners: list[Any] = [module for module in unet.modules() if hasattr(module, "transformer_blocks")]
    for owner in owners:
        owner.gradient_checkpointing = False
        for block in owner.transformer_blocks:
            block.forward = checkpointed(block.forward, options)


def checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A block's forward under a checkpoint; a function, since the compiler does not look into a partial."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **options, **kwargs)

    return call

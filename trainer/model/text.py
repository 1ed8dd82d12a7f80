"""Chunks of token ids -> prompt embeddings, as SDXL's two text encoders make them.

Many chunks of a batch are identical, so each distinct chunk is encoded once. Recipe, section 4.
"""

from typing import Any

import torch
from torch import Tensor


def encode_prompts(
    text_encoder_1: Any,
    text_encoder_2: Any,
    input_ids_1: Tensor,
    input_ids_2: Tensor,
    chunk_map: Tensor,
) -> tuple[Tensor, Tensor]:
    """Prompt embeddings (B, 2 + 75 chunks, 2048) and pooled embeddings (B, 1280), widths those of full SDXL.

    Hidden states before the last layer of each encoder, without final norm, concatenated over channels. Pooled:
    encoder 2, last layer, final norm, at the first EOS of the first chunk, times the text projection.
    """
    output_1 = text_encoder_1(input_ids_1, output_hidden_states=True)
    output_2 = text_encoder_2(input_ids_2, output_hidden_states=True)
    hidden = torch.cat([output_1.hidden_states[-2], output_2.hidden_states[-2]], dim=-1)  # (K, 77, 2048)
    eos_id = text_encoder_2.get_input_embeddings().num_embeddings - 1
    eos_places = (input_ids_2 == eos_id).int().argmax(dim=-1)  # (K,)
    at_eos = output_2.last_hidden_state[torch.arange(len(input_ids_2), device=eos_places.device), eos_places]
    pooled = text_encoder_2.text_projection(repeat_rows(at_eos, chunk_map[:, 0]))  # (B, 1280)
    return join_chunks(hidden, chunk_map), pooled


def join_chunks(hidden: Tensor, chunk_map: Tensor) -> Tensor:
    """(K, 77, D) and (B, chunks) -> (B, 2 + 75 chunks, D): one BOS first, one EOS last."""
    parts = repeat_rows(hidden, chunk_map.flatten()).unflatten(0, chunk_map.shape)  # (B, chunks, 77, D)
    return torch.cat([parts[:, 0, :1], parts[:, :, 1:-1].flatten(1, 2), parts[:, -1, -1:]], dim=1)


def repeat_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]``, (K, ...) and (N,) -> (N, ...), with a backward that gives the same bits each time.

    PyTorch's own backward of that indexing adds the gradients of repeated rows in any order, with several threads on
    the CPU and on GPUs alike.
    """
    return _RepeatRows.apply(values, rows)


class _RepeatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(values)
        return values[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        add = add_rows_in_order if gradient.device.type == "cpu" else add_rows_by_product
        return add(gradient, rows, ctx.count), None


def add_rows_in_order(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sum of the gradients (N, ...) of each row, (count, ...), one after the other, in fp32."""
    total = torch.zeros(count, *gradient.shape[1:], dtype=torch.float32, device=gradient.device)
    return total.index_add_(0, rows, gradient.float()).to(gradient.dtype)


def add_rows_by_product(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    """The same sums as one matrix product, whose order is fixed: index_add_ on a GPU adds in any order."""
    chosen = torch.arange(count, device=rows.device)[:, None] == rows  # (count, N)
    return (chosen.to(gradient.dtype) @ gradient.flatten(1)).view(count, *gradient.shape[1:])

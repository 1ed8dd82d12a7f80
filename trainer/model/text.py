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
    first = chunk_map[:, 0]
    eos_id = text_encoder_2.get_input_embeddings().num_embeddings - 1
    eos_places = (input_ids_2[first] == eos_id).int().argmax(dim=-1)
    pooled = text_encoder_2.text_projection(output_2.last_hidden_state[first, eos_places])  # (B, 1280)
    return join_chunks(hidden, chunk_map), pooled


def join_chunks(hidden: Tensor, chunk_map: Tensor) -> Tensor:
    """(K, 77, D) and (B, chunks) -> (B, 2 + 75 chunks, D): one BOS in front, one EOS behind."""
    parts = hidden[chunk_map]  # (B, chunks, 77, D)
    return torch.cat([parts[:, 0, :1], parts[:, :, 1:-1].flatten(1, 2), parts[:, -1, -1:]], dim=1)

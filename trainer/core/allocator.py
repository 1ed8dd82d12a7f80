"""How PyTorch asks a GPU for memory: in segments that grow, so that buckets of many sizes leave fewer holes."""

import os
from collections.abc import MutableMapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # today's, and the older ones


def use_expandable_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Unless the user has set the allocator: what is set there is taken as a whole. Before torch is imported."""
    if not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"

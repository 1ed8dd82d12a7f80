"""What the host of a GPU would wait for, counted where nothing waits: on the CPU, or on the meta device."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READING = {  # operators of which the host reads the result, or its size, from the device
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero, aten.masked_select,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten.bincount,
    aten.lift_fresh,  # a tensor made of Python's numbers, whose copy to a device is waited for
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # the host reads how many are true in a mask
COPYING = {aten._to_copy: 0, aten.copy_: 1}  # -> place of what is copied among the arguments


class HostReads(TorchDispatchMode):
    """A context that counts, by operator, what the host waits for: reads, and copies from device to device.

    On the CPU ``Tensor.cpu``, ``numpy`` and ``tolist`` are no operators; on the meta device they raise, as does
    whatever else reads a value. There in turn a tensor made of Python's numbers goes unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, function.overloadpacket
        result = function(*args, **kwargs)
        reads = operator in READING
        if operator in INDEXING:
            reads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        elif operator is aten.repeat_interleave:
            reads = kwargs.get("output_size") is None  # else its size is known
        elif operator in COPYING and args[COPYING[operator]].device != result.device:
            reads = not (kwargs.get("non_blocking") or True in args[2:3])
        self.found[operator.__name__] += reads
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.found = +self.found  # without those that are counted zero times

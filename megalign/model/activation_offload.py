"""What the forward pass keeps for the backward pass waits in host memory (TRL's activation_offloading).

The copies run in the order of the computation, so that neither side waits for them on the host. On a CPU host memory
is all there is: the copies are made there too, and prove that the numbers stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

MIN_BYTES = 1024  # a smaller tensor costs more to move than it frees; TRL's limit


class _Away(NamedTuple):
    content: Tensor
    device: torch.device


@contextmanager
def offloaded_activations(model: nn.Module, alive: Iterable[Tensor] = ()) -> Iterator[None]:
    """Around a forward pass of the model. Its weights, and tensors that are `alive` anyway, are not copied."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers(), alive)}

    def pack(tensor: Tensor) -> Tensor | _Away:
        if type(tensor) is not Tensor or tensor.nbytes < MIN_BYTES or tensor.untyped_storage().data_ptr() in kept:
            return tensor
        return _Away(to_host(tensor), tensor.device)

    def unpack(packed: Tensor | _Away) -> Tensor:
        return packed.content.to(packed.device, non_blocking=True) if isinstance(packed, _Away) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, page-locked where it comes from a GPU: only that lets the host go on meanwhile."""
    content = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return content.copy_(tensor, non_blocking=True)

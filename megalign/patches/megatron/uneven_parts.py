"""Collectives of tensors of different lengths over gloo."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist


def send_uneven_parts_over_gloo() -> None:
    """Ranks of an expert have different numbers of tokens, which gloo's collectives do not take as they are called.

    (1) token_dispatcher.py:666,669,810 give all_to_all their split sizes as tensors; gloo wants lists.
    (2) mappings.py:144 all_gather and :185 reduce_scatter of tensors of different lengths: gloo refuses them. Here
    they are padded to the longest, and reduced whole. Goes when gloo takes uneven parts.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    all_to_all = mappings.all_to_all
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(all_to_all)
    def all_to_all_of_lists(
        group: Any, tensor: torch.Tensor, output: Any = None, input: Any = None, **rest: Any
    ) -> Any:
        return all_to_all(group, tensor, _as_list(output), _as_list(input), **rest)

    @functools.wraps(gather)
    def gather_uneven(tensor: torch.Tensor, group: Any, sizes: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(tensor, group, sizes, *args, **kwargs)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @functools.wraps(reduce_scatter)
    def reduce_scatter_uneven(
        tensor: torch.Tensor, group: Any, sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(tensor, group, sizes, *args, **kwargs)
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].clone()

    token_dispatcher.all_to_all = all_to_all_of_lists
    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven


def _as_list(sizes: Any) -> Any:
    return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

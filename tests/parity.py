"""How far megalign's per-token logprobs are from transformers', for any family at any layout."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.parallel.groups import ParallelGroups
from tests.by_hand import packed, unpacked
from tests.layouts import Layout, make_engine
from tests.ranks import run_ranks
from tests.tiny import load_reference

LENGTHS = [9, 1, 17, 4, 23, 6]
TEMPERATURES = torch.tensor([1.0, 0.7, 1.3, 1.0, 0.5, 2.0])
MICROBATCHES = [[0, 1, 2], [3, 4, 5]]


def sequences() -> list[Tensor]:
    """Random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 101, (length,), generator=generator) for length in LENGTHS]


def batch(ids: list[int], groups: ParallelGroups) -> Batch:
    """Some of the sequences as one microbatch, each with its own temperature."""
    parts = [{"tokens": sequences()[i], "loss_mask": torch.arange(LENGTHS[i]) > 0} for i in ids]
    return packed(parts, groups, temperature=TEMPERATURES[ids])


def engine_logprobs(
    path: str, layout: Layout, microbatches: list[list[int]], fields: dict[str, Any] | None = None
) -> dict[int, Tensor]:
    """On a rank: the logprobs of its data-parallel share, by sequence."""
    engine = make_engine(path, layout, trainable=False, **(fields or {}))
    dp = engine.groups.dp
    mine = microbatches[dp.rank :: dp.size]
    batches = [batch(ids, engine.groups) for ids in mine]
    columns = engine.forward(batches, ("logprobs",))
    found: dict[int, Tensor] = {}
    for ids, made, column in zip(mine, batches, columns, strict=True):
        found.update(zip(ids, unpacked(made, column["logprobs"], [LENGTHS[i] for i in ids]), strict=True))
    return found


@cache
def reference_logprobs(path: str) -> dict[int, Tensor]:
    """transformers', sequence by sequence, without packing or padding."""
    return logprobs_of(load_reference(path))


@torch.no_grad()
def logprobs_of(model: torch.nn.Module) -> dict[int, Tensor]:
    """Those of a model of transformers, in host memory."""
    found = {}
    for i, (tokens, temperature) in enumerate(zip(sequences(), TEMPERATURES, strict=True)):
        logits = model(tokens[None].to(model.device)).logits[0].float().cpu()
        log_p = (logits / temperature).log_softmax(-1)
        picked = log_p[:-1].gather(1, tokens[1:, None]).squeeze(1)
        found[i] = torch.cat([torch.zeros(1), picked])
    return found


def largest_difference(path: str, layout: Layout, microbatches: list[list[int]] = MICROBATCHES, **fields: Any) -> float:
    """Over all tokens of all sequences, on every rank of the layout; NaN if there is one."""
    wanted = reference_logprobs(path)
    found: dict[int, Tensor] = {}
    differences = []
    for rank in run_ranks(layout.world, engine_logprobs, path, layout, microbatches, fields):
        found.update(rank)
        differences += [(rank[i] - wanted[i]).abs().max() for i in rank]
    assert sorted(found) == list(range(len(LENGTHS))), f"sequences {sorted(found)} came back"
    return float(torch.stack(differences).max())  # unlike Python's max() it keeps NaN

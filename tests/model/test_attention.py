"""Windows and caps against a softmax over all scores written out, in one block of queries and in several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalign.batch import Batch
from megalign.model import attention
from megalign.model.attention import PackedAttention, PackedSequences
from megalign.parallel.groups import Axis

LENGTHS = [9, 1, 14]
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}  # of the softmax, which is in fp32


def heads(seed: int) -> list[Tensor]:
    """Query, key and value, [T, 4 or 2, 6], of all sequences."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(sum(LENGTHS), count, 6) for count in (4, 2, 2)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def packed() -> PackedSequences:
    batch = Batch(
        tokens=torch.zeros(sum(LENGTHS), dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        num_sequences=len(LENGTHS),
        token_columns={},
    )
    return PackedSequences.of(batch, Axis(None, 0, 1, [0]))


def written_out(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """Sequence by sequence, head by head, query by query."""
    outputs = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        for i in range(len(q)):
            first = 0 if window is None else max(0, i - window + 1)
            row = []
            for head in range(4):
                scores = k[first : i + 1, head // 2] @ q[i, head] * 0.3
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                row.append(scores.softmax(0) @ v[first : i + 1, head // 2])
            outputs.append(torch.cat(row))
    return torch.stack(outputs)


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (5, None), (None, 0.7), (5, 0.7), (14, 0.7)])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, block: int, window: int, softcap: float) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    module = PackedAttention(None, 1, None, "self", softmax_scale=0.3, window=window, softcap=softcap)
    ours, theirs = heads(1), heads(1)
    seed = torch.randn(sum(LENGTHS), 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, wanted = module(*ours, None, packed_seq_params=packed()), written_out(*theirs, window, softcap)
    torch.testing.assert_close(found, wanted, **ROUNDING)
    (found * seed).sum().backward()
    (wanted * seed).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **ROUNDING)
    with torch.no_grad():
        torch.testing.assert_close(module(*ours, None, packed_seq_params=packed()), wanted, **ROUNDING)

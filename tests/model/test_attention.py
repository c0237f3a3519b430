"""Windows, caps and sinks against a softmax over all scores written out, in one block of queries and in several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

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


def written_out(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None = None
) -> Tensor:
    """Sequence by sequence, head by head, query by query."""
    outputs = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True):
        for i in range(len(q)):
            first = 0 if window is None else max(0, i - window + 1)
            row = []
            for head in range(4):
                scores = k[first : i + 1, head // 2] @ q[i, head] * 0.3
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                below = scores.exp().sum() + (0 if sinks is None else sinks[head].exp())
                row.append(scores.exp() / below @ v[first : i + 1, head // 2])
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


@pytest.mark.parametrize("block", [512, 4])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (5, 0.7)])
def test_values_and_gradients_with_sinks(
    monkeypatch: pytest.MonkeyPatch, block: int, window: int | None, softcap: float | None
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    config = SimpleNamespace(num_attention_heads=8, tensor_model_parallel_size=2, params_dtype=torch.float64)
    module = PackedAttention(config, 1, None, "self", softmax_scale=0.3, window=window, softcap=softcap, sinks=True)
    assert module.softmax_offset.shape == (4,)  # this tensor rank's
    sinks = nn.Parameter(torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64))
    with torch.no_grad():
        module.softmax_offset.copy_(sinks)
    ours, theirs = [*heads(1), module.softmax_offset], [*heads(1), sinks]
    seed = torch.randn(sum(LENGTHS), 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = module(*ours[:3], None, packed_seq_params=packed())
    wanted = written_out(*theirs[:3], window, softcap, sinks)
    torch.testing.assert_close(found, wanted, **ROUNDING)
    (found * seed).sum().backward()
    (wanted * seed).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **ROUNDING)


@pytest.mark.parametrize("queries", [1, 200])
def test_queries_behind_a_shared_prefix_keep_no_matrix_for_backward(queries: int) -> None:
    """As under context parallelism and after a common beginning: they are the last of the keys' positions."""
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(1200, heads, 6, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    seed = torch.randn(queries, 4, 6, generator=generator)
    query, key, value = given
    module = PackedAttention(None, 1, None, "self", softmax_scale=0.3)
    wanted = module._attend(query, key, value)[-queries:]
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = module._attend(query[-queries:], key, value)
    assert saved and max(saved) <= query.nbytes < 200 * 1200  # a matrix, were it of bytes
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for mine, other in zip(*(torch.autograd.grad((x * seed).sum(), given) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)

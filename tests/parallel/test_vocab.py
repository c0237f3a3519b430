"""token_scores against torch's log_softmax over the whole vocabulary, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalign.parallel import vocab
from megalign.parallel.groups import Axis
from tests.ranks import run_ranks

VOCAB, PADDED, HIDDEN, TOKENS = 13, 16, 6, 9


def _case() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(PADDED, HIDDEN, generator=generator)
    bias = torch.randn(PADDED, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    temperature = torch.rand(TOKENS, generator=generator) + 0.5
    seeds = torch.randn(2, TOKENS, generator=generator)
    return hidden, weight, bias, labels, temperature, seeds


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _reference(softcap: float | None) -> dict[str, torch.Tensor]:
    """Plain fp64 autograd over the real vocabulary."""
    hidden, weight, bias, labels, temperature, seeds = _case()
    hidden, weight, bias = (x.double().requires_grad_() for x in (hidden, weight, bias))
    raw = _capped(hidden @ weight.T + bias, softcap)[:, :VOCAB]
    logits = raw / temperature.double()[:, None]
    log_p = logits.log_softmax(1)
    logprobs = log_p.gather(1, labels[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (logprobs * seeds[0] + entropy * seeds[1]).sum().backward()
    correct = (logits.argmax(1) == labels).float()
    return {
        "mean_logits": raw.mean(1), "log_sum_squares": log_p.exp().square().sum(1).log(),
        "logprobs": logprobs, "entropy": entropy, "correct": correct,
        "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad,
    }  # fmt: skip


def _sharded(softcap: float | None) -> dict[str, torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, bias, labels, temperature, seeds = _case()
    hidden.requires_grad_()
    rows = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    weight, bias = (x[rows].clone().requires_grad_() for x in (weight, bias))
    old = vocab.CHUNK_ELEMENTS, vocab.CHUNK_TOKENS
    vocab.CHUNK_ELEMENTS, vocab.CHUNK_TOKENS = {"cpu": 4 * len(weight)}, 1  # several chunks, the last one short
    scores = vocab.token_scores(
        hidden, weight, labels, temperature=temperature, vocab_size=VOCAB, bias=bias,
        tp=Axis(dist.group.WORLD, rank, size, list(range(size))), extras=("mean_logits", "log_sum_squares"),
        softcap=softcap,
    )  # fmt: skip
    (scores.logprobs * seeds[0] + scores.entropy * seeds[1]).sum().backward()
    vocab.CHUNK_ELEMENTS, vocab.CHUNK_TOKENS = old
    return {
        "mean_logits": scores.mean_logits, "log_sum_squares": scores.log_sum_squares,
        "logprobs": scores.logprobs.detach(), "entropy": scores.entropy.detach(), "correct": scores.argmax_correct,
        "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad,
    }  # fmt: skip


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_scores_and_gradients_equal_full_softmax(world: int, softcap: float | None) -> None:
    wanted = _reference(softcap)
    ranks = run_ranks(world, _sharded, softcap)
    for name in ("logprobs", "entropy", "correct", "mean_logits", "log_sum_squares", "hidden"):
        for got in ranks:
            torch.testing.assert_close(
                got[name].double(), wanted[name].double().detach(), rtol=2e-6, atol=2e-6, msg=name
            )
    for name in ("weight", "bias"):
        got = torch.cat([rank[name] for rank in ranks])
        torch.testing.assert_close(got.double(), wanted[name], rtol=2e-6, atol=2e-6, msg=name)


def _ties() -> list[float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden = torch.ones(4, HIDDEN)
    weight = torch.zeros(PADDED, HIDDEN)
    weight[[3, VOCAB - 2]] = 1.0  # on the first rank, and on the last that has real entries
    rows = slice(rank * PADDED // size, (rank + 1) * PADDED // size)
    scores = vocab.token_scores(
        hidden, weight[rows], torch.tensor([3, VOCAB - 2, 0, VOCAB - 1]), temperature=None, vocab_size=VOCAB,
        tp=Axis(dist.group.WORLD, rank, size, list(range(size))),
    )  # fmt: skip
    return scores.argmax_correct.tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_of_entries_at_the_top_the_first_alone_is_right(world: int) -> None:
    assert run_ranks(world, _ties) == [[1.0, 0.0, 0.0, 0.0]] * world


def _no_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(PADDED, HIDDEN, requires_grad=True)
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    scores = vocab.token_scores(
        hidden, weight, torch.zeros(0, dtype=torch.int64), temperature=None, vocab_size=VOCAB,
        tp=Axis(dist.group.WORLD, 0, 1, [0]),
    )  # fmt: skip
    scores.logprobs.sum().backward()
    return scores.logprobs.detach(), weight.grad


def test_no_tokens_give_zero_gradients_not_no_graph() -> None:
    logprobs, grad = run_ranks(1, _no_tokens)[0]
    assert logprobs.shape == (0,)
    assert torch.equal(grad, torch.zeros(PADDED, HIDDEN))

"""Log-probability and entropy of given tokens from hidden states, on a vocabulary split over tensor ranks.

Neither the logits of the batch nor the whole vocabulary exist in one place: head and softmax run in token
chunks, forward and again in backward, where the gradient is written over the logits. Logits come in the weights'
dtype, as vLLM's do; the softmax is in fp32, and one pass over them (megalign/ops.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalign import ops
from megalign.parallel.groups import Axis

# Logits alive at once: 32 MB in fp32 stay near a CPU's caches; a GPU wants larger matrices, here of 64 MB
# in bf16.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**25}
# Tokens of a chunk at least: each chunk reads the head three times and adds to its gradient, so that with 55 tokens of
# a vocabulary of 151,936 both passes took a third longer.
CHUNK_TOKENS = 192


class TokenScores(NamedTuple):
    """What the head says of each of N tokens, float32; the last two only where they were asked for."""

    logprobs: Tensor  # [N] differentiable
    entropy: Tensor  # [N] differentiable
    argmax_correct: Tensor  # [N] 1 where the token was the most probable one, the first of several such
    mean_logits: Tensor | None = None  # [N] the logits' mean over the vocabulary
    log_sum_squares: Tensor | None = None  # [N] log sum_v p_v^2 (WPO, arXiv 2406.11827 eq. 2)


EXTRAS = ("mean_logits", "log_sum_squares")


def token_scores(
    hidden: Tensor,  # [N, H], equal on all tensor ranks
    weight: Tensor,  # [V / tp, H], this rank's rows of the padded head
    labels: Tensor,  # [N] int64, global token ids
    *,
    temperature: Tensor | None,  # [N] float32
    vocab_size: int,  # rows at or past it are padding: probability 0
    tp: Axis,
    bias: Tensor | None = None,  # [V / tp]
    extras: tuple[str, ...] = (),  # of EXTRAS
    softcap: float | None = None,
) -> TokenScores:
    """log softmax(hidden @ weight.T / temperature)[labels], its entropy, and whether labels are the argmax.

    With a softcap logits are softcap * tanh(logit / softcap), before the temperature.
    """
    logprobs, entropy, correct, *rest = _TokenScores.apply(
        hidden, weight, bias, labels, temperature, vocab_size, tp, extras, softcap
    )
    return TokenScores(logprobs, entropy, correct, **dict(zip(extras, rest, strict=True)))


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, temperature, vocab_size, tp, extras, softcap):  # noqa: ANN001, ANN205
        shard = _Shard(weight, bias, vocab_size, tp, softcap)
        tables = [
            ops.vocab_statistics(
                shard.logits(hidden[rows]),
                shard.local(labels[rows]),
                all_of_them=bool(extras),
                **shard.how(temperature, rows),
            )
            for rows in _chunks(hidden, weight)
        ]
        empty = hidden.new_zeros(len(ops.NAMES) if extras else ops.NUM_PLAIN, 0, dtype=torch.float32)
        table = dict(zip(ops.NAMES, shard.over_the_vocabulary(torch.cat([empty, *tables], dim=1)), strict=False))
        log_sum = table["sum"].log()
        log_normaliser = table["top"] + log_sum
        logprobs = table["target"] - log_normaliser
        entropy = log_sum - table["weighted"] / table["sum"]
        # Not by its own logit: in bf16 several are often at the top.
        others = [(table["first"] == labels).float()]
        if extras:
            scale = 1.0 if temperature is None else temperature
            more = {
                "mean_logits": table["logits"] / vocab_size * scale,
                "log_sum_squares": table["squares"].log() - 2 * log_sum,
            }
            others += [more[name] for name in extras]
        ctx.save_for_backward(hidden, weight, bias, labels, temperature, log_normaliser, entropy)
        ctx.vocab_size, ctx.tp, ctx.softcap = vocab_size, tp, softcap
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)  # most losses leave the entropy alone
        return logprobs, entropy, *others

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, *_):  # noqa: ANN001, ANN205
        hidden, weight, bias, labels, temperature, log_normaliser, entropy = ctx.saved_tensors
        shard = _Shard(weight, bias, ctx.vocab_size, ctx.tp, ctx.softcap)
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_normaliser)
        grad_hidden = torch.zeros_like(hidden)
        chunks = _chunks(hidden, weight)
        grad_weight: Tensor | None = None
        if len(chunks) > 1:  # added up in fp32; one chunk needs no such copy of a whole vocabulary
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in chunks:
            grad_logits = ops.vocab_gradient_(
                shard.logits(hidden[rows]),
                shard.local(labels[rows]),
                log_normaliser=log_normaliser[rows],
                entropy=entropy[rows],
                grad_logprobs=grad_logprobs[rows],
                grad_entropy=None if grad_entropy is None else grad_entropy[rows],
                **shard.how(temperature, rows),
            )
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=torch.float32)
            grad_hidden[rows] = grad_logits @ weight
            if grad_weight is None:
                grad_weight = grad_logits.T @ hidden[rows]
            else:
                ops.add_product_(grad_weight, grad_logits.T, hidden[rows])
            del grad_logits  # before the next chunk's are made
        if ctx.tp.size > 1:  # each rank saw its share of the vocabulary only
            dist.all_reduce(grad_hidden, group=ctx.tp.group)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


class _Shard:
    """This rank's rows of the head, and the softmax over all of them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, vocab_size: int, tp: Axis, softcap: float | None) -> None:
        self.weight, self.bias, self.tp, self.softcap = weight, bias, tp, softcap
        self.first = tp.rank * weight.shape[0]
        self.num_real = max(0, min(weight.shape[0], vocab_size - self.first))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, V / tp], without what `how` adds."""
        return hidden @ self.weight.T

    def how(self, temperature: Tensor | None, rows: slice) -> dict[str, Any]:
        """What makes entries of the softmax of the rows' logits."""
        heat = None if temperature is None else temperature[rows]
        return {"num_real": self.num_real, "temperature": heat, "bias": self.bias, "softcap": self.softcap}

    def local(self, labels: Tensor) -> Tensor:
        """[n] columns of this rank's logits, -1 for those of others."""
        local = labels - self.first
        return local.where((local >= 0) & (local < self.num_real), -1)

    def over_the_vocabulary(self, table: Tensor) -> Tensor:
        """The statistics of all ranks' entries from each rank's: sums in units of e^top move to the highest top."""
        if self.tp.size == 1 or not table.numel():
            return table
        tables = table.new_empty(self.tp.size * len(table), table.shape[1])
        dist.all_gather_into_tensor(tables, table, group=self.tp.group)
        tops, sums, weighted, targets, firsts, *others = tables.view(self.tp.size, *table.shape).unbind(1)
        top = tops.max(0).values
        firsts = firsts + len(self.weight) * torch.arange(self.tp.size, device=table.device)[:, None]
        first = firsts.where(tops == top, torch.inf).min(0).values
        down = (tops - top).where(tops > -torch.inf, 0.0)  # 0 * -inf, of a rank with padding only, would be NaN
        scale = down.exp()
        rows = [sums * scale, scale * (weighted + down * sums), targets]
        if others:
            others[-1] = others[-1] * scale.square()
        return torch.stack([top, *(row.sum(0) for row in rows), first, *(row.sum(0) for row in others)])


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(CHUNK_TOKENS, CHUNK_ELEMENTS[hidden.device.type] // max(1, len(weight)))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]

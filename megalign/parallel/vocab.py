"""Log-probability and entropy of given tokens from hidden states, on a vocabulary split over tensor ranks.

Neither the logits of the batch nor the whole vocabulary exist in one place: head and softmax run in token
chunks, forward and again in backward. Logits come in the weights' dtype, as vLLM's do; the softmax is in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalign.parallel.groups import Axis

# Logits alive at once: 32 MB in fp32 stay near a CPU's caches; a GPU wants larger matrices, here of 256 MB.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


class TokenScores(NamedTuple):
    """What the head says of each of N tokens, float32; the last two only where they were asked for."""

    logprobs: Tensor  # [N] differentiable
    entropy: Tensor  # [N] differentiable
    argmax_correct: Tensor  # [N] 1 where the token was the most probable one
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
        parts = [
            shard.scores(hidden[rows], labels[rows], None if temperature is None else temperature[rows], extras)
            for rows in _chunks(hidden, weight)
        ]
        empty = hidden.new_zeros(4 + len(extras), 0, dtype=torch.float32).unbind()
        columns = [torch.cat(column) for column in zip(empty, *parts, strict=True)]
        logprobs, entropy, log_normaliser, *others = columns
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
        grad_weight: Tensor | None = None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            scale = None if temperature is None else temperature[rows]
            grad_logits = shard.grad_logits(
                hidden[rows],
                labels[rows],
                scale,
                log_normaliser[rows],
                entropy[rows],
                grad_logprobs[rows],
                None if grad_entropy is None else grad_entropy[rows],
            )
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            product = grad_logits.T @ hidden[rows]
            # One chunk needs no fp32 copy of a whole vocabulary to be added up in.
            grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
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

    def logits(self, hidden: Tensor, temperature: Tensor | None) -> Tensor:
        """[n, V / tp] float32; padding rows are -inf."""
        logits = (hidden @ self.weight.T).float()
        if self.bias is not None:
            logits += self.bias.float()
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if temperature is not None:
            logits /= temperature[:, None]
        logits[:, self.num_real :] = -torch.inf
        return logits

    def scores(
        self, hidden: Tensor, labels: Tensor, temperature: Tensor | None, extras: tuple[str, ...] = ()
    ) -> tuple[Tensor, ...]:
        """logprobs, entropy, log normaliser, argmax_correct and the extras, [n] each."""
        logits = self.logits(hidden, temperature)
        top = logits.max(dim=1).values
        if self.tp.size > 1:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.tp.group)
        inside, local = self._locate(labels)
        target = logits.gather(1, local[:, None]).squeeze(1).where(inside, 0.0)
        logits -= top[:, None]
        exponentials = logits.exp()
        # 0 * -inf of padding rows would be NaN; their exponential is 0 whatever the logit.
        weighted = (exponentials[:, : self.num_real] * logits[:, : self.num_real]).sum(1)
        sums = [exponentials.sum(1), weighted, target]
        if extras:
            real = torch.full_like(top, self.num_real)
            sums += [logits[:, : self.num_real].sum(1) + real * top, real, exponentials.square().sum(1)]
        sums = torch.stack(sums)
        if self.tp.size > 1:
            dist.all_reduce(sums, group=self.tp.group)
        log_sum = sums[0].log()
        logprobs = sums[2] - top - log_sum
        entropy = log_sum - sums[1] / sums[0]
        scores = (logprobs, entropy, top + log_sum, (sums[2] >= top).float())
        if not extras:
            return scores
        scale = 1.0 if temperature is None else temperature
        more = {"mean_logits": sums[3] / sums[4] * scale, "log_sum_squares": sums[5].log() - 2 * log_sum}
        return *scores, *(more[name] for name in extras)

    def grad_logits(
        self,
        hidden: Tensor,
        labels: Tensor,
        temperature: Tensor | None,
        log_normaliser: Tensor,
        entropy: Tensor,
        grad_logprobs: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """d logprob = onehot - p; d entropy = -p (log p + entropy); over the temperature, times the cap's slope."""
        log_p = self.logits(hidden, temperature)
        slope = None if self.softcap is None else self._slope(log_p, temperature)
        log_p.sub_(log_normaliser[:, None])
        p = log_p.exp()
        grad = -p * grad_logprobs[:, None]
        if grad_entropy is not None:
            log_p[:, self.num_real :] = 0.0
            grad -= p * (log_p + entropy[:, None]) * grad_entropy[:, None]
        inside, local = self._locate(labels)
        grad.scatter_add_(1, local[:, None], grad_logprobs.where(inside, 0.0)[:, None])
        if temperature is not None:
            grad = grad / temperature[:, None]
        return grad if slope is None else grad * slope

    def _slope(self, logits: Tensor, temperature: Tensor | None) -> Tensor:
        """d capped / d uncapped = 1 - (capped / softcap)^2, of logits over their temperature; 0 for padding rows."""
        capped = logits if temperature is None else logits * temperature[:, None]
        slope = 1 - (capped / self.softcap).square()
        slope[:, self.num_real :] = 0.0
        return slope

    def _locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        local = labels - self.first
        inside = (local >= 0) & (local < self.num_real)
        return inside, local.where(inside, 0)


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS[hidden.device.type] // max(1, len(weight)))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]

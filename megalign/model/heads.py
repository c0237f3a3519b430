"""What the last stage makes of its hidden states: token columns, aligned with the tokens they speak of.

Under sequence and context parallelism a rank holds the hidden states of its own tokens only, and with shared prefixes
of T' tokens for T; the columns are of the whole batch, on every rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megalign.batch import Batch
from megalign.data.prefixes import SharedPrefixes
from megalign.model.build import HiddenStatesModel
from megalign.parallel import context, vocab
from megalign.parallel.groups import ParallelGroups


def language_model_columns(
    model: HiddenStatesModel,
    hidden: Tensor,  # [T / cp, 1, H], with sequence parallelism [T / cp / tp, 1, H]
    batch: Batch,
    groups: ParallelGroups,
    vocab_size: int,
    extras: tuple[str, ...] = (),
    softcap: float | None = None,
    prefixes: SharedPrefixes | None = None,
) -> dict[str, Tensor]:
    """logprobs, entropy, argmax_correct and the extras (vocab.EXTRAS), [T] float32 each, 0 off the loss mask.

    The head runs only where the loss mask is set: the hidden state before a token predicts it.
    """
    mask = batch["loss_mask"]
    if model.config.sequence_parallel:
        # The scores' gradient is already whole on every tensor rank, so each takes its part of it.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    if prefixes is None:
        following = _positions(batch, groups) + 1
        has_loss = (following < batch.num_tokens).logical_and_(mask[following.clamp(max=batch.num_tokens - 1)])
        rows = has_loss.nonzero()[:, 0]
        targets = following[rows]
    else:  # a prompt's last token predicts the first of each of its completions
        targets = mask.nonzero()[:, 0]
        rows = prefixes.source[targets - 1]
    scores = vocab.token_scores(
        hidden[:, 0].index_select(0, rows).to(model.head_weight.dtype),
        model.head_weight,
        batch.tokens[targets],
        temperature=batch.per_token(batch["temperature"])[targets] if "temperature" in batch else None,
        vocab_size=vocab_size,
        tp=groups.tp,
        bias=model.head_bias,
        extras=extras,
        softcap=softcap,
    )
    found = {name: score for name, score in scores._asdict().items() if score is not None}
    return dict(zip(found, _whole(list(found.values()), targets, batch, groups), strict=True))


def score_columns(
    model: HiddenStatesModel,
    hidden: Tensor,  # [T / cp, 1, H], with sequence parallelism [T / cp / tp, 1, H]
    batch: Batch,
    groups: ParallelGroups,
    prefixes: SharedPrefixes | None = None,
) -> dict[str, Tensor]:
    """`scores` and `values` [T] float32, 0 off the loss mask, from a head with one output.

    scores[t] is of the text up to and with token t (a reward model's); values[t] of the text before token t, the
    state in which token t was chosen (a critic's).
    """
    mask = batch["loss_mask"]
    outputs = F.linear(hidden[:, 0].float(), model.head_weight.float())
    if model.config.sequence_parallel:
        # After the head, so that each tensor rank has its own tokens' share of the weight's gradient.
        outputs = gather_from_sequence_parallel_region(outputs, tensor_parallel_output_grad=False)
    if prefixes is not None:
        outputs = outputs.index_select(0, prefixes.source)
    (outputs,) = _whole([outputs[:, 0]], _positions(batch, groups), batch, groups)
    # The first token is never in the loss, so what rolls over to it is masked.
    return {"scores": outputs * mask, "values": outputs.roll(1) * mask}


def _positions(batch: Batch, groups: ParallelGroups) -> Tensor:
    """[T / cp] where this context rank's tokens stand in the batch."""
    if groups.cp.size == 1:
        return torch.arange(batch.num_tokens, device=batch.tokens.device)
    return context.positions_of(batch.host_lengths.whole, groups.cp.rank, groups.cp.size).to(batch.tokens.device)


def _whole(scores: list[Tensor], targets: Tensor, batch: Batch, groups: ParallelGroups) -> list[Tensor]:
    """[n] each, of the tokens `targets` -> [T] each, with all context ranks' tokens and 0 elsewhere."""
    table = torch.stack(scores)
    columns = table.new_zeros(len(scores), batch.num_tokens).index_copy(1, targets, table)
    return list(context.sum_shares(columns, groups.cp).unbind())

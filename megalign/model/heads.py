"""What the last stage makes of its hidden states: token columns, aligned with the tokens they speak of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megalign.batch import Batch
from megalign.model.build import HiddenStatesModel
from megalign.parallel import vocab
from megalign.parallel.groups import ParallelGroups


def language_model_columns(
    model: HiddenStatesModel,
    hidden: Tensor,  # [T, 1, H]
    batch: Batch,
    groups: ParallelGroups,
    vocab_size: int,
    extras: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """logprobs, entropy, argmax_correct and the extras (vocab.EXTRAS), [T] float32 each, 0 off the loss mask.

    The head runs only where the loss mask is set: the hidden state before a token predicts it.
    """
    positions = batch["loss_mask"].nonzero().squeeze(1)
    assert not batch["loss_mask"][batch.cu_seqlens[:-1].long()].any(), "a sequence's first token has no prediction"
    temperature = batch.per_token(batch["temperature"])[positions] if "temperature" in batch else None
    scores = vocab.token_scores(
        hidden[:, 0].index_select(0, (positions - 1).clamp(min=0)),
        model.head_weight,
        batch.tokens[positions],
        temperature=temperature,
        vocab_size=vocab_size,
        tp=groups.tp,
        extras=extras,
    )
    return {
        name: score.new_zeros(batch.num_tokens).index_copy(0, positions, score)
        for name, score in scores._asdict().items()
        if score is not None
    }


def score_columns(
    model: HiddenStatesModel,
    hidden: Tensor,  # [T, 1, H]
    batch: Batch,
) -> dict[str, Tensor]:
    """`scores` and `values` [T] float32, 0 off the loss mask, from a head with one output.

    scores[t] is of the text up to and with token t (a reward model's); values[t] of the text before token t, the
    state in which token t was chosen (a critic's).
    """
    mask = batch["loss_mask"]
    outputs = F.linear(hidden[:, 0].float(), model.head_weight.float()).squeeze(1)
    # The first token is never in the loss, so what rolls over to it is masked.
    return {"scores": outputs * mask, "values": outputs.roll(1) * mask}

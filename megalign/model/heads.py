"""What the last stage makes of its hidden states: token columns, aligned with the tokens they speak of."""

from __future__ import annotations

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
) -> dict[str, Tensor]:
    """logprobs, entropy and argmax_correct, [T] float32 each, 0 off the loss mask.

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
    )
    return {
        name: score.new_zeros(batch.num_tokens).index_copy(0, positions, score)
        for name, score in scores._asdict().items()
    }

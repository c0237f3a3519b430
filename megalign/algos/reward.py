"""The reward model's loss: Bradley-Terry over preference pairs, one score a sequence."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from megalign.algos.columns import sequence_column
from megalign.algos.masked import masked, maximum, minimum, sequence_mean
from megalign.algos.pairs import Pair, num_pairs
from megalign.batch import Batch, Counts, Metric


def reward_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    center_rewards_coefficient: float | None,
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the mean over pairs of -log s(score_c - score_r - margin) (InstructGPT, arXiv
    2203.02155 eq. 1; margins: Llama 2, arXiv 2307.09288 eq. 2), and of TRL's metrics.

    `outputs`: scores [T] with its graph. Columns: loss_mask [T], True at each sequence's last token only; margin [S],
    where the rows have one, the same on both sequences of a pair. `center_rewards_coefficient` weighs
    (score_c + score_r)^2, which pulls the scores towards 0 (arXiv 2312.09244 eq. 2). The metrics leave margins out.
    """
    pairs = num_pairs(counts)
    scores = batch.per_sequence_sum(masked(outputs["scores"], batch["loss_mask"]))
    pair = Pair.of(scores)
    logits = pair.delta
    if "margin" in batch:
        logits = logits - Pair.of(sequence_column(batch, "margin", scores)).chosen
    losses = -logsigmoid(logits)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (pair.chosen + pair.rejected).square()
    accurate = (pair.chosen > pair.rejected).to(scores.dtype)
    metrics = {
        "min_reward": minimum(scores),
        "mean_reward": sequence_mean(scores, counts.sequences),
        "max_reward": maximum(scores),
        "accuracy": sequence_mean(accurate, pairs),
        "margin": sequence_mean(pair.delta, pairs),
    }
    return losses.sum() / pairs, metrics

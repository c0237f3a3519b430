"""Supervised losses over packed batches."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megalign.algos.masked import masked, token_mean
from megalign.batch import Batch, Counts, Metric


def sft_loss(
    outputs: dict[str, Tensor],
    batch: Batch,
    counts: Counts,
    *,
    loss_type: Literal["nll", "dft"] = "nll",
) -> tuple[Tensor, dict[str, Metric]]:
    """This microbatch's share of the mean negative log likelihood over all loss tokens of the step.

    `outputs`: "logprobs" [T] with its graph, "entropy" [T], and "argmax_correct" [T] (1.0 where the model's
    first choice is the token) when the engine was asked for it. `dft` weights each token by its own
    probability, as a constant (DFT, arXiv 2508.05629).
    """
    mask = batch["loss_mask"]
    nll = -masked(outputs["logprobs"], mask)
    if loss_type == "dft":
        nll = nll * outputs["logprobs"].detach().exp()
    else:
        assert loss_type == "nll", f"loss_type={loss_type!r}"
    metrics = {"entropy": token_mean(outputs["entropy"], mask, counts.tokens)}
    if "argmax_correct" in outputs:
        metrics["mean_token_accuracy"] = token_mean(outputs["argmax_correct"], mask, counts.tokens)
    return nll.sum() / max(counts.tokens, 1.0), metrics

"""SFT losses against torch's cross entropy and plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch, Counts


def logits_and_batch() -> tuple[Tensor, Batch]:
    """Two sequences of 4 and 3 tokens and a tail of 1; logits[t] predict tokens[t]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    batch = Batch(
        tokens=torch.randint(11, (8,), generator=generator),
        cu_seqlens=torch.tensor([0, 4, 7, 8], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": mask},
    )
    return logits, batch


def outputs_of(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    batch.tokens[1] = logits[1].argmax()  # one right guess among the loss tokens
    distribution = torch.distributions.Categorical(logits=logits)
    return {
        "logprobs": distribution.log_prob(batch.tokens),
        "entropy": distribution.entropy().detach(),
        "argmax_correct": (logits.argmax(-1) == batch.tokens).double(),
    }


def test_nll_is_cross_entropy_over_the_loss_tokens_by_the_global_count() -> None:
    logits, batch = logits_and_batch()
    loss, metrics = sft_loss(outputs_of(logits, batch), batch, Counts(tokens=10, sequences=5))
    labels = batch.tokens.masked_fill(~batch["loss_mask"], -100)
    expected = cross_entropy(logits, labels, reduction="sum") / 10
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits, retain_graph=True)[0])
    chosen = batch["loss_mask"]
    probabilities = logits.softmax(-1)[chosen]
    assert metrics["entropy"].value.item() == pytest.approx(-(probabilities * probabilities.log()).sum().item() / 10)
    correct = (logits.argmax(-1) == batch.tokens)[chosen].sum().item()
    assert metrics["mean_token_accuracy"].value.item() == pytest.approx(correct / 10)


def test_dft_weights_each_token_by_its_own_probability_as_a_constant() -> None:
    logits, batch = logits_and_batch()
    loss, _ = sft_loss(outputs_of(logits, batch), batch, Counts(tokens=4, sequences=2), loss_type="dft")
    labels = batch.tokens.masked_fill(~batch["loss_mask"], -100)
    nll = cross_entropy(logits, labels, reduction="none")
    expected = (nll * (-nll).exp().detach()).sum() / 4
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("tokens", [0.0, 4.0])
def test_a_batch_without_loss_tokens_gives_an_exact_zero_with_a_graph(tokens: float) -> None:
    logprobs = torch.full((8,), -torch.inf, requires_grad=True)  # what stands outside the mask never counts
    outputs = {"logprobs": logprobs, "entropy": torch.zeros(8)}
    loss, metrics = sft_loss(outputs, Batch.dummy(8), Counts(tokens=tokens, sequences=0))
    loss.backward()
    assert loss.item() == 0 and logprobs.grad.abs().sum() == 0
    assert metrics["entropy"].value == 0 and "mean_token_accuracy" not in metrics

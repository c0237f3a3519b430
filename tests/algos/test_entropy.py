"""The entropy quantile and the bonus' controller against torch, TRL 1.16 and hand arithmetic."""

from __future__ import annotations

import pytest
import torch

from megalign.algos.controllers import AdaptiveEntropyController
from megalign.algos.entropy import ENTROPY_COUNTS, entropy_threshold, high_entropy_mask
from megalign.batch import Batch
from tests.algos.completions import BASE, MAX_COMPLETION_LENGTH, recorded, trl_inputs
from tests.algos.trl_reference import run_trl_loss, trl_trainer

QUANTILES = (0.0, 0.2, 0.31, 0.5, 0.9, 0.999)


@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("size", [1, 2, 11, 257])
def test_the_threshold_is_torchs_quantile(size: int, quantile: float) -> None:
    entropies = torch.rand(size, generator=torch.Generator().manual_seed(size))
    ours = entropy_threshold(entropies, quantile)
    assert ours.dtype == entropies.dtype
    torch.testing.assert_close(ours, torch.quantile(entropies, 1 - quantile))


@pytest.mark.parametrize("quantile", QUANTILES)
def test_the_mask_is_trls(quantile: float) -> None:
    data = recorded()
    entropies, mask = data["entropy"].float(), data["loss_mask"]
    settings = {name: value for name, value in BASE.items() if name != "importance_sampling_level"}
    trainer = trl_trainer(level="token", bias_correction=True, **settings)
    expected = trainer.get_high_entropy_mask(entropies, mask.long(), 1 - quantile)
    ours = high_entropy_mask(entropies, mask, entropy_threshold(entropies[mask], quantile))
    assert torch.equal(ours, expected)
    assert 1 <= ours.sum() <= mask.sum()


def test_a_threshold_by_hand() -> None:
    entropies = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0])
    assert entropy_threshold(entropies, 0.5).item() == 2.0
    assert entropy_threshold(entropies, 0.375).item() == 2.5  # halfway from the third to the fourth
    assert entropy_threshold(entropies, 0.0).item() == 4.0  # the highest alone
    assert entropy_threshold(entropies[:0], 0.2).item() == float("inf")
    mask = torch.tensor([True, True, False, True, True])
    assert high_entropy_mask(entropies, mask, 2.0).tolist() == [True, False, False, True, False]


def test_equal_entropies_are_all_in_or_out_however_they_are_rounded() -> None:
    entropies = torch.tensor([4.3, 4.3 + 5e-7, 4.3 - 1e-6, 4.2])
    threshold = entropy_threshold(entropies, 0.0)
    mask = high_entropy_mask(entropies, torch.ones(4, dtype=torch.bool), threshold)
    assert mask.tolist() == [True, True, True, False]


def test_more_tokens_than_torchs_quantile_takes() -> None:
    entropies = torch.zeros(2**24 + 2)
    entropies[-1] = 1.0
    assert entropy_threshold(entropies, 0.0).item() == 1.0


def test_a_batch_without_sequences_counts_no_token() -> None:
    assert ENTROPY_COUNTS["entropy_tokens"](Batch.dummy(4)).item() == 0


def test_the_adaptive_coefficient_takes_trls_steps() -> None:
    data = recorded()
    options = {"entropy_coef": 0.01, "entropy_coef_max": 0.02, "entropy_coef_delta": 0.006, "entropy_target": 1.0}
    trainer = trl_trainer(
        loss_type="grpo",
        level="token",
        epsilon=0.1,
        epsilon_high=None,
        beta=0.0,
        max_completion_length=MAX_COMPLETION_LENGTH,
        bias_correction=True,
        use_adaptive_entropy=True,
        **options,
    )
    ours = AdaptiveEntropyController(0.01, minimum=0.0, maximum=0.02, delta=0.006, target=1.0)
    plain = None
    coefficients = []
    for level in (0.9, 0.8, 0.7, 1.2, 1.3, 1.4, 1.5, 0.5):  # of the entropy of every token
        entropy = torch.full_like(data["entropy"], level)
        loss, metrics = run_trl_loss(trainer, trl_inputs(data, None), data["logprobs"], entropy)
        plain = loss.item() if plain is None else plain  # the first step has no bonus
        assert loss.item() == pytest.approx(plain - ours.applied * level)
        ours.update(level)
        coefficients.append(ours.coefficient)
        assert ours.coefficient == pytest.approx(metrics["entropy_coef"], abs=1e-12)
    assert coefficients == pytest.approx([0.016, 0.02, 0.02, 0.014, 0.008, 0.002, 0.0, 0.006])


def test_the_adaptive_coefficient_goes_on_from_a_checkpoint() -> None:
    settings = {"minimum": 0.0, "maximum": 1.0, "delta": 0.1, "target": 1.0}
    first = AdaptiveEntropyController(0.5, **settings)
    assert first.applied == 0.0
    first.update(0.5)
    second = AdaptiveEntropyController(0.5, **settings)
    second.load_state_dict(first.state_dict())
    assert second.applied == first.applied == 0.6

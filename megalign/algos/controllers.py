"""Coefficients that a run moves as it goes: of PPO's KL penalty and of the entropy bonus.

Plain numbers, equal on every rank as long as what they are told is; `state_dict` goes into the checkpoint.
"""

from __future__ import annotations

import math


class FixedKLController:
    """A KL coefficient that stays what it is."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def update(self, kl: float, num_sequences: int) -> None:
        """Nothing follows from what was measured."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps: nothing, the config says it."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """A fixed coefficient has no state to take."""


class AdaptiveKLController:
    """A KL coefficient that steers the KL of a sequence towards `target` (arXiv 1909.08593 section 2.2).

    The paper's K_beta is num_sequences / horizon: the smaller the horizon, the faster it moves.
    """

    def __init__(self, coefficient: float, *, target: float, horizon: float) -> None:
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, num_sequences: int) -> None:
        """Moves the coefficient after a batch of `num_sequences` sequences with a mean KL (sum of tokens) `kl`."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * num_sequences / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what a checkpoint kept."""
        self.coefficient = state["coefficient"]


class AdaptiveEntropyController:
    """A coefficient of the entropy bonus that rises by `delta` after each step whose entropy was at or below
    `target`, and falls otherwise, within [minimum, maximum] (Skywork-OR1, arXiv 2505.22312).
    """

    def __init__(self, coefficient: float, *, minimum: float, maximum: float, delta: float, target: float) -> None:
        self.coefficient = coefficient
        self.minimum, self.maximum, self.delta, self.target = minimum, maximum, delta, target
        self.last_entropy = math.inf  # no bonus before the first measurement

    @property
    def applied(self) -> float:
        """The next step's coefficient: 0 while the last step's entropy was above the target."""
        return self.coefficient if self.last_entropy <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """Takes a step's mean entropy over all the tokens that the bonus acts on, in the whole job."""
        if entropy <= self.target:
            self.coefficient = min(self.coefficient + self.delta, self.maximum)
        else:
            self.coefficient = max(self.coefficient - self.delta, self.minimum)
        self.last_entropy = entropy

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient, "last_entropy": self.last_entropy}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what a checkpoint kept."""
        self.coefficient, self.last_entropy = state["coefficient"], state["last_entropy"]

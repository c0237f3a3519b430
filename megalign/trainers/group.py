"""GroupTrainer: what GRPO and RLOO share, several completions of each prompt and a reference behind beta."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from megalign.train_engine import TrainEngine
from megalign.trainers.dynamic_sampling import Refill
from megalign.trainers.online import ONLINE_REFUSED, OnlineTrainer
from megalign.trainers.reference import Reference


class GroupTrainer(OnlineTrainer):
    """Advantages within the group of a prompt; a leaf says which."""

    refused_arguments = ONLINE_REFUSED

    def __init__(self, model: str | None = None, reward_funcs: Any = None, args: Any = None, **given: Any) -> None:
        super().__init__(model, reward_funcs, args, **given)
        if self.args.dynamic_sampling:
            self.refill = Refill(self.args, self.reward_weights)

    def needs_reference(self) -> bool:
        """Whether the policy is held near the model that it began as."""
        return self.args.beta != 0.0

    def settings(self) -> dict[str, Any]:
        """The model by its weights, with beta = 0 too: a resumed run may turn its reference on."""
        return {**super().settings(), "model (the reference behind beta)": self._beginning.described}

    @cached_property
    def _beginning(self) -> Reference:
        return self.reference or Reference(self.model_path, self.args, self.groups)

    def engines(self) -> dict[str, TrainEngine]:
        """A reference that follows the policy is part of where a run stands."""
        moves = self.reference is not None and self.args.sync_ref_model
        return {**super().engines(), "reference": self.reference.engine} if moves else super().engines()

    def after_step(self) -> None:
        """The reference follows, where asked to."""
        if self.reference is not None:
            self.reference.follow(self.policy, self.state.global_step)

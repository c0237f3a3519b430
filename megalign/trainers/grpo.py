"""GRPOTrainer: group relative advantages (arXiv 2402.03300) and the losses of its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalign.algos.advantages import group_advantages, reward_metrics
from megalign.algos.controllers import AdaptiveEntropyController
from megalign.algos.entropy import ENTROPY_COUNTS, entropy_threshold, high_entropy_mask
from megalign.algos.policy import grpo_loss
from megalign.batch import Batch, Counts, Metric
from megalign.config import GRPOConfig
from megalign.parallel.reduce import gather_over, reduce_counts
from megalign.train_engine import StepResult
from megalign.trainers.experience import Credited, Minibatch, with_token_columns
from megalign.trainers.group import GroupTrainer

# Fields that the loss takes by the same name.
_LOSS_FIELDS = (
    "beta",
    "epsilon",
    "epsilon_high",
    "loss_type",
    "importance_sampling_level",
    "max_completion_length",
    "use_bias_correction_kl",
    "delta",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
)


class GRPOTrainer(GroupTrainer):
    """TRL's GRPOTrainer: model, reward_funcs, args, the datasets, processing_class, callbacks."""

    config_class = GRPOConfig

    @property
    def corrects_sampler(self) -> bool:
        """As the config says."""
        return self.args.vllm_importance_sampling_correction

    def make_parts(self) -> None:
        """Also makes the controller of the entropy bonus."""
        super().make_parts()
        args = self.args
        limits = {"minimum": args.entropy_coef_min, "maximum": args.entropy_coef_max}
        self.entropy = AdaptiveEntropyController(
            args.entropy_coef, **limits, delta=args.entropy_coef_delta, target=args.entropy_target
        )

    def with_advantages(self, minibatches: list[Minibatch], rewards: Tensor, num_generations: int) -> Credited:
        """Each reward against its group's mean, scaled as scale_rewards says."""
        how = {
            "num_generations": num_generations,
            "scale_rewards": self.args.scale_rewards,
            "multi_objective_aggregation": self.args.multi_objective_aggregation,
        }
        advantages = group_advantages(rewards, self.reward_weights, **how)
        return Credited(
            minibatches=self.experience.with_sequence_column(minibatches, "advantages", advantages),
            advantages=advantages,
            metrics=reward_metrics(rewards, self.reward_weights, self.rewards.names, **how),
        )

    def with_step_columns(self, minibatch: Minibatch) -> Minibatch:
        """Which tokens are among the most uncertain of the step, as the present policy sees them."""
        if self.args.top_entropy_quantile >= 1.0:
            return minibatch
        with self.run.phases("logprob"):
            outputs = self.policy.forward(minibatch.batches, ("entropy",))
        entropies = [output["entropy"].cpu() for output in outputs]
        masks = [batch["loss_mask"] for batch in minibatch.batches]
        mine = torch.cat([entropy[mask] for entropy, mask in zip(entropies, masks, strict=True)])
        everyone, _ = gather_over(mine, self.groups.dp)
        threshold = entropy_threshold(everyone, self.args.top_entropy_quantile)
        columns = [
            {"entropy_mask": high_entropy_mask(entropy, mask, threshold)}
            for entropy, mask in zip(entropies, masks, strict=True)
        ]
        (chosen,) = with_token_columns([minibatch], columns)
        named = reduce_counts(chosen.batches, self.groups, ENTROPY_COUNTS).named
        return replace(chosen, counts=replace(chosen.counts, named={**chosen.counts.named, **named}))

    def take_step(self, minibatch: Minibatch) -> StepResult:
        """One optimizer step, after which an adaptive entropy coefficient moves."""
        result = super().take_step(minibatch)
        if self.args.use_adaptive_entropy and result.skipped is None:
            self.entropy.update(result.metrics["bonus_entropy"])
        if self._entropy_coef is not None:
            self.run.window.add({"entropy_coef": self.entropy.coefficient})
        return result

    def loss(self, outputs: dict[str, Tensor], batch: Batch, counts: Counts) -> tuple[Tensor, dict[str, Metric]]:
        """The LossFn of a step."""
        fields = {name: getattr(self.args, name) for name in _LOSS_FIELDS}
        batch, sampling = self.experience.corrected(outputs["logprobs"], batch, counts)
        value, metrics = grpo_loss(outputs, batch, counts, **fields, entropy_coef=self._entropy_coef)
        return value, {**sampling, **metrics}

    @property
    def _entropy_coef(self) -> float | None:
        """The present step's coefficient; None is no bonus at all."""
        if self.args.use_adaptive_entropy:
            return self.entropy.applied
        return self.args.entropy_coef or None

    def loop_state(self) -> dict[str, Any]:
        """Also the entropy coefficient."""
        return {**super().loop_state(), "entropy": self.entropy.state_dict()}

    def restore_loop_state(self, state: Mapping[str, Any], replicas: Sequence[Any]) -> None:
        """Also the entropy coefficient."""
        super().restore_loop_state(state, replicas)
        self.entropy.load_state_dict(state["entropy"])

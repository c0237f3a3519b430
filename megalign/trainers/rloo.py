"""RLOOTrainer: REINFORCE with the other completions of a prompt as the baseline (arXiv 2402.14740)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalign.algos.rloo import kl_metrics, rloo_advantages, rloo_loss, rloo_reward_metrics, sequence_kl
from megalign.config import RLOOConfig
from megalign.parallel.reduce import reduce_metrics
from megalign.trainers.experience import Credited, Minibatch, total_counts
from megalign.trainers.group import GroupTrainer


class RLOOTrainer(GroupTrainer):
    """TRL's RLOOTrainer: model, reward_funcs, args, the datasets, processing_class, callbacks."""

    config_class = RLOOConfig

    def needs_old_logprobs(self) -> bool:
        """The KL in the reward is of the policy that sampled."""
        return super().needs_old_logprobs() or self.args.beta != 0.0

    def with_advantages(self, minibatches: list[Minibatch], rewards: Tensor, num_generations: int) -> Credited:
        """Each reward, less beta times its completion's KL, against the mean of its siblings'."""
        args = self.args
        kl = self.experience.per_completion(minibatches, sequence_kl) if args.beta else None
        clip = None if args.reward_clip_range is None else tuple(args.reward_clip_range)
        how = {"num_generations": num_generations, "beta": args.beta, "reward_clip_range": clip}
        advantages = rloo_advantages(
            rewards, self.reward_weights, kl, **how, normalize_advantages=args.normalize_advantages
        )
        metrics = rloo_reward_metrics(rewards, self.reward_weights, self.rewards.names, kl, **how)
        return Credited(
            minibatches=self.experience.with_sequence_column(minibatches, "advantages", advantages),
            advantages=advantages,
            metrics=metrics | (self._kl_metrics(minibatches) if args.beta else {}),
        )

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        return rloo_loss(*inputs, epsilon=self.args.epsilon, epsilon_high=self.args.epsilon_high)

    def _kl_metrics(self, minibatches: list[Minibatch]) -> dict[str, float]:
        counts = total_counts(minibatches)
        shares = [kl_metrics(batch, counts) for minibatch in minibatches for batch in minibatch.batches]
        return reduce_metrics(shares, self.groups)

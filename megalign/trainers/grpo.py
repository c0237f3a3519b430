"""GRPOTrainer: group relative advantages (arXiv 2402.03300) and the clipped policy loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalign.algos.advantages import group_advantages, reward_metrics
from megalign.algos.policy import grpo_loss
from megalign.config import GRPOConfig
from megalign.trainers.online import OnlineTrainer


class GRPOTrainer(OnlineTrainer):
    """TRL's GRPOTrainer: model, reward_funcs, args, the datasets, processing_class, callbacks."""

    config_class = GRPOConfig
    refused_arguments = {
        "reward_processing_classes": "reward models are not built yet; give a function",
        "tools": "tool calls are not built yet; completions are one turn",
        "rollout_func": "completions are sampled by vLLM in the ranks",
        "environment_factory": "environments are not built yet; score completions with reward_funcs",
    }

    def advantages(self, rewards: Tensor, num_generations: int) -> tuple[Tensor, dict[str, float]]:
        """Each reward against its group's mean, scaled as scale_rewards says."""
        how = {"num_generations": num_generations, "scale_rewards": self.args.scale_rewards}
        advantages = group_advantages(rewards, self.reward_weights, **how)
        return advantages, reward_metrics(rewards, self.reward_weights, self.rewards.names, **how)

    def loss(self, *inputs: Any) -> Any:
        """The LossFn of a step."""
        return grpo_loss(
            *inputs,
            beta=self.args.beta,
            epsilon=self.args.epsilon,
            epsilon_high=self.args.epsilon_high,
            loss_type=self.args.loss_type,
            importance_sampling_level=self.args.importance_sampling_level,
            max_completion_length=self.args.max_completion_length,
            use_bias_correction_kl=self.args.use_bias_correction_kl,
        )

"""PPOConfig: proximal policy optimization with a critic, the fields of TRL 1.12 (the last to have it)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.online import OnlineConfig
from megalign.config.refused import PPO, Refusal
from megalign.config.values import option
from megalign.errors import UserError


@config
class PPOConfig(OnlineConfig):
    """PPO (arXiv 1707.06347) with a critic, on rewards less the KL divergence from the SFT model."""

    refused: ClassVar[Mapping[str, Refusal]] = PPO

    learning_rate: float = option(3e-6, minimum=0)
    """AdamW's peak learning rate."""
    critic_learning_rate: float | None = option(None, minimum=0)
    """The critic's peak learning rate; learning_rate when not given."""
    critic_warmup_steps: int = option(0, minimum=0)
    """Optimizer steps at the start in which the critic alone learns."""
    sft_model_path: str | None = None
    """The model that the KL divergence is measured from; model_name_or_path when not given. Without
    model_name_or_path, training also starts from it."""
    reward_model_path: str | None = None
    """A reward model's directory (*ForSequenceClassification): a reward after those of reward_funcs."""
    value_model_path: str | None = None
    """The model that the critic starts from; reward_model_path when not given, and without that the policy's
    with a new head."""
    max_completion_length: int = option(53, minimum=1)
    """Longest completion, in tokens (TRL's response_length)."""
    temperature: float = option(0.7, above=0)
    """Sampling temperature; the trainer's logprobs use the same."""
    stop_token: str | None = option(None, choices=("eos",))
    """eos ends a completion at the tokenizer's end token. (Also when neither this nor stop_token_id is given;
    TRL's None samples on to the full length.)"""
    stop_token_id: int | None = option(None, minimum=0)
    """Token that alone ends a completion, in place of the tokenizer's and the model's."""
    missing_eos_penalty: float | None = option(None, above=0)
    """What is taken off the score of a completion that did not end by itself."""
    total_episodes: int | None = option(None, minimum=1)
    """Completions to learn from in the whole run, rounded up to whole rounds; in place of max_steps and
    num_train_epochs."""
    num_ppo_epochs: int = option(4, minimum=1)
    """Passes over each round of completions."""
    num_mini_batches: int = option(1, minimum=1)
    """Optimizer steps in each pass: a round samples per_device_train_batch_size * data-parallel ranks *
    gradient_accumulation_steps * num_mini_batches completions."""
    kl_coef: float = option(0.05, minimum=0)
    """Weight of the KL divergence from the SFT model, token by token, in the reward; with kl_target its
    start."""
    kl_estimator: str = option("k1", choices=("k1", "k3"))
    """Estimator of the KL divergence: k1 (the log ratio) or k3 (less variance, never negative)."""
    kl_target: float | None = option(None, above=0)
    """KL divergence per completion that kl_coef is adapted to hold (arXiv 1909.08593 sec. 2.2); not given,
    kl_coef is fixed."""
    kl_horizon: int = option(10000, minimum=1)
    """Completions over which the adaptation of kl_coef acts; fewer adapt it faster."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation over the round."""
    gamma: float = option(1.0, minimum=0, maximum=1)
    """Discount of later rewards."""
    lam: float = option(0.95, minimum=0, maximum=1)
    """Lambda of generalized advantage estimation (arXiv 1506.02438)."""
    cliprange: float = option(0.2, minimum=0)
    """Clipping range of the probability ratio around 1."""
    vf_coef: float = option(0.1, minimum=0)
    """Weight of the critic's loss."""
    cliprange_value: float = option(0.2, minimum=0)
    """Clipping range of a new value around the old one."""

    @property
    def reward_sources(self) -> list[str]:
        """The rewards that the config names, in the order of reward_weights."""
        model = [] if self.reward_model_path is None else [self.reward_model_path]
        return [*(self.reward_funcs or []), *model]

    @property
    def passes_per_round(self) -> int:
        """How often the optimizer goes over the completions of a round."""
        return self.num_ppo_epochs

    def microbatches_per_generation(self, data_parallel_size: int) -> int:
        """Microbatches that one round of sampling feeds each DP rank, in one pass."""
        return self.gradient_accumulation_steps * self.num_mini_batches

    def steps_of_episodes(self, data_parallel_size: int) -> int | None:
        """Optimizer steps that total_episodes asks for: whole rounds."""
        if self.total_episodes is None:
            return None
        rounds = math.ceil(self.total_episodes / self.completions_per_generation(data_parallel_size))
        return rounds * self.num_mini_batches * self.num_ppo_epochs

    def validate(self, world_size: int) -> None:
        """What is said twice, or would have no effect."""
        super().validate(world_size)
        if self.stop_token is not None and self.stop_token_id is not None:
            raise UserError(
                f"stop_token={self.stop_token!r} and stop_token_id={self.stop_token_id} both say where a completion "
                "ends; give one of them"
            )
        if self.total_episodes is not None and self.max_steps > 0:
            raise UserError(
                f"total_episodes={self.total_episodes} and max_steps={self.max_steps} both say how long to train; give "
                "one of them"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise UserError(
                f"kl_target={self.kl_target} scales kl_coef, and 0 stays 0 however it is scaled; set kl_coef above 0"
            )
        self._validate_warmup(self.data_parallel_size(world_size))

    def _validate_warmup(self, replicas: int) -> None:
        steps = self.max_steps if self.max_steps > 0 else self.steps_of_episodes(replicas)
        if steps is not None and self.critic_warmup_steps >= steps:
            raise UserError(
                f"critic_warmup_steps {self.critic_warmup_steps} leaves the policy none of the run's {steps} optimizer "
                "steps; lower it"
            )

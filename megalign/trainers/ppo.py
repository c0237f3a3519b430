"""PPOTrainer: policy, critic, reference and reward model, each awake for its own pass (arXiv 1707.06347)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalign.algos.advantages import combined_rewards
from megalign.algos.controllers import AdaptiveKLController, FixedKLController
from megalign.algos.gae import gae, moments, whitened
from megalign.algos.kl import KL_ESTIMATORS
from megalign.algos.masked import sequence_token_means
from megalign.algos.ppo import (
    objective_metrics,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
    with_missing_eos_penalty,
)
from megalign.batch import Batch
from megalign.config import PPOConfig
from megalign.errors import UserError
from megalign.parallel.reduce import reduce_metrics, sum_over
from megalign.rollout.engine import GenerationParams, awake
from megalign.train_engine import StepResult, TrainEngine
from megalign.trainers import arguments
from megalign.trainers.arguments import as_list
from megalign.trainers.experience import Credited, Minibatch, total_counts, with_token_columns
from megalign.trainers.online import ONLINE_REFUSED, OnlineTrainer
from megalign.trainers.reference import Reference


class PPOTrainer(OnlineTrainer):
    """TRL 1.12's PPOTrainer, with reward_funcs: model, args, ref_model, reward_model, value_model, the datasets."""

    config_class = PPOConfig
    refused_arguments = ONLINE_REFUSED
    data_fields = (*OnlineTrainer.data_fields, "num_mini_batches")
    scores_end_tokens = True

    def __init__(
        self,
        model: str | None = None,
        reward_funcs: Any = None,
        args: Any = None,
        *,
        ref_model: str | None = None,
        reward_model: str | None = None,
        value_model: str | None = None,
        **given: Any,
    ) -> None:
        self._ref_model, self._reward_model, self._value_model = ref_model, reward_model, value_model
        if model is None and args is not None and args.model_name_or_path is None:
            model = args.sft_model_path
        super().__init__(model, reward_funcs, args, **given)

    # ---- the four models

    def make_parts(self) -> None:
        """Also makes the controller of the KL coefficient."""
        super().make_parts()
        args = self.args
        self.kl: AdaptiveKLController | FixedKLController = FixedKLController(args.kl_coef)
        if args.kl_target is not None:
            self.kl = AdaptiveKLController(args.kl_coef, target=args.kl_target, horizon=args.kl_horizon)

    def reward_sources(self) -> list[Any]:
        """The reward functions, and the reward model behind them."""
        model = self.args.reward_model_path if self._reward_model is None else self._reward_model
        return [*super().reward_sources(), *as_list(model)]

    def load_engines(self) -> None:
        """Reward models, reference and critic."""
        self.rewards.load()
        output_dir, critic = self.args.output_dir, self._critic_path()
        path = arguments.model_directory(self._ref_model or self.args.sft_model_path or self.model_path, None)
        arguments.refuse_same_directory(output_dir, {"the reference": path, "the critic": critic})
        arguments.refuse_same_directory(str(self._critic_directory(output_dir)), {"the critic": critic})
        self.reference = Reference(path, self.args, self.groups)
        _ = self.reference.engine
        self.critic = TrainEngine(critic, self.args, self.groups, score_head=True)
        self.critic.sleep()

    def _critic_path(self) -> str:
        """The critic begins as the model that was named, as a reward model, or as the policy with a new head."""
        named = self._value_model or self.args.value_model_path
        judges = [model.path for model in self.rewards.models.values()]
        return arguments.model_directory(named or (judges[0] if judges else self.model_path), None)

    def engines(self) -> dict[str, TrainEngine]:
        """Policy and critic."""
        return {**super().engines(), "critic": self.critic}

    def save_model(self, output_dir: str | None = None) -> None:
        """The policy as a Hugging Face directory, and the critic in its critic/."""
        super().save_model(output_dir)
        with self.critic.kept_as_it_was():
            path = self._critic_directory(output_dir or self.args.output_dir)
            self.critic.export(str(path), special_tokens=self.special_tokens)

    @property
    def model_directories(self) -> list[Path]:
        """Also the critic's."""
        return [*super().model_directories, self._critic_directory(self.args.output_dir)]

    def _critic_directory(self, output_dir: str) -> Path:
        return Path(output_dir) / "critic"

    def settings(self) -> dict[str, Any]:
        """The reference by its weights."""
        return {**super().settings(), "ref_model": self.reference.described}

    def generation_params(self) -> GenerationParams:
        """With stop_token_id that token alone ends a completion: the model's own end tokens are sampled on past."""
        params, stop = super().generation_params(), self.args.stop_token_id
        if stop is None:
            return params
        if stop >= self.architecture.vocab_size:
            raise UserError(
                f"stop_token_id={stop} is not in the model's vocabulary of {self.architecture.vocab_size}; give the id "
                "of one of its tokens"
            )
        return replace(params, stop_token_ids=(stop,), extra={"ignore_eos": True, **params.extra})

    def max_steps(self) -> int:
        """Those that total_episodes asks for, where it is given."""
        return self.args.steps_of_episodes(self.groups.dp.size) or super().max_steps()

    def needs_reference(self) -> bool:
        """What token rewards take off is measured from it."""
        return True

    def needs_old_logprobs(self) -> bool:
        """The policy's before its first step of the round: what the ratio and the KL are of."""
        return True

    # ---- a round

    def with_advantages(self, minibatches: list[Minibatch], rewards: Tensor, num_generations: int) -> Credited:
        """Values, rewards of tokens, advantages (whitened over the whole round) and returns."""
        args = self.args
        scores = combined_rewards(rewards, self.reward_weights)
        if scores.isnan().any():
            which = int(scores.isnan().nonzero()[0])
            raise UserError(
                f"no reward function scored completion {which} of the round; PPO needs a number for each: return one "
                "instead of None"
            )
        maker = self.experience
        with self.run.phases("critic"):
            minibatches = maker.with_token_column(minibatches, "values", self.critic, "values")
        minibatches = maker.with_sequence_column(minibatches, "scores", scores)
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        token_kl = [_on_loss_tokens(KL_ESTIMATORS[args.kl_estimator], batch) for batch in batches]
        rewarded = [self._token_rewards(kl, batch) for kl, batch in zip(token_kl, batches, strict=True)]
        if args.whiten_rewards:
            rewarded = self._whitened(rewarded, batches, shift_mean=False)
        estimated = [
            gae(reward, batch["values"], batch, gamma=args.gamma, lam=args.lam)
            for reward, batch in zip(rewarded, batches, strict=True)
        ]
        advantages = self._whitened([advantage for advantage, _ in estimated], batches, shift_mean=True)
        columns = [
            {"advantages": advantage, "returns": returns}
            for advantage, (_, returns) in zip(advantages, estimated, strict=True)
        ]
        minibatches = with_token_columns(minibatches, columns)
        return Credited(
            minibatches=minibatches,
            advantages=maker.per_completion(
                minibatches, lambda batch: sequence_token_means(batch["advantages"], batch)
            ),
            metrics=self._objective(token_kl, batches, minibatches, scores),
        )

    def _token_rewards(self, kl: Tensor, batch: Batch) -> Tensor:
        if not batch.num_sequences:  # Batch.dummy
            return torch.zeros_like(kl)
        scores = with_missing_eos_penalty(batch["scores"], batch["ended"].bool(), self.args.missing_eos_penalty)
        return token_rewards(kl, scores, batch, kl_coef=self.kl.coefficient)

    def _whitened(self, columns: list[Tensor], batches: list[Batch], *, shift_mean: bool) -> list[Tensor]:
        """Over the loss tokens of all ranks: whitening a rank's own would tie numbers to the layout."""
        parts = [moments(column, batch["loss_mask"]) for column, batch in zip(columns, batches, strict=True)]
        total = sum_over(torch.stack(parts).sum(0), self.groups.dp)
        return [
            whitened(column, batch["loss_mask"], total, shift_mean=shift_mean)
            for column, batch in zip(columns, batches, strict=True)
        ]

    def _objective(
        self, token_kl: list[Tensor], batches: list[Batch], minibatches: list[Minibatch], scores: Tensor
    ) -> dict[str, float]:
        """TRL's objective/*."""
        counts, coefficient = total_counts(minibatches), self.kl.coefficient
        shares = [
            objective_metrics(kl, batch, counts, kl_coef=coefficient)
            for kl, batch in zip(token_kl, batches, strict=True)
        ]
        metrics = reduce_metrics(shares, self.groups)
        ended = self.experience.per_completion(minibatches, lambda batch: batch["ended"])
        paid = with_missing_eos_penalty(scores, ended.bool(), self.args.missing_eos_penalty).mean().item()
        return {
            **metrics,
            "objective/scores": paid,
            "objective/rlhf_reward": paid + metrics["objective/non_score_reward"],
            "kl_coef": coefficient,
            "val/num_eos_tokens": float(ended.sum()),
        }

    def after_credit(self, credited: Credited) -> None:
        """An adaptive coefficient moves, for the next round."""
        self.kl.update(credited.metrics["objective/kl"], len(credited.advantages))

    # ---- the steps

    def before_steps(self, schedule: list[Minibatch]) -> list[Minibatch]:
        """All steps of the critic, while it is awake: its loss and the policy's share columns and nothing else."""
        rate = self.args.learning_rate if self.args.critic_learning_rate is None else self.args.critic_learning_rate
        loss = partial(ppo_value_loss, cliprange_value=self.args.cliprange_value, vf_coef=self.args.vf_coef)
        done = []
        with awake(self.critic), self.run.phases("critic"):
            for number, minibatch in enumerate(schedule):
                factor = self.learning_rate.factor(self.state.global_step + number)
                result = self.critic.train_step(
                    minibatch.batches, loss, learning_rate=rate * factor, counts=minibatch.counts
                )
                self.run.skips.count(result, self.state.global_step + number + 1, model="critic")
                metrics = {"critic_grad_norm": result.grad_norm, "critic_learning_rate": rate * factor}
                done.append(replace(minibatch, metrics={**result.metrics, **metrics}))
        return done

    def take_step(self, minibatch: Minibatch) -> StepResult:
        """The policy's step; none in the critic's warm-up."""
        if self.state.global_step >= self.args.critic_warmup_steps:
            return super().take_step(minibatch)
        noted = minibatch.metrics
        loss = self.args.vf_coef * noted["loss/value_avg"]
        self.run.count_loss(loss)
        self.run.window.set(grad_norm=noted["critic_grad_norm"], learning_rate=noted["critic_learning_rate"])
        return StepResult(loss=loss, grad_norm=noted["critic_grad_norm"], metrics={}, counts=minibatch.counts)

    def loss(self, *inputs: Any) -> Any:
        """The policy's LossFn."""
        return ppo_policy_loss(*inputs, cliprange=self.args.cliprange)

    def loop_state(self) -> dict[str, Any]:
        """Also the KL coefficient."""
        return {**super().loop_state(), "kl": self.kl.state_dict()}

    def restore_loop_state(self, state: Mapping[str, Any], replicas: Sequence[Any]) -> None:
        """Also the KL coefficient."""
        super().restore_loop_state(state, replicas)
        self.kl.load_state_dict(state["kl"])


def _on_loss_tokens(estimator: Any, batch: Batch) -> Tensor:
    """[T] KL of the policy that sampled from the reference, 0 off the loss mask."""
    return estimator(batch["old_logprobs"], batch["ref_logprobs"]) * batch["loss_mask"]

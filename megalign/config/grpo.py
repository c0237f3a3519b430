"""GRPOConfig: group relative policy optimization, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.loop import LoopConfig
from megalign.config.parallel import ParallelConfig
from megalign.config.refused import GRPO, Refusal
from megalign.config.rollout import RolloutConfig
from megalign.config.values import option
from megalign.errors import UserError

_SCALES = {True: "group", False: "none"}


@config
class GRPOConfig(LoopConfig, ParallelConfig, RolloutConfig):
    """GRPO (arXiv 2402.03300) and its DAPO, Dr. GRPO and GSPO variants."""

    refused: ClassVar[Mapping[str, Refusal]] = GRPO

    learning_rate: float = option(1e-6, minimum=0)
    """AdamW's peak learning rate."""
    reward_funcs: list[str] | None = None
    """Reward functions: built-in names, dotted paths (my.module.func) or files (path/to/file.py:func). In
    Python, give functions to the trainer instead."""
    shuffle_dataset: bool = True
    """Prompts in a new random order each epoch; False takes them in order."""
    disable_dropout: bool = option(
        True,
        choices=(True,),
        why="dropout would make old and new logprobs differ by noise, so it is never applied",
    )
    """Models run without dropout. TRL's default is False."""
    beta: float = option(0.0, minimum=0)
    """Weight of the KL divergence from the reference model; 0 loads none."""
    num_iterations: int = option(1, minimum=1)
    """Passes over each round of completions (mu in the paper)."""
    epsilon: float = option(0.2, minimum=0)
    """Clipping range of the probability ratio, below 1."""
    epsilon_high: float | None = option(None, minimum=0)
    """Clipping range above 1; epsilon when not given (DAPO: 0.28)."""
    loss_type: str = option(
        "dapo",
        choices=("grpo", "bnpo", "dr_grpo", "dapo"),
        why="this loss is not built yet (GSPO is grpo with importance_sampling_level='sequence')",
    )
    """How token losses are averaged: grpo (per sequence, then over sequences), bnpo (over the step's tokens),
    dr_grpo (by the constant max_completion_length) or dapo (over the tokens of the whole generation
    batch)."""
    importance_sampling_level: str = option("token", choices=("token", "sequence"))
    """Probability ratio per token, or one per sequence (GSPO)."""
    reward_weights: list[float] | None = None
    """Weight of each reward function; 1 each when not given."""
    scale_rewards: str | bool = option("group", choices=("group", "batch", "none"))
    """Divide advantages by the rewards' standard deviation in the group (or True), in the batch, or not at
    all (none or False)."""
    mask_truncated_completions: bool = False
    """Leave completions that hit max_completion_length out of the loss."""
    use_bias_correction_kl: bool = True
    """Weigh the KL term by the probability ratio, which makes its gradient unbiased off policy; only with
    beta."""
    log_completions: bool = False
    """Print sampled completions and write them to output_dir/completions at each log."""
    num_completions_to_print: int | None = option(None, minimum=1)
    """Completions to print; all when not given."""
    log_unique_prompts: bool = False
    """One completion per prompt in what log_completions prints and writes."""

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = _SCALES[self.scale_rewards]
        super().__post_init__()

    @property
    def eval_generations(self) -> int:
        """Completions per prompt in evaluation."""
        return self.num_generations_eval or self.num_generations

    def microbatches_per_generation(self, data_parallel_size: int) -> int:
        """steps_per_generation, filled in: microbatches that one round of sampling feeds each DP rank."""
        if self.steps_per_generation is not None:
            return self.steps_per_generation
        if self.generation_batch_size is None:
            return self.gradient_accumulation_steps
        return self.generation_batch_size // (self.per_device_train_batch_size * data_parallel_size)

    def completions_per_generation(self, data_parallel_size: int) -> int:
        """generation_batch_size, filled in: completions of one round of sampling, over the whole job."""
        microbatches = self.microbatches_per_generation(data_parallel_size)
        return self.per_device_train_batch_size * data_parallel_size * microbatches

    @property
    def engines_sleep(self) -> bool:
        """vllm_enable_sleep_mode speaks for both sides of the colocation: each engine is awake for its own
        pass only."""
        return self.vllm_enable_sleep_mode

    def validate(self, world_size: int) -> None:
        """Generation batch by groups, microbatches and optimizer steps; evaluation batch by its groups; time-outs."""
        super().validate(world_size)
        if self.reward_timeout >= self.ddp_timeout:
            raise UserError(
                f"reward_timeout {self.reward_timeout:g} s must be below ddp_timeout {self.ddp_timeout} s, after which "
                "the ranks that wait for the rewards give the job up; raise ddp_timeout or lower reward_timeout"
            )
        replicas = self.data_parallel_size(world_size)
        self._validate_generation_batch(replicas)
        rows = self.per_device_eval_batch_size * replicas
        if self.evaluates and rows % self.eval_generations:
            raise UserError(
                f"per_device_eval_batch_size {self.per_device_eval_batch_size} * data-parallel ranks {replicas} = "
                f"{rows} must be a multiple of num_generations_eval {self.eval_generations}; change one of them"
            )
        if self.reward_funcs and self.reward_weights and len(self.reward_funcs) != len(self.reward_weights):
            raise UserError(
                f"reward_weights has {len(self.reward_weights)} values for {len(self.reward_funcs)} reward functions; "
                "give one for each"
            )

    def _validate_generation_batch(self, replicas: int) -> None:
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise UserError(
                f"generation_batch_size {self.generation_batch_size} and steps_per_generation "
                f"{self.steps_per_generation} say the same thing twice; give one of them"
            )
        microbatch = self.per_device_train_batch_size * replicas
        if self.generation_batch_size is not None and self.generation_batch_size % microbatch:
            raise UserError(
                f"generation_batch_size {self.generation_batch_size} must be a multiple of "
                f"per_device_train_batch_size {self.per_device_train_batch_size} * data-parallel ranks {replicas} = "
                f"{microbatch}; change one of them"
            )
        completions = self.completions_per_generation(replicas)
        if completions % self.num_generations:
            raise UserError(
                f"generation_batch_size {completions} (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} * data-parallel ranks {replicas} * steps_per_generation "
                f"{completions // microbatch}) must be a multiple of num_generations {self.num_generations}; "
                "change one of them"
            )
        if completions // microbatch % self.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation {completions // microbatch} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}, so that optimizer steps do not straddle rounds of sampling; "
                "change one of them"
            )

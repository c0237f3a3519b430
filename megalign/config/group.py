"""What GRPO's and RLOO's configs share: groups of completions, and the clipped ratio of probabilities."""

from __future__ import annotations

from megalign.config.base import config
from megalign.config.online import OnlineConfig
from megalign.config.reference import ReferenceConfig
from megalign.config.values import option
from megalign.errors import UserError


@config
class GroupConfig(OnlineConfig, ReferenceConfig):
    """Advantages within the group of completions of a prompt."""

    generation_batch_size: int | None = option(None, minimum=1)
    """Completions sampled at once, over the whole job; per_device_train_batch_size * data-parallel ranks *
    steps_per_generation when not given. Give this or steps_per_generation."""
    steps_per_generation: int | None = option(None, minimum=1)
    """Microbatches that one round of sampling feeds; gradient_accumulation_steps (one optimizer step) when
    not given. Must be a multiple of gradient_accumulation_steps."""
    num_iterations: int = option(1, minimum=1)
    """Passes over each round of completions (mu in the paper of GRPO)."""
    beta: float = option(0.0, minimum=0)
    """Weight of the KL divergence from the reference model; 0 loads none."""
    epsilon: float = option(0.2, minimum=0)
    """Clipping range of the probability ratio, below 1."""
    epsilon_high: float | None = option(None, minimum=0)
    """Clipping range above 1; epsilon when not given (DAPO: 0.28). For cispo the largest ratio, and around
    5."""
    mask_truncated_completions: bool = False
    """Leave completions that hit max_completion_length out of the loss."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, from which nothing is learnt, and sample others in their place
    (DAPO, arXiv 2503.14476 sec. 3.2)."""
    dynamic_sampling_max_rounds: int = option(10, minimum=1)
    """Samplings that dynamic_sampling may take to fill one round; groups without a difference fill what is
    left."""

    @property
    def passes_per_round(self) -> int:
        """How often the optimizer goes over the completions of a round."""
        return self.num_iterations

    def microbatches_per_generation(self, data_parallel_size: int) -> int:
        """steps_per_generation, filled in: microbatches that one round of sampling feeds each DP rank."""
        if self.steps_per_generation is not None:
            return self.steps_per_generation
        if self.generation_batch_size is None:
            return self.gradient_accumulation_steps
        return self.generation_batch_size // (self.per_device_train_batch_size * data_parallel_size)

    def validate(self, world_size: int) -> None:
        """A reference that moves must be there."""
        super().validate(world_size)
        if self.sync_ref_model and not self.beta:
            raise UserError(
                "sync_ref_model=True moves a reference model that beta=0 does not load; set beta above 0, or "
                "sync_ref_model=False"
            )

    def _validate_round(self, replicas: int) -> None:
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
        super()._validate_round(replicas)
        microbatches = self.microbatches_per_generation(replicas)
        if microbatches % self.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation {microbatches} must be a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}, so that optimizer steps do not straddle rounds of sampling; "
                "change one of them"
            )

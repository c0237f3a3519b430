"""GRPOConfig: group relative policy optimization, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.group import GroupConfig
from megalign.config.refused import GRPO, Refusal
from megalign.config.rollout import CorrectionConfig
from megalign.config.values import option
from megalign.errors import UserError

_SCALES = {True: "group", False: "none"}
_WITHOUT_CLIPPED_RATIO = ("cispo", "sapo", "vespo")


@config
class GRPOConfig(GroupConfig, CorrectionConfig):
    """GRPO (arXiv 2402.03300) and its relatives: DAPO, Dr. GRPO, GSPO, CISPO, SAPO, LUSPO, VESPO."""

    refused: ClassVar[Mapping[str, Refusal]] = GRPO

    learning_rate: float = option(1e-6, minimum=0)
    """AdamW's peak learning rate."""
    num_generations: int = option(8, minimum=2)
    """Completions per prompt: the group that advantages are computed over."""
    loss_type: str = option(
        "dapo",
        choices=("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
        why="there is no such loss (GSPO is grpo with importance_sampling_level='sequence')",
    )
    """How token losses are averaged: grpo (per sequence, then over sequences), bnpo (over the step's tokens),
    dr_grpo (by the constant max_completion_length) or dapo (over the tokens of the whole generation batch); or
    another loss: cispo (arXiv 2506.13585, averaged as dapo), sapo (arXiv 2511.20347, as grpo), luspo (arXiv
    2602.05261, summed over a sequence; use importance_sampling_level='sequence') or vespo (arXiv 2602.10693, as
    dapo)."""
    importance_sampling_level: str = option("token", choices=("token", "sequence"))
    """Probability ratio per token, or one per sequence (GSPO)."""
    delta: float | None = option(None, above=0)
    """Largest probability ratio where the advantage is negative (two-sided clipping, arXiv 2505.07291); choose
    it above 1 + epsilon_high."""
    sapo_temperature_neg: float = option(1.05, above=0)
    """sapo's temperature where the advantage is not positive."""
    sapo_temperature_pos: float = option(1.0, above=0)
    """sapo's temperature where the advantage is positive."""
    vespo_k_pos: float = option(2.0, minimum=0)
    """vespo's power of the sequence's ratio where the advantage is 0 or above."""
    vespo_lambda_pos: float = option(3.0, minimum=0)
    """vespo's exponential decay in the sequence's ratio where the advantage is 0 or above."""
    vespo_k_neg: float = option(3.0, minimum=0)
    """vespo's power where the advantage is negative."""
    vespo_lambda_neg: float = option(2.0, minimum=0)
    """vespo's decay where the advantage is negative."""
    scale_rewards: str | bool = option("group", choices=("group", "batch", "none"))
    """Divide advantages by the rewards' standard deviation in the group (or True), in the batch, or not at
    all (none or False)."""
    multi_objective_aggregation: str = option(
        "sum_then_normalize", choices=("sum_then_normalize", "normalize_then_sum")
    )
    """Several rewards: their weighted sum is scaled as scale_rewards says, or each is scaled in its group before
    they are summed, and the sum in the batch (GDPO, arXiv 2601.05242)."""
    use_bias_correction_kl: bool = True
    """Weigh the KL term by the probability ratio, which makes its gradient unbiased off policy; only with
    beta."""
    off_policy_mask_threshold: float | None = option(None, minimum=0)
    """Leave sequences with negative advantage out of the loss when the sampler's mean logprob exceeds the
    policy's by more than this (arXiv 2512.02556 eq. 9); 0.5 is usual."""
    top_entropy_quantile: float = option(1.0, minimum=0, maximum=1)
    """Only this share of the step's tokens, those of the highest entropy, is in the policy loss (arXiv
    2506.01939: 0.2)."""
    entropy_coef: float = option(0.0, minimum=0)
    """Weight of an entropy bonus: the mean entropy of the step's tokens, whatever loss_type is; with
    use_adaptive_entropy its start."""
    use_adaptive_entropy: bool = False
    """Raise entropy_coef by entropy_coef_delta after a step whose entropy is below entropy_target, lower it
    after others, and apply it only at or below the target (arXiv 2505.22312)."""
    entropy_coef_min: float = option(0.0, minimum=0)
    """Least value of an adaptive entropy_coef."""
    entropy_coef_max: float = option(1.0, minimum=0)
    """Largest value of an adaptive entropy_coef."""
    entropy_coef_delta: float = option(0.005, minimum=0)
    """Change of an adaptive entropy_coef after a step."""
    entropy_target: float = option(0.2, minimum=0)
    """Entropy per token, in nats, that use_adaptive_entropy holds; start from the entropy that is logged."""

    cast_lm_head_to_fp32: bool = False
    """Keep the head's weight (with tied embeddings theirs) in fp32 in a bf16 model, and compute the logits in fp32."""

    @property
    def head_in_fp32(self) -> bool:
        """Whether the language model's head is fp32 in a bf16 model."""
        return self.cast_lm_head_to_fp32

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = _SCALES[self.scale_rewards]
        super().__post_init__()

    def validate(self, world_size: int) -> None:
        """Fields that the loss would not read, or that contradict one another."""
        super().validate(world_size)
        if self.delta is not None and self.loss_type in _WITHOUT_CLIPPED_RATIO:
            raise UserError(
                f"delta={self.delta} clips the ratio a second time, and loss_type={self.loss_type!r} does not clip it; "
                "drop delta, or use another loss_type"
            )
        if self.loss_type == "vespo" and self.vllm_importance_sampling_correction:
            self._validate_vespo()
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise UserError(
                f"scale_rewards={self.scale_rewards!r} has no effect with multi_objective_aggregation="
                "'normalize_then_sum', which scales each reward in its group; use scale_rewards='group'"
            )
        if self.use_adaptive_entropy and not self.entropy_coef_min <= self.entropy_coef <= self.entropy_coef_max:
            raise UserError(
                f"entropy_coef={self.entropy_coef} must be from entropy_coef_min {self.entropy_coef_min} to "
                f"entropy_coef_max {self.entropy_coef_max}, between which use_adaptive_entropy moves it; change one"
            )

    def _validate_vespo(self) -> None:
        if self.vllm_importance_sampling_mode not in ("token_truncate", "token_mask"):
            raise UserError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode!r} corrects whole sequences, and "
                "loss_type='vespo' multiplies tokens' corrections itself; use token_truncate or token_mask"
            )

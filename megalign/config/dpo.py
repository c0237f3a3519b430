"""DPOConfig: direct preference optimization, TRL's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from megalign.config.base import config
from megalign.config.preference import PreferenceConfig
from megalign.config.refused import DPO, Refusal
from megalign.config.values import option
from megalign.errors import UserError

_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
# The losses on the difference of the two scores, which alone have an f-divergence form.
_ON_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SORTED = ("aot", "aot_unpaired")


@config
class DPOConfig(PreferenceConfig):
    """DPO (arXiv 2305.18290) and its relatives on pairs of a chosen and a rejected answer."""

    refused: ClassVar[Mapping[str, Refusal]] = DPO

    learning_rate: float = option(1e-6, minimum=0)
    """AdamW's peak learning rate."""
    truncation_mode: str = option("keep_start", choices=("keep_start", "keep_end"))
    """Which part of a sequence longer than max_length is kept."""
    loss_type: list[str] = option(["sigmoid"], choices=_LOSSES)
    """One loss, or several whose sum is weighed by loss_weights."""
    loss_weights: list[float] | None = None
    """Weight of each loss in loss_type; 1 each when not given."""
    beta: float = option(0.1, above=0)
    """How firmly the policy is held to the reference; ipo's tau."""
    label_smoothing: float = option(0.0, minimum=0, maximum=1)
    """Probability that a pair is labelled the wrong way round; read by robust, exo_pair (1e-3 is usual) and
    the aot losses."""
    f_divergence_type: str = option(
        "reverse_kl", choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    )
    """Divergence from the reference (arXiv 2309.16240); others than reverse_kl only with losses on the
    difference of the scores."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence; at 1 it is reverse_kl."""
    ld_alpha: float | None = option(None, minimum=0, maximum=1)
    """Weight of the tokens by which one answer is longer than the other (LD-DPO, arXiv 2409.06411); 1 when
    not given."""
    use_weighting: bool = False
    """Weigh pairs by the policy's own probability of them (WPO, arXiv 2406.11827)."""
    discopop_tau: float = option(0.05, above=0)
    """Temperature of discopop (arXiv 2406.08414)."""

    def validate(self, world_size: int) -> None:
        """Losses with their weights, and what only some losses have."""
        super().validate(world_size)
        if not self.loss_type:
            raise UserError("loss_type=[] names no loss; give one or more")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} losses in loss_type; give "
                "one for each"
            )
        without = [loss for loss in self.loss_type if loss not in _ON_DIFFERENCES]
        if self.f_divergence_type != "reverse_kl" and without:
            raise UserError(
                f"f_divergence_type={self.f_divergence_type!r} has no form for loss_type {', '.join(without)}; use "
                f"reverse_kl, or losses of {', '.join(_ON_DIFFERENCES)}"
            )
        if self.use_weighting and any(loss in _SORTED for loss in self.loss_type):
            raise UserError(
                "use_weighting=True weighs pairs, and the aot losses sort them apart; set one of them otherwise"
            )
        self._validate_label_smoothing()

    def _validate_label_smoothing(self) -> None:
        smoothing = self.label_smoothing
        readers = ("robust", "exo_pair", "aot", "aot_unpaired")
        if smoothing and not set(readers) & set(self.loss_type):
            raise UserError(
                f"label_smoothing={smoothing} has no effect on loss_type {', '.join(self.loss_type)}: only "
                f"{', '.join(readers)} read it; use robust, or leave it out"
            )
        if "exo_pair" in self.loss_type and not 0 < smoothing < 1:
            raise UserError(
                f"label_smoothing={smoothing} must be between 0 and 1 for loss_type exo_pair, which takes its "
                "logarithm; 1e-3 is usual"
            )
        if "robust" in self.loss_type and smoothing >= 0.5:
            raise UserError(
                f"label_smoothing={smoothing} must be below 0.5 for loss_type robust, which divides by 1 - 2 * "
                "label_smoothing; 0.1 is usual"
            )

"""What DPO's and KTO's configs share: logprobs of the reference that are computed once."""

from __future__ import annotations

from megalign.config.base import config
from megalign.config.offline import OfflineConfig
from megalign.config.reference import ReferenceConfig
from megalign.config.values import option
from megalign.errors import UserError


@config
class PreferenceConfig(OfflineConfig, ReferenceConfig):
    """Preferences against a reference model."""

    precompute_ref_log_probs: bool = False
    """Compute the reference's logprobs once, before training, so that its memory is free afterwards. They are
    cached in output_dir/reference_logprobs, and used again while rows and reference are the same."""
    precompute_ref_batch_size: int | None = option(None, minimum=1)
    """Rows per data-parallel rank and microbatch when they are computed; per_device_train_batch_size when not
    given."""

    def validate(self, world_size: int) -> None:
        """Logprobs that are computed once need a reference that stays."""
        super().validate(world_size)
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise UserError(
                "precompute_ref_log_probs=True computes the reference's logprobs once, and sync_ref_model=True moves "
                "the reference; set one of them to False"
            )
        if self.precompute_ref_batch_size is not None and not self.precompute_ref_log_probs:
            raise UserError(
                f"precompute_ref_batch_size={self.precompute_ref_batch_size} has no effect without "
                "precompute_ref_log_probs; set that to True, or drop it"
            )

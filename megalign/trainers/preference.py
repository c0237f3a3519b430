"""PreferenceTrainer: what DPO and KTO share, a reference model whose logprobs are columns of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from megalign.batch import Batch
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import read_config
from megalign.errors import UserError
from megalign.train_engine import TrainEngine
from megalign.trainers import arguments
from megalign.trainers.offline import OfflineTrainer
from megalign.trainers.reference import Reference, RowSequence


class PreferenceTrainer(OfflineTrainer):
    """Offline losses on log(policy / reference); a leaf names the row's sequences that the reference scores."""

    def __init__(self, model: str | None = None, ref_model: str | None = None, args: Any = None, **given: Any) -> None:
        self._ref_model = ref_model
        super().__init__(model, args, **given)

    # ---- what a leaf says

    def reference_columns(self) -> Mapping[str, RowSequence]:
        """The list columns that precompute_ref_log_probs adds to the rows, and the sequence that each is of."""
        raise NotImplementedError

    # ---- the reference

    def make_parts(self) -> None:
        """A reference that the config allows; it is loaded when it is first needed."""
        super().make_parts()
        path = self.model_path if self._ref_model is None else arguments.model_directory(self._ref_model, None)
        if self.args.sync_ref_model and architecture_of(read_config(path)) != self.architecture:
            raise UserError(
                f"sync_ref_model=True mixes the policy into the reference, and {path} is another architecture; use one "
                "of the policy's sizes, or sync_ref_model=False"
            )
        arguments.refuse_same_directory(self.args.output_dir, {"ref_model": path})
        self.reference = Reference(path, self.args, self.groups)

    def make_policy(self) -> TrainEngine:
        """The model that is trained; TRL logs the mean of its logits."""
        if not self.args.precompute_ref_log_probs:
            _ = self.reference.engine  # what is wrong with its files is known before training
        return TrainEngine(self.model_path, self.args, self.groups, extras=self.extras)

    @property
    def extras(self) -> tuple[str, ...]:
        """Further columns of the policy's head."""
        return ("mean_logits",)

    def engines(self) -> dict[str, TrainEngine]:
        """A reference that follows the policy is part of where a run stands."""
        engines = super().engines()
        return {**engines, "reference": self.reference.engine} if self.args.sync_ref_model else engines

    def settings(self) -> dict[str, Any]:
        """The reference by its weights: the same model may lie elsewhere when the run goes on."""
        return {**super().settings(), "ref_model": self.reference.described}

    def described_rows(self) -> Dataset:
        """Without the reference's logprobs, which another split into batches rounds otherwise."""
        rows = super().described_rows()
        return rows.remove_columns([name for name in self.reference_columns() if name in rows.column_names])

    def after_step(self) -> None:
        """The reference follows, where asked to."""
        self.reference.follow(self.policy, self.state.global_step)

    def with_reference(self, batches: list[Batch]) -> list[Batch]:
        """The batches with ref_logprobs, unless their rows brought them."""
        if self.args.precompute_ref_log_probs:
            return batches
        with self.run.phases("reference"):
            return self.reference.with_logprobs(batches)

    def with_row_columns(self, rows: Dataset) -> Dataset:
        """With the reference's logprobs, where they are computed before training."""
        if not self.args.precompute_ref_log_probs:
            return rows
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        rows = self.reference.precomputed(rows, self.reference_columns(), size)
        self.reference.release()
        return rows

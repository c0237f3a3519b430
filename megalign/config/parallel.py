"""How the model is split over ranks: Megatron-Core's names and meanings."""

from __future__ import annotations

from megalign.config.base import Config, config
from megalign.config.values import option
from megalign.errors import UserError


@config
class ParallelConfig(Config):
    """Sizes of the parallel axes; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = option(1, minimum=1)
    """Ranks that share each layer's matrices (TP); must divide the attention heads."""
    pipeline_model_parallel_size: int = option(1, minimum=1)
    """Pipeline stages (PP): ranks that each hold a run of layers; must divide the number of layers."""
    virtual_pipeline_model_parallel_size: int | None = option(
        None,
        choices=(1,),
        why="several chunks a stage are not built yet, nearest is pipeline_model_parallel_size",
    )
    """Model chunks that each pipeline stage holds (interleaved schedule)."""
    context_parallel_size: int = option(
        1,
        choices=(1,),
        why="splitting sequences over ranks is not built yet, nearest is tensor_model_parallel_size",
    )
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = option(
        1,
        choices=(1,),
        why="mixture-of-experts models are not built yet, nearest is tensor_model_parallel_size",
    )
    """Ranks that share a layer's experts (EP)."""
    expert_tensor_parallel_size: int | None = option(
        None,
        choices=(1,),
        why="mixture-of-experts models are not built yet, nearest is tensor_model_parallel_size",
    )
    """Ranks that share each expert's matrices (ETP)."""
    sequence_parallel: bool = option(
        False, choices=(False,), why="it is not built yet, nearest is tensor_model_parallel_size"
    )
    """Also split activations between the tensor-parallel regions over the TP ranks."""
    use_distributed_optimizer: bool = True
    """Shard AdamW's state and fp32 master weights over the data-parallel ranks. Megatron's default is False;
    with it every rank would hold a full copy, which is what large models cannot afford. The numbers are the
    same."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a job of `world_size` ranks."""
        return world_size // self.model_parallel_size

    def validate(self, world_size: int) -> None:
        """World size by tp * pp * cp."""
        super().validate(world_size)
        self.validate_layout(world_size)

    def validate_layout(self, world_size: int) -> None:
        """That whole copies of the model fill the ranks."""
        if world_size % self.model_parallel_size:
            raise UserError(
                f"world size {world_size} must be a multiple of tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size} * pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size} * context_parallel_size {self.context_parallel_size} = "
                f"{self.model_parallel_size}; start a multiple of {self.model_parallel_size} ranks or choose smaller "
                "sizes"
            )

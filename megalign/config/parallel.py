"""How the model is split over ranks: Megatron-Core's names and meanings."""

from __future__ import annotations

import math

from megalign.config.base import Config, config
from megalign.config.values import option
from megalign.errors import UserError


@config
class ParallelConfig(Config):
    """Sizes of the parallel axes; what is left of the world is data parallel."""

    tensor_model_parallel_size: int = option(1, minimum=1)
    """Ranks that share each layer's matrices (TP); must divide the attention heads."""
    sequence_parallel: bool = False
    """Also split the activations between the tensor-parallel regions over the TP ranks; the numbers are the same.
    Mixture-of-experts models with TP need it."""
    pipeline_model_parallel_size: int = option(1, minimum=1)
    """Pipeline stages (PP): ranks that each hold a run of layers; must divide the number of layers, unless the first
    or last stage has a number of its own."""
    virtual_pipeline_model_parallel_size: int | None = option(None, minimum=1)
    """Model chunks that each pipeline stage holds (VPP, the interleaved schedule): a smaller pipeline bubble for more
    messages."""
    num_layers_in_first_pipeline_stage: int | None = option(None, minimum=1)
    """Layers of the first stage, which also holds the embedding; the other stages share the rest evenly."""
    num_layers_in_last_pipeline_stage: int | None = option(None, minimum=1)
    """Layers of the last stage, which also holds the head; the other stages share the rest evenly."""
    context_parallel_size: int = option(1, minimum=1)
    """Ranks that share each sequence (CP), for long ones: every rank has two of its 2 * CP pieces (zigzag)."""
    expert_model_parallel_size: int = option(1, minimum=1)
    """Ranks that share a layer's experts (EP); must divide the number of experts."""
    expert_tensor_parallel_size: int | None = option(None, minimum=1)
    """Ranks that share each expert's matrices (ETP); tensor_model_parallel_size when not given."""
    use_distributed_optimizer: bool = True
    """Shard AdamW's state and fp32 master weights over the data-parallel ranks. Megatron's default is False;
    with it every rank would hold a full copy, which is what large models cannot afford. The numbers are the
    same."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients over the data-parallel ranks, if there are several, while the backward pass goes on. Not given:
    on GPUs; a CPU's ranks have no second engine that could do it."""
    overlap_param_gather: bool | None = None
    """Gather updated weights while the next forward pass goes on; needs use_distributed_optimizer and
    overlap_grad_reduce. Not given: where both are on."""

    @property
    def overlaps_grad_reduce(self) -> bool:
        """overlap_grad_reduce, or what stands for it."""
        if self.overlap_grad_reduce is None:
            # Imported here: --help and a wrong flag must answer without torch.
            from megalign.device import on_cuda

            return on_cuda()
        return self.overlap_grad_reduce

    @property
    def overlaps_param_gather(self) -> bool:
        """overlap_param_gather, or what stands for it."""
        if self.overlap_param_gather is None:
            return self.use_distributed_optimizer and self.overlaps_grad_reduce
        return self.overlap_param_gather

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model, each sequence's parts included."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """expert_tensor_parallel_size, or what stands for it."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def num_chunks(self) -> int:
        """Model chunks on each pipeline stage."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def token_unit(self) -> int:
        """The tokens that a rank computes on are a multiple of this; the precision says which."""
        return 1

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a job of `world_size` ranks."""
        return world_size // self.model_parallel_size

    def validate(self, world_size: int) -> None:
        """World size by the axes; what Megatron-Core cannot combine."""
        super().validate(world_size)
        self.validate_layout(world_size)

    def validate_layout(self, world_size: int) -> None:
        """That whole copies of the model fill the ranks, and that the axes go together."""
        self._validate_combination()
        if world_size % self.model_parallel_size:
            raise UserError(
                f"world size {world_size} must be a multiple of tensor_model_parallel_size "
                f"{self.tensor_model_parallel_size} * pipeline_model_parallel_size "
                f"{self.pipeline_model_parallel_size} * context_parallel_size {self.context_parallel_size} = "
                f"{self.model_parallel_size}; start a multiple of {self.model_parallel_size} ranks or choose smaller "
                "sizes"
            )
        stage = world_size // self.pipeline_model_parallel_size
        share = self.expert_tensor_size * self.expert_model_parallel_size
        if stage % share:
            raise UserError(
                f"each of the {self.pipeline_model_parallel_size} pipeline stages has {stage} ranks, which must be a "
                f"multiple of expert_model_parallel_size {self.expert_model_parallel_size} * "
                f"expert_tensor_parallel_size {self.expert_tensor_size} (tensor_model_parallel_size when not given); "
                f"start more ranks, or choose sizes whose product divides {stage}, like {math.gcd(stage, share)}"
            )

    def _validate_combination(self) -> None:
        pp = self.pipeline_model_parallel_size
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError(
                "sequence_parallel=True needs tensor_model_parallel_size above 1, since TP ranks are what it splits "
                "over; drop it, or set tensor_model_parallel_size"
            )
        if self.num_chunks > 1 and pp == 1:
            raise UserError(
                f"virtual_pipeline_model_parallel_size={self.num_chunks} needs pipeline_model_parallel_size above 1; "
                "drop it, or set pipeline_model_parallel_size"
            )
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            if getattr(self, name) is not None and pp == 1:
                raise UserError(
                    f"{name}={getattr(self, name)} needs pipeline_model_parallel_size above 1: one stage has all "
                    "layers; drop it, or set pipeline_model_parallel_size"
                )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlaps_grad_reduce):
            raise UserError(
                "overlap_param_gather=True needs use_distributed_optimizer=True and overlap_grad_reduce=True "
                "(Megatron-Core's rule: only a sharded optimizer has weights to gather); set both, or drop it"
            )

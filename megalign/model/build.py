"""This rank's part of the model: Megatron's GPTModel, whose last stage returns hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, empty, nn, tensor, where

from megalign import device
from megalign.conversion.architecture import Architecture
from megalign.model.architecture import transformer_config
from megalign.model.attention import PackedAttention
from megalign.model.experts import mark_experts
from megalign.model.layer_spec import layer_spec
from megalign.parallel.groups import Axis, ParallelGroups
from megalign.patches.megatron import megatron_calls

if TYPE_CHECKING:
    from megalign.config import LoopConfig


class HiddenStatesModel(GPTModel):
    """GPTModel that stops before its head: [T, 1, H] on every stage. Heads are functions of it."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    @property
    def head_weight(self) -> Tensor:
        """[padded V / tp, H], the embedding's when tied, or a score head's [1, H]; on the last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    @property
    def head_bias(self) -> Tensor | None:
        """[padded V / tp] where the family's head has one."""
        return self.output_layer.bias


class ScoreHead(nn.Module):
    """The weight [labels, H] of a reward model or critic; whole on every tensor rank."""

    def __init__(self, config: TransformerConfig, num_labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(num_labels, config.hidden_size, dtype=config.params_dtype))
        # Megatron sums this gradient over tensor ranks when each saw only its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The weight as Megatron's checkpoints describe a replicated tensor."""
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {}, sharded_offsets)


def build_model(architecture: Architecture, args: LoopConfig, groups: ParallelGroups) -> list[HiddenStatesModel]:
    """The model chunks of this rank, without weights: `resharding.load` fills them."""
    config = transformer_config(architecture, args, groups)
    # A score head is computed in fp32 as it is.
    head_in_fp32 = args.head_in_fp32 and architecture.num_labels is None
    return [_build_chunk(number, architecture, config, groups, head_in_fp32) for number in range(args.num_chunks)]


def _build_chunk(
    number: int, architecture: Architecture, config: TransformerConfig, groups: ParallelGroups, head_in_fp32: bool
) -> HiddenStatesModel:
    """Chunk `number` of this stage: the first chunk of all has the embedding, the last of all the head."""
    chunks = config.virtual_pipeline_model_parallel_size
    is_first = groups.is_first_stage and number == 0
    is_last = groups.is_last_stage and number == (chunks or 1) - 1
    vp_stage = None if chunks is None else number
    with megatron_calls():
        model = HiddenStatesModel(
            config,
            layer_spec(config, architecture, vp_stage),
            vocab_size=architecture.padded_vocab_size(groups.tp.size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=is_first,
            post_process=is_last,
            position_embedding_type="none",  # our attention rotates, see model.rotary
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            vp_stage=vp_stage,
        )
        if architecture.num_labels is not None and is_last:
            model.output_layer = ScoreHead(config, architecture.num_labels)
        if architecture.head_bias and is_last:
            _add_head_bias(model, architecture.padded_vocab_size(groups.tp.size) // groups.tp.size)
        model.to(device.device())
        if architecture.embedding_scale is not None and is_first:
            model.embedding.word_embeddings.register_forward_hook(_scaled_by(architecture.embedding_scale))
        if architecture.pad_token_id is not None and is_first:
            model.embedding.word_embeddings.register_forward_hook(
                _without_gradient_of(architecture.pad_token_id, groups.tp if config.sequence_parallel else None)
            )
    if head_in_fp32:
        _keep_head_in_fp32(model)
    _mark_tensor_parallel(model)
    mark_experts(model)
    for layer in model.decoder.layers:
        # Latent attention rotates before its core.
        rotates = architecture.mla is not None or hasattr(layer.self_attention.core_attention, "rotary")
        assert rotates, "Megatron rotates nothing: its attention must"
    return model


def _scaled_by(scale: float) -> Callable[..., Tensor]:
    """A forward hook of the embedding. The scale is rounded to the embeddings' dtype, as in Gemma's training."""

    def hook(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        return embedded * tensor(scale, dtype=embedded.dtype, device=embedded.device)

    return hook


def _add_head_bias(model: HiddenStatesModel, rows: int) -> None:
    """[padded V / tp]; GPTModel builds its head without one."""
    model.output_layer.bias = nn.Parameter(empty(rows, dtype=model.config.params_dtype))
    model.output_layer.bias.allreduce = True  # as Megatron marks what no expert holds


def _keep_head_in_fp32(model: HiddenStatesModel) -> None:
    """TRL's cast_lm_head_to_fp32: with tied embeddings the one weight is fp32, and only what it embeds is not."""
    if model.post_process:
        model.output_layer.float()
    if model.share_embeddings_and_output_weights and model.pre_process:
        dtype = model.config.params_dtype
        model.embedding.word_embeddings.float()
        model.embedding.word_embeddings.register_forward_hook(lambda _, inputs, embedded: embedded.to(dtype))


def _without_gradient_of(pad_token_id: int, scattered: Axis | None) -> Callable[..., Tensor]:
    """A forward hook of the embedding: transformers' padding_idx, which also counts where the pad is the end token.

    Its output is [1, T, H], or with sequence parallelism, scattered over these tensor ranks, [T / tp, 1, H].
    """

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        (tokens,) = inputs
        if scattered is not None:
            tokens = tokens.T.chunk(scattered.size)[scattered.rank]
        assert embedded.shape[:-1] == tokens.shape, f"embeddings {embedded.shape} of tokens {tokens.shape}"
        return where((tokens == pad_token_id)[..., None], embedded.detach(), embedded)

    return hook


def _mark_tensor_parallel(model: nn.Module) -> None:
    """What Megatron does while it initialises weights, which we skip: without the mark the gradient norm takes
    a split weight for a replicated one and counts tensor rank 0's part only.

    Transformer Engine marks every weight of its linears, also those that Megatron keeps whole on each tensor rank:
    latent attention's down projections, which the norm would count tp times. Megatron 0.19.2's TELinear takes that mark
    away (extensions/transformer_engine.py:1062), 0.16.1's does not (:651); this goes with 0.16.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("linear_q_down_proj.weight", "linear_kv_down_proj.weight")):
            parameter.tensor_model_parallel = False
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | PackedAttention):
                _mark(parameter, dim=0)
            elif isinstance(module, RowParallelLinear) and name == "weight":
                _mark(parameter, dim=1)


def _mark(parameter: nn.Parameter, dim: int) -> None:
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)

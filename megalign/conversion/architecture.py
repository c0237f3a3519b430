"""The numbers that describe a decoder, whichever family it comes from. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

LayerKind = Literal["dense", "moe"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """The feed-forward part of the layers that have a router."""

    num_experts: int
    top_k: int
    """Experts of a token."""
    ffn_hidden_size: int
    """Of each expert."""
    shared_ffn_hidden_size: int | None = None
    """Of the expert that every token passes, if there is one."""
    dense_layers: frozenset[int] = frozenset()
    """Layers with an ordinary feed-forward part instead."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a Hugging Face config says, in Megatron's words."""

    family: str
    """Key of the family table."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    """Need not be hidden_size / num_attention_heads."""
    vocab_size: int
    """Without the pad rows that tensor parallelism may need."""
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rope_scaling: Mapping[str, Any] | None = None
    """None, or what conversion.rope reads: {"rope_type": "linear", "llama3", "yarn" or "longrope", ...}."""
    rotary_percent: float = 1.0
    """The share of each head, from its begin, that is rotated."""
    rotary_interleaved: bool = False
    """Pairs are neighbours instead of the two halves."""
    local_rotary_base: float | None = None
    """Of the layers with a sliding window, without scaling, where they differ from the others."""
    sliding_window: int | None = None
    """How many tokens, its own among them, a token sees in the `sliding_layers`."""
    sliding_layers: frozenset[int] = frozenset()
    softmax_scale: float | None = None
    """Of the attention's scores; None: 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) before the mask."""
    logit_softcap: float | None = None
    """The same for the language model's logits."""
    activation: Activation = "silu"
    """Of the gate."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + weight, in fp32."""
    sandwich_norms: bool = False
    """A norm after attention and after the feed-forward part as well, before each is added."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by, in their dtype."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys."""
    tied_embeddings: bool = False
    head_bias: bool = False
    """A bias on the language model's head."""
    pad_token_id: int | None = None
    """The token whose embedding gets no gradient as an input; transformers gives its embedding this padding_idx."""
    num_labels: int | None = None
    """Outputs of a score head in the place of the language model's head (*ForSequenceClassification)."""
    moe: MixtureOfExperts | None = None
    """None: every layer is dense."""

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 in a dense model."""
        return 0 if self.moe is None else self.moe.num_experts

    def layer_kind(self, layer: int) -> LayerKind:
        """What the feed-forward part of a (global) layer is."""
        return "dense" if self.moe is None or layer in self.moe.dense_layers else "moe"

    def window(self, layer: int) -> int | None:
        """The sliding window of a (global) layer; None: all tokens before."""
        return self.sliding_window if layer in self.sliding_layers else None

    @property
    def rotary_dim(self) -> int:
        """Rotated dims of a head."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_query_groups * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the three projections in one tensor."""
        return self.query_size + 2 * self.kv_size

    @property
    def gate_up_size(self) -> int:
        """Rows of gate and up projection in one tensor."""
        return 2 * self.ffn_hidden_size

    def padded_vocab_size(self, tp_size: int) -> int:
        """The vocabulary rounded up to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tp_size) * tp_size

    def with_score_head(self) -> Architecture:
        """The same decoder with a head of one output: a reward model or a critic."""
        return replace(self, num_labels=1, tied_embeddings=False, head_bias=False)

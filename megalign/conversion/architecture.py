"""The numbers that describe a decoder, whichever family it comes from. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megalign.errors import UserError

LayerKind = Literal["dense", "moe"]
Activation = Literal["silu", "gelu_tanh", "quick_gelu"]


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
    shared_gate: bool = False
    """A sigmoid of the token scales the shared expert's output."""
    dense_layers: frozenset[int] = frozenset()
    """Layers with an ordinary feed-forward part instead."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """The router's logits become scores by it, over all experts."""
    selection_bias: bool = False
    """A number for each expert is added to its score where experts are chosen, not where they are weighted."""
    normalized: bool = False
    """The scores of the chosen experts are divided by their sum."""
    scaling: float = 1.0
    """Then multiplied by this."""
    num_groups: int = 1
    """Neighbouring experts in equal groups, of which a token chooses some first."""
    top_groups: int = 1
    group_score_experts: int = 1
    """A group's score is the sum of the scores of this many of its experts, the best."""
    router_in_fp32: bool = False
    """The router's product is in fp32; else in the model's dtype, as transformers computes it for the family."""

    @property
    def gate_up_size(self) -> int:
        """Rows of an expert's gate and up projection in one tensor."""
        return 2 * self.ffn_hidden_size

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok={self.top_k} must be between 1 and the {self.num_experts} experts of a layer"
            )
        if self.num_experts % self.num_groups or self.top_groups > self.num_groups:
            raise UserError(
                f"n_group={self.num_groups} must divide the {self.num_experts} experts of a layer and be at least "
                f"topk_group={self.top_groups}"
            )
        size = self.num_experts // self.num_groups
        if self.top_groups * size < self.top_k or size < self.group_score_experts:
            raise UserError(
                f"n_group={self.num_groups} makes groups of {size} experts, too few for topk_group={self.top_groups} "
                f"of them to have num_experts_per_tok={self.top_k}, or {self.group_score_experts} to score by; "
                "use fewer groups"
            )


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA, arXiv 2405.04434): keys and values, and queries, from narrow projections."""

    num_heads: int
    q_lora_rank: int | None
    """None: queries come straight from the hidden state."""
    kv_lora_rank: int
    nope_head_dim: int
    """Of queries and keys: the part without rotary positions."""
    rope_head_dim: int
    """The part with them, which is one for all key heads."""
    value_head_dim: int

    @property
    def query_size(self) -> int:
        """Rows of the (up) projection to queries."""
        return self.num_heads * (self.nope_head_dim + self.rope_head_dim)

    @property
    def down_size(self) -> int:
        """Rows of the projection to the latent of keys and values, and to the keys' rotary part."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def up_size(self) -> int:
        """Rows of the projection from that latent."""
        return self.num_heads * (self.nope_head_dim + self.value_head_dim)

    @property
    def value_size(self) -> int:
        """Columns of the output projection."""
        return self.num_heads * self.value_head_dim


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
    """None, or what conversion.rope reads: {"rope_type": "linear", "llama3", "yarn" or "longrope", ...}. With latent
    attention None or {"rope_type": "yarn", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "mscale", "mscale_all_dim"}."""
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
    attention_sinks: bool = False
    """A learned score of each head, of no token, is in the softmax with the others."""
    logit_softcap: float | None = None
    """The same for the language model's logits."""
    activation: Activation = "silu"
    """Of the gate; quick_gelu: x * sigmoid(1.702 x)."""
    activation_limit: float | None = None
    """Before it gates are cut above this, what they multiply above and below."""
    up_offset: float = 0.0
    """Added to what gates multiply, after that."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + weight, in fp32."""
    sandwich_norms: bool = False
    """A norm after attention and after the feed-forward part as well, before each is added."""
    embedding_scale: float | None = None
    """What embeddings are multiplied by, in their dtype."""
    qkv_bias: bool = False
    linear_bias: bool = False
    """A bias on all that is linear in a layer: besides queries, keys and values the output projection of attention,
    the router, and the feed-forward part or experts."""
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
    mla: LatentAttention | None = None
    """None: ordinary (grouped) attention."""
    num_mtp_layers: int = 0
    """Layers behind the last one in the files, for predicting several tokens at once: not loaded, not exported."""

    def in_json(self) -> dict[str, Any]:
        """The numbers in JSON's types, by which a checkpoint knows whose it is."""
        return json.loads(json.dumps(asdict(self), default=sorted))

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
    def one(self) -> int:
        """Rows of a vector that is kept as a matrix."""
        return 1

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

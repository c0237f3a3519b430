"""Floating-point operations of a decoder: a multiplication and an addition are two. Torch-free.

What every implementation has to compute, so recomputed activations and a chunked head's second product do not count;
nor do norms, rotations and softmax, which are below one in a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence

from megalign.conversion.architecture import Architecture

BACKWARD = 2
"""A product's backward pass is two products of its size."""


def training_flops(architecture: Architecture, lengths: Sequence[int], num_predicted: int) -> float:
    """Forward and backward over sequences of these lengths, of which `num_predicted` tokens pass the head."""
    return (1 + BACKWARD) * forward_flops(architecture, lengths, num_predicted)


def forward_flops(architecture: Architecture, lengths: Sequence[int], num_predicted: int) -> float:
    """The forward pass alone."""
    layers = range(architecture.num_layers)
    weights = sum(_layer_weights(architecture, layer) for layer in layers)
    head = architecture.hidden_size * (architecture.num_labels or architecture.vocab_size)
    pairs: dict[int | None, int] = {}  # of a query and a key that it sees, by window
    for window in {architecture.window(layer) for layer in layers}:
        pairs[window] = sum(_pairs(length, window) for length in lengths)
    scores = sum(pairs[architecture.window(layer)] * _score_size(architecture) for layer in layers)
    return 2.0 * (weights * sum(lengths) + head * num_predicted + scores)


def _layer_weights(architecture: Architecture, layer: int) -> int:
    """Numbers of a layer's matrices that a token is multiplied with."""
    hidden, moe = architecture.hidden_size, architecture.moe
    if architecture.layer_kind(layer) == "dense":
        return _attention_weights(architecture) + 3 * hidden * architecture.ffn_hidden_size
    experts = moe.top_k * moe.ffn_hidden_size + (moe.shared_ffn_hidden_size or 0)
    return _attention_weights(architecture) + 3 * hidden * experts + hidden * moe.num_experts


def _attention_weights(architecture: Architecture) -> int:
    hidden, mla = architecture.hidden_size, architecture.mla
    if mla is None:
        return hidden * (architecture.qkv_size + architecture.query_size)
    queries = mla.query_size * (mla.q_lora_rank or hidden) + hidden * (mla.q_lora_rank or 0)
    return queries + hidden * mla.down_size + mla.kv_lora_rank * mla.up_size + mla.value_size * hidden


def _score_size(architecture: Architecture) -> int:
    """Multiplications of one query with one key, and of the weight with its value, over all heads."""
    mla = architecture.mla
    if mla is None:
        return 2 * architecture.query_size
    return mla.query_size + mla.value_size


def _pairs(length: int, window: int | None) -> int:
    """Of a token and one that it sees, itself included."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window

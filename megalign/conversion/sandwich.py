"""Rules of the families with a norm before and after attention, and before and after the feed-forward part."""

from __future__ import annotations

from megalign.conversion.rules import Copy, Rule


def sandwich_norms(rules: list[Rule], after_attention: str, before_mlp: str, after_mlp: str) -> list[Rule]:
    """Llama's rules with these Hugging Face names for the three norms behind the first."""
    names = {
        "pre_mlp_layernorm": before_mlp,
        "self_attention.linear_proj.post_layernorm": after_attention,
        "mlp.linear_fc2.post_layernorm": after_mlp,
    }
    norms = [
        Copy.of(f"decoder.layers.*.{megatron}.weight", f"model.layers.*.{hf}.weight", ("hidden_size",))
        for megatron, hf in names.items()
    ]
    return [*(rule for rule in rules if rule.megatron != norms[0].megatron), *norms]

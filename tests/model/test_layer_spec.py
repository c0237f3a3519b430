"""Which layers and optimizer are chosen, what a run says of it, and names of checkpoints that either spec reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from torch import nn

from megalign import compiled, device
from megalign.batch import Batch
from megalign.config import SFTConfig
from megalign.conversion.architecture import Architecture, MixtureOfExperts
from megalign.conversion.names import canonical
from megalign.errors import UserError
from megalign.model import build, extensions, layer_spec
from megalign.model.activations import SwiGLU
from megalign.model.attention import PackedSequences
from megalign.model.optimizer import adam_states
from megalign.parallel.groups import Axis
from tests.layouts import ONE_RANK, make_engine
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.megatron

ARCHITECTURE = Architecture(
    family="llama", num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4,
    head_dim=8, vocab_size=100, max_position_embeddings=64, norm_epsilon=1e-5, rotary_base=1e4,
)  # fmt: skip


def chosen(impl: str) -> str:
    return layer_spec.transformer_impl(SFTConfig(transformer_impl=impl), ARCHITECTURE)


def test_transformer_engine_is_taken_where_it_is_and_asked_for_in_vain_elsewhere(monkeypatch) -> None:
    assert chosen("auto") == chosen("local") == "local"
    with pytest.raises(UserError, match="cannot be imported; install it .*, or use 'local'"):
        chosen("transformer_engine")
    monkeypatch.setattr(layer_spec, "HAVE_TE", True)
    with pytest.raises(UserError, match="needs a GPU, and torch sees none; run it on a GPU, or use 'local'"):
        chosen("transformer_engine")
    monkeypatch.setattr(layer_spec, "has_transformer_engine", lambda: True)
    assert chosen("auto") == chosen("transformer_engine") == "transformer_engine" and chosen("local") == "local"


def test_a_library_needs_a_gpu(monkeypatch) -> None:
    assert not extensions.has_transformer_engine()
    monkeypatch.setattr(extensions.transformer_engine, "HAVE_TE", True)
    assert not extensions.has_transformer_engine()
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    assert extensions.has_transformer_engine()


def test_the_names_say_why_nothing_faster_is_used(monkeypatch) -> None:
    assert extensions.layers_name("local", "auto") == "plain torch (Transformer Engine is not installed)"
    assert extensions.layers_name("local", "local") == "plain torch (transformer_impl='local')"
    assert extensions.layers_name("transformer_engine", "auto") == "Transformer Engine"
    assert extensions.optimizer_name() == "torch's fused AdamW (NVIDIA Apex is not installed)"
    monkeypatch.setattr(megatron_optimizer, "Adam", type("FusedAdam", (), {"__module__": "apex.optimizers.fused_adam"}))
    assert extensions.optimizer_name() == "Apex's fused Adam"
    monkeypatch.setattr(extensions.transformer_engine, "HAVE_TE", True)
    assert extensions.layers_name("local", "auto") == "plain torch (there is no GPU)"
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    capped = replace(ARCHITECTURE, attention_softcap=30.0, attention_sinks=True)
    lacks = layer_spec.not_in_transformer_engine(capped)
    assert extensions.layers_name(layer_spec.transformer_impl(SFTConfig(), capped), "auto", lacks) == (
        "plain torch (the model needs a cap on attention scores and a sink in attention, "
        "which Transformer Engine has not)"
    )
    assert extensions.layers_name("local", "local", lacks) == "plain torch (transformer_impl='local')"


def compiles(path: str) -> list[bool]:
    return [(make_engine(path, ONE_RANK, torch_compile=wanted), compiled._wanted)[1] for wanted in (False, True)]


def test_an_engine_compiles_its_passes_where_the_config_says_so(tmp_path: Path) -> None:
    assert run_ranks(1, compiles, save_tiny_model("llama", tmp_path)) == [[False, True]]


def described(path: str) -> tuple[str, list[str], int]:
    engine = make_engine(path, ONE_RANK)
    states = engine._models[0].sharded_state_dict()
    keys = sorted({item.key for name, item in states.items() if not name.endswith("_extra_state")})
    return engine.made_of, keys, sum(isinstance(module, SwiGLU) for module in engine._models[0].modules())


def test_checkpoints_have_transformer_engines_names(tmp_path: Path) -> None:
    """Written by hand from get_gpt_layer_with_transformer_engine_spec: a linear's norm is part of the linear."""
    ((line, keys, fused),) = run_ranks(1, described, save_tiny_model("qwen3", tmp_path, tie_word_embeddings=False))
    assert line == (
        "layers: plain torch (Transformer Engine is not installed); "
        "optimizer: torch's fused AdamW (NVIDIA Apex is not installed)"
    )
    layer = [
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    others = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    assert keys == sorted([*others, *(f"decoder.layers.{name}" for name in layer)])
    assert fused > 0  # and has no name


def test_silu_and_its_product_are_one_module_wherever_they_are() -> None:
    moe = MixtureOfExperts(num_experts=2, top_k=1, ffn_hidden_size=8)
    for architecture, kind in ((ARCHITECTURE, "dense"), (replace(ARCHITECTURE, moe=moe), "moe")):
        for fused in (True, False):
            config: Any = SimpleNamespace(
                num_moe_experts=2, qk_layernorm=False, multi_latent_attention=False, use_te_activation_func=fused
            )
            layer = layer_spec._local_layer(config, architecture, 0)
            parts = layer_spec._feed_forward_parts(layer.submodules.mlp, kind)
            assert {part.activation_func for part in parts} == {SwiGLU if fused else None}
    assert layer_spec.is_swiglu(ARCHITECTURE)
    for other in ({"activation": "gelu_tanh"}, {"activation_limit": 7.0}, {"up_offset": 1.0}):
        assert not layer_spec.is_swiglu(replace(ARCHITECTURE, **other))


@pytest.mark.parametrize("latent, qk_norm", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_names_of_fused_norms_lead_back_to_the_plain_ones(kind: str, latent: bool, qk_norm: bool) -> None:
    config: Any = SimpleNamespace(multi_latent_attention=latent, qk_layernorm=qk_norm)
    names = layer_spec.fused_norms(config, kind)
    # Upstream's spec fuses the feed-forward norm unless a router reads it too, and latent attention's inner norms.
    assert ("pre_mlp_layernorm." in names) == (kind == "dense")
    assert ("input_layernorm." in names) == (not latent)
    assert ("self_attention.kv_layernorm." in names) == (latent and qk_norm)
    for plain, fused in names.items():
        assert canonical(f"decoder.layers.0.{fused}weight", 3).name == f"decoder.layers.3.{plain}weight"


def test_packed_sequences_carry_padded_lengths_under_context_parallelism_only() -> None:
    batch = Batch(
        tokens=torch.arange(12),
        cu_seqlens=torch.tensor([0, 4, 12], dtype=torch.int32),
        num_sequences=2,
        token_columns={"loss_mask": torch.ones(12, dtype=torch.bool)},
    )
    for size in (1, 2):
        packed = PackedSequences.of(batch, Axis(None, 0, size, list(range(size))))
        assert packed.qkv_format == "thd" and packed.cu_seqlens_q is packed.cu_seqlens_kv is batch.cu_seqlens
        assert packed.max_seqlen_q == packed.max_seqlen_kv == 8
        wanted = batch.cu_seqlens if size > 1 else None
        assert packed.cu_seqlens_q_padded is packed.cu_seqlens_kv_padded is wanted


class FusedAdam:
    """As NVIDIA's: it counts steps in the group."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters, "step": 3}]
        self.state: dict[Any, dict[str, Any]] = {parameter: {} for parameter in parameters}


def test_only_torchs_adamw_has_a_step_in_each_state() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    for inner, names in (
        (FusedAdam(parameters), {"exp_avg", "exp_avg_sq"}),
        (torch.optim.AdamW(parameters), {"step", "exp_avg", "exp_avg_sq"}),
    ):
        made: Any = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)])
        (state,) = adam_states(made)
        assert state.keys() == names and state is inner.state[parameters[0]]


def test_a_cap_on_scores_is_not_in_transformer_engine() -> None:
    capped = replace(
        ARCHITECTURE, attention_softcap=30.0, moe=MixtureOfExperts(num_experts=2, top_k=1, ffn_hidden_size=8)
    )
    with pytest.raises(UserError, match="has no cap on attention scores"):
        layer_spec.transformer_impl(SFTConfig(transformer_impl="transformer_engine"), capped)


def test_down_projections_of_latent_attention_are_no_split_weights() -> None:
    """Else the gradient's norm counts each tensor rank's copy; Transformer Engine's linears mark every weight."""
    split = {"linear_q_down_proj": False, "linear_kv_down_proj": False, "linear_kv_up_proj": True}
    attention = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in split})
    for weight in attention.parameters():
        weight.tensor_model_parallel = True
    build._mark_tensor_parallel(nn.ModuleDict({"self_attention": attention}))
    assert {name: attention[name].weight.tensor_model_parallel for name in split} == split

"""Recomputed and offloaded activations change no gradient; what does not go together is refused by name."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalign.algos.supervised import sft_loss
from megalign.batch import Counts
from megalign.config import SFTConfig
from megalign.conversion.architecture import Architecture, MixtureOfExperts
from megalign.errors import UserError
from megalign.model import activation_offload
from megalign.model.extensions import LOCAL, TRANSFORMER_ENGINE
from megalign.model.recomputation import recomputation
from megalign.parallel import pipeline
from megalign.train_engine import TrainEngine
from tests.by_hand import random_batch, relative
from tests.layouts import ONE_RANK, Layout, gradients_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels

LAYOUTS = [ONE_RANK, Layout(tp=2, sp=True), Layout(cp=2), Layout(pp=2), Layout(pp=2, vpp=2)]
NOTHING = {"gradient_checkpointing": False}
FULL = {"recompute_granularity": "full"}
VARIANTS: dict[str, dict[str, Any]] = {
    "selective": {},
    "modules": {"recompute_modules": ["core_attn", "layernorm", "mlp"]},
    "uniform": {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
    "offloaded": {**NOTHING, "activation_offloading": True},
    "offloaded and selective": {"activation_offloading": True},
    "offloaded and recomputed modules": {"activation_offloading": True, "recompute_modules": ["layernorm", "mlp"]},
    "offloaded and full": {**FULL, "activation_offloading": True},
}


def gradients(engine: TrainEngine) -> dict[str, Tensor]:
    counts = Counts(tokens=44.0, sequences=4.0, generation_tokens=44.0)
    pipeline.train(
        engine._chunks,
        engine._placed([random_batch(0), random_batch(1)]),
        engine._stage,
        engine._rows,
        engine._head,
        lambda columns, rows: sft_loss(columns, rows, counts),
        engine.groups,
    )
    return gradients_of(engine)


def differing(path: str, layout: Layout) -> dict[str, list[str]]:
    """For each variant the parameters whose gradient is not the one without.

    Bit by bit, or to the last digits: where norms are recomputed their part of the residual's gradient is added in
    another order, and what comes back from host memory has other strides than the slice that went.
    """
    options = {"use_distributed_optimizer": False}
    wanted = gradients(make_engine(path, layout, **options, **NOTHING))
    assert all(tensor.abs().max() > 0 for tensor in wanted.values())
    found = {}
    for name, fields in VARIANTS.items():
        engine = make_engine(path, layout, **options, **fields)
        with mock.patch.object(activation_offload, "to_host", wraps=activation_offload.to_host) as copied:
            ours = gradients(engine)
        exact = "layernorm" not in fields.get("recompute_modules", []) and "activation_offloading" not in fields
        limit = 0.0 if exact else 2e-6
        found[name] = [key for key, tensor in wanted.items() if not relative(ours[key], tensor) <= limit]  # or NaN
        assert copied.called == ("offloaded" in name), (name, copied.call_count)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_gradient_changes(layout: Layout, tiny_models: TinyModels) -> None:
    for found in run_ranks(layout.world, differing, tiny_models["qwen3"], layout):
        assert not any(found.values()), found


def test_offloading_copies_activations_and_neither_weights_nor_what_is_small_or_alive(monkeypatch) -> None:
    moved: list[tuple[int, ...]] = []
    copy = activation_offload.to_host
    monkeypatch.setattr(activation_offload, "to_host", lambda tensor: moved.append(tuple(tensor.shape)) or copy(tensor))
    layer = torch.nn.Linear(40, 40)
    rows = torch.randn(30, 40, requires_grad=True)
    with activation_offload.offloaded_activations(layer, [rows]):
        first = layer(rows)
        outputs = layer(first.tanh()).tanh()[:, :2].exp()
    outputs.sum().backward()
    # Both tanh keep their output, the second linear its input; the weights, `rows` and [30, 2] stay.
    assert sorted(moved) == [(30, 40)] * 3
    gradient = rows.grad.clone()
    rows.grad = None
    layer(layer(rows).tanh()).tanh()[:, :2].exp().sum().backward()
    assert torch.equal(gradient, rows.grad)


# ---- what does not go together


def architecture(**changes: Any) -> Architecture:
    sizes = dict(
        family="llama", num_layers=6, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=4,
        head_dim=8, vocab_size=100, max_position_embeddings=64, norm_epsilon=1e-5, rotary_base=1e4,
    )  # fmt: skip
    return Architecture(**sizes | changes)


EXPERTS = architecture(moe=MixtureOfExperts(num_experts=4, top_k=2, ffn_hidden_size=16))


def test_the_fields_become_megatrons() -> None:
    def fields(**values: Any) -> dict[str, Any]:
        return recomputation(SFTConfig(**values), architecture(), LOCAL)

    assert fields(gradient_checkpointing=False) == {}
    assert fields() == {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    assert fields(recompute_modules=["mlp"])["recompute_modules"] == ["mlp"]
    assert fields(**FULL) == {**FULL, "recompute_method": "uniform", "recompute_num_layers": 1}
    block = {**FULL, "recompute_method": "block", "recompute_num_layers": 4}
    assert fields(**block) == block


@pytest.mark.parametrize(
    "values, model, implementation, part",
    [
        ({**FULL, "recompute_num_layers": 4}, architecture(), LOCAL, "does not divide the 6 layers"),
        (
            {**FULL, "recompute_num_layers": 2, "pipeline_model_parallel_size": 2},
            architecture(),
            LOCAL,
            "does not divide the 3 layers",
        ),
        (
            {
                **FULL,
                "recompute_num_layers": 2,
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 2,
            },
            architecture(num_layers=5),
            LOCAL,
            "does not divide the 3 layers",
        ),
        (
            {**FULL, "recompute_num_layers": 7, "recompute_method": "block"},
            architecture(),
            LOCAL,
            "is more than the 6 layers",
        ),
        ({"recompute_modules": ["moe"]}, architecture(), LOCAL, "needs experts"),
        ({"recompute_modules": ["shared_experts"]}, EXPERTS, LOCAL, "needs a shared expert"),
        ({"recompute_modules": ["mlp"]}, EXPERTS, LOCAL, "needs a dense layer"),
        ({"recompute_modules": ["mla_up_proj"]}, architecture(), LOCAL, "latent attention"),
        ({"recompute_modules": ["moe_act"]}, EXPERTS, LOCAL, "use 'moe'"),
        ({"recompute_modules": ["layernorm"]}, architecture(), TRANSFORMER_ENGINE, "recompute their norm themselves"),
        ({"recompute_modules": ["layernorm"], "fp8": "hybrid"}, EXPERTS, TRANSFORMER_ENGINE, "delayed scaling"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    values: dict[str, Any], model: Architecture, implementation: str, part: str
) -> None:
    with pytest.raises(UserError, match=part) as caught:
        recomputation(SFTConfig(**values), model, implementation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, part",
    [
        ({"gradient_checkpointing": False, "recompute_modules": ["mlp"]}, "gradient_checkpointing=False"),
        ({"gradient_checkpointing": False, "recompute_num_layers": 1}, "gradient_checkpointing=False"),
        ({"recompute_method": "block"}, "no effect on selective"),
        ({"recompute_num_layers": 2}, "no effect on selective"),
        ({**FULL, "recompute_modules": ["mlp"]}, "no effect on full"),
        ({"recompute_modules": []}, "recomputes nothing"),
        ({**FULL, "recompute_method": "block"}, "how many layers"),
    ],
)
def test_what_contradicts_is_refused_before_a_model_is_read(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        SFTConfig(**values).validate(1)
    assert "\n" not in str(caught.value)

"""router_aux_loss_coef: the gradient it adds is that of the formula in its doc, at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megalign.batch import Batch, Counts
from megalign.conversion.families import architecture_of
from megalign.conversion.hf_files import read_config
from megalign.errors import UserError
from megalign.model.layout_checks import check_policy
from megalign.parallel import pipeline
from tests.by_hand import packed
from tests.layouts import ONE_RANK, Layout, arguments, gradients_of, groups_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels, as_saved, load_reference

pytestmark = pytest.mark.megatron

COEFFICIENT = 0.3
# Lengths that layouts pad, and a number of microbatches that neither two replicas nor two chunks share evenly: what is
# added must not count.
MICROBATCHES = [[7, 16], [11, 3, 1], [21]]
LAYOUTS = [
    ONE_RANK,
    Layout(tp=2, sp=True),
    Layout(cp=2),
    Layout(dp=2, ep=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, sp=True, pp=2, etp=1),
    Layout(tp=2, sp=True, ep=2, etp=1),
    Layout(tp=2, sp=True, cp=2),
]


def tokens(number: int, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * number + place)
    return torch.randint(3, 101, (MICROBATCHES[number][place],), generator=generator)


def no_loss(columns: dict[str, Tensor], batch: Batch, counts: Counts) -> tuple[Tensor, dict[str, Any]]:
    """A main loss of 0, so that the gradients are the load-balancing loss's alone."""
    return columns["logprobs"].sum() * 0, {}


def gradients(path: str, layout: Layout, masked: bool, coefficient: float | None) -> dict[str, Tensor]:
    engine = make_engine(path, layout, use_distributed_optimizer=False, router_aux_loss_coef=coefficient)
    dp = engine.groups.dp
    batches = []
    for number in range(dp.rank, len(MICROBATCHES), dp.size):
        parts = []
        for place, length in enumerate(MICROBATCHES[number]):
            mask = torch.arange(length) >= max(1, length // 2 if masked else 1)
            parts.append({"tokens": tokens(number, place), "loss_mask": mask})
        batches.append(packed(parts, engine.groups))
    counts = Counts(tokens=1.0, sequences=1.0)
    pipeline.train(
        engine._chunks,
        engine._placed(batches),
        engine._stage,
        engine._rows,
        engine._head,
        lambda columns, batch: no_loss(columns, batch, counts),
        engine.groups,
    )
    return gradients_of(engine)


def router_logits(model: torch.nn.Module, number: int) -> list[Tensor]:
    """[tokens, experts] of each layer with experts, for one microbatch."""
    rows = [model(tokens(number, place)[None], output_router_logits=True) for place in range(len(MICROBATCHES[number]))]
    return [torch.cat(layers) for layers in zip(*(row.router_logits for row in rows), strict=True)]


def wanted_gradients(path: str) -> dict[str, Tensor]:
    """Of the documented formula on transformers' router logits, written out."""
    model = load_reference(path)
    experts, top_k = model.config.num_local_experts, model.config.num_experts_per_tok
    total = sum(sum(lengths) for lengths in MICROBATCHES)
    loss = torch.zeros(())
    for number, lengths in enumerate(MICROBATCHES):
        layers = router_logits(model, number)
        for logits in layers:
            probabilities = logits.softmax(-1)
            chosen = torch.zeros_like(logits).scatter(1, probabilities.topk(top_k).indices, 1.0)
            balance = experts * (chosen.mean(0) * probabilities.mean(0)).sum()
            loss = loss + COEFFICIENT * balance / len(layers) * sum(lengths) / total
    loss.backward()
    zero = lambda parameter: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # noqa: E731
    return as_saved(model, zero)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_its_gradient_is_that_of_the_formula(tiny_models: TinyModels, layout: Layout, masked: bool) -> None:
    path = tiny_models["mixtral"]
    wanted = wanted_gradients(path)
    routers = [name for name in wanted if name.endswith("gate.weight")]
    assert len(routers) == 4 and all(wanted[name].norm() > 1e-3 for name in routers)
    for rank in run_ranks(layout.world, gradients, path, layout, masked, COEFFICIENT):
        assert rank.keys() == wanted.keys()
        for name, gradient in rank.items():
            difference = float((gradient - wanted[name]).norm())
            assert difference <= 1e-4 * float(wanted[name].norm()) + 1e-7, (name, difference)


def test_without_it_there_is_none(tiny_models: TinyModels) -> None:
    [found] = run_ranks(1, gradients, tiny_models["mixtral"], ONE_RANK, False, None)
    assert all(float(gradient.abs().max()) == 0 for gradient in found.values())


@torch.no_grad()
def test_the_formula_is_that_of_transformers_for_one_layer(tiny_models: TinyModels) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models["mixtral"], dtype=torch.float32).eval()
    for logits in router_logits(model, 2):
        probabilities = logits.softmax(-1)
        chosen = torch.zeros_like(logits).scatter(1, probabilities.topk(2).indices, 1.0)
        mine = 4 * (chosen.mean(0) * probabilities.mean(0)).sum()
        torch.testing.assert_close(mine, load_balancing_loss_func((logits,), 4, 2))


def refusal(path: str) -> str:
    with pytest.raises(UserError) as told:
        check_policy(
            architecture_of(read_config(path)), arguments(ONE_RANK, router_aux_loss_coef=0.1), groups_of(ONE_RANK)
        )
    return str(told.value)


def test_a_dense_model_refuses_it(tiny_models: TinyModels) -> None:
    [told] = run_ranks(1, refusal, tiny_models["qwen3"])
    assert told == "router_aux_loss_coef=0.1 balances the experts of a model, and qwen3 has none; drop it"


def layout_refusal(path: str, layout: Layout) -> str:
    with pytest.raises(UserError) as told:
        make_engine(path, layout, trainable=False)
    return str(told.value)


def test_tensor_ranks_of_a_model_with_experts_need_sequence_parallelism(tiny_models: TinyModels) -> None:
    for told in run_ranks(2, layout_refusal, tiny_models["mixtral"], Layout(tp=2)):
        assert "tensor_model_parallel_size 2" in told and told.endswith("its part of the tokens")

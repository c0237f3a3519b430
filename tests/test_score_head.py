"""Reward models and critics: scores, values, gradients, files and checkpoints of the head with one output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from megalign.algos.columns import token_column
from megalign.batch import Batch, Counts, Metric
from megalign.errors import UserError
from megalign.parallel import pipeline
from megalign.parallel.groups import ParallelGroups
from tests.by_hand import packed, unpacked, worst
from tests.jobs.start import run
from tests.layouts import LAYOUTS, ONE_RANK, Layout, gradients_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import DENSE_FAMILIES, as_saved, save_tiny_classifier, save_tiny_model

LENGTHS = [7, 2, 12, 5]


def tokens(i: int) -> Tensor:
    return torch.randint(3, 101, (LENGTHS[i],), generator=torch.Generator().manual_seed(40 + i))


def seeds(i: int) -> Tensor:
    """[2, T] what the loss multiplies scores and values by."""
    return torch.randn(2, LENGTHS[i], generator=torch.Generator().manual_seed(60 + i))


def batch(ids: list[int], groups: ParallelGroups) -> Batch:
    parts = [
        {
            "tokens": tokens(i),
            "loss_mask": torch.arange(LENGTHS[i]) > 0,
            "score_seeds": seeds(i)[0],
            "value_seeds": seeds(i)[1],
        }
        for i in ids
    ]
    return packed(parts, groups)


def loss(outputs: dict[str, Tensor], batch: Batch, counts: Counts) -> tuple[Tensor, dict[str, Metric]]:
    seeds = [token_column(batch, f"{name}_seeds", outputs["scores"]) for name in ("score", "value")]
    return (outputs["scores"] * seeds[0] + outputs["values"] * seeds[1]).sum(), {}


def on_ranks(path: str, layout: Layout) -> dict[str, Any]:
    engine = make_engine(path, layout, score_head=True, use_distributed_optimizer=False)
    groups = engine.groups
    mine = [[0, 1], [2, 3]][groups.dp.rank :: groups.dp.size]
    batches = engine._placed([batch(ids, groups) for ids in mine])
    columns = engine.forward(batches, ("scores", "values"))
    pipeline.train(
        engine._chunks, batches, engine._stage, engine._rows, engine._head,
        lambda c, b: loss(c, b, Counts(tokens=1, sequences=1)), groups,
    )  # fmt: skip
    found = {
        i: {name: unpacked(made, column[name], [LENGTHS[i] for i in ids])[place] for name in column}
        for ids, made, column in zip(mine, batches, columns, strict=True)
        for place, i in enumerate(ids)
    }
    return {"columns": found, "gradients": gradients_of(engine)}


def reference(path: str) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """transformers' score of every prefix, [T] a sequence, and plain autograd of the same loss."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    scores, total = {}, torch.zeros(())
    for i in range(len(LENGTHS)):
        # Its forward answers for the last token only: its own head on the backbone's states gives all of them.
        scores[i] = model.score(model.model(tokens(i)[None]).last_hidden_state)[0, :, 0]
        assert torch.allclose(model(tokens(i)[None]).logits[0, 0], scores[i][-1])
        total = total + (scores[i] * seeds(i)[0])[1:].sum() + (scores[i][:-1] * seeds(i)[1][1:]).sum()
    total.backward()
    gradients = as_saved(model, lambda parameter: parameter.grad)
    return {i: score.detach() for i, score in scores.items()}, gradients


# llama's at every layout; of the others those that split what is theirs.
CASES = [
    *((layout, family) for layout in [ONE_RANK, *LAYOUTS] for family in ("llama", "qwen2", "qwen3")),
    *(
        (layout, family)
        for layout in LAYOUTS[:2]
        for family in DENSE_FAMILIES
        if family not in ("llama", "qwen2", "qwen3")
    ),
    *((layout, "mixtral") for layout in (Layout(dp=2, ep=2), Layout(tp=2, sp=True, etp=1))),
    (Layout(dp=2, ep=2), "qwen3_moe"),
]


def case(layout: Layout, family: str) -> Any:
    """On the newest Megatron-Core too for one family without experts and one with them."""
    return pytest.param(layout, family, marks=[pytest.mark.megatron] if family in ("llama", "mixtral") else [])


@pytest.mark.parametrize(("layout", "family"), [case(*given) for given in CASES], ids=str)
def test_scores_values_and_gradients_equal_transformers(tmp_path: Path, family: str, layout: Layout) -> None:
    path = save_tiny_classifier(family, tmp_path)
    scores, gradients = reference(path)
    seen = set()
    for rank in run_ranks(layout.world, on_ranks, path, layout):
        for i, column in rank["columns"].items():
            seen.add(i)
            assert torch.allclose(column["scores"][1:], scores[i][1:], atol=1e-4)
            assert torch.allclose(column["values"][1:], scores[i][:-1], atol=1e-4)
            assert column["scores"][0] == column["values"][0] == 0
        assert sorted(rank["gradients"]) == sorted(gradients)
        for name, wanted in gradients.items():
            assert (rank["gradients"][name] - wanted).norm() < 1e-4 * wanted.norm(), name
    assert seen == set(range(len(LENGTHS)))


def exported(path: str, layout: Layout, target: str, pad: int | None) -> None:
    tokens = {} if pad is None else {"pad_token_id": pad}
    make_engine(path, layout, score_head=True).export(target, special_tokens=tokens)


@pytest.mark.megatron
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, pp=2)], ids=str)
def test_a_new_head_on_a_language_model_is_one_at_every_layout_and_loads_in_transformers(
    tmp_path: Path, layout: Layout
) -> None:
    path = save_tiny_model("llama", tmp_path / "model", pad_token_id=None)
    run_ranks(layout.world, exported, path, layout, str(tmp_path / "out"), 0)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_labels == 1 and model.config.pad_token_id == 0
    # normal(0, initializer_range) from the seed, drawn as the documentation says
    wanted = torch.randn(1, 32, generator=torch.Generator().manual_seed(42)) * 0.02
    assert torch.equal(model.score.weight, wanted)
    assert len(model(torch.tensor([[5, 6, 7], [8, 9, 0]])).logits) == 2  # a padded batch


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, pp=2)], ids=str)
def test_a_classifier_goes_in_and_out_bitwise(tmp_path: Path, layout: Layout) -> None:
    path = save_tiny_classifier("qwen3", tmp_path / "model")
    run_ranks(layout.world, exported, path, layout, str(tmp_path / "out"), None)
    before = AutoModelForSequenceClassification.from_pretrained(path).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


VLLM_SCORES = """
import json, sys
from vllm import LLM, PoolingParams, TokensPrompt
path, prompts = sys.argv[1], json.loads(sys.argv[2])
model = LLM(path, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=64)
raw = PoolingParams(use_activation=False)
found = model.encode([TokensPrompt(prompt_token_ids=ids) for ids in prompts], raw, pooling_task="classify")
print("scores", json.dumps([one.outputs.data.tolist() for one in found]))
"""


@pytest.mark.vllm
def test_an_exported_classifier_scores_the_same_in_vllm(tmp_path: Path) -> None:
    path = save_tiny_classifier("qwen3", tmp_path / "model", head_dim=32)
    layout = Layout(tp=2, pp=2)
    run_ranks(layout.world, exported, path, layout, str(tmp_path / "out"), None)
    prompts = [tokens(i).tolist() for i in range(len(LENGTHS))]
    environ = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, "-c", VLLM_SCORES, str(tmp_path / "out"), json.dumps(prompts)]
    ran = run(command, cwd=tmp_path, **environ).succeeded()
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("scores ")]
    wanted, _ = reference(path)
    assert torch.allclose(
        torch.tensor(json.loads(line.removeprefix("scores "))), torch.stack([wanted[i][-1:] for i in wanted]), atol=1e-4
    )


def step(engine: Any) -> float:
    made = [batch([0, 1, 2, 3], engine.groups)]
    return engine.train_step(made, loss, learning_rate=1e-2, counts=Counts(tokens=1, sequences=1)).grad_norm


def resumed(path: str, layout: Layout, directory: str) -> None:
    engine = make_engine(path, layout, score_head=True)
    step(engine)
    engine.save(directory)
    norm, weights = step(engine), {name: tensor.clone() for name, tensor in engine.gathered()}
    other = make_engine(path, layout, score_head=True)
    other.load(directory)
    assert step(other) == norm
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.gathered())


@pytest.mark.megatron
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, sp=True), Layout(pp=2, vpp=2), Layout(dp=2)], ids=str)
def test_a_resumed_critic_goes_on_bitwise(tmp_path: Path, layout: Layout) -> None:
    path = save_tiny_model("qwen2", tmp_path / "model")
    run_ranks(layout.world, resumed, path, layout, str(tmp_path / "checkpoint"))


def mixed(path: str, other: str, layout: Layout, directory: str) -> float:
    kept, new = (make_engine(p, layout, trainable=False) for p in (path, other))
    before = {name: tensor.clone() for name, tensor in kept.gathered()}
    theirs = {name: tensor.clone() for name, tensor in new.gathered()}
    kept.mix_in(new, 0.25)
    kept.save(directory)
    found = make_engine(path, layout, trainable=False)
    found.load(directory)
    after = dict(found.gathered())
    return worst(after, {name: 0.75 * tensor + 0.25 * theirs[name] for name, tensor in before.items()})[0]


@pytest.mark.megatron
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, pp=2)], ids=str)
def test_a_moving_reference_is_mixed_saved_and_read(tmp_path: Path, layout: Layout) -> None:
    paths = [save_tiny_model("llama", tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    for difference in run_ranks(layout.world, mixed, *paths, layout, str(tmp_path / "frozen")):
        assert difference < 1e-6


def mixed_with_itself(path: str) -> bool:
    kept, new = (make_engine(path, ONE_RANK, trainable=False, bf16=True) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in kept.gathered()}
    kept.mix_in(new, 0.6)
    return all(torch.equal(tensor, before[name]) for name, tensor in kept.gathered())


def test_a_reference_in_bf16_stays_where_the_policy_is(tmp_path: Path) -> None:
    assert run_ranks(1, mixed_with_itself, save_tiny_model("llama", tmp_path)) == [True]


def refused(path: str, score_head: bool) -> str:
    try:
        make_engine(path, ONE_RANK, score_head=score_head)
    except UserError as error:
        return str(error)
    return ""


def test_heads_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    classifier = save_tiny_classifier("llama", tmp_path / "one")
    assert "LlamaForSequenceClassification" in run_ranks(1, refused, classifier, False)[0]
    two = save_tiny_classifier("llama", tmp_path / "two", num_labels=2)
    assert "2 labels" in run_ranks(1, refused, two, True)[0]  # which transformers' config.json does not mention

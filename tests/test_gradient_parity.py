"""Loss, every gradient tensor, gradient norm and updated weights are the same at every layout.

The reference is transformers with plain autograd; completions are recorded and old and reference logprobs
carry fixed noise, since an on-policy GRPO loss is about 0 whatever is wrong.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

from megalign.algos.policy import grpo_loss
from megalign.algos.supervised import sft_loss
from megalign.batch import Batch, Counts
from megalign.parallel import pipeline
from megalign.parallel.groups import ParallelGroups
from megalign.parallel.reduce import reduce_counts, reduce_metrics
from tests.by_hand import packed, relative, worst
from tests.layouts import EIGHT_RANKS, EVERYTHING, LAYOUTS, ONE_RANK, Layout, gradients_of, make_engine
from tests.ranks import run_ranks
from tests.tiny import TinyModels, as_saved, load_reference

FAMILIES = ["llama", "qwen2", "qwen3"]
# (prompt, completion) lengths; microbatches of uneven token counts, the third without any loss token.
ROWS = [(3, 6), (5, 2), (2, 15), (4, 1), (6, 0), (3, 0), (2, 9), (7, 4)]
MICROBATCHES = [[0, 1], [2, 3], [4, 5], [6, 7]]
GRPO_OPTIONS = dict(
    beta=0.1,
    epsilon=0.2,
    epsilon_high=0.28,
    loss_type="dapo",
    importance_sampling_level="token",
    max_completion_length=16,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "dapo": GRPO_OPTIONS,
    "gspo": GRPO_OPTIONS | dict(loss_type="grpo", importance_sampling_level="sequence"),
}


def tokens(i: int) -> Tensor:
    ids = torch.randint(3, 101, (sum(ROWS[i]),), generator=torch.Generator().manual_seed(100 + i))
    ids[len(ids) // 2] = 0  # the pad token, which transformers' embedding passes no gradient to
    return ids


def noise(i: int, salt: int) -> Tensor:
    return torch.randn(sum(ROWS[i]), generator=torch.Generator().manual_seed(1000 * salt + i)) * 0.3


def advantage(i: int) -> float:
    return float(torch.randn((), generator=torch.Generator().manual_seed(50 + i)))


@cache
def recorded(path: str) -> dict[int, Tensor]:
    """Reference logprobs of every row: what old and reference columns are perturbations of."""
    model = load_reference(path)
    with torch.no_grad():
        return {i: _reference_logprobs(model, tokens(i)) for i in range(len(ROWS))}


def _reference_logprobs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    log_p = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
    return torch.cat([log_p.new_zeros(1), log_p.gather(1, ids[1:, None]).squeeze(1)])


def microbatch(ids: list[int], logprobs: dict[int, Tensor], groups: ParallelGroups) -> Batch:
    parts = [
        {
            "tokens": tokens(i),
            "loss_mask": torch.arange(sum(ROWS[i])) >= ROWS[i][0],
            "old_logprobs": logprobs[i] + noise(i, 1),
            "ref_logprobs": logprobs[i] + noise(i, 2),
        }
        for i in ids
    ]
    return packed(parts, groups, advantages=torch.tensor([advantage(i) for i in ids]))


def loss_of(name: str) -> Any:
    return sft_loss if name == "sft" else partial(grpo_loss, **VARIANTS[name])


def global_counts() -> Counts:
    loss_tokens = float(sum(completion for _, completion in ROWS))
    return Counts(tokens=loss_tokens, sequences=float(len(ROWS)), generation_tokens=loss_tokens)


# ---- on the ranks -------------------------------------------------------------------------------------------


def gradients(
    path: str, layout: Layout, name: str, logprobs: dict[int, Tensor], fields: dict[str, Any]
) -> dict[str, Any]:
    """Loss and whole gradients, in Hugging Face names, read through the exporter from DDP's buffers."""
    engine = make_engine(path, layout, use_distributed_optimizer=False, **fields)
    groups = engine.groups
    batches = [microbatch(ids, logprobs, groups) for ids in MICROBATCHES[groups.dp.rank :: groups.dp.size]]
    counts = reduce_counts(batches, groups)
    assert (counts.tokens, counts.sequences) == (global_counts().tokens, global_counts().sequences)
    shares = pipeline.train(
        engine._chunks,
        engine._placed(batches),
        engine._stage,
        engine._rows,
        engine._head,
        lambda columns, batch: loss_of(name)(columns, batch, global_counts()),
        groups,
    )
    metrics = reduce_metrics(shares, groups)
    return {"metrics": metrics, "gradients": gradients_of(engine)}


def two_steps(
    path: str, layout: Layout, name: str, logprobs: dict[int, Tensor], fields: dict[str, Any]
) -> dict[str, Any]:
    """Two clipped AdamW steps with the sharded optimizer."""
    # AdamW divides a gradient of nearly 0 by itself: with its usual epsilon one element's rounding moves a weight
    # by the whole learning rate. 1e-3 keeps the comparison about the algorithm.
    engine = make_engine(path, layout, weight_decay=0.1, max_grad_norm=0.5, adam_epsilon=1e-3, **fields)
    dp = engine.groups.dp
    batches = [microbatch(ids, logprobs, engine.groups) for ids in MICROBATCHES[dp.rank :: dp.size]]
    norms = [
        engine.train_step(batches, loss_of(name), learning_rate=1e-2, counts=global_counts()).grad_norm
        for _ in range(2)
    ]
    return {"norms": norms, "weights": {key: value.clone() for key, value in engine.gathered()}}


# ---- the reference ------------------------------------------------------------------------------------------


def reference_loss(model: torch.nn.Module, name: str, logprobs: dict[int, Tensor]) -> Tensor:
    """The loss written out, row by row, on transformers' logits."""
    total = torch.zeros(())
    counts = global_counts()
    for i, (prompt, completion) in enumerate(ROWS):
        if not completion:
            continue
        current = _reference_logprobs(model, tokens(i))[prompt:]
        if name == "sft":
            total = total - current.sum() / counts.tokens
            continue
        old, ref = ((logprobs[i] + noise(i, salt))[prompt:] for salt in (1, 2))
        log_ratio = current - old
        if VARIANTS[name]["importance_sampling_level"] == "sequence":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * advantage(i), ratio.clamp(1 - 0.2, 1 + 0.28) * advantage(i))
        kl = ((ref - current).exp() - (ref - current) - 1) * ratio
        token_loss = -surrogate + 0.1 * kl
        if VARIANTS[name]["loss_type"] == "dapo":
            total = total + token_loss.sum() / counts.generation_tokens
        else:
            total = total + token_loss.mean() / counts.sequences
    return total


@cache
def reference_gradients(path: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
    model = load_reference(path).to(dtype)
    loss = reference_loss(model, name, recorded(path))
    loss.backward()
    return float(loss), as_saved(model, lambda parameter: parameter.grad)


@cache
def reference_steps(path: str, name: str) -> dict[str, Any]:
    """torch's AdamW as transformers' Trainer groups it."""
    model = load_reference(path)
    names = Trainer.get_decay_parameter_names(None, model)
    decayed, plain = (
        [p for name, p in model.named_parameters() if (name in names) is wanted] for wanted in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, eps=1e-3
    )
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        reference_loss(model, name, recorded(path)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return {"norms": norms, "weights": as_saved(model, lambda parameter: parameter)}


def check_gradients(path: str, layout: Layout, name: str, **fields: Any) -> None:
    loss, wanted = reference_gradients(path, name)
    scale = max(abs(loss), sum(abs(advantage(i)) for i in range(len(ROWS))) / len(ROWS)) if name != "sft" else abs(loss)
    for rank in run_ranks(layout.world, gradients, path, layout, name, recorded(path), fields):
        assert abs(rank["metrics"]["loss"] - loss) <= 1e-4 * scale
        difference, key = worst(rank["gradients"], wanted)
        assert difference < 1e-4, (key, difference)


# The layout is the outer loop: its process groups are made once for all families.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["sft", pytest.param("dapo", marks=pytest.mark.megatron), "gspo"])
@pytest.mark.parametrize("layout", [ONE_RANK, *LAYOUTS], ids=str)
def test_every_gradient_equals_plain_autograd(tiny_models: TinyModels, layout: Layout, name: str, family: str) -> None:
    check_gradients(tiny_models[family], layout, name)


@pytest.mark.megatron
@pytest.mark.parametrize("family", ["mistral", "phi3", "glm4", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, sp=True), Layout(cp=2), Layout(pp=2)], ids=str)
def test_every_gradient_of_families_with_parts_of_their_own(
    tiny_models: TinyModels, layout: Layout, family: str
) -> None:
    check_gradients(tiny_models[family], layout, "dapo")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "glm4"])
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_bf16_gradients_are_as_near_to_fp32s_as_transformers_own(
    tiny_models: TinyModels, layout: Layout, family: str, tmp_path: Path
) -> None:
    path = str(tmp_path)  # of weights that bf16 holds: what differs is arithmetic
    AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.bfloat16).save_pretrained(path)
    _, exact = reference_gradients(path, "sft")
    _, theirs = reference_gradients(path, "sft", torch.bfloat16)
    for rank in run_ranks(layout.world, gradients, path, layout, "sft", recorded(path), {"bf16": True}):
        assert 0 < relative(whole(rank["gradients"]), whole(exact)) < 1.25 * relative(whole(theirs), whole(exact))


def whole(gradients: dict[str, Tensor]) -> Tensor:
    """All tensors as one."""
    return torch.cat([gradients[name].float().flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_norms_behind_the_parts_windows_caps_and_sinks_are_recomputed(
    tiny_models: TinyModels, family: str, granularity: str
) -> None:
    recompute = {"gradient_checkpointing": True, "recompute_granularity": granularity}
    check_gradients(tiny_models[family], Layout(tp=2, sp=True), "sft", **recompute)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_with_more_tensor_ranks_than_key_and_value_heads(tiny_models: TinyModels, family: str) -> None:
    check_gradients(tiny_models[family], Layout(tp=4, sp=True), "sft")


@pytest.mark.ranks8
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("layout", "name"), [(EIGHT_RANKS, "sft"), (EIGHT_RANKS, "dapo"), (EVERYTHING, "dapo")], ids=str
)
def test_every_gradient_equals_plain_autograd_on_eight_ranks(
    tiny_models: TinyModels, layout: Layout, name: str, family: str
) -> None:
    check_gradients(tiny_models[family], layout, name)


@pytest.mark.megatron
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [ONE_RANK, *LAYOUTS], ids=str)
def test_two_clipped_steps_equal_torch_adamw(tiny_models: TinyModels, layout: Layout, family: str) -> None:
    check_two_steps(tiny_models[family], layout)


def check_two_steps(path: str, layout: Layout, **fields: Any) -> None:
    wanted = reference_steps(path, "dapo")
    for rank in run_ranks(layout.world, two_steps, path, layout, "dapo", recorded(path), fields):
        assert rank["norms"] == pytest.approx(wanted["norms"], rel=1e-4)
        difference, key = worst(rank["weights"], wanted["weights"])
        assert difference < 1e-4, (key, difference)

"""The head in fp32 within a bf16 model, and a head with a bias: gradients, export and checkpoints at every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch, Counts
from megalign.config import GRPOConfig
from megalign.conversion import families
from megalign.conversion.families import llama
from megalign.conversion.rules import Vocab
from megalign.parallel import pipeline
from megalign.parallel.groups import initialize
from megalign.train_engine import TrainEngine
from tests.by_hand import random_batch, relative, worst
from tests.layouts import ONE_RANK, Layout, gradients_of
from tests.ranks import run_ranks
from tests.tiny import load_reference, save_tiny_model

pytestmark = pytest.mark.megatron

LAYOUTS = [ONE_RANK, Layout(tp=2, sp=True), Layout(pp=2)]
LENGTHS = (8, 16)
COUNTS = Counts(tokens=22.0, sequences=2.0, generation_tokens=22.0)


def batch() -> Batch:
    return random_batch(3)


def engine_of(path: str, layout: Layout, **fields: Any) -> TrainEngine:
    args = GRPOConfig(**layout.fields, output_dir="unused", **fields)
    return TrainEngine(path, args, initialize(args, timeout_s=100))


def gradients(engine: TrainEngine) -> dict[str, Tensor]:
    pipeline.train(
        engine._chunks,
        engine._placed([batch()]),
        engine._stage,
        engine._rows,
        engine._head,
        lambda columns, rows: sft_loss(columns, rows, COUNTS),
        engine.groups,
    )
    return gradients_of(engine)


# ---- cast_lm_head_to_fp32


def with_head_in_fp32(path: str, layout: Layout, directory: str) -> dict[str, Any]:
    fields = {"bf16": True, "cast_lm_head_to_fp32": True}
    engine = engine_of(path, layout, **fields)
    logprobs = engine.forward([batch()])[0]["logprobs"]
    engine.train_step([batch()], sft_loss, learning_rate=1e-2)
    engine.save(f"{directory}/checkpoint")
    engine.export(f"{directory}/model")
    other = engine_of(path, layout, **fields)
    other.load(f"{directory}/checkpoint")
    results = []
    for one in (engine, other):
        one.train_step([batch()], sft_loss, learning_rate=1e-2)
        results.append({name: tensor.clone() for name, tensor in one.gathered()})
    same = all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())
    return {
        "logprobs": logprobs,
        "dtypes": {name: tensor.dtype for name, tensor in results[0].items()},
        "resumed": same,
        "gradients": gradients(engine_of(path, layout, use_distributed_optimizer=False, **fields)),
    }


def reference(path: str) -> tuple[Tensor, dict[str, Tensor]]:
    """TRL's way of doing it in transformers: a bf16 decoder under an fp32 head."""
    model = load_reference(path)
    head = model.lm_head.weight.detach().clone().requires_grad_()
    model.to(torch.bfloat16)
    tied = model.config.tie_word_embeddings
    if tied:  # TRL's embedding is the fp32 weight, whose output is rounded
        model.set_input_embeddings(_Rounded(head))
    parts, start = [], 0
    for length in LENGTHS:
        ids = batch().tokens[start : start + length]
        hidden = model.model(ids[None]).last_hidden_state[0, :-1].float()
        log_p = (hidden @ head.T).log_softmax(-1)
        parts += [log_p.new_zeros(1), log_p.gather(1, ids[1:, None]).squeeze(1)]
        start += length
    logprobs = torch.cat(parts)
    (-logprobs.sum() / COUNTS.tokens).backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return logprobs.detach(), {**found, "model.embed_tokens.weight" if tied else "lm_head.weight": head.grad}


class _Rounded(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.table = weight

    def forward(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.table).to(torch.bfloat16)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_fp32_head_has_fp32_logits_gradients_and_files(family: str, layout: Layout, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path / "bf16", dtype=torch.bfloat16)
    head = "lm_head.weight" if family == "qwen2" else "model.embed_tokens.weight"
    logprobs, wanted = reference(path)
    for rank in run_ranks(layout.world, with_head_in_fp32, path, layout, str(tmp_path)):
        assert {name for name, dtype in rank["dtypes"].items() if dtype is torch.float32} == {head}
        assert rank["resumed"]
        # A bf16 decoder is the same to about three digits; a bf16 head would round these logits to 2^-8 of them.
        assert (rank["logprobs"] - logprobs).abs().max() < 0.15
        assert relative(rank["gradients"][head], wanted[head]) < 0.03
    files = load_file(tmp_path / "model" / "model.safetensors")
    assert {name for name, tensor in files.items() if tensor.dtype is torch.float32} == {head}
    assert not torch.equal(files[head], files[head].bfloat16().float()), "the step's fp32 weight was rounded"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def logits_are_exact(path: str) -> tuple[float, float]:
    """How far logprobs are from fp32's of the same hidden states, with the head in fp32 and in bf16."""
    found = []
    for cast in (True, False):
        engine = engine_of(path, ONE_RANK, bf16=True, cast_lm_head_to_fp32=cast)
        states: list[Tensor] = []
        head = engine._head
        engine._head = lambda hidden, rows, head=head, states=states: states.append(hidden) or head(hidden, rows)
        logprobs = engine.forward([batch()])[0]["logprobs"]
        log_p = (states[0][:, 0].float() @ engine._models[0].head_weight.float().T)[:, :101].log_softmax(-1)
        wanted = log_p[:-1].gather(1, batch().tokens[1:, None]).squeeze(1)
        mask = batch()["loss_mask"][1:]
        found.append(float(((logprobs[1:] - wanted) * mask).abs().max()))
    return found[0], found[1]


def test_only_an_fp32_head_does_not_round_logits(tmp_path: Path) -> None:
    path = save_tiny_model("qwen2", tmp_path, dtype=torch.bfloat16)
    ((cast, plain),) = run_ranks(1, logits_are_exact, path)
    assert cast < 1e-5 < 1e-3 < plain


# ---- a head with a bias


def add_family() -> None:
    """Llama with a bias on its head, in this process."""
    family = ModuleType("biased")
    family.HF_ARCHITECTURE = "BiasedForCausalLM"
    family.read_config = lambda config: replace(llama.read_config(config), family="biased", head_bias=True)
    family.rules = lambda architecture: [
        *llama.rules(architecture),
        *([Vocab.bias("output_layer.bias", "lm_head.bias")] if architecture.head_bias else []),
    ]
    families.FAMILIES["biased"] = family


def save_biased(path: Path, *, tied: bool) -> str:
    save_tiny_model("llama", path, tie_word_embeddings=tied)
    tensors = load_file(path / "model.safetensors")
    bias = torch.randn(101, generator=torch.Generator().manual_seed(9))
    save_file({**tensors, "lm_head.bias": bias}, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.update(architectures=["BiasedForCausalLM"], model_type="biased")
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def with_bias(path: str, layout: Layout, directory: str) -> dict[str, Any]:
    add_family()
    engine = engine_of(path, layout, bf16=False)
    start = {name: tensor.clone() for name, tensor in engine.gathered()}
    logprobs = engine.forward([batch()])[0]["logprobs"]
    engine.save(f"{directory}/checkpoint")
    engine.export(f"{directory}/model")
    other = engine_of(path, layout, bf16=False)
    for model in other._models:
        for parameter in model.parameters():
            parameter.data.zero_()
    other.load(f"{directory}/checkpoint")
    restored = all(torch.equal(tensor, start[name]) for name, tensor in other.gathered())
    scored = TrainEngine(path, engine._args, engine.groups, score_head=True)
    return {
        "logprobs": logprobs,
        "restored": restored,
        "score": sorted(name for name, _ in scored.gathered() if "head" in name or "score" in name),
        "gradients": gradients(engine_of(path, layout, bf16=False, use_distributed_optimizer=False)),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_bias_on_the_head_is_trained_split_and_written(layout: Layout, tied: bool, tmp_path: Path) -> None:
    path = save_biased(tmp_path / "biased", tied=tied)
    plain = save_tiny_model("llama", tmp_path / "plain", tie_word_embeddings=tied)  # the same seed
    model = load_reference(plain)
    model.lm_head.bias = torch.nn.Parameter(load_file(f"{path}/model.safetensors")["lm_head.bias"])
    parts, start = [], 0
    for length in LENGTHS:
        ids = batch().tokens[start : start + length]
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        parts += [log_p.new_zeros(1), log_p.gather(1, ids[1:, None]).squeeze(1)]
        start += length
    logprobs = torch.cat(parts)
    (-logprobs.sum() / COUNTS.tokens).backward()
    wanted = {name: value.grad for name, value in model.named_parameters()}
    for rank in run_ranks(layout.world, with_bias, path, layout, str(tmp_path)):
        assert (rank["logprobs"] - logprobs).abs().max() < 1e-4
        assert rank["restored"] and rank["score"] == ["score.weight"]
        difference, name = worst(rank["gradients"], wanted)
        assert difference < 1e-4, (name, difference)
    before, after = (load_file(f"{directory}/model.safetensors") for directory in (path, tmp_path / "model"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

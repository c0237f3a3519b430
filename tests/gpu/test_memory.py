"""The GPU's memory: what sleeping gives back, what the head needs, what offloading spares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megalign import device
from megalign.algos.supervised import sft_loss
from megalign.batch import Batch
from megalign.config import GRPOConfig
from megalign.parallel import vocab
from megalign.parallel.groups import initialize
from megalign.train_engine import TrainEngine
from tests.layouts import ONE_RANK, make_engine
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.cuda_only

MIB = 2**20
TOKENS = (4096, 16384)
SEQUENCE = 512
CHUNKS = (2**22, 2**26)  # elements
VOCABULARIES = (32_000, 128_000)


def batch(num_tokens: int) -> Batch:
    return Batch(
        tokens=torch.randint(3, 30_000, (num_tokens,), generator=torch.Generator().manual_seed(0)),
        cu_seqlens=torch.arange(0, num_tokens + 1, SEQUENCE, dtype=torch.int32),
        num_sequences=num_tokens // SEQUENCE,
        token_columns={"loss_mask": torch.arange(num_tokens) % SEQUENCE > 0},
    )


def save_model(path: Path, layers: int = 4) -> str:
    """A hundred million random weights."""
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=1024, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return str(path)


def used() -> int:
    """Bytes that the driver has given away, to anybody."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def peak_of(call: Callable[[], object]) -> float:
    """MiB that were alive at once beyond what was before."""
    device.release_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / MIB


@pytest.mark.parametrize("bf16", [True, False])
def test_a_sleeping_engine_gives_its_memory_to_the_driver_and_wakes_bitwise(tmp_path: Path, bf16: bool) -> None:
    path = save_model(tmp_path)
    args = GRPOConfig(bf16=bf16, output_dir="unused", vllm_enable_sleep_mode=True)
    groups = initialize(args, timeout_s=100)
    # The context, loaded kernels and NCCL's buffers stay: they are there before the engine that is measured.
    first = make_engine(save_tiny_model("llama", tmp_path / "tiny", vocab_size=32_000), ONE_RANK, bf16=bf16)
    first.train_step([batch(1024)], sft_loss, learning_rate=1e-3)
    del first
    device.release_memory()
    empty = used()
    engine = TrainEngine(path, args, groups)
    engine.train_step([batch(1024)], sft_loss, learning_rate=1e-3)
    device.release_memory()
    kept = [tensor.cpu() for tensor in engine._resident_tensors()]
    weights = sum(parameter.numel() for parameter in engine._models[0].parameters())
    held = weights * (2 + 4 + 12 if bf16 else 4 + 4 + 8)  # weights, gradients, AdamW with its masters
    awake = used()
    engine.sleep()
    asleep = used()
    engine.wake()
    again = used()
    gib = {"held": held, "before": empty, "awake": awake, "asleep": asleep, "woken": again}
    print("sleep", {"bf16": bf16, "weights": weights, **{name: round(size / 2**30, 2) for name, size in gib.items()}})
    assert awake - asleep > 0.95 * held
    assert asleep - empty < 0.05 * held + 64 * MIB
    assert again <= awake + 64 * MIB
    for before, after in zip(kept, engine._resident_tensors(), strict=True):
        assert torch.equal(before, after.cpu())
    engine.train_step([batch(1024)], sft_loss, learning_rate=1e-3)  # the optimizer's views are whole


def test_a_saved_engine_is_read_bitwise(tmp_path: Path) -> None:
    engine = make_engine(save_model(tmp_path / "model"), ONE_RANK, bf16=True)
    engine.train_step([batch(1024)], sft_loss, learning_rate=1e-3)
    engine.save(str(tmp_path / "checkpoint"))
    engine.export(str(tmp_path / "exported"))
    other = make_engine(str(tmp_path / "model"), ONE_RANK, bf16=True)
    other.load(str(tmp_path / "checkpoint"))
    kept, found = (list(each._models[0].parameters()) for each in (engine, other))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(kept, found, strict=True))
    exported = load_file(tmp_path / "exported/model.safetensors")
    found = dict(other.gathered())
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name].cpu(), exported[name]) for name in found)


def test_peak_memory_follows_the_chunk_and_not_tokens_times_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    monkeypatch.setattr(vocab, "CHUNK_TOKENS", 1)
    for size in VOCABULARIES:
        path = save_tiny_model("llama", tmp_path / str(size), vocab_size=size, hidden_size=64, num_hidden_layers=1)
        engine = make_engine(path, ONE_RANK, transformer_impl="local")
        for chunk in CHUNKS:
            monkeypatch.setitem(vocab.CHUNK_ELEMENTS, "cuda", chunk)
            for num_tokens in TOKENS:
                given = [batch(num_tokens)]
                calls = {
                    "forward": lambda engine=engine, given=given: engine.forward(given, ("logprobs", "entropy")),
                    "training": lambda engine=engine, given=given: engine.train_step(
                        given, sft_loss, learning_rate=0.0
                    ),
                }
                for name, call in calls.items():
                    call()  # what is allocated once
                    found[name, size, chunk, num_tokens] = peak_of(call)
    few, many = TOKENS
    small, large = CHUNKS
    logits = many * VOCABULARIES[1] * 4 / MIB  # what one copy of the larger head's output would take
    print("peak MiB", {" ".join(map(str, key)): round(value) for key, value in found.items()}, "logits", round(logits))
    for name in ("forward", "training"):
        for chunk in CHUNKS:
            at = {size: found[name, size, chunk, many] for size in VOCABULARIES}
            assert abs(at[VOCABULARIES[0]] - at[VOCABULARIES[1]]) < 0.05 * logits
            assert at[VOCABULARIES[1]] - found[name, VOCABULARIES[1], chunk, few] < 0.05 * logits
        assert found[name, VOCABULARIES[1], small, many] < 0.05 * logits
        more = found[name, VOCABULARIES[1], large, many] - found[name, VOCABULARIES[1], small, many]
        assert more > large * 4 / MIB


@pytest.mark.parametrize("fields", [{"activation_offloading": True}, {"recompute_granularity": "full"}], ids=str)
def test_offloading_and_recomputation_lower_the_peak(tmp_path: Path, fields: dict[str, object]) -> None:
    path = save_model(tmp_path, layers=8)
    peaks = {}
    for name, given in {"plain": {"gradient_checkpointing": False}, "spared": fields}.items():
        if "activation_offloading" in given:
            given = {"gradient_checkpointing": False, **given}
        engine = make_engine(path, ONE_RANK, bf16=True, transformer_impl="local", **given)
        call = lambda engine=engine: engine.train_step([batch(8192)], sft_loss, learning_rate=0.0)  # noqa: E731
        call()
        peaks[name] = peak_of(call)
        del engine, call
    print("peak MiB", fields, {name: round(value) for name, value in peaks.items()})
    assert peaks["spared"] < 0.6 * peaks["plain"]

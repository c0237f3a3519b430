"""The logprob path's peak memory grows with the chunk of the vocabulary head, not with tokens x vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from megalign import device
from megalign.algos.supervised import sft_loss
from megalign.batch import Batch
from megalign.parallel import vocab
from tests.layouts import ONE_RANK, make_engine
from tests.ranks import run_ranks
from tests.tiny import save_tiny_model

MIB = 2**20
M_MMAP_THRESHOLD = -3  # malloc.h
TOKENS = (1024, 4096)
SEQUENCE = 128
CHUNKS = (2**19, 2**23)  # elements
VOCABULARIES = (8_000, 32_000)


def batch(num_tokens: int) -> Batch:
    return Batch(
        tokens=torch.randint(3, 101, (num_tokens,), generator=torch.Generator().manual_seed(0)),
        cu_seqlens=torch.arange(0, num_tokens + 1, SEQUENCE, dtype=torch.int32),
        num_sequences=num_tokens // SEQUENCE,
        token_columns={"loss_mask": torch.arange(num_tokens) % SEQUENCE > 0},
    )


def peak_of(call: Callable[[], object]) -> float:
    """MiB by which the process grew at its highest, over what it held before."""
    device.release_memory()
    before = device.resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    call()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    (now,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return (int(line.split()[1]) * 1024 - int(now.split()[1]) * 1024 - before) / MIB


def peaks(path: str) -> dict[tuple[str, int, int], float]:
    """By pass, chunk and number of tokens."""
    # Larger blocks go back when they are freed: what is measured are live tensors, not glibc's gaps between them.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB) == 1
    engine = make_engine(path, ONE_RANK)
    found = {}
    for chunk in CHUNKS:
        vocab.CHUNK_ELEMENTS["cpu"], vocab.CHUNK_TOKENS = chunk, 1
        for num_tokens in TOKENS:
            given = [batch(num_tokens)]
            calls = {
                "forward": lambda given=given: engine.forward(given, ("logprobs", "entropy")),
                "training": lambda given=given: engine.train_step(given, sft_loss, learning_rate=0.0),
            }
            for name, call in calls.items():
                call()  # what is allocated once
                found[name, chunk, num_tokens] = peak_of(call)
    return found


def test_peak_memory_follows_the_chunk_and_not_tokens_times_vocabulary(tmp_path: Path) -> None:
    found = {}
    for vocab_size in VOCABULARIES:
        path = save_tiny_model(
            "llama", tmp_path / str(vocab_size), vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1
        )
        (found[vocab_size],) = run_ranks(1, peaks, path, fresh=True)
    few, many = TOKENS
    logits = many * VOCABULARIES[1] * 4 / MIB  # what one copy of the larger head's output would take
    small, large = CHUNKS
    for name in ("forward", "training"):
        for chunk in CHUNKS:
            at = {size: found[size][name, chunk, many] for size in VOCABULARIES}
            assert abs(at[VOCABULARIES[0]] - at[VOCABULARIES[1]]) < 0.1 * logits, (name, chunk, found)
            grown = at[VOCABULARIES[1]] - found[VOCABULARIES[1]][name, chunk, few]
            assert grown < 0.1 * logits, (name, chunk, found)
        assert found[VOCABULARIES[1]][name, small, many] < 0.15 * logits, (name, found)
        # The logits of a large chunk are alive at once; with small ones the whole step takes less than those alone.
        of_a_chunk = large // VOCABULARIES[1] * VOCABULARIES[1] * 4 / MIB
        assert found[VOCABULARIES[1]][name, small, many] < of_a_chunk, (name, found)
        assert found[VOCABULARIES[1]][name, large, many] > of_a_chunk, (name, found)

"""Plain torch layers on a GPU compute what transformers does on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalign import device
from megalign.batch import Batch
from megalign.model.attention import PackedAttention, PackedSequences
from tests.by_hand import relative
from tests.layouts import ONE_RANK, groups_of
from tests.model.test_recomputation import differing
from tests.parity import MICROBATCHES, engine_logprobs, largest_difference, logprobs_of, reference_logprobs
from tests.ranks import run_ranks
from tests.test_gradient_parity import check_gradients, check_two_steps
from tests.test_train_engine import resumed
from tests.tiny import DENSE_FAMILIES, MOE_FAMILIES, TinyModels, save_tiny_model

FAMILIES = [*DENSE_FAMILIES, *MOE_FAMILIES]
PLAIN = {"transformer_impl": "local"}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """With the limit of gpt_oss's gates that transformers before 5.18 computes whatever its config says."""
    directory = tmp_path_factory.mktemp("tiny")
    models = TinyModels(directory)
    models["gpt_oss"] = save_tiny_model("gpt_oss", directory / "gpt_oss", swiglu_limit=7.0)
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(tiny_models: TinyModels, family: str) -> None:
    found = largest_difference(tiny_models[family], ONE_RANK, **PLAIN)
    print(f"largest difference fp32 {family} {found:.1e}")
    assert found < 1e-4


def errors(found: dict[int, torch.Tensor], wanted: dict[int, torch.Tensor]) -> torch.Tensor:
    """Of every token's logprob."""
    return torch.cat([(found[i].cpu() - wanted[i]).abs()[1:] for i in wanted])


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_transformers_own(tiny_models: TinyModels, family: str) -> None:
    # A router's near ties go the other way for single tokens, in both: so it is the median that must agree.
    path, wanted = tiny_models[family], reference_logprobs(tiny_models[family])
    (ours,) = run_ranks(1, engine_logprobs, path, ONE_RANK, MICROBATCHES, {"bf16": True, **PLAIN})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Grouped products refuse rows as short as these experts'.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **plain).eval()
    mine, their = errors(ours, wanted), errors(logprobs_of(theirs.to(device)), wanted)
    print(f"median (mean) error bf16 {family} {mine.median():.1e} ({mine.mean():.1e}), "
          f"transformers {their.median():.1e} ({their.mean():.1e})")  # fmt: skip
    assert mine.median() < 2 * their.median() + 1e-3
    assert mine.median() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_plain_autograd(tiny_models: TinyModels, family: str) -> None:
    check_gradients(tiny_models[family], ONE_RANK, "dapo", **PLAIN)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "deepseek_v3"])
def test_two_clipped_steps_equal_torch_adamw(tiny_models: TinyModels, family: str) -> None:
    check_two_steps(tiny_models[family], ONE_RANK, **PLAIN)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("fields", [{}, {"bf16": True}, {"use_distributed_optimizer": False}], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_a_resumed_engine_goes_on_bitwise(
    tiny_models: TinyModels, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    path = tiny_models[family]
    assert all(run_ranks(1, resumed, path, ONE_RANK, str(tmp_path / "checkpoint"), fields | PLAIN))


@pytest.mark.usefixtures("deterministic")
def test_recomputation_and_offloading_change_no_gradient(tiny_models: TinyModels) -> None:
    (found,) = run_ranks(1, differing, tiny_models["qwen3"], ONE_RANK)
    assert not any(found.values()), found


@pytest.mark.parametrize("window", [None, 2, 20])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "value_width"), [(4, 4, 64, 64), (6, 2, 64, 64), (4, 4, 192, 128)]
)
def test_all_sequences_in_one_call_are_attended_as_one_by_one(
    heads: int, groups: int, width: int, value_width: int, window: int | None
) -> None:
    lengths = [1, 33, 20, 64, 7]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    axis = groups_of(ONE_RANK).cp
    batch = Batch(tokens=torch.zeros(sum(lengths), dtype=torch.int64), cu_seqlens=cu_seqlens, num_sequences=5)
    packed = PackedSequences.of(batch.to(device.device()), axis)
    config = SimpleNamespace(num_attention_heads=heads, tensor_model_parallel_size=1)
    attention = PackedAttention(config, 1, None, "self", window=window)
    torch.manual_seed(0)
    given = [torch.randn(sum(lengths), *shape) for shape in ((heads, width), (groups, width), (groups, value_width))]
    seed = torch.randn(sum(lengths), heads * value_width)

    def outcome(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [part.to(device.device(), dtype).requires_grad_() for part in given]
        attended = attention(*inputs, None, packed_seq_params=packed)
        attended.backward(seed.to(attended))
        return [attended, *(part.grad for part in inputs)]

    for found, wanted in zip(outcome(torch.bfloat16), outcome(torch.float32), strict=True):
        assert relative(found, wanted) < 1e-2
    if device.on_cuda():
        assert attention._is_one_call(given[0].cuda().bfloat16(), given[2], packed)

"""Transformer Engine's layers: transformers' numbers in fp32, and near them in bf16 and FP8."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalign.algos.supervised import sft_loss
from megalign.batch import Batch, Counts
from megalign.errors import UserError
from megalign.parallel import pipeline
from megalign.parallel.groups import initialize
from megalign.train_engine import TrainEngine
from tests.by_hand import packed, relative
from tests.gpu.test_parity import errors
from tests.layouts import ONE_RANK, arguments, gradients_of, make_engine
from tests.parity import LENGTHS, MICROBATCHES, engine_logprobs, largest_difference, reference_logprobs, sequences
from tests.ranks import run_ranks
from tests.test_gradient_parity import check_gradients
from tests.tiny import save_tiny_model

TE = {"transformer_impl": "transformer_engine"}
# Heads that cuDNN's attention takes, and sizes that FP8's products take.
SIZES: dict[str, Any] = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
LATENT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "head_dim": 32,
    "v_head_dim": 32,
    "rms_norm_eps": 1e-6,
}
FAMILIES = {"llama": SIZES, "qwen3": SIZES, "mixtral": SIZES, "deepseek_v3": LATENT}


def has_transformer_engine() -> bool:
    from megalign.patches import megatron

    if not torch.cuda.is_available():
        return False
    megatron.install()
    from megalign.model import extensions

    return extensions.has_transformer_engine()


pytestmark = [
    pytest.mark.cuda_only,
    pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine and a CUDA device"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A directory for each family."""
    return {
        family: save_tiny_model(family, tmp_path_factory.mktemp(family), **sizes) for family, sizes in FAMILIES.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(models: dict[str, str], family: str) -> None:
    found = largest_difference(models[family], ONE_RANK, **TE)
    print(f"largest difference TE fp32 {family} {found:.1e}")
    assert found < 1e-4
    assert make_engine(models[family], ONE_RANK, **TE).made_of.startswith("layers: Transformer Engine")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_equals_plain_autograd(models: dict[str, str], family: str) -> None:
    check_gradients(models[family], ONE_RANK, "dapo", **TE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_plain_layers(models: dict[str, str], family: str) -> None:
    wanted = reference_logprobs(models[family])
    found = {}
    for implementation in ("transformer_engine", "local"):
        fields = {"bf16": True, "transformer_impl": implementation}
        (found[implementation],) = run_ranks(1, engine_logprobs, models[family], ONE_RANK, MICROBATCHES, fields)
    mine, plain = (errors(found[name], wanted) for name in ("transformer_engine", "local"))
    print(f"median (mean) error bf16 {family} TE {mine.median():.1e} ({mine.mean():.1e}), "
          f"plain {plain.median():.1e} ({plain.mean():.1e})")  # fmt: skip
    assert mine.median() < 2 * plain.median() + 1e-3


def test_a_checkpoint_of_the_one_is_read_by_the_other(models: dict[str, str], tmp_path: Path) -> None:
    path = models["mixtral"]
    fields = {"bf16": True, "use_distributed_optimizer": True}
    engines = [make_engine(path, ONE_RANK, **fields, transformer_impl=name) for name in ("transformer_engine", "local")]
    for engine in engines:
        engine.train_step([rows(engine)], sft_loss, learning_rate=1e-3)
    for number, (mine, other) in enumerate([engines, engines[::-1]]):
        mine.train_step([rows(mine)], sft_loss, learning_rate=1e-3)
        wanted = {name: tensor.clone() for name, tensor in mine.gathered()}
        mine.save(str(tmp_path / str(number)))
        other.load(str(tmp_path / str(number)))
        found = dict(other.gathered())
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def rows(engine: TrainEngine) -> Batch:
    parts = [{"tokens": ids, "loss_mask": torch.arange(len(ids)) > 0} for ids in sequences()]
    return packed(parts, engine.groups)


def outcome(path: str, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs, and gradients of their mean, of the second of two passes: delayed scaling has then seen maxima."""
    args = arguments(ONE_RANK, bf16=True, use_distributed_optimizer=False, **fields)
    engine = TrainEngine(path, args, initialize(args, timeout_s=100))
    batch = rows(engine)
    counts = Counts(tokens=float(sum(LENGTHS) - len(LENGTHS)), sequences=float(len(LENGTHS)))
    for _ in range(2):
        for chunk in engine._chunks:
            chunk.zero_grad_buffer()
        pipeline.train(
            engine._chunks,
            engine._placed([batch]),
            engine._stage,
            engine._rows,
            engine._head,
            lambda columns, rows: sft_loss(columns, rows, counts),
            engine.groups,
        )
    (columns,) = engine.forward([batch])
    return columns["logprobs"][: sum(LENGTHS)].cpu(), {name: grad.cpu() for name, grad in gradients_of(engine).items()}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_stays_near_bf16(models: dict[str, str], family: str, recipe: str) -> None:
    logprobs, gradients = outcome(models[family], fp8="hybrid", fp8_recipe=recipe, **TE)
    wanted, wanted_gradients = outcome(models[family], **TE)
    mean = float((logprobs - wanted).abs().mean())
    far = sorted((relative(gradients[name], wanted_gradients[name]), name) for name in wanted_gradients)
    whole = relative(flat(gradients), flat(wanted_gradients))
    print(f"fp8 {recipe} {family}: logprobs' mean error {mean:.1e} of {float(wanted.abs().mean()):.1f}, gradients' "
          f"relative error {whole:.2f} as one, {far[-1][0]:.2f} at worst, {far[-1][1]}")  # fmt: skip
    expected, expected_whole = rounding(models[family])
    assert 0 < mean < 1.6 * expected  # 0: nothing was in FP8
    assert whole < 1.6 * expected_whole


@cache
def rounding(path: str) -> tuple[float, float]:
    """What rounding weights and inputs to e4m3 alone does to transformers' model: to logprobs, and to the gradient.

    A router's near ties go the other way, so with experts the gradient is nearly another one.
    """
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **plain)
    wanted, wanted_gradient = logprobs_and_gradient(model)
    kept = ("embed_tokens.weight", "lm_head.weight", "gate.weight", "router.weight")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and not name.endswith(kept):
                weight.copy_(rounded(weight) if weight.ndim == 2 else torch.stack([rounded(part) for part in weight]))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, given: (given[0] + (rounded(given[0]) - given[0]).detach(),))
    found, gradient = logprobs_and_gradient(model)
    return float((found - wanted).abs().mean()), relative(gradient, wanted_gradient)


def rounded(tensor: Tensor) -> Tensor:
    scale = torch.finfo(torch.float8_e4m3fn).max / tensor.detach().abs().max().clamp(min=1e-12)
    return (tensor * scale).to(torch.float8_e4m3fn).to(tensor.dtype) / scale


def logprobs_and_gradient(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Of every sequence that has a second token; the gradient is of the mean."""
    model.zero_grad()
    parts = [
        model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]) for ids in sequences() if len(ids) > 1
    ]
    logprobs = torch.cat(parts)
    (-logprobs.mean()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logprobs.detach(), flat(gradients)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All of them as one."""
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors)])


def test_mxfp8_is_refused_below_blackwell(models: dict[str, str]) -> None:
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("a Blackwell GPU computes in MXFP8, so there is nothing to refuse")
    with pytest.raises(UserError, match="fp8_recipe='mxfp8' needs compute capability 10.0"):
        outcome(models["llama"], fp8="hybrid", fp8_recipe="mxfp8", **TE)

"""csrc's CUDA kernels against the same in torch, and compiled passes against plain ones, on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalign import ops
from megalign.compiled import compile_passes
from megalign.model.rotary import _rotate_halves, _rotate_pairs
from tests.test_ops import CASES, DTYPES, check_first_of_several, check_gradient, check_statistics

pytestmark = pytest.mark.cuda_only


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_torch(name: str, dtype: torch.dtype) -> None:
    check_statistics(name, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_torch(name: str, dtype: torch.dtype) -> None:
    check_gradient(name, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_several_tops_is_told(dtype: torch.dtype) -> None:
    check_first_of_several(dtype, "cuda")


ACTIVATIONS = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, eps=1e-5), (64,), (64,)),
    "zero-centred rms_norm": (lambda x, w: ops.rms_norm(x, w, eps=1e-5, zero_centered=True), (2, 64), (64,)),
    "swiglu": (lambda x, _: ops.swiglu(x), (1, 128), (1,)),
    "rotated halves": (lambda x, w: _rotate_halves(x, w.cos()[None, None], w.sin()[None, None]), (4, 80), (64,)),
    "rotated pairs": (lambda x, w: _rotate_pairs(x, w.cos()[None, None], w.sin()[None, None]), (4, 64), (64,)),
}


def with_gradients(
    function: Callable[[Tensor, Tensor], Tensor], given: list[Tensor], dtype: torch.dtype, compiles: bool
) -> list[Tensor]:
    """The output, and its gradients of what it was made of."""
    compile_passes(compiles)
    given = [tensor.to(dtype).detach().requires_grad_() for tensor in given]
    output = function(*given)
    gradients = torch.autograd.grad(output.float().pow(3).sum(), given, allow_unused=True)
    compile_passes(True)
    return [output.float(), *(gradient.float() for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_compiled_pass_is_the_plain_one_and_is_compiled_once(name: str) -> None:
    function, shape, other = ACTIVATIONS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for num_tokens in (7, 300, 64, 2):
        draw = torch.Generator("cuda").manual_seed(num_tokens)
        given = [torch.randn(*size, generator=draw, device="cuda") for size in ((num_tokens, *shape), other)]
        given = [tensor.bfloat16().float() for tensor in given]
        wanted = with_gradients(function, given, torch.float32, False)
        plain = with_gradients(function, given, torch.bfloat16, False)
        found = with_gradients(function, given, torch.bfloat16, True)
        for mine, eager, exact in zip(found, plain, wanted, strict=True):
            assert (mine - exact).norm() <= 1.1 * (eager - exact).norm() + 1e-3 * exact.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_weight_gradient_is_added_without_being_rounded_first() -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    left, right, total = (
        torch.randn(size, generator=draw, device="cuda") for size in ((96, 512), (512, 160), (96, 160))
    )
    left, right = left.bfloat16(), right.bfloat16()
    wanted = total + left.float() @ right.float()
    found = ops.add_product_(total, left.T.contiguous().T, right)
    assert found is total
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)
    assert (total - wanted).abs().max() < 0.01 * (wanted.bfloat16().float() - wanted).abs().max()

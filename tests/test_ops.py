"""csrc's operators against the same in torch, and that against fp64 autograd."""

from __future__ import annotations

import shutil
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalign import ops

CASES = {
    "plain": {"width": 2500, "num_real": 2500},
    "one block": {"width": 40, "num_real": 40},
    "padding": {"width": 1024, "num_real": 1000},
    "temperature": {"width": 2500, "num_real": 2500, "temperature": True},
    "bias and temperature": {"width": 2500, "num_real": 2490, "temperature": True, "bias": True},
    "softcap": {"width": 2500, "num_real": 2500, "softcap": 5.0},
    "all": {"width": 3001, "num_real": 2900, "temperature": True, "bias": True, "softcap": 30.0},
    "padding alone": {"width": 64, "num_real": 0},
}
ROWS = 6
DTYPES = (torch.float32, torch.bfloat16)


def case(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(logits, labels, the keywords of both operators)."""
    what = CASES[name]
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(ROWS, what["width"], generator=generator) * 4).to(dtype)
    labels = torch.randint(0, max(1, what["num_real"]), (ROWS,), generator=generator)
    labels[0 if what["num_real"] else slice(None)] = -1
    temperature = torch.rand(ROWS, generator=generator) + 0.5 if what.get("temperature") else None
    bias = torch.randn(what["width"], generator=generator) if what.get("bias") else None
    given = {"temperature": temperature, "bias": bias}
    placed = {name: None if column is None else column.to(device) for name, column in given.items()}
    return (
        logits.to(device),
        labels.to(device),
        {**placed, "num_real": what["num_real"], "softcap": what.get("softcap")},
    )


def check_statistics(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Both ways of making them."""
    logits, labels, how = case(name, dtype, device)
    assert ops.has_kernel(logits)
    for all_of_them in (False, True):
        found = ops.vocab_statistics(logits, labels, all_of_them=all_of_them, **how)
        wanted = ops.vocab_statistics_in_torch(logits, labels, all_of_them=all_of_them, **how)
        torch.testing.assert_close(found, wanted, rtol=3e-6, atol=2e-3 if all_of_them else 1e-5)


def check_gradient(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """The gradient takes the logits' place; bf16 is rounded once."""
    logits, labels, how = case(name, dtype, device)
    statistics = ops.vocab_statistics_in_torch(logits, labels, **how)
    log_sum = statistics[1].log() if how["num_real"] else torch.zeros(ROWS, device=device)
    generator = torch.Generator().manual_seed(6)
    seeds = torch.randn(2, ROWS, generator=generator).to(device)
    known = {
        "log_normaliser": statistics[0].clamp(min=-1e3) + log_sum,
        "entropy": log_sum - (statistics[2] / statistics[1]).nan_to_num(),
        "grad_logprobs": seeds[0],
    }
    for grad_entropy in (None, seeds[1]):
        wanted = ops.vocab_gradient_in_torch(logits, labels, grad_entropy=grad_entropy, **known, **how)
        given = logits.clone()
        found = ops.vocab_gradient_(given, labels, grad_entropy=grad_entropy, **known, **how)
        assert found is given and found.dtype is dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(found.float(), wanted, **tolerance)


def test_an_extension_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_OPERATORS", (*ops._OPERATORS, "not_yet_written"))
    loaded, why_not = ops._load()
    assert not loaded and "without not_yet_written; build it anew" in why_not


def test_the_extension_is_there_where_it_can_be_built() -> None:
    assert ops.LOADED or shutil.which("c++") is None, ops.WHY_NOT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_torch(name: str, dtype: torch.dtype) -> None:
    check_statistics(name, dtype)


def check_first_of_several(dtype: torch.dtype, device: str = "cpu") -> None:
    """Of entries at the top the first is told, in whatever block, warp or thread they are."""
    tops = [[0], [2499], [1, 2], [31, 32, 2000], [1023, 1024], [7, 519, 1031], range(2500)]
    logits = torch.zeros(len(tops), 2500)
    for row, columns in zip(logits, tops, strict=True):
        row[list(columns)] = 3.0
    logits = logits.to(device, dtype)
    labels = torch.zeros(len(tops), dtype=torch.int64, device=device)
    for statistics in (ops.vocab_statistics, ops.vocab_statistics_in_torch):
        first = statistics(logits, labels, num_real=2500)[ops.NAMES.index("first")]
        assert first.tolist() == [columns[0] for columns in tops]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_several_tops_is_told(dtype: torch.dtype) -> None:
    check_first_of_several(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_torch(name: str, dtype: torch.dtype) -> None:
    check_gradient(name, dtype)


@pytest.mark.parametrize("name", [name for name in CASES if name != "padding alone"])
def test_the_reference_equals_autograd_in_fp64(name: str) -> None:
    logits, labels, how = case(name, torch.float32)
    labels = labels.clamp(min=0)
    x = logits.double().requires_grad_()
    entries = x if how["bias"] is None else x + how["bias"].double()
    if how["softcap"] is not None:
        entries = how["softcap"] * torch.tanh(entries / how["softcap"])
    if how["temperature"] is not None:
        entries = entries / how["temperature"].double()[:, None]
    log_p = entries[:, : how["num_real"]].log_softmax(1)
    logprobs, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    seeds = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(7)).double()
    (logprobs * seeds[0] + entropy * seeds[1]).sum().backward()

    statistics = dict(
        zip(ops.NAMES, ops.vocab_statistics_in_torch(logits, labels, all_of_them=True, **how), strict=True)
    )
    log_normaliser = statistics["top"] + statistics["sum"].log()
    torch.testing.assert_close(
        (statistics["target"] - log_normaliser).double(), logprobs.detach(), rtol=1e-5, atol=1e-5
    )
    mine = statistics["sum"].log() - statistics["weighted"] / statistics["sum"]
    torch.testing.assert_close(mine.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    squares = statistics["squares"] / statistics["sum"].square()
    torch.testing.assert_close(squares.double(), log_p.detach().exp().square().sum(1), rtol=1e-5, atol=1e-9)
    gradient = ops.vocab_gradient_in_torch(
        logits, labels, log_normaliser=log_normaliser, entropy=mine,
        grad_logprobs=seeds[0].float(), grad_entropy=seeds[1].float(), **how,
    )  # fmt: skip
    torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_not_hidden(bad: float) -> None:
    logits, labels, how = case("plain", torch.float32)
    logits[2, 1500] = bad
    statistics = ops.vocab_statistics(logits, labels, **how)
    assert statistics[1].isfinite().tolist() == [True, True, False, True, True, True]


def test_probabilities_too_small_for_fp32_are_zero() -> None:
    logits = torch.tensor([[0.0, -1000.0, -88.0]])
    statistics = ops.vocab_statistics(logits, torch.tensor([1]), num_real=3)
    assert statistics[:, 0].tolist() == [0.0, 1.0, 0.0, -1000.0, 0.0]


def test_wrong_columns_are_refused() -> None:
    logits = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="labels must be 2 contiguous int64"):
        ops.vocab_statistics(logits, torch.zeros(3, dtype=torch.int64), num_real=8)
    with pytest.raises(RuntimeError, match="num_real is 9 of 8"):
        ops.vocab_statistics(logits, torch.zeros(2, dtype=torch.int64), num_real=9)
    with pytest.raises(RuntimeError, match="temperature must be 2"):
        ops.vocab_statistics(logits, torch.zeros(2, dtype=torch.int64), num_real=8, temperature=torch.ones(1))


# Each side the longest once, and longer than a panel of 2^22 numbers; and small ones.
SHAPES = [(40, 70, 65_000), (65_000, 70, 40), (30, 150_000, 40), (5, 7, 9), (4, 4, 4), (1, 30, 50), (3, 30, 2)]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_bf16_products_are_rounded_once(m: int, k: int, n: int) -> None:
    assert ops.multiply_bf16_in_fp32() == ops.LOADED
    generator = torch.Generator().manual_seed(8)
    left, right = torch.randn(m, k, generator=generator).bfloat16(), torch.randn(n, k, generator=generator).bfloat16()
    wanted = left.double() @ right.T.double()
    noise = {"rtol": 2**-8, "atol": 1e-5 * k**0.5}  # half a unit in the last place; fp32's sums
    torch.testing.assert_close((left @ right.T).double(), wanted, **noise)
    torch.testing.assert_close((left @ right.T.contiguous()).double(), wanted, **noise)
    out = torch.empty(m, n, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.mm(left, right.T, out=out).double(), wanted, **noise)
    bias = torch.randn(n, generator=generator).bfloat16()
    added = torch.addmm(bias, left, right.T, beta=2, alpha=0.5)
    torch.testing.assert_close(added.double(), 2 * bias.double() + 0.5 * wanted, **noise)


def test_bf16_products_have_gradients() -> None:
    ops.multiply_bf16_in_fp32()
    generator = torch.Generator().manual_seed(9)
    left, right = (torch.randn(12, 8, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    seed = torch.randn(12, 12, generator=generator).bfloat16()
    (left @ right.T).backward(seed)
    for found, wanted in ((left.grad, seed.double() @ right.double()), (right.grad, seed.T.double() @ left.double())):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=2**-8, atol=1e-5)


def test_other_products_stay_torchs() -> None:
    left, right = torch.randn(6, 5), torch.randn(5, 7)
    before = left @ right
    ops.multiply_bf16_in_fp32()
    assert torch.equal(left @ right, before)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(left.bfloat16(), torch.randn(6, 7).bfloat16())
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(left.bfloat16(), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_without_rounding_it_first(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.multiply_bf16_in_fp32()
    monkeypatch.setattr(ops, "_WIDENED", 64)  # several panels
    made = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 50, generator=made).to(dtype), torch.randn(50, 7, generator=made).to(dtype)
    before = torch.randn(9, 7, generator=made)
    total = before.clone()
    assert ops.add_product_(total, left, right) is total
    torch.testing.assert_close(total.double(), before.double() + left.double() @ right.double(), rtol=0, atol=1e-5)


def test_a_processor_with_bf16_instructions_adds_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_widens", False)
    left, right = (
        torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16() for size in ((9, 50), (50, 7))
    )
    total = torch.ones(9, 7)
    ops.add_product_(total, left, right)
    product = left.double() @ right.double()  # rounded to bf16 before it is added
    torch.testing.assert_close(total.double() - 1, product, rtol=2**-8, atol=1e-5)
    assert not torch.allclose(total.double() - 1, product, rtol=0, atol=1e-5)


def test_where_torch_computes_instead_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    assert ops.why_torch(torch.device("cpu")) is None
    assert "no kernels for meta" in ops.why_torch(torch.device("meta"))
    assert not ops.has_kernel(torch.zeros(2, dtype=torch.float64))
    if not torch.ops.megalign.has_cuda():
        assert "built without CUDA kernels, as nvcc was not there" in ops.why_torch(cuda)
    monkeypatch.setattr(ops, "LOADED", False)
    assert ops.why_torch(cuda) == ops.WHY_NOT and not ops.has_kernel(torch.zeros(2))

    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    assert ops._load() == (False, f"not built; {ops._BUILD} builds it where there is a C++ compiler")
    (tmp_path / f"_ops{EXTENSION_SUFFIXES[0]}").write_bytes(b"of another machine")
    loaded, why = ops._load()
    assert not loaded and "does not load" in why and ops._BUILD in why


# Rows of one number, less than a vector, SmolLM2's, and more than one block; 70 rows are three parts of the weight's
# gradient.
WIDTHS = (1, 7, 64, 576, 1030, 2049)
NUM_ROWS = 70
BF16 = {"rtol": 2**-8, "atol": 1e-4}  # half a unit in the last place
EPS = 1e-5


def layer_input(width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(NUM_ROWS, width, generator=generator) * 3).to(dtype)


def check_rounding(found: Tensor, wanted: Tensor) -> None:
    """The same numbers in bf16, but for the very few that fp32's last digit puts to the other side."""
    assert found.dtype is wanted.dtype and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=2**-7 if found.dtype is torch.bfloat16 else 1e-6, atol=1e-30)
    assert found.dtype is torch.float32 or (found != wanted).sum() <= found.numel() / 1000


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_equal_torch_and_fp64_autograd(width: int, dtype: torch.dtype, zero_centered: bool) -> None:
    hidden, weight = layer_input(width, dtype).requires_grad_(), layer_input(width, dtype)[0].clone().requires_grad_()
    seed = layer_input(width, dtype).flip(0)
    found = ops.rms_norm(hidden, weight, eps=EPS, zero_centered=zero_centered)
    check_rounding(found, ops.rms_norm_in_torch(hidden, weight, eps=EPS, zero_centered=zero_centered))
    found.backward(seed)

    x, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    F.rms_norm(x, (width,), 1 + w if zero_centered else w, EPS).backward(seed.double())
    assert hidden.grad.dtype is weight.grad.dtype is dtype
    if dtype is torch.float32:
        torch.testing.assert_close(hidden.grad.double(), x.grad, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-5, atol=1e-4)
        return
    torch.testing.assert_close(hidden.grad.double(), x.grad, **BF16)
    if not zero_centered:  # what the weight multiplies was rounded
        normed = ops.rms_norm_in_torch(hidden, torch.ones_like(weight), eps=EPS)
        w.grad = (normed.double() * seed.double()).sum(0)
    torch.testing.assert_close(weight.grad.double(), w.grad, **BF16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu_equals_torch_and_fp64_autograd(width: int, dtype: torch.dtype) -> None:
    gate_up, seed = layer_input(2 * width, dtype).requires_grad_(), layer_input(width, dtype)
    found = ops.swiglu(gate_up)
    check_rounding(found, ops.swiglu_in_torch(gate_up))
    found.backward(seed)
    x = gate_up.detach().double().requires_grad_()
    ops.swiglu_in_torch(x).backward(seed.double())
    assert gate_up.grad.dtype is dtype
    noise = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(gate_up.grad.double(), x.grad, **noise)


def test_swiglu_of_large_and_no_numbers() -> None:
    gates = torch.tensor([float("nan"), float("inf"), -100.0, -87.5, -80.0, 0.0, 80.0, 100.0])
    gate_up = torch.cat([gates, torch.full_like(gates, 2.0)]).requires_grad_()
    found = ops.swiglu(gate_up)
    torch.testing.assert_close(found, ops.swiglu_in_torch(gate_up), equal_nan=True, rtol=1e-6, atol=1e-35)
    found.sum().backward()
    slopes, ups = gate_up.grad.chunk(2)
    torch.testing.assert_close(slopes[2:], torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 2.0]), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(ups, F.silu(gates), equal_nan=True, rtol=1e-6, atol=1e-35)
    assert slopes[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_heads_and_of_no_rows(dtype: torch.dtype) -> None:
    """Queries are a view of what they come from; the gradient of a sum is one number, spread out."""
    rows = layer_input(3 * 2 * 12, dtype).view(NUM_ROWS, 1, 2, 36)
    weight = layer_input(12, dtype)[0].clone()
    views = [rows.clone().requires_grad_() for _ in range(2)]
    for given, norm in zip(views, (ops.rms_norm, ops.rms_norm_in_torch), strict=True):
        norm(given[..., 12:24], weight, eps=EPS).sum().backward()
    noise = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-5, "atol": 0.05}
    torch.testing.assert_close(views[0].grad, views[1].grad, **noise)
    assert views[0].grad[..., :12].count_nonzero() == 0 < views[0].grad[..., 12:24].count_nonzero()
    strided = layer_input(24, dtype).T[:20].T
    check_rounding(ops.swiglu(strided), ops.swiglu_in_torch(strided))

    nothing, learnt = torch.zeros(0, 3, 8, dtype=dtype).requires_grad_(), torch.ones(8, dtype=dtype).requires_grad_()
    ops.rms_norm(nothing, learnt, eps=EPS).sum().backward()
    assert nothing.grad.shape == (0, 3, 8) and torch.equal(learnt.grad, torch.zeros(8, dtype=dtype))
    assert ops.swiglu(nothing).shape == (0, 3, 4)


def test_a_weights_gradient_is_the_same_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    gradients = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            hidden, weight = layer_input(2049, torch.float32).requires_grad_(), torch.ones(2049).requires_grad_()
            ops.rms_norm(hidden, weight, eps=EPS).backward(layer_input(2049, torch.float32).flip(0))
            gradients.append((hidden.grad, weight.grad))
    finally:
        torch.set_num_threads(threads)
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


def test_norm_and_swiglu_are_recomputed_and_hold_no_more_than_their_input() -> None:
    gate_up, weight = layer_input(512, torch.float32).requires_grad_(), layer_input(512, torch.float32)[0].clone()
    saved: list[Tensor] = []

    def both(given: Tensor) -> Tensor:
        return ops.swiglu(ops.rms_norm(given, weight, eps=EPS))

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        both(gate_up).square().sum().backward()
    assert [tensor.numel() for tensor in saved[:4]] == [gate_up.numel(), 512, NUM_ROWS, gate_up.numel()]
    assert saved[0].data_ptr() == gate_up.data_ptr()
    wanted = gate_up.grad
    gate_up.grad = None
    checkpoint(both, gate_up, use_reentrant=False).square().sum().backward()
    assert torch.equal(gate_up.grad, wanted)
    with torch.no_grad():
        assert not both(gate_up).requires_grad


def test_norms_and_swiglu_of_other_dtypes_are_torchs() -> None:
    """A weight of another dtype too: the result has the wider one."""
    narrow, wide = layer_input(8, torch.bfloat16), layer_input(8, torch.float32)
    assert ops.rms_norm(narrow, wide[0], eps=EPS).dtype is torch.float32
    assert ops.swiglu(wide.double()).dtype is torch.float64
    with pytest.raises(RuntimeError, match="even number"):
        ops.swiglu(layer_input(7, torch.float32))
    with pytest.raises(RuntimeError, match="weight must be 8 numbers"):
        ops.rms_norm(wide, torch.ones(7), eps=EPS)

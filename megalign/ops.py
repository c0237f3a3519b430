"""What csrc/ computes, and the same in torch: the reference, and what runs where the extension was not built.

The sole importer of the extension. `setup.py` builds it where torch and a C++ compiler are at hand, and CUDA's kernels
with it where torch has CUDA and nvcc is there.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megalign.compiled import one_pass

NAMES = ("top", "sum", "weighted", "target", "first", "logits", "squares")
"""The rows of `vocab_statistics`, of x = a row's entries: max x; sum e^(x - top); sum e^(x - top) (x - top); x at the
label, 0 without one; the first column with the top; and, where all are asked for, sum x; sum e^(2 (x - top)).
"""
NUM_PLAIN = NAMES.index("logits")


def vocab_statistics(
    logits: Tensor,  # [n, V / tp] fp32 or bf16, straight from the matrix product
    labels: Tensor,  # [n] int64 column, -1 where the label is not among them
    *,
    num_real: int,  # columns at or past it are padding: probability 0
    temperature: Tensor | None = None,  # [n] float32
    bias: Tensor | None = None,  # [V / tp]
    softcap: float | None = None,
    all_of_them: bool = False,
) -> Tensor:
    """[5, n], or [7, n] with all of them: NAMES, float32, of the real columns alone.

    An entry is (logit + bias), capped as softcap * tanh(entry / softcap), over the row's temperature. A tensor rank
    without a real column has -inf, and zeros.
    """
    if has_kernel(logits):
        given = _columns(temperature, bias)
        return torch.ops.megalign.vocab_statistics(
            logits, labels.contiguous(), *given, softcap or 0.0, num_real, all_of_them
        )
    return vocab_statistics_in_torch(
        logits,
        labels,
        num_real=num_real,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        all_of_them=all_of_them,
    )


def vocab_gradient_(
    logits: Tensor,  # [n, V / tp]; becomes the gradient
    labels: Tensor,
    *,
    log_normaliser: Tensor,  # [n] log sum_v e^x over the whole vocabulary
    entropy: Tensor,  # [n]
    grad_logprobs: Tensor,  # [n] float32
    grad_entropy: Tensor | None,  # [n]
    num_real: int,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The gradient of the raw logits, written over them, 0 for padding.

    With p = softmax(x): d logprob = onehot(label) - p, d entropy = -p (log p + entropy), each over the temperature and
    times the cap's slope 1 - (capped / softcap)^2.
    """
    given = {"num_real": num_real, "temperature": temperature, "bias": bias, "softcap": softcap}
    if not has_kernel(logits):
        gradient = vocab_gradient_in_torch(
            logits,
            labels,
            log_normaliser=log_normaliser,
            entropy=entropy,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            **given,
        )
        return logits.copy_(gradient)
    columns = (log_normaliser, entropy, grad_logprobs, grad_entropy)
    torch.ops.megalign.vocab_gradient_(
        logits, labels.contiguous(), *_columns(temperature, bias), softcap or 0.0, num_real, *_columns(*columns)
    )
    return logits


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """normed * weight, normed = hidden / sqrt(mean(hidden^2) + eps) of the last dimension; zero-centred 1 + weight.

    The mean is fp32. Normed is rounded to hidden's dtype before the weight, but zero-centred, and in a compiled pass,
    once, at the end.
    """
    if hidden.device.type == "cpu" and has_kernel(hidden) and weight.dtype is hidden.dtype:
        return _RmsNorm.apply(hidden, weight, eps, zero_centered)
    return rms_norm_in_torch(hidden, weight, eps=eps, zero_centered=zero_centered)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the last dimension's first half, rounded to its dtype, times the second."""
    if gate_up.device.type == "cpu" and has_kernel(gate_up):
        return _SwiGlu.apply(gate_up)
    return swiglu_in_torch(gate_up)


@one_pass
def rms_norm_in_torch(hidden: Tensor, weight: Tensor, *, eps: float, zero_centered: bool = False) -> Tensor:
    """`rms_norm`, pass by pass."""
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=eps)
    if zero_centered:  # Gemma's, which is rounded once, at the end
        return (normed * (1.0 + weight.float())).to(hidden.dtype)
    # Rounded before the weight, as transformers does: bf16 must not round twice.
    return normed.to(hidden.dtype) * weight


@one_pass
def swiglu_in_torch(gate_up: Tensor) -> Tensor:
    """`swiglu`, pass by pass."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, eps, zero_centered):  # noqa: ANN001, ANN205
        normed, rstd = torch.ops.megalign.rms_norm(hidden, weight, eps, zero_centered)
        ctx.save_for_backward(hidden, weight, rstd)
        ctx.zero_centered = zero_centered
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return *torch.ops.megalign.rms_norm_backward(grad, *ctx.saved_tensors, ctx.zero_centered), None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):  # noqa: ANN001, ANN205
        ctx.save_for_backward(gate_up)
        return torch.ops.megalign.swiglu(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return torch.ops.megalign.swiglu_backward(grad, *ctx.saved_tensors)


def vocab_statistics_in_torch(
    logits: Tensor,
    labels: Tensor,
    *,
    num_real: int,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    all_of_them: bool = False,
) -> Tensor:
    """`vocab_statistics`, pass by pass."""
    if num_real == 0:
        table = logits.new_zeros(len(NAMES), len(logits), dtype=torch.float32)
        table[0] = -torch.inf
        return table if all_of_them else table[:NUM_PLAIN]
    x = _entries(logits[:, :num_real], temperature, None if bias is None else bias[:num_real], softcap)
    top, first = x.max(dim=1)
    target = x.gather(1, labels.clamp(min=0)[:, None])[:, 0].where(labels >= 0, 0.0)
    below = x - top[:, None]
    exponentials = below.exp()
    rows = [top, exponentials.sum(1), (exponentials * below).sum(1), target, first.float()]
    if all_of_them:
        rows += [x.sum(1), exponentials.square().sum(1)]
    return torch.stack(rows)


def vocab_gradient_in_torch(
    logits: Tensor,
    labels: Tensor,
    *,
    log_normaliser: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    num_real: int,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What `vocab_gradient_` writes, as a tensor of its own, [n, V / tp] float32."""
    gradient = logits.new_zeros(logits.shape, dtype=torch.float32)
    if num_real == 0:
        return gradient
    x = _entries(logits[:, :num_real], temperature, None if bias is None else bias[:num_real], softcap)
    log_p = x - log_normaliser[:, None]
    p = log_p.exp()
    real = -p * grad_logprobs[:, None]
    if grad_entropy is not None:
        real -= p * (log_p + entropy[:, None]) * grad_entropy[:, None]
    real.scatter_add_(1, labels.clamp(min=0)[:, None], grad_logprobs.where(labels >= 0, 0.0)[:, None])
    if temperature is not None:
        real /= temperature[:, None]
    if softcap is not None:
        capped = x if temperature is None else x * temperature[:, None]
        real *= 1 - (capped / softcap).square()
    gradient[:, :num_real] = real
    return gradient


def has_kernel(tensor: Tensor) -> bool:
    """Whether the extension has kernels for such a tensor."""
    return tensor.dtype in (torch.float32, torch.bfloat16) and why_torch(tensor.device) is None


def why_torch(device: torch.device) -> str | None:
    """Why torch computes there what csrc/ could; None where csrc/ does."""
    if not LOADED:
        return WHY_NOT
    if device.type == "cuda" and not torch.ops.megalign.has_cuda():
        return f"built without CUDA kernels, as nvcc was not there; {_BUILD} builds them where it is"
    return None if device.type in ("cpu", "cuda") else f"it has no kernels for {device.type}"


def multiply_bf16_in_fp32() -> bool:
    """From now on this process widens bf16 matrices of its CPU for a product and rounds once; says whether it can.

    For processors without bf16 instructions, where torch's own products take five to ten times fp32's time.
    """
    global _widens
    if LOADED:
        torch.ops.megalign.multiply_bf16_in_fp32()
    _widens = LOADED
    return LOADED


def add_product_(
    total: Tensor,  # [m, n] float32
    left: Tensor,  # [m, k] fp32 or bf16
    right: Tensor,  # [k, n] of the same dtype
) -> Tensor:
    """total += left @ right; on a GPU, and where a CPU widens bf16, the sum is rounded to fp32 only."""
    if left.dtype is torch.float32:
        return total.addmm_(left, right)
    if left.is_cuda:
        return torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    if not _widens:
        return total.add_(left @ right)
    step = max(1, _WIDENED // max(left.shape[0], right.shape[1], 1))
    for a, b in zip(left.split(step, dim=1), right.split(step), strict=True):
        total.addmm_(a.float(), b.float())
    return total


def _entries(logits: Tensor, temperature: Tensor | None, bias: Tensor | None, softcap: float | None) -> Tensor:
    x = logits.float()
    if bias is not None:
        x = x + bias.float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x if temperature is None else x / temperature[:, None]


def _columns(*columns: Tensor | None) -> list[Tensor | None]:
    return [None if column is None else column.detach().float().contiguous() for column in columns]


_BUILD = "pip install --no-build-isolation -e ."
_OPERATORS = (
    "has_cuda",
    "multiply_bf16_in_fp32",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "vocab_gradient_",
    "vocab_statistics",
)


def _load() -> tuple[bool, str]:
    """(whether it is there, why not)."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_ops{suffix}")
        if not path.exists():
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:  # built for another torch, or another machine
            return False, f"{path.name} does not load ({error}); build it anew: {_BUILD}"
        absent = [name for name in _OPERATORS if not hasattr(torch.ops.megalign, name)]
        if absent:
            return False, f"{path.name} is of older sources, without {absent[0]}; build it anew: {_BUILD}"
        return True, ""
    return False, f"not built; {_BUILD} builds it where there is a C++ compiler"


LOADED, WHY_NOT = _load()
_widens = False  # multiply_bf16_in_fp32 was called
_WIDENED = 2**22  # numbers of one matrix that are widened at once: 16 MB

// Matrix products of bf16 matrices on processors that have no instructions for them: torch's own take five to ten times
// as long there as fp32's do. Operands are widened panel by panel, multiplied and added up in fp32, and rounded once.
#include <ATen/CPUFunctions.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

namespace megalign {
namespace {

using at::Tensor;

constexpr int64_t kPanel = 1 << 22; // numbers of the larger operand that are widened at once: 16 MB

bool is_for_us(const Tensor& left, const Tensor& right) {
  // A product with a vector reads each number once: nothing is gained by widening it.
  return left.scalar_type() == at::kBFloat16 && right.scalar_type() == at::kBFloat16 && left.dim() == 2 &&
      right.dim() == 2 && left.size(1) == right.size(0) && std::min(left.size(0), right.size(1)) >= 4;
}

Tensor wide(const Tensor& narrow) { return narrow.to(at::kFloat); }

// left [m, k] right [k, n] -> out [m, n] of any float type, cut along whichever of the three is longest.
void multiply(const Tensor& left, const Tensor& right, Tensor& out) {
  const int64_t m = left.size(0), k = left.size(1), n = right.size(1), longest = std::max({m, k, n});
  const int64_t other = longest == k ? std::max(m, n) : k;
  const int64_t step = std::max<int64_t>(64, kPanel / std::max<int64_t>(1, other));
  if (longest == n) {
    const Tensor whole = wide(left);
    for (int64_t first = 0; first < n; first += step) {
      const int64_t size = std::min(step, n - first);
      out.narrow(1, first, size).copy_(at::cpu::mm(whole, wide(right.narrow(1, first, size))));
    }
  } else if (longest == m) {
    const Tensor whole = wide(right);
    for (int64_t first = 0; first < m; first += step) {
      const int64_t size = std::min(step, m - first);
      out.narrow(0, first, size).copy_(at::cpu::mm(wide(left.narrow(0, first, size)), whole));
    }
  } else {
    Tensor total;
    for (int64_t first = 0; first < k; first += step) {
      const int64_t size = std::min(step, k - first);
      const Tensor a = wide(left.narrow(1, first, size)), b = wide(right.narrow(0, first, size));
      if (first == 0)
        total = at::cpu::mm(a, b);
      else
        at::cpu::addmm_(total, a, b);
    }
    out.copy_(total);
  }
}

Tensor mm(const Tensor& left, const Tensor& right) {
  if (!is_for_us(left, right)) return at::cpu::mm(left, right);
  Tensor out = at::cpu::empty({left.size(0), right.size(1)}, left.options());
  multiply(left, right, out);
  return out;
}

Tensor& mm_out(const Tensor& left, const Tensor& right, Tensor& out) {
  const bool fits = out.dim() == 2 && out.size(0) == left.size(0) && out.size(1) == right.size(1);
  if (!is_for_us(left, right) || !fits || out.scalar_type() != at::kBFloat16) return at::cpu::mm_outf(left, right, out);
  multiply(left, right, out);
  return out;
}

Tensor addmm(
    const Tensor& bias, const Tensor& left, const Tensor& right, const at::Scalar& beta, const at::Scalar& alpha) {
  if (!is_for_us(left, right) || bias.scalar_type() != at::kBFloat16)
    return at::cpu::addmm(bias, left, right, beta, alpha);
  Tensor total = at::cpu::empty({left.size(0), right.size(1)}, left.options().dtype(at::kFloat));
  multiply(left, right, total);
  if (alpha.toDouble() != 1) total.mul_(alpha);
  if (beta.toDouble() != 0) total.add_(bias, beta);
  return total.to(at::kBFloat16);
}

struct Silence : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// For the whole process, the rollout engine's products included; a second call changes nothing.
void multiply_bf16_in_fp32() {
  static std::optional<torch::Library> library;
  if (library) return;
  Silence silence; // torch warns of kernels that replace its own, which is what is wanted here
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  library.emplace(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("mm", &mm);
  library->impl("mm.out", &mm_out);
  library->impl("addmm", &addmm);
}

} // namespace

TORCH_LIBRARY_FRAGMENT(megalign, library) {
  library.def("multiply_bf16_in_fp32() -> ()", &multiply_bf16_in_fp32);
}

} // namespace megalign

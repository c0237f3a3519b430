// silu(gate) * up of rows [gate, up], forward and backward in one pass each.
//
// silu(gate) is rounded to the tensor's type before the product, as torch does; the backward is fp32, rounded once.
// megalign/ops.py has the same in torch, which is the reference.
#include "vectors.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace megalign {
namespace {

using at::Tensor;

constexpr int64_t kWork = 1 << 13; // products that are worth a thread

// 1 / (1 + e^-x) and 1 / (1 + e^x), neither by subtraction.
struct Sigmoid {
  float at, mirrored;
};

INLINE Sigmoid sigmoid(float x) {
  const float small = exponential(-std::fabs(x)), large_share = 1.0f / (1.0f + small);
  const float small_share = small * large_share;
  return x < 0 ? Sigmoid{small_share, large_share} : Sigmoid{large_share, small_share};
}

template <typename T>
EACH_PROCESSOR void multiply(const T* gate, const T* up, T* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float x = widened(gate[i]);
    narrow_to(y + i, rounded<T>(x * sigmoid(x).at) * widened(up[i]));
  }
}

// silu'(x) = s (1 + x (1 - s)) with s the sigmoid.
template <typename T>
EACH_PROCESSOR void differentiate(
    const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float x = widened(gate[i]), g = widened(grad[i]);
    const Sigmoid s = sigmoid(x);
    narrow_to(grad_gate + i, g * widened(up[i]) * (s.at * (1.0f + x * s.mirrored)));
    narrow_to(grad_up + i, g * rounded<T>(x * s.at));
  }
}

template <typename T>
void forward(int64_t count, int64_t half, const void* gate_up, void* y) {
  const T* from = static_cast<const T*>(gate_up);
  T* to = static_cast<T*>(y);
  at::parallel_for(0, count, std::max<int64_t>(1, kWork / half), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      multiply(from + 2 * row * half, from + (2 * row + 1) * half, to + row * half, half);
  });
}

template <typename T>
void backward(int64_t count, int64_t half, const void* grad, const void* gate_up, void* grad_gate_up) {
  const T *g = static_cast<const T*>(grad), *from = static_cast<const T*>(gate_up);
  T* to = static_cast<T*>(grad_gate_up);
  at::parallel_for(0, count, std::max<int64_t>(1, kWork / half), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t gates = 2 * row * half, ups = gates + half;
      differentiate(g + row * half, from + gates, from + ups, to + gates, to + ups, half);
    }
  });
}

int64_t half_of(const Tensor& gate_up) {
  const auto type = gate_up.scalar_type();
  TORCH_CHECK(gate_up.is_cpu(), "swiglu's kernel is for CPUs");
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "gate_up must be fp32 or bf16, not ", type);
  TORCH_CHECK(
      gate_up.dim() >= 1 && gate_up.size(-1) > 0 && gate_up.size(-1) % 2 == 0,
      "gate_up must have rows of an even number of numbers");
  return gate_up.size(-1) / 2;
}

Tensor swiglu(const Tensor& given) {
  const int64_t half = half_of(given);
  const Tensor gate_up = given.contiguous();
  auto sizes = gate_up.sizes().vec();
  sizes.back() = half;
  Tensor y = at::empty(sizes, gate_up.options());
  const auto work = gate_up.scalar_type() == at::kFloat ? &forward<float> : &forward<uint16_t>;
  work(y.numel() / half, half, gate_up.const_data_ptr(), y.mutable_data_ptr());
  return y;
}

Tensor swiglu_backward(const Tensor& grad_y, const Tensor& given) {
  const int64_t half = half_of(given);
  TORCH_CHECK(
      grad_y.scalar_type() == given.scalar_type() && grad_y.is_cpu() && grad_y.numel() * 2 == given.numel(),
      "grad_y must be half of gate_up");
  const Tensor grad = grad_y.contiguous(), gate_up = given.contiguous();
  Tensor grad_gate_up = at::empty_like(gate_up);
  const auto work = gate_up.scalar_type() == at::kFloat ? &backward<float> : &backward<uint16_t>;
  work(
      grad.numel() / half, half, grad.const_data_ptr(), gate_up.const_data_ptr(), grad_gate_up.mutable_data_ptr());
  return grad_gate_up;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(megalign, library) {
  library.def("swiglu(Tensor gate_up) -> Tensor", &swiglu);
  library.def("swiglu_backward(Tensor grad_y, Tensor gate_up) -> Tensor", &swiglu_backward);
}

} // namespace megalign

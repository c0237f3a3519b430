// Root-mean-square norms of rows, forward and backward in one look at memory each: torch takes about ten.
//
// normed = x / sqrt(mean(x^2) + eps) in fp32. y = normed * weight, with normed rounded to x's type first; zero-centred:
// y = normed * (1 + weight), rounded once. megalign/ops.py has the same in torch, which is the reference.
#include "vectors.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace megalign {
namespace {

using at::Tensor;

constexpr int64_t kBlock = 1024;    // numbers of a row that are added up in fp32; blocks in fp64
constexpr int64_t kWork = 1 << 14;  // numbers that are worth a thread
constexpr int64_t kMaxParts = 256;  // of the weight's gradient

template <typename T>
EACH_PROCESSOR float squares(const T* x, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += widened(x[i]) * widened(x[i]);
  return sum;
}

template <typename T, bool kZeroCentered>
INLINE float scale(T weight) {
  return kZeroCentered ? 1.0f + widened(weight) : widened(weight);
}

template <typename T, bool kZeroCentered>
EACH_PROCESSOR float products(const T* grad, const T* x, const T* weight, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += widened(grad[i]) * scale<T, kZeroCentered>(weight[i]) * widened(x[i]);
  return sum;
}

template <typename T, bool kZeroCentered>
EACH_PROCESSOR void normalise(const T* x, const T* weight, float rstd, T* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const float normed = widened(x[i]) * rstd;
    narrow_to(y + i, (kZeroCentered ? normed : rounded<T>(normed)) * scale<T, kZeroCentered>(weight[i]));
  }
}

// `mean` is that of grad * scale * normed over the row.
template <typename T, bool kZeroCentered>
EACH_PROCESSOR void differentiate(
    const T* grad, const T* x, const T* weight, float rstd, float mean, T* grad_x, float* grad_weight, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float normed = widened(x[i]) * rstd;
    grad_weight[i] += widened(grad[i]) * (kZeroCentered ? normed : rounded<T>(normed));
    narrow_to(grad_x + i, rstd * (widened(grad[i]) * scale<T, kZeroCentered>(weight[i]) - normed * mean));
  }
}

EACH_PROCESSOR void add(float* to, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

template <typename Sum>
double in_blocks(int64_t size, const Sum& sum) {
  double total = 0;
  for (int64_t first = 0; first < size; first += kBlock) total += sum(first, std::min(kBlock, size - first));
  return total;
}

struct Rows {
  int64_t count, width;
};

template <typename T, bool kZeroCentered>
void forward(const Rows& rows, const T* x, const T* weight, float eps, T* y, float* rstd) {
  const int64_t width = rows.width;
  at::parallel_for(0, rows.count, std::max<int64_t>(1, kWork / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * width;
      const double sum = in_blocks(width, [&](int64_t first, int64_t size) { return squares(from + first, size); });
      rstd[row] = 1.0f / std::sqrt(static_cast<float>(sum / width) + eps);
      normalise<T, kZeroCentered>(from, weight, rstd[row], y + row * width, width);
    }
  });
}

// The weight's gradient is added up part by part of the rows, and the parts in their order: the same numbers for any
// number of threads.
template <typename T, bool kZeroCentered>
Tensor backward(const Rows& rows, const T* grad, const T* x, const T* weight, const float* rstd, T* grad_x) {
  const int64_t width = rows.width, in_part = std::max<int64_t>(32, (rows.count + kMaxParts - 1) / kMaxParts);
  const int64_t parts = std::max<int64_t>(1, (rows.count + in_part - 1) / in_part);
  Tensor sums = at::zeros({parts, width}, at::kFloat);
  float* grad_weight = sums.mutable_data_ptr<float>();
  at::parallel_for(0, parts, std::max<int64_t>(1, kWork / (in_part * width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * in_part; row < std::min(end * in_part, rows.count); ++row) {
      const T *g = grad + row * width, *from = x + row * width;
      const double sum = in_blocks(width, [&](int64_t first, int64_t size) {
        return products<T, kZeroCentered>(g + first, from + first, weight + first, size);
      });
      const float mean = static_cast<float>(sum / width) * rstd[row];
      float* part = grad_weight + row / in_part * width;
      differentiate<T, kZeroCentered>(g, from, weight, rstd[row], mean, grad_x + row * width, part, width);
    }
  });
  for (int64_t part = 1; part < parts; ++part) add(grad_weight, grad_weight + part * width, width);
  return sums[0];
}

Rows rows_of(const Tensor& x, const Tensor& weight) {
  const auto type = x.scalar_type();
  TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "rms_norm's kernel is for CPUs");
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "x must be fp32 or bf16, not ", type);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, "x must have rows of at least one number");
  TORCH_CHECK(
      weight.scalar_type() == type && weight.dim() == 1 && weight.size(0) == x.size(-1),
      "weight must be ", x.size(-1), " numbers of x's type");
  return {x.numel() / x.size(-1), x.size(-1)};
}

template <typename T>
const T* numbers(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename Work>
void for_type(const Tensor& x, bool zero_centered, const Work& work) {
  const auto with = [&](auto number) {
    using T = decltype(number);
    zero_centered ? work(T(), std::true_type()) : work(T(), std::false_type());
  };
  x.scalar_type() == at::kFloat ? with(float()) : with(uint16_t());
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& given, const Tensor& weights, double eps, bool zero_centered) {
  const Rows rows = rows_of(given, weights);
  const Tensor x = given.contiguous(), weight = weights.contiguous(); // heads of queries are views
  Tensor y = at::empty_like(x), rstd = at::empty({rows.count}, at::kFloat);
  for_type(x, zero_centered, [&](auto number, auto centered) {
    using T = decltype(number);
    forward<T, centered.value>(
        rows, numbers<T>(x), numbers<T>(weight), static_cast<float>(eps), static_cast<T*>(y.mutable_data_ptr()),
        rstd.mutable_data_ptr<float>());
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_y, const Tensor& given, const Tensor& weights, const Tensor& rstd, bool zero_centered) {
  const Rows rows = rows_of(given, weights);
  TORCH_CHECK(
      grad_y.sizes() == given.sizes() && grad_y.scalar_type() == given.scalar_type() && grad_y.is_cpu(),
      "grad_y must be as x is");
  TORCH_CHECK(
      rstd.scalar_type() == at::kFloat && rstd.is_contiguous() && rstd.numel() == rows.count && rstd.is_cpu(),
      "rstd must be ", rows.count, " contiguous fp32 numbers");
  const Tensor grad = grad_y.contiguous(), x = given.contiguous(), weight = weights.contiguous();
  Tensor grad_x = at::empty_like(x), grad_weight;
  for_type(x, zero_centered, [&](auto number, auto centered) {
    using T = decltype(number);
    grad_weight = backward<T, centered.value>(
        rows, numbers<T>(grad), numbers<T>(x), numbers<T>(weight), rstd.const_data_ptr<float>(),
        static_cast<T*>(grad_x.mutable_data_ptr()));
  });
  return {grad_x, grad_weight.to(weight.scalar_type(), false, true)};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(megalign, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centered) -> (Tensor, Tensor)", &rms_norm);
  library.def(
      "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, bool zero_centered) -> (Tensor, Tensor)",
      &rms_norm_backward);
}

} // namespace megalign

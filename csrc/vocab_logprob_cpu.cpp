// The CPU's kernels: a row is read once, in blocks that stay in the first cache; rows are shared out to torch's threads.
#include "vectors.h"
#include "vocab_logprob.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace megalign {
namespace {

constexpr int kBlock = 1024;

// By its series near 0, where 1 - 2 / (e^2x + 1) would lose the digits.
INLINE float hyperbolic_tangent(float x) {
  const float square = x * x;
  const float series =
      x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
  const float bounded = std::min(std::max(x, -15.0f), 15.0f);
  const float whole = 1.0f - 2.0f / (exponential(2.0f * bounded) + 1.0f);
  return std::fabs(x) < 0.3f ? series : (x != x ? x : whole);
}

EACH_PROCESSOR void widen(const uint16_t* from, float* to, int size) {
  for (int i = 0; i < size; ++i) to[i] = widened(from[i]);
}

EACH_PROCESSOR void narrow(const float* from, uint16_t* to, int size) {
  for (int i = 0; i < size; ++i) narrow_to(to + i, from[i]);
}

EACH_PROCESSOR void add(float* x, const float* bias, int size) {
  for (int i = 0; i < size; ++i) x[i] += bias[i];
}

EACH_PROCESSOR void cap(float* x, float softcap, int size) {
  for (int i = 0; i < size; ++i) x[i] = softcap * hyperbolic_tangent(x[i] / softcap);
}

EACH_PROCESSOR void divide(float* x, float by, int size) {
  for (int i = 0; i < size; ++i) x[i] /= by;
}

EACH_PROCESSOR float largest(const float* x, int size) {
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int i = 0; i < size; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

struct Sums {
  float sum = 0, weighted = 0, logits = 0, squares = 0;
};

EACH_PROCESSOR void add_up(const float* x, float top, int size, Sums* sums) {
  float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int i = 0; i < size; ++i) {
    const float below = x[i] - top, value = exponential(below);
    sum += value;
    weighted += value * below;
  }
  sums->sum = sum;
  sums->weighted = weighted;
}

EACH_PROCESSOR void add_up_all(const float* x, float top, int size, Sums* sums) {
  float sum = 0, weighted = 0, logits = 0, squares = 0;
#pragma omp simd reduction(+ : sum, weighted, logits, squares)
  for (int i = 0; i < size; ++i) {
    const float below = x[i] - top, value = exponential(below);
    sum += value;
    weighted += value * below;
    logits += x[i];
    squares += value * value;
  }
  *sums = {sum, weighted, logits, squares};
}

EACH_PROCESSOR void differentiate(const float* x, float normaliser, float logprob, float* out, int size) {
  for (int i = 0; i < size; ++i) out[i] = -exponential(x[i] - normaliser) * logprob;
}

EACH_PROCESSOR void differentiate_both(
    const float* x, float normaliser, float logprob, float entropy, float grad_entropy, float* out, int size) {
  for (int i = 0; i < size; ++i) {
    const float log_p = x[i] - normaliser;
    out[i] = -exponential(log_p) * (logprob + grad_entropy * (log_p + entropy));
  }
}

// d capped / d uncapped = 1 - (capped / softcap)^2; x is the capped logit over its temperature.
EACH_PROCESSOR void through_cap(const float* x, float temperature, float softcap, float* gradient, int size) {
  for (int i = 0; i < size; ++i) {
    const float share = x[i] * temperature / softcap;
    gradient[i] *= 1.0f - share * share;
  }
}

const float* as_floats(const float* raw, float*, int) { return raw; }

const float* as_floats(const c10::BFloat16* raw, float* buffer, int size) {
  widen(reinterpret_cast<const uint16_t*>(raw), buffer, size);
  return buffer;
}

void store(const float* values, float* to, int size) { std::copy(values, values + size, to); }

void store(const float* values, c10::BFloat16* to, int size) {
  narrow(values, reinterpret_cast<uint16_t*>(to), size);
}

// Entries first .. first + size of row `row`; in `buffer` unless they are the raw logits themselves.
template <typename T>
const float* entries(const Rows& rows, int64_t row, const T* raw, int64_t first, int size, float* buffer) {
  const float* x = as_floats(raw + first, buffer, size);
  if (!rows.bias && !rows.temperature && rows.softcap == 0) return x;
  if (x != buffer) std::copy(x, x + size, buffer);
  if (rows.bias) add(buffer, rows.bias + first, size);
  if (rows.softcap != 0) cap(buffer, rows.softcap, size);
  if (rows.temperature) divide(buffer, rows.temperature[row], size);
  return buffer;
}

template <typename T>
void row_statistics(const Rows& rows, int64_t row, const T* raw, float* table, bool all) {
  float buffer[kBlock];
  const int64_t label = rows.labels[row];
  float top = -std::numeric_limits<float>::infinity(), target = 0;
  double sum = 0, weighted = 0, logits = 0, squares = 0;
  int64_t first_of_top = 0;
  for (int64_t first = 0; first < rows.num_real; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, rows.num_real - first));
    const float* x = entries(rows, row, raw, first, size, buffer);
    const float higher = largest(x, size);
    if (higher > top) {
      if (first > 0) { // all that was added up was in units of exp(top)
        const double down = static_cast<double>(top) - higher, scale = std::exp(down);
        weighted = sum > 0 ? scale * (weighted + down * sum) : 0;
        sum *= scale;
        squares *= scale * scale;
      }
      top = higher;
      first_of_top = first + (std::find(x, x + size, top) - x);
    }
    Sums sums;
    all ? add_up_all(x, top, size, &sums) : add_up(x, top, size, &sums);
    sum += sums.sum;
    weighted += sums.weighted;
    logits += sums.logits;
    squares += sums.squares;
    if (label >= first && label < first + size) target = x[label - first];
  }
  const int64_t n = rows.count;
  table[kTop * n + row] = top;
  table[kSum * n + row] = static_cast<float>(sum);
  table[kWeighted * n + row] = static_cast<float>(weighted);
  table[kTarget * n + row] = target;
  table[kFirst * n + row] = static_cast<float>(first_of_top);
  if (!all) return;
  table[kLogits * n + row] = static_cast<float>(logits);
  table[kSquares * n + row] = static_cast<float>(squares);
}

template <typename T>
void row_gradient(const Rows& rows, int64_t row, const Gradient& given, T* raw) {
  float buffer[kBlock], gradient[kBlock];
  const int64_t label = rows.labels[row];
  const float temperature = rows.temperature ? rows.temperature[row] : 1.0f;
  const float logprob = given.grad_logprobs[row], normaliser = given.log_normaliser[row];
  for (int64_t first = 0; first < rows.num_real; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, rows.num_real - first));
    const float* x = entries(rows, row, raw, first, size, buffer);
    if (given.grad_entropy)
      differentiate_both(x, normaliser, logprob, given.entropy[row], given.grad_entropy[row], gradient, size);
    else
      differentiate(x, normaliser, logprob, gradient, size);
    if (label >= first && label < first + size) gradient[label - first] += logprob;
    if (rows.temperature) divide(gradient, temperature, size);
    if (rows.softcap != 0) through_cap(x, temperature, rows.softcap, gradient, size);
    store(gradient, raw + first, size);
  }
  std::fill(raw + rows.num_real, raw + rows.width, T(0));
}

template <typename Work>
void for_each_row(const Rows& rows, const Work& work) {
  at::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) work(row);
  });
}

} // namespace

template <typename T>
void vocab_statistics_cpu(const Rows& rows, const T* logits, float* table, bool all) {
  for_each_row(rows, [&](int64_t row) { row_statistics(rows, row, logits + row * rows.stride, table, all); });
}

template <typename T>
void vocab_gradient_cpu(const Rows& rows, const Gradient& given, T* logits) {
  for_each_row(rows, [&](int64_t row) { row_gradient(rows, row, given, logits + row * rows.stride); });
}

template void vocab_statistics_cpu(const Rows&, const float*, float*, bool);
template void vocab_statistics_cpu(const Rows&, const c10::BFloat16*, float*, bool);
template void vocab_gradient_cpu(const Rows&, const Gradient&, float*);
template void vocab_gradient_cpu(const Rows&, const Gradient&, c10::BFloat16*);

} // namespace megalign

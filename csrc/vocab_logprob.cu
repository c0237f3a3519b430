// The GPU's kernels: one block of threads a row. No header of torch: nvcc alone compiles this file.
#include "vocab_logprob.h"
#include "vocab_logprob_cuda.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>

namespace megalign {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;

__device__ float load(const float* at) { return *at; }
__device__ float load(const __nv_bfloat16* at) { return __bfloat162float(*at); }
__device__ void store(float value, float* at) { *at = value; }
__device__ void store(float value, __nv_bfloat16* at) { *at = __float2bfloat16_rn(value); }

template <typename T>
__device__ float entry(const Rows& rows, const T* raw, int64_t index, float temperature) {
  float x = load(raw + index);
  if (rows.bias) x += rows.bias[index];
  if (rows.softcap != 0) x = rows.softcap * tanhf(x / rows.softcap);
  return rows.temperature ? x / temperature : x;
}

// Sums in units of exp(top): what a thread, a warp and a block know of a row.
struct Partial {
  float top = -INFINITY, sum = 0, weighted = 0, logits = 0, squares = 0;
  int first = 0; // where the top is, the first of several

  __device__ void rescale(float higher) {
    if (top == -INFINITY) {
      top = higher;
      return;
    }
    const float down = top - higher, scale = expf(down);
    weighted = scale * (weighted + down * sum);
    sum *= scale;
    squares *= scale * scale;
    top = higher;
  }

  __device__ void add(float x, int index) {
    if (x > top) {
      rescale(x);
      first = index;
    }
    const float below = x - top, value = expf(below);
    sum += value;
    weighted += value * below;
    logits += x;
    squares += value * value;
  }

  __device__ void merge(Partial other) {
    if (other.top > top || (other.top == top && other.first < first)) first = other.first;
    const float higher = fmaxf(top, other.top);
    if (higher != -INFINITY) {
      if (top != higher) rescale(higher);
      if (other.top != higher) other.rescale(higher);
    }
    sum += other.sum;
    weighted += other.weighted;
    logits += other.logits;
    squares += other.squares;
  }

  __device__ Partial of_lane(int distance) const {
    Partial other;
    other.top = __shfl_down_sync(0xffffffffu, top, distance);
    other.sum = __shfl_down_sync(0xffffffffu, sum, distance);
    other.weighted = __shfl_down_sync(0xffffffffu, weighted, distance);
    other.logits = __shfl_down_sync(0xffffffffu, logits, distance);
    other.squares = __shfl_down_sync(0xffffffffu, squares, distance);
    other.first = __shfl_down_sync(0xffffffffu, first, distance);
    return other;
  }

  __device__ void merge_warp() {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) merge(of_lane(distance));
  }
};

template <typename T>
__global__ void statistics_kernel(Rows rows, const T* logits, float* table, bool all) {
  __shared__ Partial of_warps[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  const T* raw = logits + row * rows.stride;
  const float temperature = rows.temperature ? rows.temperature[row] : 1.0f;
  Partial mine;
  for (int64_t index = threadIdx.x; index < rows.num_real; index += kThreads)
    mine.add(entry(rows, raw, index, temperature), static_cast<int>(index));
  mine.merge_warp();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  mine = threadIdx.x < kThreads / kWarp ? of_warps[threadIdx.x] : Partial();
  mine.merge_warp();
  if (threadIdx.x > 0) return;
  const int64_t label = rows.labels[row], n = rows.count;
  table[kTop * n + row] = mine.top;
  table[kSum * n + row] = mine.sum;
  table[kWeighted * n + row] = mine.weighted;
  table[kTarget * n + row] = label >= 0 && label < rows.num_real ? entry(rows, raw, label, temperature) : 0.0f;
  table[kFirst * n + row] = static_cast<float>(mine.first);
  if (!all) return;
  table[kLogits * n + row] = mine.logits;
  table[kSquares * n + row] = mine.squares;
}

template <typename T>
__global__ void gradient_kernel(Rows rows, Gradient given, T* logits) {
  const int64_t row = blockIdx.x;
  T* raw = logits + row * rows.stride;
  const int64_t label = rows.labels[row];
  const float temperature = rows.temperature ? rows.temperature[row] : 1.0f;
  const float normaliser = given.log_normaliser[row], entropy = given.entropy[row];
  const float logprob = given.grad_logprobs[row], grad_entropy = given.grad_entropy ? given.grad_entropy[row] : 0.0f;
  for (int64_t index = threadIdx.x; index < rows.width; index += kThreads) {
    float gradient = 0;
    if (index < rows.num_real) {
      const float x = entry(rows, raw, index, temperature), log_p = x - normaliser;
      gradient = -expf(log_p) * (logprob + grad_entropy * (log_p + entropy));
      if (index == label) gradient += logprob;
      gradient /= temperature;
      if (rows.softcap != 0) {
        const float share = x * temperature / rows.softcap;
        gradient *= 1.0f - share * share;
      }
    }
    store(gradient, raw + index);
  }
}

} // namespace

void launch_statistics(const Rows& rows, const void* logits, bool bf16, float* table, bool all, void* stream) {
  if (rows.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (bf16)
    statistics_kernel<<<rows.count, kThreads, 0, queue>>>(rows, static_cast<const __nv_bfloat16*>(logits), table, all);
  else
    statistics_kernel<<<rows.count, kThreads, 0, queue>>>(rows, static_cast<const float*>(logits), table, all);
}

void launch_gradient(const Rows& rows, const Gradient& given, void* logits, bool bf16, void* stream) {
  if (rows.count == 0) return;
  const auto queue = static_cast<cudaStream_t>(stream);
  if (bf16)
    gradient_kernel<<<rows.count, kThreads, 0, queue>>>(rows, given, static_cast<__nv_bfloat16*>(logits));
  else
    gradient_kernel<<<rows.count, kThreads, 0, queue>>>(rows, given, static_cast<float*>(logits));
}

} // namespace megalign

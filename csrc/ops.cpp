// torch.ops.megalign.vocab_*: checks what they are given, and sends it to the kernels of its device. Loading the library
// registers these and the other files' operators; megalign/ops.py is the only one to do so.
#include "vocab_logprob.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <optional>

#ifdef MEGALIGN_WITH_CUDA
#include "vocab_logprob_cuda.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace megalign {

template <typename T>
void vocab_statistics_cpu(const Rows& rows, const T* logits, float* table, bool all);
template <typename T>
void vocab_gradient_cpu(const Rows& rows, const Gradient& given, T* logits);

namespace {

using at::Tensor;

const float* floats(const std::optional<Tensor>& column, int64_t size, const char* name) {
  if (!column) return nullptr;
  TORCH_CHECK(
      column->scalar_type() == at::kFloat && column->is_contiguous() && column->numel() == size,
      name, " must be ", size, " contiguous fp32 numbers");
  return column->const_data_ptr<float>();
}

Rows rows_of(
    const Tensor& logits,
    const Tensor& labels,
    const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& bias,
    double softcap,
    int64_t num_real) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1, "logits must be [n, V] with neighbouring columns");
  const auto type = logits.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "logits must be fp32 or bf16, not ", type);
  const int64_t count = logits.size(0), width = logits.size(1);
  TORCH_CHECK(0 <= num_real && num_real <= width, "num_real is ", num_real, " of ", width, " columns");
  TORCH_CHECK(
      labels.scalar_type() == at::kLong && labels.is_contiguous() && labels.numel() == count,
      "labels must be ", count, " contiguous int64 numbers");
  for (const auto& other : {std::optional(labels), temperature, bias})
    TORCH_CHECK(!other || other->device() == logits.device(), "all tensors must be on ", logits.device());
  return {
      count,
      width,
      logits.stride(0),
      num_real,
      labels.const_data_ptr<int64_t>(),
      floats(temperature, count, "temperature"),
      floats(bias, width, "bias"),
      static_cast<float>(softcap)};
}

Tensor vocab_statistics(
    const Tensor& logits,
    const Tensor& labels,
    const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& bias,
    double softcap,
    int64_t num_real,
    bool all) {
  const Rows rows = rows_of(logits, labels, temperature, bias, softcap, num_real);
  Tensor table = at::empty({all ? kNumStatistics : kNumPlainStatistics, rows.count}, labels.options().dtype(at::kFloat));
  float* out = table.mutable_data_ptr<float>();
  const bool bf16 = logits.scalar_type() == at::kBFloat16;
#ifdef MEGALIGN_WITH_CUDA
  if (logits.is_cuda()) {
    const c10::cuda::CUDAGuard guard(logits.device());
    launch_statistics(rows, logits.const_data_ptr(), bf16, out, all, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return table;
  }
#endif
  TORCH_CHECK(logits.is_cpu(), "megalign's extension was built without a kernel for ", logits.device());
  if (bf16)
    vocab_statistics_cpu(rows, logits.const_data_ptr<c10::BFloat16>(), out, all);
  else
    vocab_statistics_cpu(rows, logits.const_data_ptr<float>(), out, all);
  return table;
}

void vocab_gradient_(
    Tensor& logits,
    const Tensor& labels,
    const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& bias,
    double softcap,
    int64_t num_real,
    const Tensor& log_normaliser,
    const Tensor& entropy,
    const Tensor& grad_logprobs,
    const std::optional<Tensor>& grad_entropy) {
  const Rows rows = rows_of(logits, labels, temperature, bias, softcap, num_real);
  for (const auto& other : {std::optional(log_normaliser), std::optional(entropy), std::optional(grad_logprobs), grad_entropy})
    TORCH_CHECK(!other || other->device() == logits.device(), "all tensors must be on ", logits.device());
  const Gradient given{
      floats(log_normaliser, rows.count, "log_normaliser"),
      floats(entropy, rows.count, "entropy"),
      floats(grad_logprobs, rows.count, "grad_logprobs"),
      floats(grad_entropy, rows.count, "grad_entropy")};
  const bool bf16 = logits.scalar_type() == at::kBFloat16;
#ifdef MEGALIGN_WITH_CUDA
  if (logits.is_cuda()) {
    const c10::cuda::CUDAGuard guard(logits.device());
    launch_gradient(rows, given, logits.mutable_data_ptr(), bf16, c10::cuda::getCurrentCUDAStream().stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
#endif
  TORCH_CHECK(logits.is_cpu(), "megalign's extension was built without a kernel for ", logits.device());
  if (bf16)
    vocab_gradient_cpu(rows, given, logits.mutable_data_ptr<c10::BFloat16>());
  else
    vocab_gradient_cpu(rows, given, logits.mutable_data_ptr<float>());
}

bool has_cuda() {
#ifdef MEGALIGN_WITH_CUDA
  return true;
#else
  return false;
#endif
}

} // namespace

TORCH_LIBRARY(megalign, library) {
  library.def("has_cuda() -> bool", &has_cuda);
  library.def(
      "vocab_statistics(Tensor logits, Tensor labels, Tensor? temperature, Tensor? bias, float softcap, int num_real, "
      "bool all) -> Tensor");
  library.def(
      "vocab_gradient_(Tensor(a!) logits, Tensor labels, Tensor? temperature, Tensor? bias, float softcap, "
      "int num_real, Tensor log_normaliser, Tensor entropy, Tensor grad_logprobs, Tensor? grad_entropy) -> ()");
  library.impl("vocab_statistics", &vocab_statistics);
  library.impl("vocab_gradient_", &vocab_gradient_);
}

} // namespace megalign

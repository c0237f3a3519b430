// The GPU kernels' launchers, which a compiler without CUDA's headers can call: `stream` is a cudaStream_t.
#pragma once

#include "vocab_logprob.h"

namespace megalign {

void launch_statistics(const Rows& rows, const void* logits, bool bf16, float* table, bool all, void* stream);
void launch_gradient(const Rows& rows, const Gradient& given, void* logits, bool bf16, void* stream);

} // namespace megalign

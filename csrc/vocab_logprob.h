// What softmax and its gradient need of one row of logits at a time, without a second copy of the row.
//
// A row's entry x_v is made from a raw logit z_v of a matrix product: plus a bias, capped (c * tanh(z / c)), over the
// row's temperature. Entries at or past `num_real` are padding of the vocabulary: their probability is 0.
// All arithmetic is fp32 (sums of a CPU's blocks: fp64); raw logits and the gradient that replaces them are fp32 or
// bf16. megalign/ops.py has the same functions in torch, which are the reference.
#pragma once

#include <cstdint>

namespace megalign {

struct Rows {
  int64_t count;         // n
  int64_t width;         // V / tp: entries of a row, padding included
  int64_t stride;        // from one row to the next
  int64_t num_real;      // entries that are no padding
  const int64_t* labels; // [n] within the row; -1 where another tensor rank holds it
  const float* temperature; // [n] or null
  const float* bias;        // [width] or null
  float softcap;            // 0: none
};

// The rows of the table that `vocab_statistics` writes, [statistics, n].
enum Statistic { kTop, kSum, kWeighted, kTarget, kFirst, kLogits, kSquares, kNumStatistics };
constexpr int kNumPlainStatistics = kLogits; // without the two that only some losses ask for

struct Gradient {
  const float* log_normaliser; // [n] log sum_v exp(x_v), over the whole vocabulary
  const float* entropy;        // [n]
  const float* grad_logprobs;  // [n]
  const float* grad_entropy;   // [n] or null
};

} // namespace megalign

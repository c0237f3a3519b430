// What the CPU's kernels have in common: loops that compilers make vectors of, for fp32 and bf16. A bf16 number travels
// as its 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

// One build runs on every x86-64: the loader picks the widest vectors that the processor has. By what it can do: names of
// processors ("arch=haswell") are compared with its own name, and any other one is left with the default.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_PROCESSOR
#endif
#define INLINE inline __attribute__((always_inline))

namespace megalign {

// exp(x) for x up to 88; below -87 the result is 0. Cody and Waite's reduction, then a polynomial of degree 6: 2 units in
// the last place. A NaN stays one.
INLINE float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f; // the sum's lowest bits are the rounded quotient
  const float quotient = shifted - 12582912.0f;
  float rest = clamped - quotient * 0.693359375f;
  rest += quotient * 2.12194440e-4f;
  float value = 1.9875691500e-4f;
  value = value * rest + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(quotient) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : value * power;
}

INLINE float widened(float number) { return number; }

INLINE float widened(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// The nearest bf16 number, ties to even, in the upper half; what is below it is left over.
INLINE uint32_t nearest_bf16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return number != number ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

INLINE void narrow_to(float* to, float number) { *to = number; }

INLINE void narrow_to(uint16_t* to, float number) { *to = static_cast<uint16_t>(nearest_bf16(number) >> 16); }

// As a T has it, in the width of a float: loops of one width make the better vectors.
template <typename T>
INLINE float rounded(float number) {
  if (sizeof(T) == sizeof(float)) return number;
  const uint32_t bits = nearest_bf16(number) & 0xffff0000u;
  std::memcpy(&number, &bits, sizeof bits);
  return number;
}

} // namespace megalign

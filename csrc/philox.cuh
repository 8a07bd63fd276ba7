// Noise from a counter: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
#pragma once

#include <cstdint>

namespace dmc {

// The first of the four words that belong to a counter.
__device__ inline uint32_t philox(uint64_t key, uint4 counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ k0, low1, high0 ^ counter.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter.x;
}

// Standard logistic noise, the difference of two standard Gumbel variables, from 23 random bits.
__device__ inline float logistic_noise(uint64_t key, uint4 counter) {
  const float uniform = (float(philox(key, counter) >> 9) + 0.5f) * 0x1p-23f;  // in (0, 1), as is 1 - uniform: exact
  return logf(uniform) - logf(1.f - uniform);
}

}  // namespace dmc

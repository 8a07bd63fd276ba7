// The twin of csrc/instructions.cuh that runs on a CPU.
#pragma once

#include "common.cuh"

namespace dmc {

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const char*>(pointer) - emulation::shared_memory());
}

inline float power_of_2(float x) { return std::exp2(x); }

inline float reciprocal(float x) { return 1.f / x; }

template <class P>
inline void multiply_add(P, float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t brought[6] = {a[0], a[1], a[2], a[3], b0, b1};
  emulation::meet(~0u, brought, [&](emulation::Warp& w) {
    const auto half_of = [](uint64_t word, int which) {
      return to_float(emulation::from_bits<P>(uint16_t(word >> 16 * which)));
    };
    const int lane = emulation::lane();
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = c[e];
      for (int k = 0; k < 16; ++k) {
        const int pair = k % 8 / 2;
        const float x = half_of(w.slots[row % 8 * 4 + pair][row / 8 + k / 8 * 2], k % 2);
        sum += double(x) * half_of(w.slots[column * 4 + pair][4 + k / 8], k % 2);
      }
      c[e] = float(sum);
    }
    return 0;
  });
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  if (row % 16) emulation::fail("load_matrices from an address that is no multiple of 16");
  emulation::meet(~0u, {row}, [&](emulation::Warp& w) {
    const int lane = emulation::lane();
    for (int i = 0; i < 4; ++i) {
      uint16_t two[2];
      for (int n = 0; n < 2; ++n) {
        const int r = kTransposed ? lane % 4 * 2 + n : lane / 4, c = kTransposed ? lane / 4 : lane % 4 * 2 + n;
        std::memcpy(&two[n], emulation::shared_memory() + w.slots[8 * i + r][0] + 2 * c, 2);
      }
      to[i] = two[0] | uint32_t(two[1]) << 16;
    }
    return 0;
  });
}

inline uint32_t transposed(uint32_t x) {
  return emulation::meet(~0u, {x}, [&](emulation::Warp& w) {
    const int lane = emulation::lane();
    uint32_t y = 0;
    for (int n = 0; n < 2; ++n) {
      const int row = lane % 4 * 2 + n, column = lane / 4;
      y |= uint32_t(uint16_t(w.slots[row * 4 + column / 2][0] >> 16 * (column % 2))) << 16 * n;
    }
    return y;
  });
}

inline void copy_16_bytes(uint32_t to, const void* from, bool exists) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulation::fail("a copy that is not aligned to 16 bytes");
  emulation::fiber().copies.back().push_back({emulation::shared_memory() + to, from, exists});
}

inline void share_writes() {}

inline void end_of_copies() { emulation::fiber().copies.emplace_back(); }

template <int kPending>
inline void arrive() {
  auto& groups = emulation::fiber().copies;
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) {
      if (copy.exists) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

template <int kPending>
inline void wait_for_copies() {
  arrive<kPending>();
  __syncthreads();
}

template <int kPending>
inline void wait_for_own_copies() {
  arrive<kPending>();
  __syncwarp();
}

}  // namespace dmc

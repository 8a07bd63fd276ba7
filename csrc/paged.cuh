// What decoding and chunks of prompts share: rotation into shared memory, and softmax-weighted sums.
#pragma once

#include "tensor_core.cuh"

namespace dmc {

constexpr float kLog2E = 1.4426950408889634f;

// Importance of a token (the paper's ω): queries' last channels, averaged over a KV head's `group` queries.
template <class T>
__device__ inline float importance(const T* first_query, int64_t head_stride, int group, int last_channel, float offset) {
  float last = 0.f;
  for (int i = 0; i < group; ++i) last += to_float(first_query[i * head_stride + last_channel]);
  return 1.f / (1.f + expf(-(last / group + offset))) + 0x1p-7f;
}

// Rotate `rows` rows into shared memory, by `threads` threads: row r, at from(r) or null for zeros, as its token stands
// at position(r).
template <class T, int D, Pairing kPairing, class From, class Position>
__device__ inline void rotate_rows(const Rotary& rotary, Rows<T, D> to, int rows, int threads, From from, Position position) {
  const int thread = threadIdx.x;
  const LanePairs<D, kPairing> pairs(rotary, thread % kLanes<D> * 4);
  if (!pairs.exist()) return;
  for (int row = thread / kLanes<D>; row < rows; row += threads / kLanes<D>) {
    PairPack<T> pack = {};
    if (const T* const source = from(row)) {
      Rotation rotation;
      rotation.read(rotary, pairs, Rotation::offset(rotary, position(row), 0));
      pack = pairs.template pack<T>(rotation.apply(pairs.read(source), pairs.have_last()));
    }
    pairs.write_pack([&](int channel) { return to.at(row, channel); }, pack);
  }
}
template <class T, int D, class From, class Position>
__device__ inline void rotate_rows(const Rotary& rotary, Rows<T, D> to, int rows, int threads, From from, Position position) {
  switch (pairing_of(rotary)) {
    case Pairing::kHalves: return rotate_rows<T, D, Pairing::kHalves>(rotary, to, rows, threads, from, position);
    case Pairing::kInterleaved: return rotate_rows<T, D, Pairing::kInterleaved>(rotary, to, rows, threads, from, position);
    default: return rotate_rows<T, D, Pairing::kAny>(rotary, to, rows, threads, from, position);
  }
}

// Softmax-weighted sums of values for 16 queries, in the rows that a lane's accumulators belong to.
template <int D>
struct Sums {
  float value[D / 16][2][4] = {};
  float highest[2] = {-INFINITY, -INFINITY};  // score so far
  float weight[2] = {};                       // of this lane's columns

  // Scores of 16 queries and N x 16 keys as accumulators, in powers of 2, -inf where a key is not seen, become weights
  // as left operands; what was summed before is brought to the same scale.
  template <class T, int N>
  __device__ void weigh(float (&scores)[N][2][4], uint32_t (&weights)[N][1][4]) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = highest[i];
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) top = fmaxf(top, fmaxf(scores[n][half][2 * i], scores[n][half][2 * i + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.f : top;  // nothing seen yet
      shrink[i] = exp2f(highest[i] - base);
      highest[i] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) sum += scores[n][half][e] = exp2f(scores[n][half][e] - base);
        }
      }
      weight[i] = weight[i] * shrink[i] + sum;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg)
        weights[n][0][reg] = pack_two<T>(scores[n][reg / 2][reg % 2 * 2], scores[n][reg / 2][reg % 2 * 2 + 1]);
    }
    if (!__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) return;  // soon, a new highest score is rare
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        value[c][0][e] *= shrink[e / 2];
        value[c][1][e] *= shrink[e / 2];
      }
    }
  }

  // The whole row's weight, for all of its lanes.
  __device__ float total(int i) const { return sum_over_quad(weight[i]); }
  static __device__ float sum_over_quad(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};

}  // namespace dmc

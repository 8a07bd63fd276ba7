// What decoding and chunks of prompts share: rotation into shared memory, and softmax-weighted sums.
#pragma once

#include <cuda_fp8.h>

#include "tensor_core.cuh"

namespace dmc {

// Entries are stored in 16 bits or in 8 (e4m3), then with a float32 scale for every key and every value. A row's pieces are
// permuted as Rows has them: whole rows are copied, and arrive ready for tiles to be read.
using fp8 = __nv_fp8_storage_t;
constexpr float kHighestFp8 = 448.f;

constexpr float kLog2E = 1.4426950408889634f;

// Importance of a token (the paper's ω): queries' last channels, averaged over a KV head's `group` queries.
template <class T>
__device__ inline float importance(const T* first_query, int64_t head_stride, int group, int last_channel, float offset) {
  float last = 0.f;
#pragma unroll 4
  for (int i = 0; i < group; ++i) last += to_float(first_query[i * head_stride + last_channel]);
  return 1.f / (1.f + expf(-(last / group + offset))) + 0x1p-7f;
}

// Rotate `rows` rows into shared memory, by the `thread`-th of `threads` threads: row r, at from(r) or null for zeros, as
// its token stands at position(r).
template <class T, int D, Pairing kPairing, class From, class Position>
__device__ inline void rotate_rows(const Rotary& rotary, Rows<T, D> to, int rows, int thread, int threads, From from, Position position) {
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
__device__ inline void rotate_rows(const Rotary& rotary, Rows<T, D> to, int rows, int thread, int threads, From from, Position position) {
  switch (pairing_of(rotary)) {
    case Pairing::kHalves: return rotate_rows<T, D, Pairing::kHalves>(rotary, to, rows, thread, threads, from, position);
    case Pairing::kInterleaved: return rotate_rows<T, D, Pairing::kInterleaved>(rotary, to, rows, thread, threads, from, position);
    default: return rotate_rows<T, D, Pairing::kAny>(rotary, to, rows, thread, threads, from, position);
  }
}

// Where entry `index` of a head has its key; its value is kPageEntries rows behind.
__device__ inline int64_t entry_row(const int* table, int index) {
  return int64_t(table[index / kPageEntries]) * 2 * kPageEntries + index % kPageEntries;
}

// The entries of one head that a chunk's tokens are part of; tokens count from the chunk's beginning.
struct ChunkEntries {
  const int* entry;   // from the beginning of the token's block
  const int* before;  // entries before each block
  int first, kv_heads;

  __device__ ChunkEntries(const PagedChunks& p, int chunk, int kv_head) : kv_heads(p.in.shape.kv_heads) {
    const int blocks = (p.longest + kDecideBlock - 1) / kDecideBlock;
    first = p.first_token[chunk] * kv_heads + kv_head;
    entry = p.entry + first, before = p.before + int64_t(chunk * kv_heads + kv_head) * blocks;
  }
  __device__ int operator[](int token) const { return entry[token * kv_heads] + before[token / kDecideBlock]; }
  // Of a token and head, where there is one number or row for each.
  __device__ int64_t index(int token) const { return first + token * kv_heads; }
};

// kKeys entries on their way through shared memory: their keys as rows [0, kKeys), behind them their values.
template <class T, class S, int D, int kKeys, int kThreads>
struct Staging {
  static constexpr bool kScaled = sizeof(S) == 1;
  static constexpr int kRows = 2 * kKeys;
  static constexpr int kStageBytes = kScaled ? kRows * (D + 4) : Rows<T, D>::bytes(kRows);
  static constexpr int kReadyBytes = kScaled ? Rows<T, D>::bytes(kRows) : 0;  // besides, once for all stages

  // Begin to copy entries [first, first + kKeys); from `bound` on there are none, and what nobody sees must be 0 and not
  // whatever was there: 0 times that might be NaN.
  static __device__ void copy(char* stage, const PagedLayer& cache, const int* table, int first, int bound, int thread) {
    constexpr int kRowBytes = D * sizeof(S), kPieces = kRowBytes / 16, kAll = kRows * kPieces;
    const auto source_row = [&](int row) {
      return entry_row(table, first + row % kKeys) + row / kKeys * kPageEntries;
    };
#pragma unroll
    for (int i = 0; i < (kAll + kThreads - 1) / kThreads; ++i) {
      const int piece = i * kThreads + thread, row = piece / kPieces;
      if (kAll % kThreads && piece >= kAll) break;
      const bool exists = first + row % kKeys < bound;
      const char* const from = static_cast<const char*>(cache.pages) + (exists ? source_row(row) * kRowBytes : 0);
      copy_16_bytes(shared_address(stage + piece * 16), from + piece % kPieces * 16, exists);
    }
    if constexpr (kScaled) {
      const int row = thread * 4;
      if (row < kRows) {
        const bool exists = first + row % kKeys < bound;
        copy_16_bytes(shared_address(stage + kRows * D + 4 * row), cache.scales + (exists ? source_row(row) : 0), exists);
      }
    }
  }

  // What has arrived, as rows; 8-bit entries are unpacked into `ready`, and have to be waited for.
  static __device__ Rows<T, D> rows(char* stage, char* ready, int first, int bound, int thread) {
    if constexpr (!kScaled) return {reinterpret_cast<T*>(stage)};
    const Rows<T, D> to{reinterpret_cast<T*>(ready)};
    constexpr int kPieces = D / 8, kAll = kRows * kPieces;
#pragma unroll
    for (int i = 0; i < (kAll + kThreads - 1) / kThreads; ++i) {
      const int piece = i * kThreads + thread, row = piece / kPieces, channel = piece % kPieces * 8;
      if (kAll % kThreads && piece >= kAll) break;
      const uint2 eight = *reinterpret_cast<const uint2*>(stage + row * D + Rows<fp8, D>::permuted(row, channel));
      const bool exists = first + row % kKeys < bound;
      const float scale = reinterpret_cast<const float*>(stage + kRows * D)[row];
      uint4 words;
      uint32_t* const word = &words.x;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto two = __nv_fp8x2_storage_t((k < 2 ? eight.x : eight.y) >> 16 * (k % 2));
        const float2 x = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
        word[k] = exists ? pack_two<T>(x.x * scale, x.y * scale) : 0;
      }
      *reinterpret_cast<uint4*>(to.at(row, channel)) = words;
    }
    return to;
  }
};

// The lanes of a warp that hold the same row as this one.
template <int D>
__device__ inline uint32_t lanes_of_row() {
  return (~0u >> (32 - D / 8)) << threadIdx.x % 32 / kLanes<D> * kLanes<D>;
}

// A lane's pairs of a key or a value become part of an entry, as the row's other lanes do at the same time.
template <class S, int D, class Pairs>
__device__ inline void write_entry(const PagedLayer& cache, int64_t row, const Pairs& pairs, const PairValues& x) {
  const auto to = [&](int channel) { return static_cast<S*>(cache.pages) + row * D + Rows<S, D>::permuted(row % 8, channel); };
  if constexpr (sizeof(S) > 1) {
    pairs.write_pack(to, pairs.template pack<S>(x));
  } else {
    float highest = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) highest = fmaxf(highest, fmaxf(fabsf(x.first[i]), fabsf(x.second[i])));
    highest = __uint_as_float(__reduce_max_sync(lanes_of_row<D>(), __float_as_uint(highest)));  // sorted like integers
    const float scale = highest / kHighestFp8, inverse = highest > 0.f ? kHighestFp8 / highest : 0.f;
    PairValues scaled;
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled.first[i] = x.first[i] * inverse, scaled.second[i] = x.second[i] * inverse;
    pairs.write_bytes(to, scaled, [](float y) { return __nv_cvt_float_to_fp8(y, __NV_SATFINITE, __NV_E4M3); });
    if (pairs.have_last()) cache.scales[row] = scale;
  }
}

// Softmax-weighted sums of values for 16 queries, in the rows that a lane's accumulators belong to.
template <int D>
struct Sums {
  float value[D / 16][2][4] = {};
  float highest[2] = {-INFINITY, -INFINITY};  // score so far, in powers of 2
  float weight[2] = {};                       // of this lane's columns

  // Scores of 16 queries and N x 16 keys as accumulators, -inf where a key is not seen, become weights; `scale`, above 0,
  // makes them powers of 2. Returns what the values summed before have to be multiplied with.
  template <int N>
  __device__ float2 weigh(float (&scores)[N][2][4], float scale) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) top = fmaxf(top, fmaxf(scores[n][half][2 * i], scores[n][half][2 * i + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(highest[i], top * scale);
      const float base = top == -INFINITY ? 0.f : top;  // nothing seen yet
      shrink[i] = power_of_2(highest[i] - base);
      highest[i] = top;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) sum += scores[n][half][e] = power_of_2(fmaf(scores[n][half][e], scale, -base));
        }
      }
      weight[i] = weight[i] * shrink[i] + sum;
    }
    return make_float2(shrink[0], shrink[1]);
  }
  __device__ void rescale(float2 shrink) {
    if (!__any_sync(~0u, shrink.x != 1.f || shrink.y != 1.f)) return;  // soon, a new highest score is rare
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        value[c][0][e] *= e < 2 ? shrink.x : shrink.y;
        value[c][1][e] *= e < 2 ? shrink.x : shrink.y;
      }
    }
  }
  // Weights as left operands.
  template <class T, int N>
  static __device__ void pack(const float (&scores)[N][2][4], uint32_t (&weights)[N][1][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg)
        weights[n][0][reg] = pack_two<T>(scores[n][reg / 2][reg % 2 * 2], scores[n][reg / 2][reg % 2 * 2 + 1]);
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

// The coefficients of a merge, m(t, j) = w_j α_{j+1} ⋯ α_t for t - window < j <= t, for a run of tokens in shared memory.
//
// Tokens come in blocks of 16. Inside a block the products of α are tabulated; between blocks they factor into what
// lies behind j in its block, the blocks between, and what leads up to t in its own. Nothing is divided by α.
#pragma once

#include "tensor_core.cuh"

namespace dmc {

constexpr int kBlock = 16;

// Tokens that one thread block merges, and its threads: a warp for the keys of 16 tokens and one for their values.
template <class T, int D>
constexpr int kTile = sizeof(T) == 4 ? 16 : D <= 128 ? 64 : 32;
template <class T, int D>
constexpr int kThreads = kTile<T, D> / kBlock * 2 * 32;

// Blocks that a window reaches back beyond its token's own.
__host__ __device__ inline int blocks_back(int window) { return (window - 1 + kBlock - 1) / kBlock; }

struct Coefficients {
  static constexpr int kStride = 20;  // of the table: 16, padded against bank conflicts

  int window;
  float *alpha, *weight;  // [rows]
  float *leading;         // [rows] product of α from the first row of the block to this one
  float *behind;          // [rows] weight times the product of α behind this row to the last of the block
  float *inside;          // [rows - inside_from][kStride] m(row, j) for j in the row's block
  int inside_from;

  static constexpr int floats(int rows, int inside_rows) { return 4 * rows + kStride * inside_rows; }

  __device__ Coefficients(float* memory, int rows, int inside_from, int window)
      : window(window), alpha(memory), weight(memory + rows), leading(memory + 2 * rows),
        behind(memory + 3 * rows), inside(memory + 4 * rows), inside_from(inside_from) {}

  // To be called by all threads once `alpha` and `weight` are there for everyone; needs a barrier behind it.
  __device__ void tabulate(int rows, int thread, int threads) {
    for (int task = thread; task < 2 * rows; task += threads) {
      const int row = task < rows ? task : task - rows, first = row / kBlock * kBlock;
      float product = 1.f, factors[kBlock];
#pragma unroll
      for (int i = 0; i < kBlock; ++i) factors[i] = alpha[first + i];
      if (task >= rows) {
#pragma unroll
        for (int i = 1; i < kBlock; ++i) product *= first + i > row ? factors[i] : 1.f;
        behind[row] = weight[row] * product;
        continue;
      }
      float m[kBlock];
#pragma unroll
      for (int i = kBlock - 1; i >= 0; --i) {
        const int back = row - first - i;
        m[i] = back >= 0 && back < window ? weight[first + i] * product : 0.f;
        product *= back >= 0 ? factors[i] : 1.f;
      }
      leading[row] = product;
      if (row < inside_from) continue;
#pragma unroll
      for (int i = 0; i < kBlock; i += 4)
        *reinterpret_cast<float4*>(inside + (row - inside_from) * kStride + i) =
            make_float4(m[i], m[i + 1], m[i + 2], m[i + 3]);
    }
  }

  __device__ float block_product(int block) const { return leading[block * kBlock + kBlock - 1]; }

  // The tile m(t, j) of two blocks, laid out as an accumulator; `between` is the product of α over the blocks strictly
  // between them.
  __device__ void tile(int t_block, int j_block, float between, float (&m)[2][4]) const {
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const int t = t_block * kBlock + tile_row(reg), j = j_block * kBlock + tile_column(reg);
      float* to = &m[reg / 2][reg % 2 * 2];
      if (t_block == j_block) {
        const float2 both = *reinterpret_cast<const float2*>(inside + (t - inside_from) * kStride + tile_column(reg));
        to[0] = both.x, to[1] = both.y;
      } else {
        const float2 both = *reinterpret_cast<const float2*>(behind + j);
        const float lead = leading[t] * between;
        to[0] = t - j < window ? lead * both.x : 0.f;
        to[1] = t - j - 1 < window ? lead * both.y : 0.f;
      }
    }
  }

  // The same with rows j and columns t.
  __device__ void transposed_tile(int t_block, int j_block, float between, float (&m)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int reg = i / 2, t = t_block * kBlock + tile_column(reg) + i % 2, j = j_block * kBlock + tile_row(reg);
      m[reg / 2][reg % 2 * 2 + i % 2] =
          t_block == j_block ? inside[(t - inside_from) * kStride + tile_row(reg)]
          : t - j < window   ? leading[t] * between * behind[j]
                             : 0.f;
    }
  }
};

__device__ inline float sum_over_columns(float x) {  // of a tile's row: the four lanes that hold it
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float sum_over_rows(float x) {  // of a tile's column: the eight lanes that hold it
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace dmc

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
  static constexpr int kInsideStride = 20;  // 16, padded against bank conflicts

  int window;
  float *alpha, *weight;  // [rows]
  float *leading;         // [rows] product of α from the first row of the block to this one
  float *trailing;        // [rows] product of α behind this row to the last of the block
  float *inside;          // [rows - inside_from][kInsideStride] product of α from behind a row of the block to this one
  int inside_from;

  static constexpr int floats(int rows, int inside_rows) { return 4 * rows + kInsideStride * inside_rows; }

  __device__ Coefficients(float* memory, int rows, int inside_from, int window)
      : window(window), alpha(memory), weight(memory + rows), leading(memory + 2 * rows),
        trailing(memory + 3 * rows), inside(memory + 4 * rows), inside_from(inside_from) {}

  // To be called by all threads once `alpha` and `weight` are there for everyone; needs a barrier behind it.
  __device__ void tabulate(int rows, int thread, int threads) {
    for (int row = thread; row < rows; row += threads) {
      const int first = row / kBlock * kBlock;
      float product = 1.f;
      for (int i = row; i >= first; --i) {
        if (row >= inside_from) inside[(row - inside_from) * kInsideStride + i - first] = product;
        product *= alpha[i];
      }
      leading[row] = product;
      if (row >= inside_from)
        for (int i = row + 1; i < first + kBlock; ++i) inside[(row - inside_from) * kInsideStride + i - first] = 0.f;
      product = 1.f;
      for (int i = row + 1; i < first + kBlock; ++i) product *= alpha[i];
      trailing[row] = product;
    }
  }

  __device__ float block_product(int block) const { return leading[block * kBlock + kBlock - 1]; }

  // m(t, j); `between` is the product of α over the blocks strictly between theirs.
  __device__ float operator()(int t, int j, float between) const {
    if (t - j >= window) return 0.f;
    const float product = t / kBlock == j / kBlock ? inside[(t - inside_from) * kInsideStride + j % kBlock]
                                                   : leading[t] * between * trailing[j];
    return weight[j] * product;
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

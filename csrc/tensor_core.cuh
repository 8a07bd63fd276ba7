// 16x16 tiles on the tensor cores, with float32 results as exact as float32 arithmetic gives them.
//
// Keys, values and their gradients enter as they are: products of 16-bit numbers are exact in float32. What is float32,
// the coefficients of a merge above all, enters as a sum of 16-bit planes, each holding what the planes before left over.
#pragma once

#include "instructions.cuh"

namespace dmc {

// Planes of a tile's elements, of float32 coefficients that multiply them, and the planes' type.
template <class T>
struct Planes {
  using type = T;
  static constexpr int elements = 1, coefficients = 2;
};
template <>
struct Planes<float> {
  using type = bf16;
  static constexpr int elements = 3, coefficients = 3;
};

// Two float32 numbers as N planes of register pairs.
template <class P, int N>
__device__ inline void split(float low, float high, uint32_t (&planes)[N][4], int reg) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    planes[n][reg] = pack_two<P>(low, high);
    const float2 held = unpack_two<P>(planes[n][reg]);
    low -= held.x;
    high -= held.y;
  }
}

// A tile laid out as an accumulator, as a left operand.
template <class T>
__device__ inline void split_tile(const float (&m)[2][4], uint32_t (&planes)[Planes<T>::coefficients][4]) {
#pragma unroll
  for (int reg = 0; reg < 4; ++reg)
    split<typename Planes<T>::type>(m[reg / 2][reg % 2 * 2], m[reg / 2][reg % 2 * 2 + 1], planes, reg);
}

// Where a lane's registers of a 16x16 tile lie: register pair r holds (row(r), column(r)) and the column behind it.
__device__ inline int tile_row(int reg) { return threadIdx.x % 32 / 4 + reg % 2 * 8; }
__device__ inline int tile_column(int reg) { return threadIdx.x % 4 * 2 + reg / 2 * 8; }

// c (16x16: two 16x8 halves of four registers) += a b, over all pairs of planes that float32 resolves.
template <class T, int A, int B>
__device__ inline void multiply_add_tiles(float (&c)[2][4], const uint32_t (&a)[A][4], const uint32_t (&b)[B][4]) {
  constexpr int kDepth = A > B ? A : B;
#pragma unroll
  for (int i = 0; i < A; ++i) {
#pragma unroll
    for (int j = 0; j < B; ++j) {
      if (i + j < kDepth) {
        multiply_add(typename Planes<T>::type{}, c[0], a[i], b[j][0], b[j][1]);
        multiply_add(typename Planes<T>::type{}, c[1], a[i], b[j][2], b[j][3]);
      }
    }
  }
}

// Rows in shared memory. So that eight of them can be read at once without bank conflicts, pieces of 16 bytes change
// places within a row, after a pattern that repeats every eight rows; in float32, rows are padded instead. (In 8 bits, for
// which `permuted` alone is meant, rows of 96 channels stay in order: two of eight conflict.)
template <class T, int D>
struct Rows {
  static constexpr int kPiece = 16 / sizeof(T), kPieces = D / kPiece;
  static constexpr bool kSwizzled = sizeof(T) <= 2 && kPieces % 4 == 0;
  static constexpr int kStride = kSwizzled ? D : D + kPiece;
  T* data;

  __device__ T* at(int row, int channel = 0) const { return data + row * kStride + permuted(row, channel); }

  // Where a row's channel comes to lie in it.
  static __device__ int permuted(int row, int channel) {
    return kSwizzled ? channel ^ (kPieces % 8 ? row / 2 % 4 : row % 8) * kPiece : channel;
  }

  static constexpr int bytes(int rows) { return rows * kStride * int(sizeof(T)); }

  // The tile with corner (row, channel) as a left operand: its rows are the product's rows.
  __device__ void left(uint32_t (&to)[Planes<T>::elements][4], int row, int channel) const {
    read<false, false>(to, row, channel);
  }
  // As a right operand whose rows are the product's columns.
  __device__ void right_transposed(uint32_t (&to)[Planes<T>::elements][4], int row, int channel) const {
    read<false, true>(to, row, channel);
  }
  // As a right operand whose channels are the product's columns.
  __device__ void right(uint32_t (&to)[Planes<T>::elements][4], int row, int channel) const {
    read<true, false>(to, row, channel);
  }
  // The tile as a left operand whose rows are channels.
  __device__ void left_transposed(uint32_t (&to)[Planes<T>::elements][4], int row, int channel) const {
    read<true, true>(to, row, channel);
  }
  // Eight rows of 16 bits and 32 channels as two right operands whose columns are the rows: of 16 channels each.
  __device__ void right_of_8(uint32_t (&to)[4], int row, int channel) const {
    const int lane = threadIdx.x % 32;
    load_matrices<false>(to, shared_address(at(row + lane % 8, channel + lane / 8 * 8)));
  }

 private:
  // `kTransposed`: registers pair up along rows instead of channels. `kSwapped`: the second and third of the four
  // 8x8 quarters change places.
  template <bool kTransposed, bool kSwapped>
  __device__ void read(uint32_t (&to)[Planes<T>::elements][4], int row, int channel) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      const int down = kSwapped ? lane / 16 : lane / 8 % 2, right = kSwapped ? lane / 8 % 2 : lane / 16;
      load_matrices<kTransposed>(to[0], shared_address(at(row + lane % 8 + down * 8, channel + right * 8)));
    } else {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int down = kSwapped ? reg / 2 : reg % 2, right = kSwapped ? reg % 2 : reg / 2;
        const int outer = lane / 4, inner = lane % 4 * 2;
        const T* from = kTransposed ? at(row + down * 8 + inner, channel + right * 8 + outer)
                                    : at(row + down * 8 + outer, channel + right * 8 + inner);
        split<bf16>(to_float(from[0]), to_float(from[kTransposed ? kStride : 1]), to, reg);
      }
    }
  }
};

// Write one row of an accumulator's 16 channels, of the tile's upper or lower eight rows, 32 bytes at once.
template <class T>
__device__ inline void write_row(T* to, const float (&c)[2][4], int lower, float scale, bool exists) {
  const int quad = threadIdx.x % 4, e = lower * 2;
  if constexpr (sizeof(T) == 2) {
    // Neighbouring lanes exchange one pair each, so that each has four neighbouring channels.
    const uint32_t left = pack_two<T>(c[0][e] * scale, c[0][e + 1] * scale);
    const uint32_t right = pack_two<T>(c[1][e] * scale, c[1][e + 1] * scale);
    const bool odd = quad % 2;
    const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
    const uint2 four = make_uint2(odd ? other : left, odd ? right : other);
    if (exists) *reinterpret_cast<uint2*>(to + (odd ? 6 : 0) + 2 * quad) = four;
  } else if (exists) {
    *reinterpret_cast<float2*>(to + 2 * quad) = make_float2(c[0][e] * scale, c[0][e + 1] * scale);
    *reinterpret_cast<float2*>(to + 8 + 2 * quad) = make_float2(c[1][e] * scale, c[1][e + 1] * scale);
  }
}

// Copy rows [first, first + count) of one sequence and head into shared memory, asynchronously; rows that the sequence
// does not have become 0.
template <class T, int D, int kThreads>
__device__ inline void copy_rows(Rows<T, D> to, const T* from, int64_t token_stride, int first, int count, int tokens) {
  constexpr int kPiece = Rows<T, D>::kPiece, kPieces = Rows<T, D>::kPieces, kAtOnce = kThreads / kPieces;
  const int thread = threadIdx.x, channel = thread % kPieces * kPiece;
  if (thread >= kAtOnce * kPieces) return;
  const auto copy = [&](auto exists) {
    int row = thread / kPieces;
    const T* source = from + (first + row) * token_stride + channel;
    uint32_t address = shared_address(to.at(row, channel));
    for (; row < count; row += kAtOnce) {
      copy_16_bytes(address, exists(first + row) ? source : from, exists(first + row));
      source += kAtOnce * token_stride;
      if constexpr (kAtOnce % 8 == 0)
        address += kAtOnce * Rows<T, D>::kStride * sizeof(T);
      else
        address = shared_address(to.at(row + kAtOnce, channel));
    }
  };
  if (first >= 0 && first + count <= tokens)  // most tiles
    copy([](int) { return true; });
  else
    copy([&](int token) { return token >= 0 && token < tokens; });
}

}  // namespace dmc

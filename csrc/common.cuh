// Rows of channels: how lanes own them, how they are read, rotated and written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace dmc {

using bf16 = __nv_bfloat16;

__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline float to_float(float x) { return x; }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline bf16 from_float(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ inline float from_float(float x) { return x; }

template <class T>
__device__ inline float rounded(float x) { return to_float(from_float<T>(x)); }

// N consecutive elements, aligned to their total size (at most 16 bytes a piece).
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T x[N];
};

template <class T, int N>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.x[i]);
}

template <class T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.x[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// A row is owned by kLanes neighbouring lanes of a warp, eight channels each.
template <int D>
constexpr int kLanes = D <= 64 ? 8 : D <= 128 ? 16 : 32;

template <int D>
__device__ inline float sum_over_row(float x) {
#pragma unroll
  for (int step = kLanes<D> / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Eight channels of a row as four pairs, so that one lane can rotate them. Pairs [0, rotated) rotate; the channels
// behind them form pairs as well, that keep their place. The row's last channel is always the last pair's second.
struct PairValues {
  float first[4], second[4];
};

template <int D>
struct PairLayout {
  int rotated;
  bool interleaved;

  __device__ PairLayout(const Rotary& rotary) : rotated(rotary.pairs), interleaved(rotary.interleaved) {}

  __device__ int first(int pair) const {
    return interleaved ? 2 * pair : pair < rotated ? pair : pair + rotated;
  }
  __device__ int second(int pair) const {
    return interleaved ? 2 * pair + 1 : pair < rotated ? pair + rotated : pair + D / 2;
  }
  // Whether pairs 4i, …, 4i + 3 are all rotated or all not.
  __device__ bool whole() const { return rotated % 4 == 0; }

  template <class T>
  __device__ PairValues read(const T* row, int pair) const {
    PairValues v;
    if (interleaved) {
      float x[2][4];
      load(row + 2 * pair, x[0]);
      load(row + 2 * pair + 4, x[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v.first[i] = x[i / 2][i % 2 * 2];
        v.second[i] = x[i / 2][i % 2 * 2 + 1];
      }
    } else if (whole()) {
      load(row + first(pair), v.first);
      load(row + second(pair), v.second);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v.first[i] = to_float(row[first(pair + i)]);
        v.second[i] = to_float(row[second(pair + i)]);
      }
    }
    return v;
  }

  template <class T>
  __device__ void write(T* row, int pair, const PairValues& v) const {
    if (interleaved) {
      float x[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i / 2][i % 2 * 2] = v.first[i];
        x[i / 2][i % 2 * 2 + 1] = v.second[i];
      }
      store(row + 2 * pair, x[0]);
      store(row + 2 * pair + 4, x[1]);
    } else if (whole()) {
      store(row + first(pair), v.first);
      store(row + second(pair), v.second);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row[first(pair + i)] = from_float<T>(v.first[i]);
        row[second(pair + i)] = from_float<T>(v.second[i]);
      }
    }
  }

  __device__ bool has_last(int pair) const { return pair + 4 == D / 2; }
};

// One token's rotation of one lane's pairs. The last channel is DMC's own: it is 0 before rotating and again after.
struct Rotation {
  PairValues cos, sin;

  template <int D>
  __device__ void read(const Rotary& rotary, const PairLayout<D>& layout, int token, int batch, int pair) {
    const int64_t row = token * rotary.stride.token + batch * rotary.stride.batch;
    if (layout.whole() && pair < layout.rotated) {
      cos = layout.read(rotary.cos + row, pair);
      sin = layout.read(rotary.sin + row, pair);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool turns = pair + i < layout.rotated;
      const int first = layout.first(pair + i), second = layout.second(pair + i);
      cos.first[i] = turns ? rotary.cos[row + first] : 1.f;
      cos.second[i] = turns ? rotary.cos[row + second] : 1.f;
      sin.first[i] = turns ? rotary.sin[row + first] : 0.f;
      sin.second[i] = turns ? rotary.sin[row + second] : 0.f;
    }
  }

  __device__ PairValues apply(PairValues x, bool has_last) const {
    if (has_last) x.second[3] = 0.f;
    PairValues y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y.first[i] = x.first[i] * cos.first[i] - x.second[i] * sin.first[i];
      y.second[i] = x.second[i] * cos.second[i] + x.first[i] * sin.second[i];
    }
    if (has_last) y.second[3] = 0.f;
    return y;
  }

  // The transpose, which takes gradients of rotated rows to gradients of unrotated ones.
  __device__ PairValues apply_transposed(PairValues y, bool has_last) const {
    if (has_last) y.second[3] = 0.f;
    PairValues x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.first[i] = y.first[i] * cos.first[i] + y.second[i] * sin.second[i];
      x.second[i] = y.second[i] * cos.second[i] - y.first[i] * sin.first[i];
    }
    if (has_last) x.second[3] = 0.f;
    return x;
  }
};

template <int D>
__device__ inline float dot(const PairValues& a, const PairValues& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += a.first[i] * b.first[i] + a.second[i] * b.second[i];
  return sum_over_row<D>(sum);
}

// Calls f.template operator()<T, D>() for the dtype and the head size at hand.
template <class F>
cudaError_t dispatch(DType dtype, int channels, F&& f) {
  auto for_size = [&]<class T>() {
    switch (channels) {
      case 64: return f.template operator()<T, 64>();
      case 96: return f.template operator()<T, 96>();
      case 128: return f.template operator()<T, 128>();
      case 256: return f.template operator()<T, 256>();
      default: return cudaErrorInvalidValue;
    }
  };
  switch (dtype) {
    case DType::kBFloat16: return for_size.template operator()<bf16>();
    case DType::kHalf: return for_size.template operator()<half>();
    case DType::kFloat: return for_size.template operator()<float>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace dmc

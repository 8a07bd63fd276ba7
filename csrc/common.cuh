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

// Two numbers in 32 bits, as one instruction converts them.
template <class T>
__device__ inline uint32_t pack_two(float low, float high);
template <>
__device__ inline uint32_t pack_two<bf16>(float low, float high) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}
template <>
__device__ inline uint32_t pack_two<half>(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&x);
}
template <class T>
__device__ inline float2 unpack_two(uint32_t x);
template <>
__device__ inline float2 unpack_two<bf16>(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <>
__device__ inline float2 unpack_two<half>(uint32_t x) {
  return __half22float2(*reinterpret_cast<const __half2*>(&x));
}

// N consecutive elements, aligned to their total size (at most 16 bytes a piece). In words: as elements, 16-bit numbers
// would take a register each.
template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  uint32_t words[sizeof(T) * N / 4];

  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else return i % 2 ? unpack_two<T>(words[i / 2]).y : unpack_two<T>(words[i / 2]).x;
  }
  __device__ void set(int i, float x) {
    if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(x);
    else words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | pack_two<T>(0.f, x) : (words[i / 2] & 0xffff0000u) | (pack_two<T>(x, 0.f) & 0xffffu);
  }
};

template <class T, int N>
__device__ inline Pack<T, N> packed(const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 4) pack.words[i] = __float_as_uint(from[i]);
    else if (i % 2) pack.words[i / 2] = pack_two<T>(from[i - 1], from[i]);
  }
  return pack;
}

template <class T, int N>
__device__ inline void unpack(const Pack<T, N>& pack, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = pack[i];
}

template <class T, int N>
__device__ inline void load(const T* from, float (&to)[N]) {
  unpack(*reinterpret_cast<const Pack<T, N>*>(from), to);
}

template <class T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
  *reinterpret_cast<Pack<T, N>*>(to) = packed<T>(from);
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

template <class T>
struct PairPack {
  Pack<T, 4> low, high;

  __device__ float operator[](int i) const { return i < 4 ? low[i] : high[i - 4]; }
};

//
// How channels pair up is a compile-time choice, for the registers that it saves: kHalves, (i, i + rotated) with
// `rotated` a multiple of 4, so that four pairs are two vectors; kInterleaved, (2i, 2i + 1); kOddHalves, as kHalves with
// any number, channel by channel.
enum class Pairing { kHalves, kInterleaved, kOddHalves };

inline Pairing pairing_of(const Rotary& rotary) {
  return rotary.interleaved ? Pairing::kInterleaved : rotary.pairs % 4 ? Pairing::kOddHalves : Pairing::kHalves;
}

template <int D, Pairing kPairing>
struct PairLayout {
  static constexpr bool interleaved = kPairing == Pairing::kInterleaved;
  int rotated;

  __device__ explicit PairLayout(const Rotary& rotary) : rotated(rotary.pairs) {}

  __device__ int first(int pair) const {
    return interleaved ? 2 * pair : pair < rotated ? pair : pair + rotated;
  }
  __device__ int second(int pair) const {
    return interleaved ? 2 * pair + 1 : pair < rotated ? pair + rotated : pair + D / 2;
  }
  // Whether a table's entries for these four pairs can be read as vectors.
  __device__ bool reads_tables(int pair) const {
    return kPairing != Pairing::kOddHalves && (!interleaved || rotated % 4 == 0) && pair < rotated;
  }

  // As memory has them: of rotated halves four first and four second channels, interleaved eight neighbours.
  template <class T>
  __device__ PairPack<T> read_pack(const T* row, int pair) const {
    PairPack<T> pack = {};
    if constexpr (kPairing != Pairing::kOddHalves) {
      const int low = interleaved ? 2 * pair : first(pair), high = interleaved ? 2 * pair + 4 : second(pair);
      pack.low = *reinterpret_cast<const Pack<T, 4>*>(row + low);
      pack.high = *reinterpret_cast<const Pack<T, 4>*>(row + high);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pack.low.set(i, to_float(row[first(pair + i)]));
        pack.high.set(i, to_float(row[second(pair + i)]));
      }
    }
    return pack;
  }

  template <class T>
  __device__ void write_pack(T* row, int pair, const PairPack<T>& pack) const {
    if constexpr (kPairing != Pairing::kOddHalves) {
      const int low = interleaved ? 2 * pair : first(pair), high = interleaved ? 2 * pair + 4 : second(pair);
      *reinterpret_cast<Pack<T, 4>*>(row + low) = pack.low;
      *reinterpret_cast<Pack<T, 4>*>(row + high) = pack.high;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row[first(pair + i)] = from_float<T>(pack.low[i]);
        row[second(pair + i)] = from_float<T>(pack.high[i]);
      }
    }
  }

  // Eight channels in a pack's order, as pairs.
  __device__ PairValues paired(const float (&x)[8]) const {
    PairValues v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v.first[i] = x[interleaved ? 2 * i : i];
      v.second[i] = x[interleaved ? 2 * i + 1 : i + 4];
    }
    return v;
  }

  template <class T>
  __device__ PairValues values(const PairPack<T>& pack) const {
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = pack[i];
    return paired(x);
  }

  template <class T>
  __device__ PairPack<T> pack(PairValues v) const {
    if constexpr (interleaved) {
      const PairValues x = v;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v.first[i] = i % 2 ? x.second[i / 2] : x.first[i / 2];
        v.second[i] = i % 2 ? x.second[i / 2 + 2] : x.first[i / 2 + 2];
      }
    }
    return {packed<T>(v.first), packed<T>(v.second)};
  }

  template <class T>
  __device__ PairValues read(const T* row, int pair) const {
    return values(read_pack(row, pair));
  }
  template <class T>
  __device__ void write(T* row, int pair, const PairValues& v) const {
    write_pack(row, pair, pack<T>(v));
  }

  __device__ bool has_last(int pair) const { return pair + 4 == D / 2; }
};

// One token's rotation of one lane's pairs. The last channel is DMC's own: it is 0 before rotating and again after.
struct Rotation {
  PairValues cos, sin;

  template <class Layout>
  __device__ void read(const Rotary& rotary, const Layout& layout, int token, int batch, int pair) {
    const int64_t row = token * rotary.stride.token + batch * rotary.stride.batch;
    if (layout.reads_tables(pair)) {
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

// The same for kernels that rotate: f.template operator()<T, D, pairing>().
template <class F>
cudaError_t dispatch(DType dtype, int channels, const Rotary& rotary, F&& f) {
  return dispatch(dtype, channels, [&]<class T, int D>() {
    switch (pairing_of(rotary)) {
      case Pairing::kHalves: return f.template operator()<T, D, Pairing::kHalves>();
      case Pairing::kInterleaved: return f.template operator()<T, D, Pairing::kInterleaved>();
      default: return f.template operator()<T, D, Pairing::kOddHalves>();
    }
  });
}

}  // namespace dmc

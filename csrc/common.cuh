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
  if constexpr (N == 1) *to = from_float<T>(from[0]);
  else *reinterpret_cast<Pack<T, N>*>(to) = packed<T>(from);
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

// How channels pair up, and how they are read. kHalves, (i, i + rotated): four pairs are two vectors; kInterleaved,
// (2i, 2i + 1): one run of eight. Both take numbers of rotated pairs that 4 divides; kAny takes either, and any number,
// channel by channel. A compile-time choice, for the registers that it saves.
enum class Pairing { kHalves, kInterleaved, kAny };

__host__ __device__ inline Pairing pairing_of(const Rotary& rotary) {
  return rotary.pairs % 4 ? Pairing::kAny : rotary.interleaved ? Pairing::kInterleaved : Pairing::kHalves;
}

// The four pairs of one lane, from `pair` on.
template <int D, Pairing kPairing>
struct LanePairs {
  int pair, rotated;
  bool interleaved;
  unsigned low, high;  // where a pack's first and last four channels begin

  __device__ LanePairs(const Rotary& rotary, int pair) : pair(pair), rotated(rotary.pairs), interleaved(rotary.interleaved) {
    low = kPairing == Pairing::kInterleaved ? 2 * pair : first(pair);
    high = kPairing == Pairing::kInterleaved ? 2 * pair + 4 : second(pair);
  }

  __device__ bool exist() const { return pair < D / 2; }
  __device__ bool have_last() const { return pair + 4 == D / 2; }

  // As memory has them.
  template <class T>
  __device__ PairPack<T> read_pack(const T* row) const {
    return read_pack<T>([row](int channel) { return row + channel; });
  }
  template <class T>
  __device__ void write_pack(T* row, const PairPack<T>& pack) const {
    write_pack([row](int channel) { return row + channel; }, pack);
  }
  // Where at(channel) says; four neighbouring channels lie side by side.
  template <class T, class At>
  __device__ PairPack<T> read_pack(At at) const {
    PairPack<T> pack = {};
    if constexpr (kPairing != Pairing::kAny) {
      pack.low = *reinterpret_cast<const Pack<T, 4>*>(at(low));
      pack.high = *reinterpret_cast<const Pack<T, 4>*>(at(high));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pack.low.set(i, to_float(*at(first(pair + i))));
        pack.high.set(i, to_float(*at(second(pair + i))));
      }
    }
    return pack;
  }
  template <class T, class At>
  __device__ void write_pack(At at, const PairPack<T>& pack) const {
    if constexpr (kPairing != Pairing::kAny) {
      *reinterpret_cast<Pack<T, 4>*>(at(low)) = pack.low;
      *reinterpret_cast<Pack<T, 4>*>(at(high)) = pack.high;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *at(first(pair + i)) = from_float<T>(pack.low[i]);
        *at(second(pair + i)) = from_float<T>(pack.high[i]);
      }
    }
  }

  // One byte a channel, as `convert` makes it; `to(channel)` is where it lies, four of them side by side.
  template <class To, class F>
  __device__ void write_bytes(To to, const PairValues& v, F convert) const {
    const PairPack<float> x = pack<float>(v);
    if constexpr (kPairing != Pairing::kAny) {
      uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) words[i / 4] |= uint32_t(convert(x[i])) << 8 * (i % 4);
      *reinterpret_cast<uint32_t*>(to(low)) = words[0];
      *reinterpret_cast<uint32_t*>(to(high)) = words[1];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *to(first(pair + i)) = convert(x.low[i]);
        *to(second(pair + i)) = convert(x.high[i]);
      }
    }
  }

  // Eight channels in a pack's order, as pairs.
  __device__ PairValues paired(const float (&x)[8]) const {
    constexpr bool kNeighbours = kPairing == Pairing::kInterleaved;
    PairValues v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v.first[i] = x[kNeighbours ? 2 * i : i];
      v.second[i] = x[kNeighbours ? 2 * i + 1 : i + 4];
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
    if constexpr (kPairing == Pairing::kInterleaved) {
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
  __device__ PairValues read(const T* row) const {
    return values(read_pack(row));
  }
  template <class T>
  __device__ void write(T* row, const PairValues& v) const {
    write_pack(row, pack<T>(v));
  }

 private:
  __device__ int first(int pair) const { return interleaved ? 2 * pair : pair < rotated ? pair : pair + rotated; }
  __device__ int second(int pair) const {
    return interleaved ? 2 * pair + 1 : pair < rotated ? pair + rotated : pair + D / 2;
  }
};

// One token's rotation of one lane's pairs. The last channel is DMC's own: it is 0 before rotating and again after.
struct Rotation {
  float cos[4], sin[4];

  // Where the angles of a token's pairs begin in both tables.
  static __device__ int64_t offset(const Rotary& rotary, int token, int batch) {
    return token * rotary.stride.token + batch * rotary.stride.batch;
  }

  template <int D, Pairing kPairing>
  __device__ void read(const Rotary& rotary, const LanePairs<D, kPairing>& pairs, int64_t offset) {
    const int turning = pairs.rotated - pairs.pair;  // pairs that turn, of the lane's four
    const float *from_cos = rotary.cos + offset + pairs.pair, *from_sin = rotary.sin + offset + pairs.pair;
    if (kPairing != Pairing::kAny && turning > 0) {
      const float4 c = *reinterpret_cast<const float4*>(from_cos), s = *reinterpret_cast<const float4*>(from_sin);
      cos[0] = c.x, cos[1] = c.y, cos[2] = c.z, cos[3] = c.w;
      sin[0] = s.x, sin[1] = s.y, sin[2] = s.z, sin[3] = s.w;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      cos[i] = kPairing == Pairing::kAny && i < turning ? from_cos[i] : 1.f;
      sin[i] = kPairing == Pairing::kAny && i < turning ? from_sin[i] : 0.f;
    }
  }

  __device__ PairValues apply(PairValues x, bool has_last) const {
    if (has_last) x.second[3] = 0.f;
    PairValues y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y.first[i] = x.first[i] * cos[i] - x.second[i] * sin[i];
      y.second[i] = x.second[i] * cos[i] + x.first[i] * sin[i];
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
      x.first[i] = y.first[i] * cos[i] + y.second[i] * sin[i];
      x.second[i] = y.second[i] * cos[i] - y.first[i] * sin[i];
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
      default: return f.template operator()<T, D, Pairing::kAny>();
    }
  });
}

}  // namespace dmc

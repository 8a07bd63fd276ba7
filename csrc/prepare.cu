// From unrotated queries, keys and values to what a causal attention kernel reads: decisions, importance, merged keys and
// values, rotation, and the last channel as a key's bias.
//
// A thread block takes a tile of tokens of one sequence and KV head, with the query heads that read it. Merging is a
// banded matrix times the tile's rows, on the tensor cores; rotation and queries follow row by row.
#include "merging.cuh"
#include "philox.cuh"

namespace dmc {
namespace {

struct Decision {
  float alpha, keep;  // the degree of merging, and log(1 - alpha)
};

__device__ Decision decide(float logit, float temperature) {
  if (temperature == 0.f) return logit > 0.f ? Decision{1.f, -INFINITY} : Decision{0.f, 0.f};
  const float x = logit / temperature, small = expf(-fabsf(x));
  return {x >= 0.f ? 1.f / (1.f + small) : small / (1.f + small), -(fmaxf(x, 0.f) + log1pf(small))};
}

// 16-bit keys hold biases down to this; exp() of it is 0.
constexpr float kHidden = -30000.f;

template <class T, int D>
struct PrepareMemory {
  static constexpr int kTokens = kTile<T, D>;
  static constexpr int kMergedStride = D + 4;

  static constexpr int floats(int back) {
    const int rows = kTokens + back * kBlock;
    return Coefficients::floats(rows, kTokens) + kTokens + 1 + kTokens * kMergedStride;
  }
  static constexpr int bytes(int back) {
    const int rows = kTokens + back * kBlock;
    return 2 * Rows<T, D>::bytes(rows) + Rows<T, D>::bytes(kTokens) + 4 * floats(back);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads<T, D>) prepare_kernel(const __grid_constant__ Prepare p) {
  using Memory = PrepareMemory<T, D>;
  constexpr int kTokens = Memory::kTokens;
  const auto [tokens, sequences, heads, kv_heads, channels] = p.shape;
  const int group = heads / kv_heads;
  const int kv_head = blockIdx.x % kv_heads, batch = blockIdx.x / kv_heads % sequences;
  const int start = blockIdx.x / kv_heads / sequences * kTokens;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int back = blocks_back(p.window), halo = back * kBlock, rows = kTokens + halo;

  extern __shared__ __align__(16) char memory[];
  const Rows<T, D> keys{reinterpret_cast<T*>(memory)}, values{keys.at(rows)}, merged_values{values.at(rows)};
  float* floats = reinterpret_cast<float*>(merged_values.at(kTokens));
  float* merged_keys = floats;
  floats += kTokens * Memory::kMergedStride;
  Coefficients merging(floats, rows, halo, p.window);
  float* keep = floats + Coefficients::floats(rows, kTokens);  // [kTokens + 1] log(1 - α)

  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;
  const T* query = static_cast<const T*>(p.query) + batch * p.query_stride.batch +
                   int64_t(kv_head) * group * p.query_stride.head;
  copy_rows<T, D, kThreads<T, D>>(keys, key, p.key_stride.token, start - halo, rows, tokens);
  copy_rows<T, D, kThreads<T, D>>(values, value, p.value_stride.token, start - halo, rows, tokens);

  // Decisions and importance, one thread a token; one token more than the tile, for the last key's bias.
  const uint64_t noise_key = p.noise_key ? *p.noise_key : 0;
  for (int row = thread; row <= rows; row += kThreads<T, D>) {
    const int token = start - halo + row;
    const bool exists = token >= 0 && token < tokens;
    const int64_t index = (int64_t(token) * sequences + batch) * kv_heads + kv_head;
    Decision decision{0.f, 0.f};
    float weight = 0.f;
    if (exists) {
      float logit = to_float(key[token * p.key_stride.token + D - 1]) - p.offset;
      if (p.noise) logit += p.noise[index];
      if (p.noise_key)
        logit += logistic_noise(
            noise_key, make_uint4(token, batch, p.noise_first_head + kv_head, p.noise_stream));
      if (token > 0) decision = decide(logit, p.temperature);  // the first token has nothing to merge into
      float last = 0.f;
      for (int i = 0; i < group; ++i)
        last += to_float(query[token * p.query_stride.token + i * p.query_stride.head + D - 1]);
      weight = 1.f / (1.f + expf(-(last / group + p.offset))) + 0x1p-7f;
    }
    if (row < rows) {
      merging.alpha[row] = decision.alpha;
      merging.weight[row] = weight;
      if (row >= halo && exists) {
        p.alpha[index] = decision.alpha;
        p.weight[index] = weight;
      }
    }
    if (row >= halo) keep[row - halo] = decision.keep;
  }
  __syncthreads();
  merging.tabulate(rows, thread, kThreads<T, D>);
  wait_for_copies();

  {  // Merge: even warps keys, odd warps values, 16 tokens each.
    using P = typename Planes<T>::type;
    const int block = back + warp / 2;
    const Rows<T, D>& source = warp % 2 ? values : keys;
    float sums[D / 16][2][4] = {}, total[2] = {}, between = 1.f;
    for (int other = block; other >= block - back; --other) {
      uint32_t coefficients[Planes<T>::coefficients][4];
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int t = block * kBlock + tile_row(reg), j = other * kBlock + tile_column(reg);
        const float m0 = merging(t, j, between), m1 = merging(t, j + 1, between);
        total[reg % 2] += m0 + m1;
        split<P>(m0, m1, coefficients, reg);
      }
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t tile[Planes<T>::elements][4];
        source.right(tile, other * kBlock, c * 16);
        multiply_add_tiles<T>(sums[c], coefficients, tile);
      }
      if (other < block) between *= merging.block_product(other);
    }
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = 1.f / sum_over_columns(total[i]);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int row = warp / 2 * kBlock + tile_row(reg), channel = c * 16 + tile_column(reg);
        const float x[2] = {sums[c][reg / 2][reg % 2 * 2] * scale[reg % 2],
                            sums[c][reg / 2][reg % 2 * 2 + 1] * scale[reg % 2]};
        if (warp % 2)
          store(merged_values.at(row, channel), x);
        else
          store(merged_keys + row * Memory::kMergedStride + channel, x);
      }
    }
  }
  __syncthreads();

  // Rotate and write, row by row.
  constexpr int kRowLanes = kLanes<D>, kRowsAtOnce = kThreads<T, D> / kRowLanes;
  const PairLayout<D> layout(p.rotary);
  const int pair = lane % kRowLanes * 4;
  const bool owns = pair < D / 2, has_last = layout.has_last(pair);
  for (int row = thread / kRowLanes; row < kTokens; row += kRowsAtOnce) {
    const int token = start + row;
    if (__all_sync(~0u, token >= tokens)) break;
    const bool writes = owns && token < tokens;
    const int64_t index = (int64_t(token) * sequences + batch) * kv_heads + kv_head;
    Rotation rotation = {};
    PairValues rotated_key = {};
    if (writes) {
      rotation.read(p.rotary, layout, token, batch, pair);
      rotated_key = rotation.apply(layout.read(merged_keys + row * Memory::kMergedStride, pair), has_last);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rotated_key.first[i] = rounded<T>(rotated_key.first[i]);
        rotated_key.second[i] = rounded<T>(rotated_key.second[i]);
      }
      PairValues with_bias = rotated_key;
      if (has_last) with_bias.second[3] = token + 1 < tokens ? fmaxf(keep[row + 1] / p.bias.bias_per_channel, kHidden) : 0.f;
      layout.write(static_cast<T*>(p.attention_key) + index * D, pair, with_bias);
    }
    for (int i = 0; i < group; ++i) {
      PairValues rotated = {};
      if (writes) {
        rotated = rotation.apply(
            layout.read(query + token * p.query_stride.token + i * p.query_stride.head, pair), has_last);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          rotated.first[j] = rounded<T>(rotated.first[j]);
          rotated.second[j] = rounded<T>(rotated.second[j]);
        }
        PairValues with_channel = rotated;
        if (has_last) with_channel.second[3] = p.bias.query_channel;
        layout.write(static_cast<T*>(p.attention_query) + (index * group + i) * D, pair, with_channel);
      }
      const float score = p.scale * dot<D>(rotated, rotated_key);
      if (writes && pair == 0)
        p.diagonal[(int64_t(batch) * heads + kv_head * group + i) * tokens + token] = score;
    }
  }

  constexpr int kPiece = 16 / sizeof(T), kPieces = D / kPiece;
  for (int i = thread; i < kTokens * kPieces; i += kThreads<T, D>) {
    const int row = i / kPieces, channel = i % kPieces * kPiece;
    if (start + row >= tokens) break;
    const int64_t index = (int64_t(start + row) * sequences + batch) * kv_heads + kv_head;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.attention_value) + index * D + channel) =
        *reinterpret_cast<const uint4*>(merged_values.at(row, channel));
  }
}

}  // namespace

template <class T, int D>
static cudaError_t launch(const Prepare& p, cudaStream_t stream) {
  const int bytes = PrepareMemory<T, D>::bytes(blocks_back(p.window));
  if (auto error = cudaFuncSetAttribute(prepare_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const int tiles = (p.shape.tokens + kTile<T, D> - 1) / kTile<T, D>;
  prepare_kernel<T, D>
      <<<tiles * p.shape.batch * p.shape.kv_heads, kThreads<T, D>, bytes, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t prepare(const Prepare& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.shape.channels, [&]<class T, int D>() { return launch<T, D>(p, stream); });
}

}  // namespace dmc

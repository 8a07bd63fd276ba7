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

// What the last channel of a key holds: its bias, as far down as 16-bit numbers go (exp() of that is 0); and 0 where
// float32 does not tell exp(bias) from 1, so that nobody has to look at such a key's diagonal.
__device__ float key_bias(float keep, float bias_per_channel) {
  return keep > -0x1p-24f ? 0.f : fmaxf(keep / bias_per_channel, -30000.f);
}

template <class T, int D>
struct PrepareMemory {
  static constexpr int kTokens = kTile<T, D>;
  static constexpr int kMergedStride = D + 4;

  // Keys and values, later the merged keys in float32.
  static constexpr int row_bytes(int back) {
    const int source = 2 * Rows<T, D>::bytes(kTokens + back * kBlock), merged = 4 * kTokens * kMergedStride;
    return source > merged ? source : merged;
  }
  // Queries on their way: of each warp kAhead times as many rows as it works on at once.
  static constexpr int kAhead = 4, kQueryRows = kThreads<T, D> / kLanes<D> * kAhead;
  static constexpr int kQueryBytes = kQueryRows * D * int(sizeof(T));

  static constexpr int bytes(int back) {
    return kQueryBytes + row_bytes(back) + 4 * (Coefficients::floats(kTokens + back * kBlock, kTokens) + kTokens + 1);
  }
};

template <class T, int D, Pairing kPairing>
__global__ void __launch_bounds__(kThreads<T, D>, sizeof(T) == 2 && D <= 128 ? 3 : 1) prepare_kernel(const __grid_constant__ Prepare p) {
  using Memory = PrepareMemory<T, D>;
  constexpr int kTokens = Memory::kTokens;
  const auto [tokens, sequences, heads, kv_heads, channels, group] = p.shape;
  const int kv_head = blockIdx.x, batch = blockIdx.y, start = blockIdx.z * kTokens;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int back = blocks_back(p.window), halo = back * kBlock, rows = kTokens + halo;

  extern __shared__ __align__(16) char memory[];
  T* const queries = reinterpret_cast<T*>(memory);
  char* const row_memory = memory + Memory::kQueryBytes;
  const Rows<T, D> keys{reinterpret_cast<T*>(row_memory)}, values{keys.at(rows)};
  float* const merged_keys = reinterpret_cast<float*>(row_memory);  // [kTokens][kMergedStride]
  float* floats = reinterpret_cast<float*>(row_memory + Memory::row_bytes(back));
  Coefficients merging(floats, rows, halo, p.window);
  float* bias = floats + Coefficients::floats(rows, kTokens);  // [kTokens + 1] of the key before, as the last channel holds it

  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;
  const T* query = static_cast<const T*>(p.query) + batch * p.query_stride.batch +
                   int64_t(kv_head) * group * p.query_stride.head;
  copy_rows<T, D, kThreads<T, D>>(values, value, p.value_stride.token, start - halo, rows, tokens);
  end_of_copies();
  copy_rows<T, D, kThreads<T, D>>(keys, key, p.key_stride.token, start - halo, rows, tokens);
  end_of_copies();

  // Queries, row by row and head by head, each warp for itself.
  constexpr int kAhead = Memory::kAhead, kRowLanes = kLanes<D>, kRowsAtOnce = kThreads<T, D> / kRowLanes;
  const int first_row = thread / kRowLanes, end = min(kTokens, tokens - start);
  const int piece = lane % kRowLanes * 8;  // this lane's eight channels
  T* const own_queries = queries + first_row * kAhead * D;
  const T* from_query = query + (start + first_row) * p.query_stride.token + piece;
  int copied = 0, copied_row = first_row, copied_head = 0;
  const auto copy_query = [&] {
    if (piece < D && copied_row < end) {
      const uint32_t to = shared_address(own_queries + copied % kAhead * D + piece);
#pragma unroll
      for (int i = 0; i < int(sizeof(T)) / 2; ++i) copy_16_bytes(to + 16 * i, from_query + 16 * i / sizeof(T), true);
    }
    end_of_copies();
    ++copied;
    if (++copied_head < group) {
      from_query += p.query_stride.head;
    } else {
      copied_head = 0;
      copied_row += kRowsAtOnce;
      from_query += kRowsAtOnce * p.query_stride.token - (group - 1) * p.query_stride.head;
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy_query();

  // Decisions and importance, one thread a token; one token more than the tile, for the last key's bias.
  for (int row = thread; row <= rows; row += kThreads<T, D>) {
    const int token = start - halo + row;
    const bool exists = token >= 0 && token < tokens;
    const int64_t index = (int64_t(token) * sequences + batch) * kv_heads + kv_head;
    Decision decision{0.f, 0.f};
    float weight = 0.f;
    if (exists) {
      // All that is read here, before any of it is used.
      const T decides = key[token * p.key_stride.token + D - 1];
      const T* weighs = query + token * p.query_stride.token + D - 1;
      const float noise = p.noise ? p.noise[index] : 0.f;
      const uint64_t noise_key = p.noise_key ? *const_cast<const volatile int64_t*>(p.noise_key) : 0;
      float last = 0.f;
      for (int i = 0; i < group; i += 4) {
        T four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = i + j < group ? weighs[(i + j) * p.query_stride.head] : from_float<T>(0.f);
        last += (to_float(four[0]) + to_float(four[1])) + (to_float(four[2]) + to_float(four[3]));
      }
      float logit = to_float(decides) - p.offset + noise;
      if (p.noise_key) {
        const int place = p.noise_first_token + batch / p.noise_sequences * p.noise_stride + token;
        logit += p.noise_scale * logistic_noise(
            noise_key, make_uint4(place, batch % p.noise_sequences, p.noise_first_head + kv_head, p.noise_stream));
      }
      if (token > 0) decision = decide(logit, p.temperature);  // the first token has nothing to merge into
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
    if (row >= halo) bias[row - halo] = key_bias(decision.keep, p.bias.bias_per_channel);
  }
  __syncthreads();
  merging.tabulate(rows, thread, kThreads<T, D>);
  wait_for_copies<kAhead + 1>();  // the values are there

  {  // Merge: two warps share 16 tokens, each takes half of the channels, of values first and then of keys.
    constexpr int kChunks = D / 32;
    const int block = back + warp / 2, first_channel = warp % 2 * (D / 2), first_token = start + warp / 2 * kBlock;
    uint32_t near[2][Planes<T>::coefficients][4];  // for the block itself and the one before: all that most windows reach
    float total[2] = {}, between = 1.f;
    for (int other = block; other >= block - back; --other) {
      float m[2][4];
      merging.tile(block, other, between, m);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i % 4 / 2] += m[i / 4][i % 4];
      if (other == block) split_tile<T>(m, near[0]);
      if (other == block - 1) split_tile<T>(m, near[1]);
      if (other < block) between *= merging.block_product(other);
    }
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = 1.f / sum_over_columns(total[i]);

    const auto merge = [&](const Rows<T, D>& source, float(&sums)[kChunks][2][4]) {
      const auto add = [&](const uint32_t(&coefficients)[Planes<T>::coefficients][4], int other) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          uint32_t tile[Planes<T>::elements][4];
          source.right(tile, other * kBlock, first_channel + c * 16);
          multiply_add_tiles<T>(sums[c], coefficients, tile);
        }
      };
      add(near[0], block);
      if (back > 0) add(near[1], block - 1);
      float between = back > 1 ? merging.block_product(block - 1) : 1.f;
      for (int other = block - 2; other >= block - back; --other) {
        float m[2][4];
        uint32_t far[Planes<T>::coefficients][4];
        merging.tile(block, other, between, m);
        split_tile<T>(m, far);
        add(far, other);
        between *= merging.block_product(other);
      }
    };
    {
      float sums[kChunks][2][4] = {};
      merge(values, sums);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = first_token + tile_row(i);
        const int64_t index = (int64_t(token) * sequences + batch) * kv_heads + kv_head;
        T* const row = static_cast<T*>(p.attention_value) + index * D + first_channel;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) write_row(row + c * 16, sums[c], i, scale[i], token < tokens);
      }
    }
    float sums[kChunks][2][4] = {};
    wait_for_copies<kAhead>();
    merge(keys, sums);
    __syncthreads();  // the merged keys take the place of what they were made from
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int row = warp / 2 * kBlock + tile_row(reg), channel = first_channel + c * 16 + tile_column(reg);
        const float x[2] = {sums[c][reg / 2][reg % 2 * 2] * scale[reg % 2],
                            sums[c][reg / 2][reg % 2 * 2 + 1] * scale[reg % 2]};
        store(merged_keys + row * Memory::kMergedStride + channel, x);
      }
    }
  }

  // Rotate and write, row by row.
  const LanePairs<D, kPairing> pairs(p.rotary, lane % kRowLanes * 4);
  const bool has_last = pairs.have_last();
  const int64_t first_index = (int64_t(start + first_row) * sequences + batch) * kv_heads + kv_head;
  T* to_key = static_cast<T*>(p.attention_key) + first_index * D;
  T* to_query = static_cast<T*>(p.attention_query) + first_index * group * D;
  float* to_diagonal = p.diagonal + (int64_t(batch) * heads + kv_head * group) * tokens + start + first_row;
  int64_t angles = Rotation::offset(p.rotary, start + first_row, batch);
  const int64_t next_kv = int64_t(kRowsAtOnce) * sequences * kv_heads * D;
  __syncthreads();
  for (int row = first_row; row - first_row < end; row += kRowsAtOnce) {
    const bool writes = pairs.exist() && row < end;
    Rotation rotation = {};
    PairValues rotated_key = {};
    if (writes) {
      rotation.read(p.rotary, pairs, angles);
      PairPack<T> pack =
          pairs.template pack<T>(rotation.apply(pairs.read(merged_keys + row * Memory::kMergedStride), has_last));
      rotated_key = pairs.values(pack);  // as rounded
      if (has_last) pack.high.set(3, bias[row + 1]);
      pairs.write_pack(to_key, pack);
    }
    T* to_head = to_query;
    for (int i = 0; i < group; ++i) {
      wait_for_own_copies<kAhead - 1>();
      PairPack<T> query_pack = {};
      if (writes) query_pack = pairs.read_pack(own_queries + copied % kAhead * D);
      __syncwarp();
      copy_query();  // in its place
      PairValues rotated = {};
      if (writes) {
        PairPack<T> pack = pairs.template pack<T>(rotation.apply(pairs.values(query_pack), has_last));
        rotated = pairs.values(pack);
        if (has_last) pack.high.set(3, p.bias.query_channel);
        pairs.write_pack(to_head, pack);
      }
      to_head += D;
      const float score = p.scale * dot<D>(rotated, rotated_key);
      if (writes && has_last) to_diagonal[i * tokens] = score;
    }
    angles += kRowsAtOnce * p.rotary.stride.token;
    to_diagonal += kRowsAtOnce;
    to_key += next_kv;
    to_query += next_kv * group;
  }
}

}  // namespace

template <class T, int D, Pairing kPairing>
static cudaError_t launch(const Prepare& p, cudaStream_t stream) {
  const int bytes = PrepareMemory<T, D>::bytes(blocks_back(p.window));
  if (auto error = cudaFuncSetAttribute(prepare_kernel<T, D, kPairing>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const dim3 grid(p.shape.kv_heads, p.shape.batch, (p.shape.tokens + kTile<T, D> - 1) / kTile<T, D>);
  prepare_kernel<T, D, kPairing>
      <<<grid, kThreads<T, D>, bytes, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t prepare(const Prepare& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.shape.channels, p.rotary,
                  [&]<class T, int D, Pairing kPairing>() { return launch<T, D, kPairing>(p, stream); });
}

}  // namespace dmc

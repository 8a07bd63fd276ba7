// A key's bias does not apply to its own token's query, but a causal kernel adds it there, too. With e^b for the biased
// and 1 for the unbiased diagonal, what is missing is (1 - e^b) e^s v on the diagonal alone: it is merged in through the
// log-sum-exp. Given the merged output and log-sum-exp, the kernel's own backward pass yields the gradients of what it
// computed, and the missing diagonal adds terms row by row. Where nothing is missing (b = 0), nothing is read.
#include "common.cuh"

namespace dmc {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 8;  // of a thread block: 32 bytes of every [b, h, s] tensor

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 6) merge_diagonal_kernel(const __grid_constant__ MergeDiagonal p) {
  constexpr int kHeads = 8, kTokensAtOnce = kThreads / kLanes<D> / kHeads;
  const auto [tokens, sequences, heads, kv_heads, channels, group] = p.shape;
  const int head_blocks = (sequences * heads + kHeads - 1) / kHeads, row = threadIdx.x / kLanes<D>;
  const int sequence_head = blockIdx.x % head_blocks * kHeads + row % kHeads;
  const int channel = threadIdx.x % kLanes<D> * 8;
  if (sequence_head >= sequences * heads || channel >= D) return;
  const int batch = sequence_head / heads, head = sequence_head % heads;
  const int64_t kv_offset = (int64_t(batch) * kv_heads + head / group) * D;
  const int64_t kv_stride = int64_t(sequences) * kv_heads * D;
  const T* const keys = static_cast<const T*>(p.attention_key) + kv_offset + D - 1;
  const T* const values = static_cast<const T*>(p.attention_value) + kv_offset + channel;
  T* const outputs = static_cast<T*>(p.output) + batch * p.output_stride.batch + head * p.output_stride.head + channel;
  const int first = blockIdx.x / head_blocks * kTokens + row / kHeads;
  T next = first < tokens ? keys[first * kv_stride] : T{};
#pragma unroll 1  // unrolled, it would need more registers, and fewer rows would be under way
  for (int i = 0; i < kTokens / kTokensAtOnce; ++i) {
    const int token = first + i * kTokensAtOnce, following = token + kTokensAtOnce;
    if (token >= tokens) return;
    const float missing = -expm1f(p.bias_per_channel * to_float(next));
    if (following < tokens) next = keys[following * kv_stride];
    if (missing == 0.f) continue;
    T* const to = outputs + token * p.output_stride.token;
    float* const lse = p.logsumexp + int64_t(sequence_head) * tokens + token;
    float out[8], value[8];
    load(to, out);
    load(values + token * kv_stride, value);
    const float summed = *lse, own = p.diagonal[lse - p.logsumexp], above = own - summed;
    const float added = missing * expf(fminf(above, 80.f)), keep = 1.f / (1.f + added), add = added * keep;
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] = out[c] * keep + value[c] * add;
    store(to, out);
    constexpr uint32_t kRow = D / 8 == 32 ? ~0u : (1u << D / 8 % 32) - 1;
    __syncwarp(kRow << threadIdx.x % 32 / kLanes<D> * kLanes<D>);  // the row's lanes have read the old log-sum-exp
    if (channel == 0) *lse = above < 80.f ? summed + log1pf(added) : own + logf(missing);
  }
}

template <class T, int D, Pairing kPairing>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ MergeDiagonalBackward p) {
  constexpr int kRows = kThreads / kLanes<D>, kHeads = kRows / kTokens;
  const auto [tokens, sequences, heads, kv_heads, channels, group] = p.shape;
  const int head_blocks = (sequences * kv_heads + kHeads - 1) / kHeads;
  const int row = threadIdx.x / kLanes<D>;
  const int token = blockIdx.x / head_blocks * kTokens + row / kHeads;
  const int sequence_head = blockIdx.x % head_blocks * kHeads + row % kHeads;
  const int batch = sequence_head / kv_heads, kv_head = sequence_head % kv_heads;
  const LanePairs<D, kPairing> pairs(p.rotary, threadIdx.x % kLanes<D> * 4);
  const bool exists = token < tokens && sequence_head < sequences * kv_heads, owns = exists && pairs.exist();
  const bool has_last = pairs.have_last();

  const int64_t kv_index = (int64_t(token) * sequences + batch) * kv_heads + kv_head, kv_row = kv_index * D;
  Rotation rotation = {};
  PairPack<T> key = {}, value = {}, grad_key = {}, grad_value = {}, next = {};
  float bias = 0.f;
  if (owns) {
    bias = p.bias_per_channel * to_float(static_cast<const T*>(p.attention_key)[kv_row + D - 1]);
    next = pairs.read_pack(static_cast<const T*>(p.grad_query) + kv_row * group);
    key = pairs.read_pack(static_cast<const T*>(p.attention_key) + kv_row);
    value = pairs.read_pack(static_cast<const T*>(p.attention_value) + kv_row);
    grad_key = pairs.read_pack(static_cast<const T*>(p.grad_key) + kv_row);
    grad_value = pairs.read_pack(static_cast<const T*>(p.grad_value) + kv_row);
    rotation.read(p.rotary, pairs, Rotation::offset(p.rotary, token, batch));
  }
  const float missing = -expm1f(bias);
  const bool any_missing = __any_sync(~0u, missing > 0.f);
  float grad_bias = grad_key.high[3] / p.bias_per_channel;  // of the lane that owns the last channel
  float add_key[8] = {}, add_value[8] = {};

  // Last channels, which hold no query and no key, take part in what follows; rotating back clears them.
#pragma unroll 1  // unrolled, it would need more registers than occupancy allows
  for (int i = 0; i < group; ++i) {
    const int head = kv_head * group + i;
    const int64_t query_row = (kv_index * group + i) * D;
    const PairPack<T> grad_query = next;
    float key_factor = 0.f;
    if (any_missing) {
      PairPack<T> grad = {}, out = {}, query = {};
      float probability = 0.f;  // of the unbiased diagonal
      if (owns) {
        grad = pairs.read_pack(static_cast<const T*>(p.grad_output) + token * p.grad_output_stride.token +
                                    batch * p.grad_output_stride.batch + head * p.grad_output_stride.head);
        out = pairs.read_pack(static_cast<const T*>(p.output) + token * p.output_stride.token +
                                   batch * p.output_stride.batch + head * p.output_stride.head);
        query = pairs.read_pack(static_cast<const T*>(p.attention_query) + query_row);
        const int64_t index = (int64_t(batch) * heads + head) * tokens + token;
        probability = expf(p.diagonal[index] - p.logsumexp[index]);
      }
      float product = 0.f;
#pragma unroll
      for (int c = 0; c < 8; ++c) product += grad[c] * (value[c] - out[c]);
      const float grad_score = probability * sum_over_row<D>(product);
      const float value_factor = missing * probability;
      key_factor = missing * grad_score * p.scale;
      grad_bias -= (1.f - missing) * grad_score;  // the attention kernel took the diagonal for biased
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        add_key[c] += key_factor * query[c];
        add_value[c] += value_factor * grad[c];
      }
    }
    if (owns) {
      if (i + 1 < group) next = pairs.read_pack(static_cast<const T*>(p.grad_query) + query_row + D);
      float sum[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) sum[c] = grad_query[c] + key_factor * key[c];
      pairs.write(static_cast<T*>(p.grad_query) + query_row,
                   rotation.apply_transposed(pairs.paired(sum), has_last));
    }
  }
  if (owns) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      add_key[c] += grad_key[c];
      add_value[c] += grad_value[c];
    }
    pairs.write(static_cast<T*>(p.grad_key) + kv_row,
                 rotation.apply_transposed(pairs.paired(add_key), has_last));
    pairs.write(static_cast<T*>(p.grad_value) + kv_row, pairs.paired(add_value));
    if (has_last) p.grad_bias[kv_index] = grad_bias;
  }
}

}  // namespace

cudaError_t merge_diagonal(const MergeDiagonal& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.shape.channels, [&]<class T, int D>() {
    const int64_t head_blocks = (int64_t(p.shape.batch) * p.shape.heads + 7) / 8;
    const int64_t blocks = head_blocks * ((p.shape.tokens + kTokens - 1) / kTokens);
    merge_diagonal_kernel<T, D><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

cudaError_t merge_diagonal_backward(const MergeDiagonalBackward& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.shape.channels, p.rotary, [&]<class T, int D, Pairing kPairing>() {
    constexpr int kHeads = kThreads / kLanes<D> / kTokens;
    const int64_t head_blocks = (int64_t(p.shape.batch) * p.shape.kv_heads + kHeads - 1) / kHeads;
    const int64_t blocks = head_blocks * ((p.shape.tokens + kTokens - 1) / kTokens);
    backward_kernel<T, D, kPairing><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace dmc

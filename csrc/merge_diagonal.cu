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
__global__ void __launch_bounds__(kThreads) merge_diagonal_kernel(const __grid_constant__ MergeDiagonal p) {
  constexpr int kHeads = 8, kRowsAtOnce = kThreads / kLanes<D>;
  const auto [tokens, sequences, heads, kv_heads, channels] = p.shape;
  const int head_blocks = (sequences * heads + kHeads - 1) / kHeads;
  const int channel = threadIdx.x % kLanes<D> * 8;
#pragma unroll 4
  for (int i = 0; i < kTokens * kHeads / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + threadIdx.x / kLanes<D>;
    const int token = blockIdx.x / head_blocks * kTokens + row / kHeads;
    const int sequence_head = blockIdx.x % head_blocks * kHeads + row % kHeads;
    if (token >= tokens || sequence_head >= sequences * heads || channel >= D) continue;
    const int batch = sequence_head / heads, head = sequence_head % heads;
    const int64_t kv_row =
        ((int64_t(token) * sequences + batch) * kv_heads + head / (heads / kv_heads)) * D;
    const float bias = p.bias_per_channel * to_float(static_cast<const T*>(p.attention_key)[kv_row + D - 1]);
    const float missing = -expm1f(bias);
    if (missing == 0.f) continue;

    const int64_t index = int64_t(sequence_head) * tokens + token;
    T* row_out = static_cast<T*>(p.output) + token * p.output_stride.token + batch * p.output_stride.batch +
                 head * p.output_stride.head + channel;
    float out[8], value[8];
    load(row_out, out);
    load(static_cast<const T*>(p.attention_value) + kv_row + channel, value);
    const float rest = p.logsumexp[index], own = p.diagonal[index] + logf(missing);
    const float larger = fmaxf(rest, own), merged = larger + log1pf(expf(fminf(rest, own) - larger));
    const float keep = expf(rest - merged), add = expf(own - merged);
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] = out[c] * keep + value[c] * add;
    store(row_out, out);
    constexpr uint32_t kRow = (D / 8 == 32) ? ~0u : (1u << D / 8 % 32) - 1;
    __syncwarp(kRow << threadIdx.x % 32 / kLanes<D> * kLanes<D>);  // the row's lanes have read the old log-sum-exp
    if (channel == 0) p.logsumexp[index] = merged;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ MergeDiagonalBackward p) {
  constexpr int kRows = kThreads / kLanes<D>, kHeads = kRows / kTokens;
  const auto [tokens, sequences, heads, kv_heads, channels] = p.shape;
  const int group = heads / kv_heads, head_blocks = (sequences * kv_heads + kHeads - 1) / kHeads;
  const int row = threadIdx.x / kLanes<D>;
  const int token = blockIdx.x / head_blocks * kTokens + row / kHeads;
  const int sequence_head = blockIdx.x % head_blocks * kHeads + row % kHeads;
  const int batch = sequence_head / kv_heads, kv_head = sequence_head % kv_heads;
  const PairLayout<D> layout(p.rotary);
  const int pair = threadIdx.x % kLanes<D> * 4;
  const bool exists = token < tokens && sequence_head < sequences * kv_heads, owns = exists && pair < D / 2;
  const bool has_last = layout.has_last(pair);

  const int64_t kv_index = (int64_t(token) * sequences + batch) * kv_heads + kv_head, kv_row = kv_index * D;
  Rotation rotation = {};
  PairValues key = {}, value = {}, grad_key = {}, grad_value = {};
  float bias = 0.f, grad_bias = 0.f;
  if (owns) {
    rotation.read(p.rotary, layout, token, batch, pair);
    key = layout.read(static_cast<const T*>(p.attention_key) + kv_row, pair);
    value = layout.read(static_cast<const T*>(p.attention_value) + kv_row, pair);
    grad_key = layout.read(static_cast<const T*>(p.grad_key) + kv_row, pair);
    grad_value = layout.read(static_cast<const T*>(p.grad_value) + kv_row, pair);
    if (has_last) grad_bias = grad_key.second[3] / p.bias_per_channel;
    if (has_last) key.second[3] = 0.f;
  }
  if (exists) bias = p.bias_per_channel * to_float(static_cast<const T*>(p.attention_key)[kv_row + D - 1]);
  const float missing = -expm1f(bias);
  const bool any_missing = __any_sync(~0u, missing > 0.f);

  for (int i = 0; i < group; ++i) {
    const int head = kv_head * group + i;
    const int64_t query_row = (kv_index * group + i) * D;
    PairValues grad_query = {};
    if (owns) grad_query = layout.read(static_cast<const T*>(p.grad_query) + query_row, pair);
    if (any_missing) {
      PairValues grad = {}, query = {}, gap = {};
      float probability = 0.f;  // of the unbiased diagonal
      if (owns) {
        grad = layout.read(static_cast<const T*>(p.grad_output) + token * p.grad_output_stride.token +
                               batch * p.grad_output_stride.batch + head * p.grad_output_stride.head, pair);
        gap = layout.read(static_cast<const T*>(p.output) + token * p.output_stride.token +
                              batch * p.output_stride.batch + head * p.output_stride.head, pair);
        query = layout.read(static_cast<const T*>(p.attention_query) + query_row, pair);
        if (has_last) query.second[3] = 0.f;
        const int64_t index = (int64_t(batch) * heads + head) * tokens + token;
        probability = expf(p.diagonal[index] - p.logsumexp[index]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          gap.first[c] = value.first[c] - gap.first[c];
          gap.second[c] = value.second[c] - gap.second[c];
        }
      }
      const float grad_score = probability * dot<D>(grad, gap);
      const float key_factor = missing * grad_score * p.scale, value_factor = missing * probability;
      grad_bias -= (1.f - missing) * grad_score * (has_last ? 1.f : 0.f);  // the kernel took the diagonal for biased
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        grad_query.first[c] += key_factor * key.first[c];
        grad_query.second[c] += key_factor * key.second[c];
        grad_key.first[c] += key_factor * query.first[c];
        grad_key.second[c] += key_factor * query.second[c];
        grad_value.first[c] += value_factor * grad.first[c];
        grad_value.second[c] += value_factor * grad.second[c];
      }
    }
    if (owns)
      layout.write(static_cast<T*>(p.grad_query) + query_row, pair, rotation.apply_transposed(grad_query, has_last));
  }
  if (owns) {
    layout.write(static_cast<T*>(p.grad_key) + kv_row, pair, rotation.apply_transposed(grad_key, has_last));
    layout.write(static_cast<T*>(p.grad_value) + kv_row, pair, grad_value);
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
  return dispatch(dtype, p.shape.channels, [&]<class T, int D>() {
    constexpr int kHeads = kThreads / kLanes<D> / kTokens;
    const int64_t head_blocks = (int64_t(p.shape.batch) * p.shape.kv_heads + kHeads - 1) / kHeads;
    const int64_t blocks = head_blocks * ((p.shape.tokens + kTokens - 1) / kTokens);
    backward_kernel<T, D><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace dmc

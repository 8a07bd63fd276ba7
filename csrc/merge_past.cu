// Attention to a sequence's past, computed apart from that to a part of its own: softmax over both is the mean of the
// two outputs, weighted by the sums of their exponentials. One pass over memory.
#include "common.cuh"

namespace dmc {
namespace {

constexpr int kThreads = 256, kHeads = 8;
constexpr int kTokens = 8;  // of a thread block: 32 bytes of a log-sum-exp

template <class T, int D>
__global__ void __launch_bounds__(kThreads) merge_past_kernel(const __grid_constant__ MergePast p) {
  constexpr int kTokensAtOnce = kThreads / kLanes<D> / kHeads;
  const int head_blocks = (p.batch * p.heads + kHeads - 1) / kHeads, row = threadIdx.x / kLanes<D>;
  const int sequence_head = blockIdx.x % head_blocks * kHeads + row % kHeads;
  const int channel = threadIdx.x % kLanes<D> * 8;
  if (sequence_head >= p.batch * p.heads || channel >= D) return;
  const int batch = sequence_head / p.heads, head = sequence_head % p.heads;
  auto of_head = [&](const Strides& stride) { return batch * stride.batch + head * stride.head; };
  T* const output = static_cast<T*>(p.output) + of_head(p.output_stride) + channel;
  const T* const past = static_cast<const T*>(p.past) + of_head(p.past_stride) + channel;
  float* const logsumexp = p.logsumexp + of_head(p.logsumexp_stride);
  const float* const past_logsumexp = p.past_logsumexp + of_head(p.past_logsumexp_stride);
  const int first = blockIdx.x / head_blocks * kTokens + row / kHeads;
#pragma unroll
  for (int i = 0; i < kTokens / kTokensAtOnce; ++i) {
    const int token = first + i * kTokensAtOnce;
    if (token >= p.tokens) return;
    T* const to = output + token * p.output_stride.token;
    float* const lse = logsumexp + token * p.logsumexp_stride.token;
    float own[8], more[8];
    load(to, own);
    load(past + token * p.past_stride.token, more);
    const float own_sum = *lse, more_sum = past_logsumexp[token * p.past_logsumexp_stride.token];
    const float smaller = expf(-fabsf(more_sum - own_sum)), whole = 1.f / (1.f + smaller), part = smaller * whole;
    const float keep = more_sum > own_sum ? part : whole, add = more_sum > own_sum ? whole : part;
#pragma unroll
    for (int c = 0; c < 8; ++c) own[c] = own[c] * keep + more[c] * add;
    store(to, own);
    constexpr uint32_t kRow = D / 8 == 32 ? ~0u : (1u << D / 8 % 32) - 1;
    __syncwarp(kRow << threadIdx.x % 32 / kLanes<D> * kLanes<D>);  // the row's lanes have read the old log-sum-exp
    if (channel == 0) *lse = fmaxf(own_sum, more_sum) + log1pf(smaller);
  }
}

}  // namespace

cudaError_t merge_past(const MergePast& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.channels, [&]<class T, int D>() {
    const int64_t head_blocks = (int64_t(p.batch) * p.heads + kHeads - 1) / kHeads;
    const int64_t blocks = head_blocks * ((p.tokens + kTokens - 1) / kTokens);
    merge_past_kernel<T, D><<<blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace dmc

// Gradients through the merge: to keys and values, to the decisions, and to the queries' importance.
//
// With x̄_t = Σ_j m(t,j) x_j / Z_t, Z_t = Σ_j m(t,j) and G_t the gradient of x̄_t (x: key and value together):
//   dL/dx_j = Σ_t m(t,j) G_t / Z_t
//   dL/dm(t,j) = E(t,j) = G_t (x_j - x̄_t) / Z_t
//   w_j dL/dw_j = Σ_t m(t,j) E(t,j)
//   α_u dL/dα_u = Σ_{j < u <= t} m(t,j) E(t,j)
// The last two need only the products G_t x_j, a band of a matrix product. And since Σ_j m(t,j) E(t,j) = 0 (a mean does
// not change when all its weights are scaled), the last sum follows from the one before:
// α_{u+1} dL/dα_{u+1} = α_u dL/dα_u + w_u dL/dw_u, so that no pair (t, j) is looked at twice and nothing divided by α.
#include "merging.cuh"

namespace dmc {
namespace {

template <class T, int D>
struct BackwardMemory {
  static constexpr int kTokens = kTile<T, D>;

  static constexpr int floats(int back) {
    const int halo = back * kBlock;
    return Coefficients::floats(kTokens + 2 * halo, kTokens + halo) + (kTokens + halo)  // inverse totals
           + (back + 1) * kTokens + kTokens / kBlock + back + 2 * kTokens;
  }
  static constexpr int bytes(int back) {
    const int halo = back * kBlock;
    return 2 * Rows<T, D>::bytes(kTokens + 2 * halo) + 2 * Rows<T, D>::bytes(kTokens + halo) + 4 * floats(back);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads<T, D>) backward_kernel(const __grid_constant__ PrepareBackward p) {
  constexpr int kTokens = BackwardMemory<T, D>::kTokens, kBlocks = kTokens / kBlock, kWarps = kThreads<T, D> / 32;
  const auto [tokens, sequences, heads, kv_heads, channels] = p.shape;
  const int group = heads / kv_heads;
  const int kv_head = blockIdx.x % kv_heads, batch = blockIdx.x / kv_heads % sequences;
  const int start = blockIdx.x / kv_heads / sequences * kTokens;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int back = blocks_back(p.window), halo = back * kBlock;
  const int rows = kTokens + 2 * halo, grad_rows = kTokens + halo;  // before, in and behind the tile; in and behind it
  const auto scalar_index = [&](int token) { return (int64_t(token) * sequences + batch) * kv_heads + kv_head; };

  extern __shared__ __align__(16) char memory[];
  const Rows<T, D> keys{reinterpret_cast<T*>(memory)}, values{keys.at(rows)};
  const Rows<T, D> grad_keys{values.at(rows)}, grad_values{grad_keys.at(grad_rows)};
  float* floats = reinterpret_cast<float*>(grad_values.at(grad_rows));
  Coefficients merging(floats, rows, halo, p.window);
  float* inverse_total = floats + Coefficients::floats(rows, grad_rows);  // [grad_rows] 1/Z
  float* column_sums = inverse_total + grad_rows;        // [back + 1][kTokens] Σ_t m E, by blocks between t and j
  float* crossing = column_sums + (back + 1) * kTokens;  // [kBlocks + back] Σ m E over pairs across the tile's start
  float* grad_logit = crossing + kBlocks + back;         // [kTokens]
  float* grad_last = grad_logit + kTokens;               // [kTokens] of the queries' last channel

  const T* key = static_cast<const T*>(p.key) + batch * p.key_stride.batch + kv_head * p.key_stride.head;
  const T* value = static_cast<const T*>(p.value) + batch * p.value_stride.batch + kv_head * p.value_stride.head;
  const int64_t row_offset = (int64_t(batch) * kv_heads + kv_head) * D, row_stride = int64_t(sequences) * kv_heads * D;
  const T* grad_merged_key = static_cast<const T*>(p.grad_merged_key) + row_offset;
  const T* grad_merged_value = static_cast<const T*>(p.grad_merged_value) + row_offset;
  copy_rows<T, D, kThreads<T, D>>(keys, key, p.key_stride.token, start - halo, rows, tokens);
  copy_rows<T, D, kThreads<T, D>>(values, value, p.value_stride.token, start - halo, rows, tokens);
  copy_rows<T, D, kThreads<T, D>>(grad_keys, grad_merged_key, row_stride, start, grad_rows, tokens);
  copy_rows<T, D, kThreads<T, D>>(grad_values, grad_merged_value, row_stride, start, grad_rows, tokens);

  for (int row = thread; row < rows; row += kThreads<T, D>) {
    const int token = start - halo + row;
    const bool exists = token >= 0 && token < tokens;
    merging.alpha[row] = exists ? p.alpha[scalar_index(token)] : 0.f;
    merging.weight[row] = exists ? p.weight[scalar_index(token)] : 0.f;
  }
  __syncthreads();
  merging.tabulate(rows, thread, kThreads<T, D>);
  wait_for_copies();

  // Products G_t x_j and what follows from them, 16 tokens t a warp.
  const auto products = [&](int block, int other, float(&to)[2][4]) {
    float by_key[2][4] = {}, by_value[2][4] = {};  // two chains of dependent multiplications instead of one
    const int grad_row = block * kBlock - halo;
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      uint32_t left[Planes<T>::elements][4], right[Planes<T>::elements][4];
      grad_keys.left(left, grad_row, c);
      keys.right_transposed(right, other * kBlock, c);
      multiply_add_tiles<T>(by_key, left, right);
      grad_values.left(left, grad_row, c);
      values.right_transposed(right, other * kBlock, c);
      multiply_add_tiles<T>(by_value, left, right);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i / 4][i % 4] = by_key[i / 4][i % 4] + by_value[i / 4][i % 4];
  };
  const auto coefficients = [&](int block, int other, float between, float(&to)[2][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int reg = i / 2;
      to[reg / 2][reg % 2 * 2 + i % 2] =
          merging(block * kBlock + tile_row(reg), other * kBlock + tile_column(reg) + i % 2, between);
    }
  };
  for (int block = back + warp; block < 2 * back + kBlocks; block += kWarps) {
    float near[2][2][4];  // the products with the block itself and the one before: all that a window of 17 reaches
    float total[2] = {}, mean[2] = {}, between = 1.f;
    for (int pass = 0; pass < 2; ++pass) {
      float crossing_sum = 0.f;
      between = 1.f;
      const auto visit = [&](int other, const float(&product)[2][4]) {
        float m[2][4];
        coefficients(block, other, between, m);
        if (other < block) between *= merging.block_product(other);
        if (pass == 0) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            total[i % 4 / 2] += m[i / 4][i % 4];
            mean[i % 4 / 2] += m[i / 4][i % 4] * product[i / 4][i % 4];
          }
          return;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) m[i / 4][i % 4] *= (product[i / 4][i % 4] - mean[i % 4 / 2]) * total[i % 4 / 2];
        if (other < back) {
#pragma unroll
          for (int i = 0; i < 8; ++i) crossing_sum += m[i / 4][i % 4];
        } else if (other < back + kBlocks) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float sum = sum_over_rows(m[i / 2][i % 2] + m[i / 2][i % 2 + 2]);
            if (lane < 4)
              column_sums[(block - other) * kTokens + (other - back) * kBlock + i / 2 * 8 + lane * 2 + i % 2] = sum;
          }
        }
      };
      if (pass == 0) products(block, block, near[0]);
      visit(block, near[0]);
      if (back > 0) {
        if (pass == 0) products(block, block - 1, near[1]);
        visit(block - 1, near[1]);
      }
      for (int other = block - 2; other >= block - back; --other) {
        float far[2][4];
        products(block, other, far);
        visit(other, far);
      }
      if (pass == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          total[i] = sum_over_columns(total[i]);
          total[i] = total[i] > 0.f ? 1.f / total[i] : 0.f;  // rows behind the sequence have no weights
          mean[i] = sum_over_columns(mean[i]) * total[i];
          if (lane % 4 == 0) inverse_total[block * kBlock - halo + lane / 4 + i * 8] = total[i];
        }
      } else {
        crossing_sum = sum_over_rows(sum_over_columns(crossing_sum));
        if (lane == 0) crossing[block - back] = crossing_sum;
      }
    }
  }
  __syncthreads();

  if (warp == 0) {  // α_u dL/dα_u along the tile, from what crosses its start; it restarts where a token appends
    constexpr int kEach = (kTokens + 31) / 32;
    float carried = 0.f;  // into this lane's tokens from those of the lanes before
    for (int i = 0; i < kBlocks + back; ++i) carried += crossing[i];
    float own[kEach], sum = 0.f;
    bool restarts = false;
    const auto appends = [&](int row) { return merging.alpha[halo + row] < 0x1p-24f; };
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i;
      own[i] = 0.f;
      if (row >= kTokens) continue;
      for (int far = 0; far <= back; ++far) own[i] += column_sums[far * kTokens + row];
      if (appends(row)) sum = 0.f, restarts = true;
      sum += own[i];
    }
    float before = __shfl_up_sync(~0u, sum, 1);
    bool before_restarts = __shfl_up_sync(~0u, restarts, 1);
    if (lane == 0) before = carried, before_restarts = true;
    for (int step = 1; step < 32; step *= 2) {
      const float further = __shfl_up_sync(~0u, before, step);
      const bool further_restarts = __shfl_up_sync(~0u, before_restarts, step);
      if (lane >= step && !before_restarts) before += further, before_restarts = further_restarts;
    }
    const float inverse_temperature = p.temperature == 0.f ? 0.f : 1.f / p.temperature;  // hard decisions: no gradient
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i, token = start + row;
      if (row >= kTokens || token >= tokens) continue;
      const float alpha = merging.alpha[halo + row], weight = merging.weight[halo + row];
      if (appends(row)) before = 0.f;
      float logit = 0.f;
      if (token > 0) {
        float from_alpha = before;
        if (p.grad_alpha)
          from_alpha += alpha * p.grad_alpha[token * p.grad_alpha_stride.token + batch * p.grad_alpha_stride.batch +
                                             kv_head * p.grad_alpha_stride.head];
        // α = sigmoid(a/τ); the key before is biased by log(1 - α).
        logit = ((1.f - alpha) * from_alpha - alpha * p.grad_bias[scalar_index(token - 1)]) * inverse_temperature;
      }
      const float sigmoid = weight - 0x1p-7f;
      grad_logit[row] = logit;
      grad_last[row] = own[i] / weight * sigmoid * (1.f - sigmoid) / group;
      before += own[i];
    }
  }

  {  // Gradients of keys and values: even warps keys, odd warps values, 16 tokens each.
    using P = typename Planes<T>::type;
    const int block = back + warp / 2;
    const Rows<T, D>& source = warp % 2 ? grad_values : grad_keys;
    const Rows<T, D>& to = warp % 2 ? values : keys;  // no one reads these any more
    float sums[D / 16][2][4] = {}, between = 1.f;
    for (int other = block; other <= block + back; ++other) {
      uint32_t transposed[Planes<T>::coefficients][4];
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const int j = block * kBlock + tile_row(reg), t = other * kBlock + tile_column(reg);
        split<P>(merging(t, j, between) * inverse_total[t - halo],
                 merging(t + 1, j, between) * inverse_total[t + 1 - halo], transposed, reg);
      }
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t tile[Planes<T>::elements][4];
        source.right(tile, other * kBlock - halo, c * 16);
        multiply_add_tiles<T>(sums[c], transposed, tile);
      }
      if (other > block) between *= merging.block_product(other);
    }
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
#pragma unroll
      for (int reg = 0; reg < 4; ++reg) {
        const float x[2] = {sums[c][reg / 2][reg % 2 * 2], sums[c][reg / 2][reg % 2 * 2 + 1]};
        store(to.at(warp / 2 * kBlock + tile_row(reg), c * 16 + tile_column(reg)), x);
      }
    }
  }
  __syncthreads();

  constexpr int kPiece = 16 / sizeof(T), kPieces = D / kPiece;
  for (int i = thread; i < kTokens * kPieces; i += kThreads<T, D>) {
    const int row = i / kPieces, channel = i % kPieces * kPiece;
    if (start + row >= tokens) break;
    const int64_t to = (start + row) * row_stride + row_offset + channel;
    if (channel + kPiece == D) *keys.at(row, D - 1) = from_float<T>(grad_logit[row]);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.grad_key) + to) = *reinterpret_cast<const uint4*>(keys.at(row, channel));
    *reinterpret_cast<uint4*>(static_cast<T*>(p.grad_value) + to) =
        *reinterpret_cast<const uint4*>(values.at(row, channel));
  }
  for (int i = thread; i < kTokens * group; i += kThreads<T, D>) {
    const int row = i / group;
    if (start + row >= tokens) break;
    static_cast<T*>(p.grad_query)[(scalar_index(start + row) * group + i % group) * D + D - 1] =
        from_float<T>(grad_last[row]);
  }
}

template <class T, int D>
cudaError_t launch(const PrepareBackward& p, cudaStream_t stream) {
  const int bytes = BackwardMemory<T, D>::bytes(blocks_back(p.window));
  if (auto error = cudaFuncSetAttribute(backward_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const int tiles = (p.shape.tokens + kTile<T, D> - 1) / kTile<T, D>;
  backward_kernel<T, D><<<tiles * p.shape.batch * p.shape.kv_heads, kThreads<T, D>, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int max_window(DType dtype, int channels) {
  int device = 0, available = 0, window = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return 0;
  // The backward pass needs the most.
  (void)dispatch(dtype, channels, [&]<class T, int D>() {
    for (int back = 0; BackwardMemory<T, D>::bytes(back) <= available; ++back) window = back * kBlock + 1;
    return cudaSuccess;
  });
  return window;
}

cudaError_t prepare_backward(const PrepareBackward& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.shape.channels, [&]<class T, int D>() { return launch<T, D>(p, stream); });
}

}  // namespace dmc

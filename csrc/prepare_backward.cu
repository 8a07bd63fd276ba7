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

  // Coefficients of the nearest blocks, as the tensor cores read them: see `near_fragment`.
  static constexpr int kFragments = kThreads<T, D> / 32 * Planes<T>::coefficients * 128;

  static constexpr int floats(int back) {
    const int halo = back * kBlock;
    return (kTokens / kBlock + back) * (back + 1) * kBlock * kBlock  // products
           + Coefficients::floats(kTokens + 2 * halo, kTokens + halo) + (kTokens + halo)  // inverse totals
           + (back + 1) * kTokens + kTokens / kBlock + back + 2 * kTokens;
  }
  static constexpr int bytes(int back) {
    const int halo = back * kBlock;
    return Rows<T, D>::bytes(kTokens + 2 * halo) + Rows<T, D>::bytes(kTokens + halo) + 4 * (kFragments + floats(back));
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads<T, D>, sizeof(T) == 2 && D <= 128 ? 3 : 1) backward_kernel(const __grid_constant__ PrepareBackward p) {
  constexpr int kTokens = BackwardMemory<T, D>::kTokens, kBlocks = kTokens / kBlock, kWarps = kThreads<T, D> / 32;
  const auto [tokens, sequences, heads, kv_heads, channels, group] = p.shape;
  const int kv_head = blockIdx.x, batch = blockIdx.y, start = blockIdx.z * kTokens;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int back = blocks_back(p.window), halo = back * kBlock;
  const int rows = kTokens + 2 * halo, grad_rows = kTokens + halo;  // before, in and behind the tile; in and behind it
  const auto scalar_index = [&](int token) { return (int64_t(token) * sequences + batch) * kv_heads + kv_head; };

  extern __shared__ __align__(16) char memory[];
  // Keys and their gradients first, then values and theirs.
  const Rows<T, D> sources{reinterpret_cast<T*>(memory)}, gradients{sources.at(rows)};
  uint32_t* const fragments = reinterpret_cast<uint32_t*>(gradients.at(grad_rows));
  float* const products = reinterpret_cast<float*>(fragments + BackwardMemory<T, D>::kFragments);
  float* floats = products + (kBlocks + back) * (back + 1) * kBlock * kBlock;
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
  const auto copy = [&](bool of_values) {
    copy_rows<T, D, kThreads<T, D>>(gradients, of_values ? grad_merged_value : grad_merged_key, row_stride, start,
                                    grad_rows, tokens);
    copy_rows<T, D, kThreads<T, D>>(sources, of_values ? value : key,
                                    of_values ? p.value_stride.token : p.key_stride.token, start - halo, rows, tokens);
    end_of_copies();
  };
  copy(false);

  const float inverse_temperature = p.temperature == 0.f ? 0.f : 1.f / p.temperature;  // hard decisions: no gradient
  for (int row = thread; row < rows; row += kThreads<T, D>) {
    const int token = start - halo + row;
    const bool exists = token >= 0 && token < tokens, in_tile = exists && row >= halo && row < halo + kTokens;
    // All that is read here, before any of it is used.
    const float alpha = exists ? p.alpha[scalar_index(token)] : 0.f;
    const float weight = exists ? p.weight[scalar_index(token)] : 0.f;
    const float grad_bias = in_tile && token > 0 ? p.grad_bias[scalar_index(token - 1)] : 0.f;
    const float grad_alpha =
        in_tile && token > 0 && p.grad_alpha
            ? p.grad_alpha[token * p.grad_alpha_stride.token + batch * p.grad_alpha_stride.batch +
                           kv_head * p.grad_alpha_stride.head]
            : 0.f;
    merging.alpha[row] = alpha;
    merging.weight[row] = weight;
    // What reaches the decision past the merge: α = sigmoid(a/τ), and the key before is biased by log(1 - α).
    if (row >= halo && row < halo + kTokens)
      grad_logit[row - halo] = alpha * ((1.f - alpha) * grad_alpha - grad_bias) * inverse_temperature;
  }
  __syncthreads();
  merging.tabulate(rows, thread, kThreads<T, D>);
  __syncthreads();
  for (int row = thread; row < grad_rows; row += kThreads<T, D>) {
    const int t = row + halo, block = t / kBlock;
    float total = 0.f, between = 1.f;
#pragma unroll
    for (int i = 0; i < kBlock; i += 4) {
      const float4 m = *reinterpret_cast<const float4*>(merging.inside + row * Coefficients::kStride + i);
      total += m.x + m.y + m.z + m.w;
    }
    for (int other = block - 1; other >= block - back; --other) {
      const float lead = merging.leading[t] * between;
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
        total += t - other * kBlock - i < p.window ? lead * merging.behind[other * kBlock + i] : 0.f;
      between *= merging.block_product(other);
    }
    inverse_total[row] = total > 0.f ? 1.f / total : 0.f;  // rows behind the sequence have no weights
  }
  __syncthreads();

  // m(t, j) / Z_t with rows j and columns t, as a left operand.
  using Fragment = uint32_t[Planes<T>::coefficients][4];
  const auto transposed = [&](int t_block, int j_block, float between, Fragment& to) {
    float m[2][4];
    merging.transposed_tile(t_block, j_block, between, m);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      m[i / 4][i % 4] *= inverse_total[t_block * kBlock + tile_column(i / 4 * 2) + i % 2 - halo];
    split_tile<T>(m, to);
  };
  // Every block j meets itself and the next; four warps would compute each of these tiles, so one does for all.
  const auto near_fragment = [&](int j_block, int distance, int plane) {
    const int tile = (j_block - back) * 2 + distance;
    return reinterpret_cast<uint4*>(fragments + ((tile * Planes<T>::coefficients + plane) * 32 + lane) * 4);
  };
  if (warp % 2 <= back) {
    Fragment mine;
    transposed(back + warp / 2 + warp % 2, back + warp / 2, 1.f, mine);
#pragma unroll
    for (int n = 0; n < Planes<T>::coefficients; ++n)
      *near_fragment(back + warp / 2, warp % 2, n) = make_uint4(mine[n][0], mine[n][1], mine[n][2], mine[n][3]);
  }

  // Products G_t x_j of 16 tokens t and 16 tokens j, `distance` blocks apart, summed over keys and values.
  const auto product_tile = [&](int t_block, int distance) {
    const int tile = (t_block - back) * (back + 1) + distance;
    return reinterpret_cast<float4*>(products + tile * kBlock * kBlock + lane * 8);
  };
  const auto multiply = [&](int t_block, int distance, bool of_values) {
    float sum[2][4] = {};
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      uint32_t left[Planes<T>::elements][4], right[Planes<T>::elements][4];
      gradients.left(left, t_block * kBlock - halo, c);
      sources.right_transposed(right, (t_block - distance) * kBlock, c);
      multiply_add_tiles<T>(sum, left, right);
    }
    float4* const to = product_tile(t_block, distance);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float4 before = of_values ? to[n] : make_float4(0.f, 0.f, 0.f, 0.f);
      to[n] = make_float4(before.x + sum[n][0], before.y + sum[n][1], before.z + sum[n][2], before.w + sum[n][3]);
    }
  };
  // Gradients of 16 tokens' keys or values, half of their channels.
  const auto spread = [&](T* to, int block, int first_channel) {
    constexpr int kChunks = D / 32;
    float sums[kChunks][2][4] = {}, between = 1.f;
    for (int other = block; other <= block + back; ++other) {
      Fragment coefficients;
      if (other < block + 2) {
#pragma unroll
        for (int n = 0; n < Planes<T>::coefficients; ++n) {
          const uint4 x = *near_fragment(block, other - block, n);
          coefficients[n][0] = x.x, coefficients[n][1] = x.y, coefficients[n][2] = x.z, coefficients[n][3] = x.w;
        }
      } else {
        transposed(other, block, between, coefficients);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        uint32_t tile[Planes<T>::elements][4];
        gradients.right(tile, other * kBlock - halo, first_channel + c * 16);
        multiply_add_tiles<T>(sums[c], coefficients, tile);
      }
      if (other > block) between *= merging.block_product(other);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = start + (block - back) * kBlock + tile_row(i);
      T* const row = to + token * row_stride + row_offset + first_channel;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) write_row(row + c * 16, sums[c], i, 1.f, token < tokens);
    }
  };

  const int pairs = (kBlocks + back) * (back + 1);  // of blocks: t in the tile, or reached by its tokens
  for (int of_values = 0; of_values < 2; ++of_values) {
    if (of_values) {
      __syncthreads();  // everyone is done with the keys
      copy(true);
    }
    wait_for_copies<0>();
    T* const to = static_cast<T*>(of_values ? p.grad_value : p.grad_key);
    for (int task = warp; task < 2 * kBlocks + pairs; task += kWarps) {
      if (task < 2 * kBlocks)
        spread(to, back + task / 2, task % 2 * (D / 2));
      else
        multiply(back + (task - 2 * kBlocks) / (back + 1), (task - 2 * kBlocks) % (back + 1), of_values);
    }
  }
  __syncthreads();

  for (int block = back + warp; block < 2 * back + kBlocks; block += kWarps) {
    float mean[2] = {}, between = 1.f;
    const float inverse[2] = {inverse_total[block * kBlock - halo + tile_row(0)],
                              inverse_total[block * kBlock - halo + tile_row(1)]};
    for (int pass = 0; pass < 2; ++pass) {
      float crossing_sum = 0.f;
      between = 1.f;
      for (int other = block; other >= block - back; --other) {
        const float4* const from = product_tile(block, block - other);
        const float4 product_halves[2] = {from[0], from[1]};
        const float* const product = &product_halves[0].x;
        float m[2][4];
        merging.tile(block, other, between, m);
        if (other < block) between *= merging.block_product(other);
        if (pass == 0) {
#pragma unroll
          for (int i = 0; i < 8; ++i) mean[i % 4 / 2] += m[i / 4][i % 4] * product[i];
          continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) m[i / 4][i % 4] *= (product[i] - mean[i % 4 / 2]) * inverse[i % 4 / 2];
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
      }
      if (pass == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) mean[i] = sum_over_columns(mean[i]) * inverse[i];
      } else {
        crossing_sum = sum_over_rows(sum_over_columns(crossing_sum));
        if (lane == 0) crossing[block - back] = crossing_sum;
      }
    }
  }
  __syncthreads();

  const auto own_sum = [&](int row) {  // w_u dL/dw_u
    float sum = 0.f;
    for (int far = 0; far <= back; ++far) sum += column_sums[far * kTokens + row];
    return sum;
  };
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
      own[i] = own_sum(row);
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
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = lane * kEach + i;
      if (row >= kTokens) continue;
      const float alpha = merging.alpha[halo + row];
      if (appends(row)) before = 0.f;
      grad_logit[row] += (1.f - alpha) * before * inverse_temperature;
      before += own[i];
    }
  } else if (thread < 32 + kTokens) {
    const int row = thread - 32;
    const float weight = merging.weight[halo + row], sigmoid = weight - 0x1p-7f;
    grad_last[row] = own_sum(row) / weight * sigmoid * (1.f - sigmoid) / group;
  }
  __syncthreads();

  // The last channels, in place of what the products left there.
  for (int i = thread; i < kTokens * (group + 1); i += kThreads<T, D>) {
    const int row = i / (group + 1), head = i % (group + 1);
    if (start + row >= tokens) break;
    const int64_t index = scalar_index(start + row);
    if (head == group)
      static_cast<T*>(p.grad_key)[index * D + D - 1] = from_float<T>(grad_logit[row]);
    else
      static_cast<T*>(p.grad_query)[(index * group + head) * D + D - 1] = from_float<T>(grad_last[row]);
  }
}

template <class T, int D>
cudaError_t launch(const PrepareBackward& p, cudaStream_t stream) {
  const int bytes = BackwardMemory<T, D>::bytes(blocks_back(p.window));
  if (auto error = cudaFuncSetAttribute(backward_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const dim3 grid(p.shape.kv_heads, p.shape.batch, (p.shape.tokens + kTile<T, D> - 1) / kTile<T, D>);
  backward_kernel<T, D><<<grid, kThreads<T, D>, bytes, stream>>>(p);
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

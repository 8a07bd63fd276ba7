// New tokens meet the paged cache, one launch a layer: decide, merge or append, rotate, write, attend, combine.
//
// Work comes in units: a page of closed entries, and for every sequence and KV head one unit more, its new tokens. The
// units of a layer are numbered head by head and dealt out in equal runs to the workers (thread blocks); whoever gets a
// head's last unit also merges its new tokens and writes them into the cache. Where a head's units fall to several
// workers, the last one to finish combines what they found. Nothing that a launch reads is written in it: merging reads
// tokens that the ring still holds, attention reads entries that are closed, and lengths are committed after the step.
#include "paged.cuh"

namespace dmc {
namespace {

constexpr int kWarps = 4, kPagedThreads = 32 * kWarps;
constexpr int kRows = 16;  // queries at once: new tokens times heads of a group

template <class T, int D>
struct PagedMemory {
  static constexpr int kStages = D <= 128 ? 3 : 2;
  static constexpr int kPageRows = 2 * kPageEntries;  // keys, then values
  static constexpr int kQueryBytes = Rows<T, D>::bytes(kRows);
  static constexpr int kNewBytes = 2 * Rows<T, D>::bytes(kRows);
  static constexpr int kMergedBytes = 4 * 2 * kMaxNewTokens * D;
  static constexpr int kPageBytes = Rows<T, D>::bytes(kPageRows);
  static constexpr int kBytes = kQueryBytes + kNewBytes + kMergedBytes + kWarps * kStages * kPageBytes;
  static_assert(kWarps * kStages * kPageBytes >= 4 * kWarps * kRows * (D + 2), "sums are combined where pages were");
};

// The two channels of a pair, as common.cuh's LanePairs has them.
template <int D>
__device__ int2 channels_of(const Rotary& rotary, int pair) {
  if (rotary.interleaved) return make_int2(2 * pair, 2 * pair + 1);
  return pair < rotary.pairs ? make_int2(pair, pair + rotary.pairs) : make_int2(pair + rotary.pairs, pair + D / 2);
}

// A rotated pair; the last channel is 0 before and after.
template <int D>
__device__ float2 rotate_pair(const Rotary& rotary, int pair, int2 channels, int64_t position, float first, float second) {
  if (channels.y == D - 1) second = 0.f;
  if (pair < rotary.pairs) {
    const float c = rotary.cos[position * rotary.stride.token + pair], s = rotary.sin[position * rotary.stride.token + pair];
    const float turned = first * c - second * s;
    second = second * c + first * s;
    first = turned;
  }
  if (channels.y == D - 1) second = 0.f;
  return make_float2(first, second);
}

template <class T, int D>
__global__ void __launch_bounds__(kPagedThreads, D <= 128 ? 2 : 1) paged_attention_kernel(const __grid_constant__ PagedAttention p) {
  using Memory = PagedMemory<T, D>;
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const auto [new_tokens, sequences, heads, kv_heads, channels, group] = in.shape;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int worker = blockIdx.x, tile = blockIdx.y, total_heads = sequences * kv_heads;
  const int all_rows = new_tokens * group, tiles = (all_rows + kRows - 1) / kRows, first_row = tile * kRows;
  if (!*in.ok) return;

  extern __shared__ __align__(16) char memory[];
  const Rows<T, D> queries{reinterpret_cast<T*>(memory)};
  const Rows<T, D> new_keys{reinterpret_cast<T*>(memory + Memory::kQueryBytes)}, new_values{new_keys.at(kRows)};
  float* const merged = reinterpret_cast<float*>(memory + Memory::kQueryBytes + Memory::kNewBytes);  // [2][kMaxNewTokens][D]
  char* const page_memory = memory + Memory::kQueryBytes + Memory::kNewBytes + Memory::kMergedBytes;
  const Rows<T, D> stages{reinterpret_cast<T*>(page_memory + warp * Memory::kStages * Memory::kPageBytes)};
  float* const combined = reinterpret_cast<float*>(page_memory);  // [kWarps][kRows][D + 2], once pages are done with

  const int units = p.first_unit[total_heads], share = (units + p.workers - 1) / p.workers;
  const int end = min(units, (worker + 1) * share);
  int unit = worker * share, head = unit < end ? p.first_head[worker] : 0;
  for (; unit < end; ++head) {
    const int head_start = p.first_unit[head], head_end = p.first_unit[head + 1];
    const int from = unit - head_start, to = min(end, head_end) - head_start, pages = head_end - head_start - 1;
    unit = head_start + to;
    const bool has_new = to > pages, whole = from == 0 && has_new;
    const int batch = head / kv_heads, kv_head = head % kv_heads;
    const int64_t slot = in.slots[batch];
    const int64_t kv_row = slot < 0 ? 0 : slot * kv_heads + kv_head;
    const auto query_at = [&](int row) {  // of token row / group
      return static_cast<const T*>(in.query) + row / group * in.query_stride.token + batch * in.query_stride.batch +
             int64_t(kv_head * group + row % group) * in.query_stride.head;
    };
    const auto output_at = [&](int row) {
      return static_cast<T*>(in.output) + row / group * in.output_stride.token + batch * in.output_stride.batch +
             int64_t(kv_head * group + row % group) * in.output_stride.head;
    };
    const auto alpha_at = [&](int token) {
      return in.alpha + token * in.alpha_stride.token + batch * in.alpha_stride.batch + kv_head * in.alpha_stride.head;
    };
    if (slot < 0) {  // nobody's place: it has this one unit
      for (int i = thread; i < kRows * D; i += kPagedThreads)
        if (first_row + i / D < all_rows) output_at(first_row + i / D)[i % D] = from_float<T>(0.f);
      if (tile == 0 && thread < new_tokens) *alpha_at(thread) = 0.f;
      if (tile == 0 && thread == 0) in.new_lengths[head] = 0;
      continue;
    }
    const int64_t position = cache.tokens[slot];
    const int length = cache.lengths[kv_row];
    const T* const key = static_cast<const T*>(in.key) + batch * in.key_stride.batch + kv_head * in.key_stride.head;
    const T* const value = static_cast<const T*>(in.value) + batch * in.value_stride.batch + kv_head * in.value_stride.head;
    const auto merges = [&](int i) {  // new token i
      return position + i > 0 && to_float(key[i * in.key_stride.token + D - 1]) > in.offset;
    };
    const int closed = length - merges(0);
    const int* const table = cache.table + kv_row * cache.max_pages;
    T* const pool = static_cast<T*>(cache.pages);
    const auto page_at = [&](int index) { return pool + int64_t(table[index]) * Memory::kPageRows * D; };

    __syncthreads();  // what the head before left in shared memory is done with
    const int pages_end = min(to, pages);
    int copied = from + warp;
    const auto copy_page = [&](int stage) {
      if (copied < pages_end) {
        const T* const page = page_at(copied);
#pragma unroll
        for (int i = 0; i < Memory::kPageRows * D / 8 / 32; ++i) {
          const int piece = i * 32 + lane, row = piece / (D / 8), channel = piece % (D / 8) * 8;
          // Values that nobody sees must be 0 and not whatever was there: 0 times that might be NaN.
          const bool exists = copied * kPageEntries + row % kPageEntries < closed;
          copy_16_bytes(shared_address(stages.at(stage * Memory::kPageRows + row, channel)), page + row * D + channel, exists);
        }
      }
      end_of_copies();
      copied += kWarps;
    };
#pragma unroll
    for (int i = 0; i < Memory::kStages - 1; ++i) copy_page(i);

    rotate_rows<T, D>(
        in.rotary, queries, kRows, kPagedThreads,
        [&](int row) { return first_row + row < all_rows ? query_at(first_row + row) : nullptr; },
        [&](int row) { return int(position) + (first_row + row) / group; });
    const auto weight_of = [&](int i) {  // new token i's importance
      return importance(query_at(i * group), in.query_stride.head, group, D - 1, in.offset);
    };

    uint32_t survivors = 0;  // new tokens whose entry the next one does not merge into
    if (has_new) {
      T* const recent = static_cast<T*>(cache.recent) + kv_row * cache.recent_tokens * 2 * D;
      float* const recent_weights = cache.recent_weights + kv_row * cache.recent_tokens;
      const int buffer = in.window ? 0 : cache.steps[slot] % 2;
      for (int i = 0; i < new_tokens; ++i)
        if (i + 1 == new_tokens || !merges(i + 1)) survivors |= 1u << i;
      for (int c = thread; c < 2 * D; c += kPagedThreads) {
        const T* const source = c < D ? key + c : value + c - D;
        const int64_t stride = c < D ? in.key_stride.token : in.value_stride.token;
        float* const result = merged + c / D * kMaxNewTokens * D + c % D;
        float mean = 0.f, total = 0.f;
        if (!in.window) {
          const int64_t state = buffer * cache.state_stride + kv_row;
          mean = cache.mean[state * 2 * D + c];
          total = cache.total[state];
        }
        for (int i = 0; i < new_tokens; ++i) {
          if (!in.window) {
            if (!merges(i)) mean = total = 0.f;
            const float weight = weight_of(i);
            mean = (mean * total + weight * to_float(source[i * stride])) / (total + weight);
            total += weight;
          } else {
            float sum = 0.f, weights = 0.f;
            for (int back = 0; back < in.window; ++back) {  // token i - back, new or recent
              const int64_t at = position + i - back;
              const int64_t ring = at % cache.recent_tokens;
              const bool is_new = back <= i;
              const float weight = is_new ? weight_of(i - back) : recent_weights[ring];
              sum += weight * to_float(is_new ? source[(i - back) * stride] : recent[ring * 2 * D + c]);
              weights += weight;
              const float decides = to_float(is_new ? key[(i - back) * in.key_stride.token + D - 1] : recent[ring * 2 * D + D - 1]);
              if (at == 0 || !(decides > in.offset)) break;
            }
            mean = sum / weights;
          }
          result[i * D] = mean;
        }
        if (!in.window && tile == 0) {
          const int64_t state = (1 - buffer) * cache.state_stride + kv_row;
          cache.mean[state * 2 * D + c] = mean;
          if (c == 0) cache.total[state] = total;
        }
        if (in.window && tile == 0) {  // the ring has room for a step's tokens beside those that a window reaches
          for (int i = 0; i < new_tokens; ++i) {
            const int64_t ring = (position + i) % cache.recent_tokens;
            recent[ring * 2 * D + c] = source[i * stride];
            if (c == 0) recent_weights[ring] = weight_of(i);
          }
        }
      }
      __syncthreads();
      for (int i = thread; i < kRows * D / 2; i += kPagedThreads) {
        const int row = i / (D / 2), pair = i % (D / 2);
        const int2 at = channels_of<D>(in.rotary, pair);
        float2 k = make_float2(0.f, 0.f), v = k;
        if (row < new_tokens) {
          const float *from_key = merged + row * D, *from_value = merged + (kMaxNewTokens + row) * D;
          k = rotate_pair<D>(in.rotary, pair, at, position + row, from_key[at.x], from_key[at.y]);
          v = make_float2(from_value[at.x], from_value[at.y]);
        }
        *new_keys.at(row, at.x) = from_float<T>(k.x);
        *new_keys.at(row, at.y) = from_float<T>(k.y);
        *new_values.at(row, at.x) = from_float<T>(v.x);
        *new_values.at(row, at.y) = from_float<T>(v.y);
      }
    }
    __syncthreads();

    Sums<D> sums;
    const float scale = in.scale * kLog2E;
    const auto attend = [&](const Rows<T, D>& rows, int first_key, int first_value, auto sees) {
      float scores[1][2][4] = {};
#pragma unroll
      for (int c = 0; c < D; c += 16) {
        uint32_t left[1][4], right[1][4];
        queries.left(left, 0, c);
        rows.right_transposed(right, first_key, c);
        multiply_add_tiles<T>(scores[0], left, right);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int reg = i / 2;
        float& x = scores[0][reg / 2][reg % 2 * 2 + i % 2];
        x = sees(tile_row(reg), tile_column(reg) + i % 2) ? x * scale : -INFINITY;
      }
      uint32_t weights[1][1][4];
      sums.template weigh<T>(scores, weights);
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t right[1][4];
        rows.right(right, first_value, c * 16);
        multiply_add_tiles<T>(sums.value[c], weights[0], right);
      }
    };
    for (int page = from + warp, stage = 0; page < pages_end; page += kWarps, stage = (stage + 1) % Memory::kStages) {
      wait_for_own_copies<Memory::kStages - 2>();
      copy_page((stage + Memory::kStages - 1) % Memory::kStages);
      const int first_key = stage * Memory::kPageRows;
      attend(stages, first_key, first_key + kPageEntries,
             [&](int, int column) { return page * kPageEntries + column < closed; });
    }
    if (has_new && warp == 0) {  // values of the new tokens lie behind their keys
      attend(new_keys, 0, kRows, [&](int row, int column) {
        const int token = (first_row + row) / group;
        return column == token || (column < token && (survivors >> column & 1));
      });
    }
    if (has_new && tile == 0) {  // into the cache
      int entry = length - 1;
      for (int i = 0; i < new_tokens; ++i) {
        const bool merging = merges(i);
        entry += !merging;
        if (thread == 0) *alpha_at(i) = merging;
        if (!(survivors >> i & 1)) continue;
        T* const row = page_at(entry / kPageEntries) + entry % kPageEntries * D;
        for (int c = thread; c < D; c += kPagedThreads) {
          row[c] = *new_keys.at(i, c);
          row[kPageEntries * D + c] = *new_values.at(i, c);
        }
      }
      if (thread == 0) in.new_lengths[head] = entry + 1;
    }

    // Four warps' sums become one.
    wait_for_copies<0>();  // and the pages are done with
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile_row(i);
      float* const to_row = combined + (warp * kRows + row) * (D + 2);
      const float weight = sums.total(i);
      if (lane % 4 == 0) to_row[D] = sums.highest[i], to_row[D + 1] = weight;
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          to_row[c * 16 + half * 8 + lane % 4 * 2] = sums.value[c][half][2 * i];
          to_row[c * 16 + half * 8 + lane % 4 * 2 + 1] = sums.value[c][half][2 * i + 1];
        }
      }
    }
    __syncthreads();

    // The weighted mean of `count` sums [kRows][D + 2], found by `sum_at`.
    const auto write_mean = [&](int count, auto sum_at) {
      for (int i = thread; i < kRows * D; i += kPagedThreads) {
        const int row = i / D, c = i % D;
        if (first_row + row >= all_rows) continue;
        float top = -INFINITY, mean = 0.f, weight = 0.f;
        for (int n = 0; n < count; ++n) top = fmaxf(top, sum_at(n)[row * (D + 2) + D]);
        for (int n = 0; n < count; ++n) {
          const float* const sum = sum_at(n) + row * (D + 2);
          const float factor = exp2f(sum[D] - top);
          mean += factor * sum[c];
          weight += factor * sum[D + 1];
        }
        output_at(first_row + row)[c] = from_float<T>(mean / weight);
      }
    };
    if (whole) {
      write_mean(kWarps, [&](int n) { return combined + n * kRows * (D + 2); });
      continue;
    }
    // A worker has at most two heads that it shares: the one that it begins with, and the one that it ends with.
    const auto partial_at = [&](int worker) {
      const int place = head_start <= worker * share ? 0 : 1;
      return p.partial + ((int64_t(worker) * 2 + place) * tiles + tile) * kRows * (D + 2);
    };
    float* const mine = partial_at(worker);
    for (int i = thread; i < kRows * (D + 2); i += kPagedThreads) {
      const int row = i / (D + 2), c = i % (D + 2);
      float top = -INFINITY, sum = 0.f;
      for (int n = 0; n < kWarps; ++n) top = fmaxf(top, combined[(n * kRows + row) * (D + 2) + D]);
      const float base = top == -INFINITY ? 0.f : top;
      for (int n = 0; n < kWarps; ++n) {
        const float* const from_row = combined + (n * kRows + row) * (D + 2);
        sum += exp2f(from_row[D] - base) * from_row[c];
      }
      mine[i] = c == D ? top : sum;
    }
    __threadfence();
    __syncthreads();
    const int first_worker = head_start / share, parts = (head_end - 1) / share - first_worker + 1;
    int* const arrived = p.arrived + int64_t(head) * tiles + tile;
    if (thread == 0) *reinterpret_cast<int*>(merged) = atomicAdd(arrived, 1) + 1 == parts;
    __syncthreads();
    const bool last = *reinterpret_cast<const int*>(merged);
    if (!last) continue;
    __threadfence();
    write_mean(parts, [&](int n) { return partial_at(first_worker + n); });
    if (thread == 0) *arrived = 0;  // for the next launch
  }
}

template <class T, int D>
cudaError_t launch(const PagedAttention& p, cudaStream_t stream) {
  constexpr int bytes = PagedMemory<T, D>::kBytes;
  if (auto error = cudaFuncSetAttribute(paged_attention_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const dim3 grid(p.workers, (p.in.shape.tokens * p.in.shape.group + kRows - 1) / kRows);
  paged_attention_kernel<T, D><<<grid, kPagedThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t paged_attention(const PagedAttention& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.in.shape.channels, [&]<class T, int D>() {
    if constexpr (sizeof(T) == 2)
      return launch<T, D>(p, stream);
    else
      return cudaErrorInvalidValue;  // caches hold 16-bit numbers
  });
}

}  // namespace dmc

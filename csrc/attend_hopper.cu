// Attention of prompts' chunks on Hopper: what attend_kernel in paged_chunks.cu computes, by its asynchronous copies and
// products.
//
// The merge has rotated all queries. Until a query's output is known, it lies where that will be.
//
// A block stays and takes tile after tile: 128 queries of one KV head, tokens times heads of the group. Its warps have
// four roles, and meet at barriers in shared memory.
//
//   copies     one warp: pages of entries into two stages of keys and two of values
//   queries    three warps: the next tile's queries, while this tile is attended
//   attention  two times four warps, 64 queries each; their products take turns, so that one group's softmax runs
//              beside the other's products. A group begins the next scores before it needs them.
//
// A query sees the entries before its token's own, and that one as it stood then. Where the next token did not change it,
// it is the one in its page, and one entry more is seen; otherwise the merge left it beside: its score begins the sums,
// and its value ends them.
#include <algorithm>

#include "hopper.cuh"
#include "paged.cuh"

namespace dmc {
namespace {

constexpr int kQueries = 128, kWarpgroup = 128;
constexpr int kQueryThreads = 96, kThreads = 3 * kWarpgroup;
constexpr int kStages = 2;

// Registers move from the warps that fetch to those that attend; together they must not exceed what the block starts with.
constexpr int kRegisters = 65536 / kThreads / 8 * 8, kFetching = 72, kAttending = 216;
static_assert(kFetching + 2 * kAttending <= 3 * kRegisters);

struct Attend {
  PagedChunks p;
  int tiles;     // of all KV heads and chunks
  int abreast;   // pairs of a KV head and a chunk that blocks work on at the same time
  int no_row;    // behind the last one of the pages
  BoxMap pages;  // [pages * 2 * kPageEntries, d]
};

// A tile of queries, as the warps that attend see it.
struct TileInfo {
  int steps;  // tiles of entries; -1: no more work
  int kv_head, chunk, first_row;
  float own_score[kQueries];
  int limit[kQueries];  // entries that the query sees in pages
  int own[kQueries];    // (token, KV head) whose own entry lies beside, or -1
};

// Matrices are [D / 64][rows][64], with permuted pieces; entries come so from their pages.
template <class T, int D>
struct alignas(1024) Memory {
  static constexpr int kKeys = D <= 128 ? 128 : 64, kBuffers = D <= 128 ? 2 : 1;
  static constexpr int kPages = kKeys / kPageEntries, kKeyBytes = kKeys * D * int(sizeof(T));
  T queries[kBuffers][kQueries * D];
  T keys[kStages][kKeys * D];
  T values[kStages][kKeys * D];
  TileInfo tiles[kBuffers];
  Barrier queries_full[kBuffers], queries_empty[kBuffers];
  Barrier keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
};

// Place and phase of the n-th use of so many buffers.
template <int kBuffers>
struct Turn {
  int n = 0;
  __device__ int buffer() const { return n % kBuffers; }
  __device__ int full() const { return n / kBuffers % 2; }       // parity to wait for before reading
  __device__ int empty() const { return n / kBuffers % 2 ^ 1; }  // and before writing
};

// One tile of queries.
struct Tile {
  int kv_head, chunk, first, count, first_row, rows;  // the chunk's tokens; rows of queries that exist
  int group;

  __device__ int token(int row) const { return min((first_row + row) / group, count - 1); }
};

// Calls f(tile) for this block's tiles. Blocks work on as many heads at a time as fit into the L2 cache together. Of those,
// long tiles come first, and every second round goes backwards, so that all have the same work; what the last round leaves
// undone falls to others with the next heads.
template <class F>
__device__ inline void for_each_tile(const Attend& a, F f) {
  const PagedChunks& p = a.p;
  const int blocks = gridDim.x, kv_heads = p.in.shape.kv_heads, heads = kv_heads * p.in.shape.batch, tiles_of_head = a.tiles / heads;
  int block = blockIdx.x;
  for (int first_head = 0; first_head < heads; first_head += a.abreast, block = blocks - 1 - block) {
    const int abreast = min(a.abreast, heads - first_head), tiles = abreast * tiles_of_head;
    for (int round = 0; round * blocks < tiles; ++round) {
      const int index = round * blocks + (round % 2 ? blocks - 1 - block : block);
      if (index >= tiles) continue;
      const int head = first_head + index % abreast;
      Tile t;
      t.kv_head = head % kv_heads, t.chunk = head / kv_heads, t.group = p.in.shape.group;
      t.first = p.first_token[t.chunk], t.count = p.first_token[t.chunk + 1] - t.first;
      t.first_row = (tiles_of_head - 1 - index / abreast) * kQueries;
      t.rows = min(kQueries, t.count * t.group - t.first_row);
      if (t.rows > 0) f(t);
    }
  }
}

// Entries that a token's query sees in pages, and whether its own is one of them.
struct Seen {
  int limit;
  bool own;
  int64_t index;

  __device__ Seen(const PagedChunks& p, const Tile& t, int token) {
    const ChunkEntries entries(p, t.chunk, t.kv_head);
    const int entry = entries[token];
    index = entries.index(token);
    own = token + 1 == t.count || entries[token + 1] != entry;
    limit = entry + own;
  }
};

template <class T, int kRows>
__device__ inline T* place(T* matrix, int row, int channel) {
  return matrix + (channel / 64 * kRows + row) * 64 + (channel % 64 ^ row % 8 * 8);
}

// One warp copies the entries that its block's tiles see.
template <class T, int D>
__device__ void copy_entries(const Attend& a, Memory<T, D>& memory) {
  using M = Memory<T, D>;
  constexpr int kBoxes = M::kPages * (D / 64);  // of a tile's keys, one a lane
  static_assert(kBoxes <= 32);
  const PagedChunks& p = a.p;
  const int lane = threadIdx.x % 32, page = lane % M::kPages, part = lane / M::kPages;
  Turn<kStages> keys, values;
  for_each_tile(a, [&](const Tile& t) {
    const int sees = Seen(p, t, t.token(kQueries - 1)).limit, steps = (sees + M::kKeys - 1) / M::kKeys;
    const int* const table = p.cache.table + (p.in.slots[t.chunk] * p.in.shape.kv_heads + t.kv_head) * p.cache.max_pages;
    // What lies behind the last page comes as zeros, not as what might be NaN; within the page, the merge saw to it.
    const auto row_of = [&](int step) {
      const int index = step * M::kPages + page;
      return index * kPageEntries < sees ? table[index] * 2 * kPageEntries : a.no_row;
    };
    const auto copy = [&](T* to, int row, Barrier* full) {
      if (lane == 0) arrive_and_expect(full, M::kKeyBytes);
      __syncwarp();
      if (lane < kBoxes) copy_box(to + (part * M::kKeys + page * kPageEntries) * 64, &a.pages, row, part * 64, full);
    };
    const auto copy_values = [&](int row) {
      wait_for(&memory.values_empty[values.buffer()], values.empty());
      copy(memory.values[values.buffer()], row == a.no_row ? row : row + kPageEntries, &memory.values_full[values.buffer()]);
      ++values.n;
    };
    int row = steps ? row_of(0) : 0;
    for (int step = 0; step < steps; ++step) {  // in the order of their use
      const int next_row = step + 1 < steps ? row_of(step + 1) : 0;
      wait_for(&memory.keys_empty[keys.buffer()], keys.empty());
      copy(memory.keys[keys.buffer()], row, &memory.keys_full[keys.buffer()]);
      ++keys.n;
      copy_values(row);
      row = next_row;
    }
  });
}

// Three warps fetch the queries of their block's tiles.
template <class T, int D>
__device__ void prepare_queries(const Attend& a, Memory<T, D>& memory) {
  constexpr int kPieces = D / 8;  // of a row, 16 bytes each
  const PagedChunks& p = a.p;
  const NewTokens& in = p.in;
  const int thread = threadIdx.x - 32;
  Turn<Memory<T, D>::kBuffers> turn;
  for_each_tile(a, [&](const Tile& t) {
    T* const queries = memory.queries[turn.buffer()];
    TileInfo& info = memory.tiles[turn.buffer()];
    wait_for(&memory.queries_empty[turn.buffer()], turn.empty());
    for (int row = thread / kPieces; row < kQueries; row += kQueryThreads / kPieces) {
      const int channel = thread % kPieces * 8, token = t.token(row), head = t.kv_head * t.group + (t.first_row + row) % t.group;
      copy_16_bytes(shared_address(place<T, kQueries>(queries, row, channel)),
                    static_cast<const T*>(in.output) + (t.first + token) * in.output_stride.token + head * in.output_stride.head + channel,
                    row < t.rows);
    }
    end_of_copies();
    for (int row = thread; row < kQueries; row += kQueryThreads) {
      const int token = t.token(row), head = t.kv_head * t.group + (t.first_row + row) % t.group;
      const Seen seen(p, t, token);
      const bool beside = !seen.own && row < t.rows;
      info.limit[row] = seen.limit;
      info.own[row] = beside ? int(seen.index) : -1;
      info.own_score[row] = beside ? p.own_score[int64_t(t.first + token) * in.shape.kv_heads * t.group + head] : 0.f;
      if (row == kQueries - 1) info.steps = (seen.limit + Memory<T, D>::kKeys - 1) / Memory<T, D>::kKeys;
    }
    if (thread == 0) info.kv_head = t.kv_head, info.chunk = t.chunk, info.first_row = t.first_row;
    wait_for_own_copies<0>();
    show_writes();
    arrive(&memory.queries_full[turn.buffer()]);
    ++turn.n;
  });
  wait_for(&memory.queries_empty[turn.buffer()], turn.empty());
  memory.tiles[turn.buffer()].steps = -1;
  arrive(&memory.queries_full[turn.buffer()]);
}

// Eight warps attend, 16 queries each.
template <class T, int D>
__device__ void attend(const Attend& a, Memory<T, D>& memory) {
  using M = Memory<T, D>;
  constexpr int N = M::kKeys / 16;
  const PagedChunks& p = a.p;
  const NewTokens& in = p.in;
  const int lane = threadIdx.x % 32, group = in.shape.group;
  const int warpgroup = threadIdx.x / kWarpgroup - 1, warp_row = threadIdx.x / 32 * 16 - kWarpgroup / 2;
  const float scale = in.scale * kLog2E;
  const auto my_turn = [&] { named_wait(1 + warpgroup, 2 * kWarpgroup); };
  const auto others_turn = [&] { named_arrive(2 - warpgroup, 2 * kWarpgroup); };
  const auto release = [&](Barrier* empty) {
    __syncwarp();
    if (lane == 0) arrive(empty);
  };
  if (warpgroup == 1) others_turn();  // the first group begins

  Turn<M::kBuffers> turn;
  Turn<kStages> keys, values;
  for (;; ++turn.n) {
    wait_for(&memory.queries_full[turn.buffer()], turn.full());
    const TileInfo& info = memory.tiles[turn.buffer()];
    const int steps = info.steps;
    if (steps < 0) break;
    Sums<D> sums;
    int limits[2];
    float own_scores[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + tile_row(i);
      limits[i] = info.limit[row];
      own_scores[i] = info.own[row] < 0 ? -INFINITY : info.own_score[row] * scale;
      sums.highest[i] = own_scores[i];
      sums.weight[i] = info.own[row] >= 0 && lane % 4 == 0;
    }
    const int all_see = info.limit[warp_row];
    const uint64_t queries = matrix_at(memory.queries[turn.buffer()] + warpgroup * 64 * 64);

    float scores[N][2][4];
    uint32_t weights[N][1][4];
    const auto begin_scores = [&] {
      const uint64_t right = matrix_at(memory.keys[keys.buffer()]);
      pin(scores);
      begin_products();
#pragma unroll
      for (int c = 0; c < D / 16; ++c)
        begin_product<T>(scores, moved(queries, c / 4 * kQueries * 128 + c % 4 * 32),
                         moved(right, c / 4 * M::kKeys * 128 + c % 4 * 32), c > 0);
      end_of_products();
    };
    const auto begin_sums = [&] {
      const uint64_t right = matrix_at(memory.values[values.buffer()], M::kKeys * 128);
      wait_for(&memory.values_full[values.buffer()], values.full());
      pin(sums.value);
      begin_products();
#pragma unroll
      for (int n = 0; n < N; ++n) begin_product<T>(sums.value, weights[n][0], moved(right, n * 16 * 128));
      end_of_products();
    };
    const auto weigh = [&](int step) {
      pin(scores);
      release(&memory.keys_empty[keys.buffer()]);
      ++keys.n;
      if ((step + 1) * M::kKeys > all_see) {
#pragma unroll
        for (int e = 0; e < 8 * N; ++e) {
          const int key = step * M::kKeys + e / 8 * 16 + e / 4 % 2 * 8 + lane % 4 * 2 + e % 2;
          if (key >= limits[e % 4 / 2]) scores[e / 8][e / 4 % 2][e % 4] = -INFINITY;
        }
      }
      return sums.weigh(scores, scale);
    };
    const auto end_sums = [&] {
      wait_for_products<0>();
      pin(sums.value);
      release(&memory.values_empty[values.buffer()]);
      ++values.n;
    };
    if (steps) {
      wait_for(&memory.keys_full[keys.buffer()], keys.full());
      my_turn();
      begin_scores();
      others_turn();
      wait_for_products<0>();
      weigh(0);  // nothing has been summed yet
      Sums<D>::template pack<T>(scores, weights);
      for (int step = 1; step < steps; ++step) {
        wait_for(&memory.keys_full[keys.buffer()], keys.full());
        my_turn();
        begin_scores();
        begin_sums();
        others_turn();
        wait_for_products<1>();
        const float2 shrink = weigh(step);
        end_sums();
        sums.rescale(shrink);
        Sums<D>::template pack<T>(scores, weights);
      }
      begin_sums();
      end_sums();
    }

    const int kv_head = info.kv_head, first = p.first_token[info.chunk], all_rows = (p.first_token[info.chunk + 1] - first) * group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + tile_row(i), at = info.first_row + row;
      if (const int own = info.own[row]; own >= 0) {
        const T* const value = static_cast<const T*>(p.own) + (int64_t(own) * 2 + 1) * D;
        const float weight = power_of_2(own_scores[i] - sums.highest[i]);
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          float v[2];
          load(value + c * 8 + lane % 4 * 2, v);
          sums.value[c / 2][c % 2][2 * i] += weight * v[0];
          sums.value[c / 2][c % 2][2 * i + 1] += weight * v[1];
        }
      }
      const float factor = 1.f / sums.total(i);
      T* const to = static_cast<T*>(in.output) + (first + at / group) * in.output_stride.token +
                    int64_t(kv_head * group + at % group) * in.output_stride.head;
#pragma unroll
      for (int c = 0; c < D / 16; ++c) write_row(to + c * 16, sums.value[c], i, factor, at < all_rows);
    }
    arrive(&memory.queries_empty[turn.buffer()]);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) attend_hopper_kernel(const __grid_constant__ Attend a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using M = Memory<T, D>;
  if (!*a.p.in.ok) return;
  extern __shared__ __align__(1024) char memory[];
  M& shared = *reinterpret_cast<M*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kAttendingWarps = 2 * kWarpgroup / 32;
    for (int i = 0; i < M::kBuffers; ++i) {
      start_barrier(&shared.queries_full[i], kQueryThreads);
      start_barrier(&shared.queries_empty[i], 2 * kWarpgroup);
    }
    for (int i = 0; i < kStages; ++i) {
      start_barrier(&shared.keys_full[i], 1);
      start_barrier(&shared.values_full[i], 1);
      start_barrier(&shared.keys_empty[i], kAttendingWarps);
      start_barrier(&shared.values_empty[i], kAttendingWarps);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    fewer_registers<kFetching>();
    if (threadIdx.x < 32)
      copy_entries<T, D>(a, shared);
    else
      prepare_queries<T, D>(a, shared);
  } else {
    more_registers<kAttending>();
    attend<T, D>(a, shared);
  }
#endif
}

template <class T, int D>
cudaError_t launch(const PagedChunks& p, DType dtype, int64_t rows, cudaStream_t stream) {
  constexpr int bytes = sizeof(Memory<T, D>);
  Attend a{p};
  const Shape& shape = p.in.shape;
  const int heads = shape.kv_heads * shape.batch;
  a.tiles = (p.longest * shape.group + kQueries - 1) / kQueries * heads;
  constexpr int64_t kTogether = 16 << 20;  // bytes of entries; Hopper has an L2 cache of 50 MiB or more
  const int64_t fit = std::clamp<int64_t>(kTogether / (int64_t(p.longest) * 2 * D * sizeof(T)), 1, heads);
  const int64_t turns = (heads + fit - 1) / fit;
  a.abreast = int((heads + turns - 1) / turns);
  a.no_row = int(rows);
  if (auto error = make_box_map(&a.pages, dtype, p.cache.pages, rows, D, kPageEntries)) return error;
  int device = 0, processors = 0;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto error = cudaFuncSetAttribute(attend_hopper_kernel<T, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const int blocks = min(processors, a.tiles);
  attend_hopper_kernel<T, D><<<blocks, kThreads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

bool attend_hopper_takes(const PagedChunks& p) {
  const int d = p.in.shape.channels;
  if (p.cache.scales || d % 64) return false;
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes attributes;
  return !cudaGetDevice(&device) && !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) &&
         !cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) && major == 9 && minor == 0 &&
         !cudaFuncGetAttributes(&attributes, attend_hopper_kernel<bf16, 64>) && attributes.ptxVersion == 90;
}

cudaError_t attend_hopper(const PagedChunks& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.in.shape.channels, [&]<class T, int D>() {
    if constexpr (sizeof(T) == 2 && D % 64 == 0)
      return launch<T, D>(p, dtype, p.cache.rows, stream);
    else
      return cudaErrorInvalidValue;
  });
}

}  // namespace dmc

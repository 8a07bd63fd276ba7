// New tokens meet the paged cache, one launch a layer: decide, merge or append, rotate, write, attend, combine.
//
// Work comes in units: for every sequence and KV head some for its new tokens, as many as they take time, and then one for
// every 16 entries. The units of a layer are numbered head by head and dealt out in equal runs to the workers. A worker is a
// warp, and all by itself: its copies of entries run ahead of it, over the borders of heads; no barrier stops them. Whoever
// gets a head's first unit merges its new tokens and writes them into the cache. Where a head's units fall to several
// workers, the last one to finish combines what they found; where they are many, first in every group of eight. Nothing that a launch
// reads is written in it: merging reads tokens that the ring still holds, attention reads entries that are closed, and
// lengths are committed after the step.
#include "hopper.cuh"
#include "paged.cuh"

namespace dmc {
namespace {

constexpr int kRows = 16;   // queries at once: new tokens times heads of a group
constexpr int kGroup = 8;   // workers that combine what they found before others do

template <class T, class S, int D>
struct PagedMemory {
  using Stage = Staging<T, S, D, kUnitEntries, 32>;
  // Stages of about 24 KiB together, so that nine workers fit.
  static constexpr int kStages = Stage::kScaled || D == 96 ? 4 : D == 64 ? 6 : 3;
  static constexpr bool kQueriesInRegisters = D <= 128;  // else they have memory of their own
  static constexpr int kQueryBytes = kQueriesInRegisters ? 0 : Rows<T, D>::bytes(kRows);
  static constexpr int kAtOnce = D <= 128 ? 8 : 4;  // workers on a multiprocessor
  static constexpr int kBytes = kQueryBytes + Stage::kReadyBytes + kStages * (Stage::kStageBytes + sizeof(Barrier));
  static_assert(Stage::kStageBytes >= Rows<T, D>::bytes(kRows));  // queries pass through one
};

#if (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900) || defined(MEGATRON_DMC_EMULATES_AMPERE)
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

// A warp's copies of units of entries into a ring of stages, which it waits for in their order.
template <class T, class S, int D>
struct Copies {
  using Memory = PagedMemory<T, S, D>;
  using Stage = typename Memory::Stage;
  // A page has two parts, keys and values, and with scales two more.
  static constexpr int kStages = Memory::kStages, kPages = kUnitEntries > kPageEntries ? kUnitEntries / kPageEntries : 1;
  static constexpr int kParts = Stage::kScaled ? 4 : 2, kPieces = kPages * kParts;
  char* const stages;
  Barrier* const arrived;
  const int lane;
  int begun = 0, done = 0;
  int page = 0;  // of the piece of the next unit that this lane copies

  __device__ Copies(char* stages)
      : stages(stages), arrived(reinterpret_cast<Barrier*>(stages + kStages * Stage::kStageBytes)), lane(threadIdx.x) {
    if constexpr (kBulkCopies) {
      if (lane == 0) {
        for (int i = 0; i < kStages; ++i) start_barrier(arrived + i, 1);
        publish_barriers();
      }
      __syncwarp();
    }
  }

  // Where the next unit lies: entries from `first` on, before `bound`.
  __device__ void look_up(const int* table, int first, int bound) {
    const int index = first / kPageEntries + lane / kParts;
    page = lane < kPieces && index * kPageEntries < bound ? table[index] : 0;
  }

  // Begin to copy it, if `bound` leaves any of it.
  __device__ void begin(const PagedLayer& cache, int first, int bound) {
    char* const stage = stages + begun++ % kStages * Stage::kStageBytes;
    Barrier* const barrier = arrived + (begun - 1) % kStages;
    const int rows = min(bound - first, kUnitEntries);
    if constexpr (kBulkCopies) {
      if (lane == 0) arrive_and_expect(barrier, max(rows, 0) * 2 * D * int(sizeof(S)) + (Stage::kScaled ? 8 * padded(rows) : 0));
      __syncwarp();
    }
    const auto copy_piece = [&](int piece, int page) {
      const int in_page = piece / kParts, part = piece % kParts, is_value = part % 2;
      const int held = min(rows - in_page * kPageEntries, min(kPageEntries, kUnitEntries));
      const int64_t row = (int64_t(page) * 2 + is_value) * kPageEntries + (kPages == 1 ? first % kPageEntries : 0);
      const int to_row = is_value * kUnitEntries + in_page * kPageEntries;
      if (part < 2)
        copy(stage + to_row * D * int(sizeof(S)), static_cast<const S*>(cache.pages) + row * D, held * D * int(sizeof(S)), barrier);
      else
        copy(stage + Stage::kRows * D + to_row * 4, cache.scales + row, 4 * padded(held), barrier);
    };
    if constexpr (kBulkCopies) {
      if (lane < kPieces) copy_piece(lane, page);
    } else {
      for (int piece = 0; piece < kPieces; ++piece) copy_piece(piece, __shfl_sync(~0u, page, piece));
      end_of_copies();
    }
  }

  // The next stage, when all of it has arrived.
  __device__ char* next() {
    if constexpr (kBulkCopies)
      wait_for(arrived + done % kStages, done / kStages % 2);
    else
      wait_for_own_copies<kStages - 1>();
    return stages + done++ % kStages * Stage::kStageBytes;
  }

 private:
  static __device__ int padded(int rows) { return (max(rows, 0) + 3) / 4 * 4; }  // scales come in pieces of 16 bytes

  __device__ void copy(char* to, const void* from, int bytes, Barrier* barrier) const {
    if constexpr (kBulkCopies) {
      if (bytes > 0) copy_bytes(to, from, bytes, barrier);
    } else {
      for (int i = lane * 16; i < bytes; i += 32 * 16) copy_16_bytes(shared_address(to + i), static_cast<const char*>(from) + i, true);
    }
  }
};

// One head of one sequence, and what a worker has to do with it.
struct Work {
  int head, batch, kv_head;
  int from, to;  // units [from, to) of its entries
  bool has_new;  // and whether its new tokens
  int64_t slot, kv_row;
  int position, length, closed;  // tokens before; entries: all, and those that no new token changes
  const int* table;
  bool merges;  // whether the first new token does

  __device__ bool nobody() const { return slot < 0; }
  // Its stages: one that its queries pass through, another one for its new tokens, then its units of entries.
  __device__ int first_stage() const { return has_new ? -2 : -1; }
  __device__ int next_stage(int stage) const { return stage == -1 ? from : stage + 1; }
  __device__ bool has_stage(int stage) const { return stage < 0 || stage < to; }
  // The entries of a stage, and where they end: there are none for queries and new tokens, and behind the last unit.
  __device__ static int first_entry(int stage) { return max(stage, 0) * kUnitEntries; }
  __device__ int bound(int stage) const { return stage >= 0 && stage < to ? closed : 0; }
};

template <class T>
__device__ Work work_of(const PagedAttention& p, int head, int begin, int end) {
  const int kv_heads = p.in.shape.kv_heads, start = p.first_unit[head], bound = p.first_unit[head + 1];
  Work w;
  w.head = head, w.batch = head / kv_heads, w.kv_head = head % kv_heads;
  w.slot = p.in.slots[w.batch];
  w.kv_row = w.nobody() ? 0 : w.slot * kv_heads + w.kv_head;
  w.position = w.nobody() ? 0 : int(p.cache.tokens[w.slot]);
  w.length = w.nobody() ? 0 : p.cache.lengths[w.kv_row];
  const int units = (w.length + kUnitEntries - 1) / kUnitEntries, first = bound - units;  // those before are new tokens'
  w.has_new = begin <= start;
  w.from = max(begin - first, 0), w.to = max(min(end - first, units), w.from);
  const T* const key = static_cast<const T*>(p.in.key) + w.batch * p.in.key_stride.batch + w.kv_head * p.in.key_stride.head;
  w.merges = w.position > 0 && to_float(key[p.in.shape.channels - 1]) > p.in.offset;
  w.closed = w.length - w.merges;
  w.table = p.cache.table + w.kv_row * p.cache.max_pages;
  return w;
}

// The new tokens of a head, as all lanes know them.
struct New {
  uint32_t merging, surviving;  // bit i: token i merges into the entry before; the next one does not merge into its own
  float weight;                 // of token `lane`
  int open;                     // tokens of the ring that the first one merges with
};

template <class T, int D>
__device__ New decide(const PagedAttention& p, const Work& w) {
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const int lane = threadIdx.x % 32, tokens = in.shape.tokens, group = in.shape.group;
  const bool exists = lane < tokens;
  New fresh;
  bool merges = false;
  fresh.weight = 0.f;
  // The token before is part of the segment; others are as long as those behind them merge.
  const bool looks_back = in.window && w.merges;
  const T* const recent = static_cast<const T*>(cache.recent) + w.kv_row * cache.recent_tokens * 2 * D;
  const int newest = in.window ? w.position % cache.recent_tokens : 0;
  const auto decision = [&](int back) {
    const int place = newest - back;
    return recent[(place < 0 ? place + cache.recent_tokens : place) * 2 * D + D - 1];
  };
  const auto in_window = [&](int back) { return back < in.window - 1 && back < w.position; };
  T last{};
  if (looks_back && in_window(1 + lane)) last = decision(1 + lane);  // on its way meanwhile
  if (exists) {
    merges = w.position + lane > 0 && to_float(static_cast<const T*>(in.key)[lane * in.key_stride.token + w.batch * in.key_stride.batch +
                                                                             w.kv_head * in.key_stride.head + D - 1]) > in.offset;
    const T* const query = static_cast<const T*>(in.query) + lane * in.query_stride.token + w.batch * in.query_stride.batch +
                           int64_t(w.kv_head) * group * in.query_stride.head;
    fresh.weight = importance(query, in.query_stride.head, group, D - 1, in.offset);
  }
  fresh.merging = __ballot_sync(~0u, merges);
  fresh.surviving = ~(fresh.merging >> 1) & (~0u >> (32 - tokens));
  fresh.open = 0;
  if (looks_back) {
    for (int base = 1; base < in.window; base += 32) {
      const int back = base + lane;
      if (base > 1 && in_window(back)) last = decision(back);
      const uint32_t votes = __ballot_sync(~0u, !(in_window(back) && to_float(last) > in.offset));
      if (votes) {
        fresh.open = min(base + __ffs(votes) - 1, in.window - 1);
        break;
      }
    }
  }
  return fresh;
}

// Merge the new tokens: rotated keys become rows [0, 16), values rows [16, 32). The first `tile` of a head's queries also
// takes them into the cache.
template <class T, class S, int D, Pairing kPairing>
__device__ void merge_new(const PagedAttention& p, const Work& w, const New& fresh, const Rows<T, D>& rows, bool keeps) {
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const int lane = threadIdx.x % 32, tokens = in.shape.tokens;
  constexpr int kParts = 32 / kLanes<D>;  // rows that a warp holds at once
  const LanePairs<D, kPairing> pairs(in.rotary, lane % kLanes<D> * 4);
  const int64_t state = w.kv_row + (in.window ? 0 : cache.steps[w.slot] % 2 * cache.state_stride);
  const int64_t next_state = w.kv_row + (in.window ? 0 : (1 - cache.steps[w.slot] % 2) * cache.state_stride);
  T* const recent = static_cast<T*>(cache.recent) + w.kv_row * cache.recent_tokens * 2 * D;
  float* const recent_weights = cache.recent_weights + w.kv_row * cache.recent_tokens;
  const int newest = in.window ? w.position % cache.recent_tokens : 0;
#pragma unroll
  for (int pass = 0; pass < (kParts == 1 ? 2 : 1); ++pass) {
    const int part = kParts == 1 ? pass : lane / kLanes<D>;  // keys, then values
    const bool takes_part = part < 2 && pairs.exist();
    const T* const source = part == 0 ? static_cast<const T*>(in.key) + w.batch * in.key_stride.batch + w.kv_head * in.key_stride.head
                                      : static_cast<const T*>(in.value) + w.batch * in.value_stride.batch + w.kv_head * in.value_stride.head;
    const int64_t stride = part == 0 ? in.key_stride.token : in.value_stride.token;
    PairValues sum = {};
    float total = 0.f;
    int entry = w.length - 1;
    const auto add = [&](const PairValues& x, float weight) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum.first[i] += weight * x.first[i];
        sum.second[i] += weight * x.second[i];
      }
      total += weight;
    };
    if (!in.window && w.merges && takes_part) {
      const float before = cache.total[state];
      add(pairs.read(cache.mean + (state * 2 + part) * D), before);
    }
    for (int i = 0; i < tokens; ++i) {
      const bool merges = fresh.merging >> i & 1;
      entry += !merges;
      const float weight = __shfl_sync(~0u, fresh.weight, i);
      const auto pack = takes_part ? pairs.read_pack(source + i * stride) : PairPack<T>{};
      if (in.window || !merges) sum = {}, total = 0.f;
      add(pairs.values(pack), weight);
      if (in.window) {
        int back = 1;
        for (int left = in.window - 1, j = i; left > 0 && j > 0 && (fresh.merging >> j & 1); --left, --j, ++back) {
          const float other = __shfl_sync(~0u, fresh.weight, j - 1);
          if (takes_part) add(pairs.read(source + (j - 1) * stride), other);
        }
        // back == i + 1: all of the new tokens up to here belong to the segment that was open.
        const int older = back == i + 1 && (fresh.merging & 1) ? min(fresh.open, in.window - back) : 0;
        constexpr int kAtOnce = 4;  // reads under way
        for (int j = 1; j <= older; j += kAtOnce) {
          PairPack<T> packs[kAtOnce];
          float weights[kAtOnce];
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (!takes_part || j + k > older) continue;
            const int place = newest - j - k, ring = place < 0 ? place + cache.recent_tokens : place;
            packs[k] = pairs.read_pack(recent + (ring * 2 + part) * D);
            weights[k] = recent_weights[ring];
          }
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) {
            if (takes_part && j + k <= older) add(pairs.values(packs[k]), weights[k]);
          }
        }
      }
      if (!takes_part) continue;
      PairValues mean;
      const float inverse = 1.f / total;
#pragma unroll
      for (int k = 0; k < 4; ++k) mean.first[k] = sum.first[k] * inverse, mean.second[k] = sum.second[k] * inverse;
      if (keeps && !in.window && i + 1 == tokens) {
        pairs.write(cache.mean + (next_state * 2 + part) * D, mean);
        if (part == 0 && pairs.have_last()) cache.total[next_state] = total;
      }
      if (keeps && in.window) {  // the ring has room for a step's tokens beside those that a window reaches
        const int place = newest + i, ring = place < cache.recent_tokens ? place : place - cache.recent_tokens;
        pairs.write_pack(recent + (ring * 2 + part) * D, pack);
        if (part == 0 && pairs.have_last()) recent_weights[ring] = weight;
      }
      if (part == 0) {
        Rotation rotation;
        rotation.read(in.rotary, pairs, Rotation::offset(in.rotary, w.position + i, 0));
        mean = rotation.apply(mean, pairs.have_last());
      }
      pairs.write_pack([&](int channel) { return rows.at(part * kRows + i, channel); }, pairs.template pack<T>(mean));
      if (keeps && (fresh.surviving >> i & 1))
        write_entry<S, D>(cache, entry_row(w.table, entry) + part * kPageEntries, pairs, mean);
    }
  }
}

// What workers found of 16 queries of a head: sums of values, and behind them each row's highest score and weight.
template <int D>
struct Partial {
  static constexpr int kFloats = kRows * (D + 2);
  static constexpr int kVector = D % 128 == 0 ? 4 : D % 64 == 0 ? 2 : 1, kVectors = D / 32 / kVector;
  float* data;

  __device__ float* sums(int row, int channel) const { return data + row * D + channel; }
  __device__ float2* total(int row) const { return reinterpret_cast<float2*>(data + kRows * D) + row; }
  // The channels that a lane combines: kVectors times kVector of them side by side.
  __device__ static int channel(int vector) { return (vector * 32 + int(threadIdx.x) % 32) * kVector; }
};

// Combine what `count` workers found, by a warp. `write` takes a row, its sums in this lane's channels, and its total.
template <int D, class At, class Write>
__device__ void combine(int count, int rows, At at, Write write) {
  using P = Partial<D>;
  constexpr int kAtOnce = 8, kTogether = 256 / D;  // workers and rows, that is, reads under way
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < rows; first += kTogether) {
    float sum[kTogether][P::kVectors][P::kVector] = {}, highest[kTogether], weight[kTogether] = {};
#pragma unroll
    for (int r = 0; r < kTogether; ++r) highest[r] = -INFINITY;
    for (int base = 0; base < count; base += 32) {
      float factor[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        float2 own = make_float2(-INFINITY, 0.f);
        if (base + lane < count && first + r < rows) own = *at(base + lane).total(first + r);
        float top = own.x;
#pragma unroll
        for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        top = fmaxf(top, highest[r]);
        const float reference = top == -INFINITY ? 0.f : top;  // nothing seen yet
        const float shrink = power_of_2(highest[r] - reference);
        highest[r] = top;
        factor[r] = power_of_2(own.x - reference);
        weight[r] = weight[r] * shrink + factor[r] * own.y;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) sum[r][i / P::kVector][i % P::kVector] *= shrink;
      }
      for (int n = base; n < min(base + 32, count); n += kAtOnce) {
        Pack<float, P::kVector> found[kAtOnce][kTogether][P::kVectors];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
          for (int r = 0; r < kTogether; ++r) {
#pragma unroll
            for (int i = 0; i < P::kVectors; ++i) {
              found[k][r][i] = {};
              if (n + k < count && first + r < rows)
                found[k][r][i] = *reinterpret_cast<const Pack<float, P::kVector>*>(at(n + k).sums(first + r, P::channel(i)));
            }
          }
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
#pragma unroll
          for (int r = 0; r < kTogether; ++r) {
            const float share = __shfl_sync(~0u, factor[r], n - base + k);
#pragma unroll
            for (int i = 0; i < D / 32; ++i)
              sum[r][i / P::kVector][i % P::kVector] += share * found[k][r][i / P::kVector][i % P::kVector];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
#pragma unroll
      for (int step = 16; step; step /= 2) weight[r] += __shfl_xor_sync(~0u, weight[r], step);
      if (first + r < rows) write(first + r, sum[r], make_float2(highest[r], weight[r]));
    }
  }
}

// Whether this is the last of `count` warps to arrive; then it sees what the others wrote before they did.
__device__ inline bool arrives_last(int* arrived, int count) {
  share_writes();
  __syncwarp();
  int last = 0;
  if (threadIdx.x % 32 == 0) last = atomicAdd(arrived, 1) + 1 == count;
  if (!__shfl_sync(~0u, last, 0)) return false;
  share_writes();
  if (threadIdx.x % 32 == 0) *arrived = 0;  // for the next launch
  return true;
}

template <class T, class S, int D>
__global__ void __launch_bounds__(32, PagedMemory<T, S, D>::kAtOnce) paged_attention_kernel(const __grid_constant__ PagedAttention p) {
  using Memory = PagedMemory<T, S, D>;
  using Stage = typename Memory::Stage;
  const NewTokens& in = p.in;
  const auto [tokens, sequences, heads, kv_heads, channels, group] = in.shape;
  const int lane = threadIdx.x, worker = blockIdx.x, tile = blockIdx.y, all_heads = sequences * kv_heads;
  const int first_row = tile * kRows, tiles = gridDim.y, rows = min(kRows, tokens * group - first_row);
  if (!*in.ok) return;

  extern __shared__ __align__(16) char memory[];
  char* const ready = memory + Memory::kQueryBytes;
  char* const stages = ready + Stage::kReadyBytes;

  const int units = p.first_unit[all_heads], share = (units + p.workers - 1) / p.workers;
  const int begin = worker * share, end = min(units, begin + share);
  if (begin >= end) return;
  const int first_head = p.first_head[worker];

  // Copies, kStages - 1 stages ahead; their pages are looked up one stage before.
  Copies<T, S, D> copies(stages);
  Work copied = work_of<T>(p, first_head, begin, end);
  int copied_stage = copied.first_stage();
  const auto look_up = [&] { copies.look_up(copied.table, Work::first_entry(copied_stage), copied.bound(copied_stage)); };
  look_up();
  const auto copy_next = [&] {
    copies.begin(p.cache, Work::first_entry(copied_stage), copied.bound(copied_stage));
    if (copied.has_stage(copied_stage)) copied_stage = copied.next_stage(copied_stage);
    if (!copied.has_stage(copied_stage) && copied.head + 1 < all_heads && p.first_unit[copied.head + 1] < end) {
      copied = work_of<T>(p, copied.head + 1, begin, end);
      copied_stage = copied.first_stage();
    }
    look_up();
  };
#pragma unroll 1
  for (int i = 0; i < Memory::kStages - 1; ++i) copy_next();
  const auto next_stage = [&] {
    __syncwarp();  // the stage before is done with: it takes the next copies
    copy_next();
    return copies.next();
  };

  // What is written here goes before copies that take the same place.
  const auto show_writes_of_warp = [] {
    if constexpr (kBulkCopies) show_writes();
    __syncwarp();
  };
  // Queries and values of no token must be 0: what is in memory may be NaN.
  const auto clear = [&](const Rows<T, D>& rows, int from, int to) {
    for (int i = from * (D / 8) + lane; i < to * (D / 8); i += 32)
      *reinterpret_cast<uint4*>(rows.at(i / (D / 8), i % (D / 8) * 8)) = uint4{};
  };

  for (int head = first_head; head < all_heads && p.first_unit[head] < end; ++head) {
    const Work w = work_of<T>(p, head, begin, end);
    const auto output_at = [&](int row) {  // of token row / group
      row += first_row;
      return static_cast<T*>(in.output) + row / group * in.output_stride.token + w.batch * in.output_stride.batch +
             int64_t(w.kv_head * group + row % group) * in.output_stride.head;
    };
    const auto alpha_at = [&](int token) {
      return in.alpha + token * in.alpha_stride.token + w.batch * in.alpha_stride.batch + w.kv_head * in.alpha_stride.head;
    };
    char* const query_stage = next_stage();
    if (w.nobody()) {
      next_stage();
      for (int i = lane; i < rows * D; i += 32) output_at(i / D)[i % D] = from_float<T>(0.f);
      if (tile == 0 && lane < tokens) *alpha_at(lane) = 0.f;
      if (tile == 0 && lane == 0) in.new_lengths[head] = 0;
      continue;
    }
    constexpr bool kInRegisters = Memory::kQueriesInRegisters;
    const Rows<T, D> queries{reinterpret_cast<T*>(kInRegisters ? query_stage : memory)};
    if (!kInRegisters) __syncwarp();  // those of the head before are done with
    clear(queries, rows, kRows);
    rotate_rows<T, D>(
        in.rotary, queries, rows, 32,
        [&](int row) {
          row += first_row;
          return static_cast<const T*>(in.query) + row / group * in.query_stride.token + w.batch * in.query_stride.batch +
                 int64_t(w.kv_head * group + row % group) * in.query_stride.head;
        },
        [&](int row) { return w.position + (first_row + row) / group; });
    __syncwarp();
    uint32_t left[D / 16][1][4];
    if (kInRegisters) {
#pragma unroll
      for (int c = 0; c < D / 16; ++c) queries.left(left[c], 0, c * 16);
      show_writes_of_warp();
    }

    // New tokens: merged, and written into the cache.
    New fresh;
    Rows<T, D> new_rows{};
    if (w.has_new) {
      char* const stage = next_stage();
      new_rows.data = reinterpret_cast<T*>(Stage::kScaled ? ready : stage);
      clear(new_rows, kRows + tokens, 2 * kRows);
      fresh = decide<T, D>(p, w);
      switch (pairing_of(in.rotary)) {
        case Pairing::kHalves: merge_new<T, S, D, Pairing::kHalves>(p, w, fresh, new_rows, tile == 0); break;
        case Pairing::kInterleaved: merge_new<T, S, D, Pairing::kInterleaved>(p, w, fresh, new_rows, tile == 0); break;
        default: merge_new<T, S, D, Pairing::kAny>(p, w, fresh, new_rows, tile == 0);
      }
      if (tile == 0) {
        if (lane < tokens) *alpha_at(lane) = fresh.merging >> lane & 1;
        if (lane == 0) in.new_lengths[head] = w.length + tokens - __popc(fresh.merging);
      }
      show_writes_of_warp();
    }

    Sums<D> sums;
    const float scale = in.scale * kLog2E;
    const auto attend = [&](const Rows<T, D>& entries, auto sees) {
      float scores[1][2][4] = {};
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t right[1][4];
        if (!kInRegisters) queries.left(left[c], 0, c * 16);
        entries.right_transposed(right, 0, c * 16);
        multiply_add_tiles<T>(scores[0], left[c], right);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int reg = i / 2;
        float& x = scores[0][reg / 2][reg % 2 * 2 + i % 2];
        if (!sees(tile_row(reg), tile_column(reg) + i % 2)) x = -INFINITY;
      }
      sums.rescale(sums.weigh(scores, scale));
      uint32_t weights[1][1][4];
      Sums<D>::template pack<T>(scores, weights);
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t right[1][4];
        entries.right(right, kRows, c * 16);
        multiply_add_tiles<T>(sums.value[c], weights[0], right);
      }
    };
    if (w.has_new) {
      attend(new_rows, [&](int row, int column) {
        const int token = (first_row + row) / group;
        return column == token || (column < token && (fresh.surviving >> column & 1));
      });
    }
    for (int unit = w.from; unit < w.to; ++unit) {
      char* const stage = next_stage();
      const int first = Work::first_entry(unit);
      const Rows<T, D> entries = Stage::rows(stage, ready, first, w.closed, lane);
      if (Stage::kScaled) {
        __syncwarp();
      } else if (first + kUnitEntries > w.closed) {
        clear(entries, kRows + w.closed - first, 2 * kRows);
        show_writes_of_warp();
      }
      if (first + kUnitEntries <= w.closed)
        attend(entries, [](int, int) { return true; });
      else
        attend(entries, [&](int, int column) { return first + column < w.closed; });
    }
    const int head_start = p.first_unit[head], head_end = p.first_unit[head + 1];
    const bool whole = begin <= head_start && head_end <= end;
    // A worker has at most two heads that it shares: the one that it begins with, and the one that it ends with.
    const auto place_of = [&](int worker) { return ((worker * 2 + (head_start > worker * share)) * tiles) + tile; };
    const auto partial_of = [&](int worker) { return Partial<D>{p.partial + int64_t(place_of(worker)) * Partial<D>::kFloats}; };
    const Partial<D> own = partial_of(worker);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = tile_row(i);
      const float weight = sums.total(i);
      if (row >= rows) continue;
      if (!whole && lane % 4 == 0) *own.total(row) = make_float2(sums.highest[i], weight);
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = c * 16 + half * 8 + lane % 4 * 2;
          const float first = sums.value[c][half][2 * i], second = sums.value[c][half][2 * i + 1];
          if (whole)
            *reinterpret_cast<uint32_t*>(output_at(row) + channel) = pack_two<T>(first / weight, second / weight);
          else
            *reinterpret_cast<float2*>(own.sums(row, channel)) = make_float2(first, second);
        }
      }
    }
    if (whole) continue;

    const auto write_output = [&](int row, const auto& sum, float2 total) {
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const int vector = i / Partial<D>::kVector, element = i % Partial<D>::kVector;
        output_at(row)[Partial<D>::channel(vector) + element] = from_float<T>(sum[vector][element] / total.y);
      }
    };
    // Workers [first, last] of the head; and those of them in this worker's group.
    const int first = head_start / share, last = (head_end - 1) / share;
    const bool in_groups = last - first >= kGroup;
    const auto group_begin = [&](int worker) { return max(worker / kGroup * kGroup, first); };
    if (in_groups) {
      const int from = group_begin(worker), count = min(worker / kGroup * kGroup + kGroup - 1, last) - from + 1;
      if (!arrives_last(p.arrived + all_heads * tiles + place_of(from), count)) continue;
      const Partial<D> group_found = partial_of(from);
      combine<D>(count, rows, [&](int n) { return partial_of(from + n); }, [&](int row, const auto& sum, float2 total) {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
          const int vector = i / Partial<D>::kVector, element = i % Partial<D>::kVector;
          group_found.sums(row, Partial<D>::channel(vector))[element] = sum[vector][element];
        }
        if (lane == 0) *group_found.total(row) = total;
      });
    }
    const int parts = in_groups ? last / kGroup - first / kGroup + 1 : last - first + 1;
    if (!arrives_last(p.arrived + int64_t(head) * tiles + tile, parts)) continue;
    combine<D>(parts, rows, [&](int n) { return partial_of(in_groups ? group_begin((first / kGroup + n) * kGroup) : first + n); }, write_output);
  }
}

template <class T, class S, int D>
cudaError_t launch(const PagedAttention& p, cudaStream_t stream) {
  constexpr int bytes = PagedMemory<T, S, D>::kBytes;
  if (auto error = cudaFuncSetAttribute(paged_attention_kernel<T, S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  const dim3 grid(p.workers, (p.in.shape.tokens * p.in.shape.group + kRows - 1) / kRows);
  paged_attention_kernel<T, S, D><<<grid, 32, bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T, class S, int D>
int workers() {
  constexpr int bytes = PagedMemory<T, S, D>::kBytes;
  int device = 0, processors = 0, blocks = 0;
  if (cudaFuncSetAttribute(paged_attention_kernel<T, S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ||
      cudaGetDevice(&device) || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, paged_attention_kernel<T, S, D>, 32, bytes))
    return 0;
  return blocks * processors;
}

}  // namespace

cudaError_t paged_attention(const PagedAttention& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.in.shape.channels, [&]<class T, int D>() {
    if constexpr (sizeof(T) == 2)
      return p.cache.scales ? launch<T, fp8, D>(p, stream) : launch<T, T, D>(p, stream);
    else
      return cudaErrorInvalidValue;  // caches hold 16-bit numbers, or 8-bit ones
  });
}

int paged_workers(DType dtype, int channels, bool scaled) {
  int found = 0;
  const auto error = dispatch(dtype, channels, [&]<class T, int D>() {
    if constexpr (sizeof(T) == 2) found = scaled ? workers<T, fp8, D>() : workers<T, T, D>();
    return cudaSuccess;
  });
  return error ? 0 : found;
}

}  // namespace dmc

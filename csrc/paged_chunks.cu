// Chunks of prompts meet the paged cache: all tokens of a chunk at once, any number of them.
//
//   decide    every token's decision, importance and entry, counted from the beginning of its block of tokens
//   take      the entries before each block, and the pages that the new entries need
//   merge     merged, rotated keys and values: an entry's last token writes it into its page, the tokens before keep
//             theirs for themselves
//   attend    a query sees the entries before its token's own, and that one as it stood then
//
// So attention runs over entries, not tokens, and a chunk's queries see those that earlier chunks left just as those that
// it makes itself. Nothing that these kernels read is written in them, but for pages behind the committed length: a step
// that is not committed can be repeated.
#include "paged.cuh"

namespace dmc {
namespace {

constexpr int kDecideTokens = 4;  // of a thread
constexpr int kDecideThreads = kDecideBlock / kDecideTokens;

template <class T>
__global__ void __launch_bounds__(kDecideThreads) decide_kernel(const __grid_constant__ PagedChunks p) {
  constexpr int kWarps = kDecideThreads / 32;
  const NewTokens& in = p.in;
  const int kv_heads = in.shape.kv_heads, group = in.shape.group, last_channel = in.shape.channels - 1;
  const int kv_head = blockIdx.x, chunk = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first = p.first_token[chunk], count = p.first_token[chunk + 1] - first;
  if (!*in.ok || int(blockIdx.z) * kDecideBlock >= count) return;

  extern __shared__ __align__(16) char memory[];
  int* const appended = reinterpret_cast<int*>(memory);  // [kWarps]
  const int64_t position = p.cache.tokens[in.slots[chunk]];
  const T* const key = static_cast<const T*>(in.key) + first * in.key_stride.token + kv_head * in.key_stride.head;
  const T* const query = static_cast<const T*>(in.query) + first * in.query_stride.token +
                         int64_t(kv_head) * group * in.query_stride.head;
  const int mine = blockIdx.z * kDecideBlock + thread * kDecideTokens;
  bool appends[kDecideTokens];
  int own = 0;
#pragma unroll
  for (int i = 0; i < kDecideTokens; ++i) {
    const int token = mine + i;
    appends[i] = false;
    if (token < count) {
      // The first token of a sequence has nothing to merge into.
      appends[i] = position + token == 0 || !(to_float(key[token * in.key_stride.token + last_channel]) > in.offset);
      p.weight[int64_t(first + token) * kv_heads + kv_head] =
          importance(query + token * in.query_stride.token, in.query_stride.head, group, last_channel, in.offset);
      in.alpha[(first + token) * in.alpha_stride.token + kv_head * in.alpha_stride.head] = !appends[i];
    }
    own += appends[i];
  }
  int before = own;  // appended by the lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int others = __shfl_up_sync(~0u, before, step);
    before += lane >= step ? others : 0;
  }
  if (lane == 31) appended[warp] = before;
  before -= own;
  __syncthreads();
  int all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? appended[w] : 0;
    all += appended[w];
  }
#pragma unroll
  for (int i = 0; i < kDecideTokens; ++i) {
    before += appends[i];
    if (mine + i < count) p.entry[int64_t(first + mine + i) * kv_heads + kv_head] = before - 1;
  }
  if (thread == 0) p.before[int64_t(chunk * kv_heads + kv_head) * gridDim.z + blockIdx.z] = all;  // made a sum next
}

constexpr int kTakeThreads = 256;

__global__ void __launch_bounds__(kTakeThreads) take_kernel(const __grid_constant__ PagedChunks p) {
  constexpr int kWarps = kTakeThreads / 32;
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const int kv_heads = in.shape.kv_heads, kv_head = blockIdx.x, chunk = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (!*in.ok) return;

  extern __shared__ __align__(16) char memory[];
  int* const numbers = reinterpret_cast<int*>(memory);  // [kWarps]
  const int64_t kv_row = in.slots[chunk] * kv_heads + kv_head;
  const int length = cache.lengths[kv_row], blocks = (p.first_token[chunk + 1] - p.first_token[chunk] + kDecideBlock - 1) / kDecideBlock;
  int* const table = cache.table + kv_row * cache.max_pages;
  int held = (length + kPageEntries - 1) / kPageEntries;
  for (int more = kTakeThreads; more == kTakeThreads; held += more) {  // a step that was given up leaves pages
    const uint32_t pages = __ballot_sync(~0u, held + thread < cache.max_pages && table[held + thread] >= 0);
    if (lane == 0) numbers[warp] = __popc(pages);
    __syncthreads();
    more = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) more += numbers[w];
    __syncthreads();
  }
  if (warp == 0) {
    int* const before = p.before + int64_t(chunk * kv_heads + kv_head) * ((p.longest + kDecideBlock - 1) / kDecideBlock);
    int entries = length;
    for (int base = 0; base < blocks; base += 32) {
      const int appended = base + lane < blocks ? before[base + lane] : 0;
      int sum = appended;  // up to this block
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int others = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? others : 0;
      }
      if (base + lane < blocks) before[base + lane] = entries + sum - appended;
      entries += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) {
      int needs = max(0, (entries + kPageEntries - 1) / kPageEntries - held), left = 0;
      if (needs) {
        auto* const free_count = reinterpret_cast<unsigned long long*>(p.free_count);
        left = int(atomicAdd(free_count, -static_cast<unsigned long long>(needs))) - needs;
        if (left < 0) {
          atomicAdd(free_count, static_cast<unsigned long long>(needs));
          *in.ok = false;
          needs = 0;
        }
      }
      numbers[0] = needs, numbers[1] = left;
      in.new_lengths[chunk * kv_heads + kv_head] = entries;
    }
  }
  __syncthreads();
  const int needs = numbers[0], left = numbers[1];
  for (int i = thread; i < needs; i += kTakeThreads) table[held + i] = p.free[left + i];
}

constexpr int kMergeThreads = 128;
constexpr int kRun = 8;  // tokens that follow each other, merged by the same lanes

// Weighted sums of keys and values of one lane's channels.
struct SegmentSums {
  PairValues key = {}, value = {};
  float total = 0.f;

  __device__ void add(const PairValues& k, const PairValues& v, float weight) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      key.first[i] += weight * k.first[i];
      key.second[i] += weight * k.second[i];
      value.first[i] += weight * v.first[i];
      value.second[i] += weight * v.second[i];
    }
    total += weight;
  }
  static __device__ PairValues scaled(PairValues x, float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x.first[i] *= factor;
      x.second[i] *= factor;
    }
    return x;
  }
};

// A lane's channels of the queries of a KV head, token by token. They are rotated into the place of their output, where
// attend_hopper reads them. Where a token's own entry lies beside, it also needs their scores with its key.
template <class T, int D, Pairing kPairing>
struct QueryRows {
  static constexpr int kAtOnce = 2;
  const PagedChunks& p;
  const LanePairs<D, kPairing>& pairs;
  const int first_head, group;
  int token;
  PairPack<T> packs[kAtOnce];  // those that come next

  __device__ QueryRows(const PagedChunks& p, const LanePairs<D, kPairing>& pairs, int token, int kv_head)
      : p(p), pairs(pairs), first_head(kv_head * p.in.shape.group), group(p.own_score ? p.in.shape.group : 0), token(token) {
    read(0);
  }

  __device__ void read(int from) {
    const T* const query = static_cast<const T*>(p.in.query) + token * p.in.query_stride.token + first_head * p.in.query_stride.head;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (from + i < group) packs[i] = pairs.read_pack(query + (from + i) * p.in.query_stride.head);
    }
  }

  // Of this token; then begin to read the next one's, if there is one.
  __device__ void turn(const Rotation& rotation, bool beside, const PairValues& own_key, bool goes_on) {
    T* const output = static_cast<T*>(p.in.output) + token * p.in.output_stride.token + first_head * p.in.output_stride.head;
    float* const score = p.own_score + int64_t(token) * p.in.shape.kv_heads * group + first_head;
    for (int from = 0; from < group; from += kAtOnce) {
      if (from) read(from);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (from + i >= group) break;
        const PairPack<T> turned = pairs.template pack<T>(rotation.apply(pairs.values(packs[i]), pairs.have_last()));
        pairs.write_pack(output + (from + i) * p.in.output_stride.head, turned);
        if (!beside) continue;
        const PairValues q = pairs.values(turned), key = pairs.values(pairs.template pack<T>(own_key));
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < 4; ++k) sum += q.first[k] * key.first[k] + q.second[k] * key.second[k];
#pragma unroll
        for (int step = kLanes<D> / 2; step; step /= 2) sum += __shfl_xor_sync(lanes_of_row<D>(), sum, step);
        if (pairs.have_last()) score[from + i] = sum;
      }
    }
    ++token;
    if (goes_on) read(0);
  }
};

template <class T, int D, Pairing kPairing>
__global__ void __launch_bounds__(kMergeThreads, 4) merge_kernel(const __grid_constant__ PagedChunks p) {
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const int kv_heads = in.shape.kv_heads, kv_head = blockIdx.x, chunk = blockIdx.y, thread = threadIdx.x;
  if (!*in.ok) return;

  const int first = p.first_token[chunk], count = p.first_token[chunk + 1] - first;
  const int run = (blockIdx.z * (kMergeThreads / kLanes<D>) + thread / kLanes<D>)*kRun, run_end = min(run + kRun, count);
  const LanePairs<D, kPairing> pairs(in.rotary, thread % kLanes<D> * 4);
  if (run >= count || !pairs.exist()) return;
  const int64_t slot = in.slots[chunk], kv_row = slot * kv_heads + kv_head;
  const int position = int(cache.tokens[slot]);
  const T* const key = static_cast<const T*>(in.key) + first * in.key_stride.token + kv_head * in.key_stride.head;
  const T* const value = static_cast<const T*>(in.value) + first * in.value_stride.token + kv_head * in.value_stride.head;
  const ChunkEntries entry(p, chunk, kv_head);
  const int* const table = cache.table + kv_row * cache.max_pages;
  const auto state = [&](int next) { return kv_row + (cache.steps[slot] + next) % 2 * cache.state_stride; };  // without a window

  if (run + kRun >= count) {  // no entry, but seen by whole tiles of products: 0 times NaN must not be
    const int end = entry[count - 1] + 1;
    const uint4 zeros = {};
    for (int at = end; at % kPageEntries && !cache.scales; ++at) {
      T* const value = static_cast<T*>(cache.pages) + (entry_row(table, at) + kPageEntries) * D;
      *reinterpret_cast<uint4*>(value + thread % kLanes<D> * 8) = zeros;
    }
  }

  // Token i of the chunk; before its beginning, from the ring.
  const auto ring = [&](int i) { return kv_row * cache.recent_tokens + (position + i) % cache.recent_tokens; };
  const auto recent = [&](int i) { return static_cast<const T*>(cache.recent) + ring(i) * 2 * D; };
  const auto key_at = [&](int i) { return i < 0 ? recent(i) : key + i * in.key_stride.token; };
  const auto value_at = [&](int i) { return i < 0 ? recent(i) + D : value + i * in.value_stride.token; };
  const auto weight_at = [&](int i) { return i < 0 ? cache.recent_weights[ring(i)] : p.weight[entry.index(i)]; };
  const auto merges = [&](int i) { return position + i > 0 && to_float(key_at(i)[D - 1]) > in.offset; };

  const int limit = in.window ? in.window : 0x7fffffff;
  SegmentSums sums;
  int held = 0;  // tokens in the sums, the last ones of their segment, up to `limit`
  const auto add = [&](int i) { sums.add(pairs.read(key_at(i)), pairs.read(value_at(i)), weight_at(i)); };
  bool joins = merges(run);
  {  // what this run's first token may merge into
    constexpr int kAtOnce = D / 8;  // tokens, one a lane
    const uint32_t lanes = lanes_of_row<D>();
    int from = run, merging;
    do {
      const int i = from - thread % kLanes<D>;
      const bool goes_on = run - i < limit - 1 && (i > 0 || in.window) && merges(i);
      const uint32_t ends = __ballot_sync(lanes, !goes_on) >> (__ffs(lanes) - 1);
      merging = ends ? __ffs(ends) - 1 : kAtOnce;
      from -= merging;
    } while (merging == kAtOnce);
    if (!in.window && from == 0 && merges(0)) {
      sums.total = cache.total[state(0)];
      sums.key = SegmentSums::scaled(pairs.read(cache.mean + state(0) * 2 * D), sums.total);
      sums.value = SegmentSums::scaled(pairs.read(cache.mean + state(0) * 2 * D + D), sums.total);
    }
    held = run - from;
    int i = from;
    for (; i + 1 < run; i += 2) {  // two reads under way
      const PairPack<T> keys[] = {pairs.read_pack(key_at(i)), pairs.read_pack(key_at(i + 1))};
      const PairPack<T> values[] = {pairs.read_pack(value_at(i)), pairs.read_pack(value_at(i + 1))};
      const float weights[] = {weight_at(i), weight_at(i + 1)};
#pragma unroll
      for (int k = 0; k < 2; ++k) sums.add(pairs.values(keys[k]), pairs.values(values[k]), weights[k]);
    }
    if (i < run) add(i);
  }
  // Tokens are read one ahead.
  struct Token {
    PairPack<T> key, value;
    float weight;
    int entry;
  };
  const auto read = [&](int i) -> Token {
    return {pairs.read_pack(key + i * in.key_stride.token), pairs.read_pack(value + i * in.value_stride.token),
            p.weight[entry.index(i)], entry[i]};
  };
  QueryRows<T, D, kPairing> queries(p, pairs, first + run, kv_head);
  Token token = read(run);
  int page = table[token.entry / kPageEntries];
  for (int i = run; i < run_end; ++i) {
    const Token next = i + 1 < count ? read(i + 1) : Token{{}, {}, 0.f, -1};
    Rotation rotation;
    rotation.read(in.rotary, pairs, Rotation::offset(in.rotary, position + i, 0));
    if (!joins) sums = {}, held = 0;
    if (held == limit) {  // the oldest leaves: subtracting it would leave a rounding error behind
      sums = {};
      for (int j = i - limit + 1; j < i; ++j) add(j);
      --held;
    }
    const bool survives = next.entry != token.entry, alone = survives && !joins;
    PairValues mean_key = pairs.values(token.key), mean_value = pairs.values(token.value);
    if (alone) {
      sums.total = token.weight;
    } else {
      sums.add(mean_key, mean_value, token.weight);
      ++held;
      mean_key = SegmentSums::scaled(sums.key, 1.f / sums.total);
      mean_value = SegmentSums::scaled(sums.value, 1.f / sums.total);
    }
    const PairValues rotated = rotation.apply(mean_key, pairs.have_last());
    if (survives) {
      const int64_t row = int64_t(page) * 2 * kPageEntries + token.entry % kPageEntries;
      if (cache.scales) {
        write_entry<fp8, D>(cache, row, pairs, rotated);
        write_entry<fp8, D>(cache, row + kPageEntries, pairs, mean_value);
      } else {
        write_entry<T, D>(cache, row, pairs, rotated);
        write_entry<T, D>(cache, row + kPageEntries, pairs, mean_value);
      }
    }
    if (!survives || cache.scales) {  // a token's own entry is never rounded to 8 bits
      T* const own = static_cast<T*>(p.own) + entry.index(i) * 2 * D;
      pairs.write(own, rotated);
      pairs.write(own + D, mean_value);
    }

    queries.turn(rotation, !survives, rotated, i + 1 < run_end);

    const int back = count - 1 - i;
    if (back < in.window - 1) {
      const int64_t place = int64_t(chunk * kv_heads + kv_head) * (in.window - 1) + in.window - 2 - back;
      T* const last = static_cast<T*>(p.last) + place * 2 * D;
      pairs.write_pack(last, token.key);
      pairs.write_pack(last + D, token.value);
      p.last_weights[place] = token.weight;
    }
    if (!in.window && back == 0) {
      pairs.write(cache.mean + state(1) * 2 * D, mean_key);
      pairs.write(cache.mean + state(1) * 2 * D + D, mean_value);
      cache.total[state(1)] = sums.total;
    }
    joins = !survives;
    token = next;
    if (i + 1 < run_end) page = table[token.entry / kPageEntries];
  }
}

constexpr int kAttendWarps = 4, kAttendThreads = 32 * kAttendWarps;

template <class T, class S, int D>
struct AttendMemory {
  static constexpr int kTiles = D <= 128 ? 2 : 1;  // of 16 queries, of one warp
  static constexpr int kQueries = kAttendWarps * kTiles * 16;
  static constexpr int kKeys = 32;  // at once
  static constexpr int kStages = D <= 128 ? 3 : 2;
  using Stage = Staging<T, S, D, kKeys, kAttendThreads>;
  static constexpr int kBytes = Rows<T, D>::bytes(kQueries) + Stage::kReadyBytes + kStages * Stage::kStageBytes;
};

template <class T, class S, int D>
__global__ void __launch_bounds__(kAttendThreads, 2) attend_kernel(const __grid_constant__ PagedChunks p) {
  using Memory = AttendMemory<T, S, D>;
  using Stage = typename Memory::Stage;
  constexpr int kTiles = Memory::kTiles, kKeys = Memory::kKeys, kStages = Memory::kStages;
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const int kv_heads = in.shape.kv_heads, group = in.shape.group;
  const int kv_head = blockIdx.x, chunk = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int first = p.first_token[chunk], count = p.first_token[chunk + 1] - first, all_rows = count * group;
  const int first_row = (gridDim.z - 1 - blockIdx.z) * Memory::kQueries;  // those that see most come first
  if (!*in.ok || first_row >= all_rows) return;

  extern __shared__ __align__(16) char memory[];
  const Rows<T, D> queries{reinterpret_cast<T*>(memory)};
  char* const ready = memory + Rows<T, D>::bytes(Memory::kQueries);
  char* const stages = ready + Stage::kReadyBytes;
  const int64_t slot = in.slots[chunk], kv_row = slot * kv_heads + kv_head, position = cache.tokens[slot];
  const int* const table = cache.table + kv_row * cache.max_pages;
  const auto token_of = [&](int row) { return min(row / group, count - 1); };
  const ChunkEntries entry_of(p, chunk, kv_head);
  // A query sees the entries before its token's own.
  const int sees = entry_of[token_of(first_row + Memory::kQueries - 1)], steps = (sees + kKeys - 1) / kKeys;

  const auto copy_step = [&](int step) {
    if (step < steps) Stage::copy(stages + step % kStages * Stage::kStageBytes, cache, table, step * kKeys, sees, thread);
    end_of_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_step(i);
  rotate_rows<T, D>(
      in.rotary, queries, Memory::kQueries, thread, kAttendThreads,
      [&](int row) {
        row += first_row;
        return row < all_rows ? static_cast<const T*>(in.query) + (first + row / group) * in.query_stride.token +
                                    int64_t(kv_head * group + row % group) * in.query_stride.head
                              : nullptr;
      },
      [&](int row) { return int(position) + token_of(first_row + row); });
  __syncthreads();

  // Every query begins with its token's own entry, as it stood then.
  const float scale = in.scale * kLog2E;
  const int warp_row = warp * kTiles * 16;
  Sums<D> sums[kTiles];
  int limits[kTiles][2];  // entries that a row sees
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = warp_row + m * 16 + tile_row(i), token = token_of(first_row + row);
      const int64_t index = entry_of.index(token);
      const int entry = limits[m][i] = entry_of[token];
      const bool in_page = !Stage::kScaled && (token + 1 == count || entry_of[token + 1] != entry);
      const T* const own = in_page ? static_cast<const T*>(cache.pages) + entry_row(table, entry) * D
                                   : static_cast<const T*>(p.own) + index * 2 * D;
      const T* const own_value = own + (in_page ? kPageEntries * D : D);
      const auto place = [&](int channel) { return in_page ? Rows<T, D>::permuted(entry % 8, channel) : channel; };
      float score = 0.f;
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const int channel = c * 8 + lane % 4 * 2;
        float q[2], k[2], v[2];
        load(queries.at(row, channel), q);
        load(own + place(channel), k);
        load(own_value + place(channel), v);
        score += q[0] * k[0] + q[1] * k[1];
        sums[m].value[c / 2][c % 2][2 * i] = v[0];
        sums[m].value[c / 2][c % 2][2 * i + 1] = v[1];
      }
      sums[m].highest[i] = Sums<D>::sum_over_quad(score) * scale;
      sums[m].weight[i] = lane % 4 == 0;
    }
  }

  const int warp_sees = entry_of[token_of(first_row + warp_row + kTiles * 16 - 1)];
  const int all_see = entry_of[token_of(first_row + warp_row)];
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    copy_step(step + kStages - 1);
    const Rows<T, D> entries = Stage::rows(stages + step % kStages * Stage::kStageBytes, ready, step * kKeys, sees, thread);
    if (Stage::kScaled) __syncthreads();
    if (step * kKeys >= warp_sees) continue;
    float scores[kTiles][kKeys / 16][2][4] = {};
#pragma unroll
    for (int c = 0; c < D; c += 16) {
      uint32_t left[kTiles][1][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) queries.left(left[m], warp_row + m * 16, c);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t right[1][4];
        entries.right_transposed(right, n * 16, c);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) multiply_add_tiles<T>(scores[m][n], left[m], right);
      }
    }
    uint32_t weights[kTiles][kKeys / 16][1][4];
    const bool partly = (step + 1) * kKeys > all_see;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (partly && step * kKeys + n * 16 + lane % 4 * 2 + e / 4 * 8 + e % 2 >= limits[m][e % 4 / 2])
            scores[m][n][e / 4][e % 4] = -INFINITY;
        }
      }
      sums[m].rescale(sums[m].weigh(scores[m], scale));
      Sums<D>::template pack<T>(scores[m], weights[m]);
    }
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t right[1][4];
        entries.right(right, kKeys + n * 16, c * 16);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) multiply_add_tiles<T>(sums[m].value[c], weights[m][n], right);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + warp_row + m * 16 + tile_row(i);
      const float factor = 1.f / sums[m].total(i);
      T* const to = static_cast<T*>(in.output) + (first + row / group) * in.output_stride.token +
                    int64_t(kv_head * group + row % group) * in.output_stride.head;
#pragma unroll
      for (int c = 0; c < D / 16; ++c) write_row(to + c * 16, sums[m].value[c], i, factor, row < all_rows);
    }
  }
}

template <class T, int D, Pairing kPairing>
cudaError_t launch(PagedChunks p, DType dtype, cudaStream_t stream) {
  const Shape& shape = p.in.shape;
  const bool on_hopper = attend_hopper_takes(p);
  if (!on_hopper) p.own_score = nullptr;
  const auto blocks = [&](int kinds) { return dim3(shape.kv_heads, shape.batch, kinds); };
  constexpr int kDecideBytes = 4 * kDecideThreads / 32, kTakeBytes = 4 * kTakeThreads / 32, kMerged = kMergeThreads / kLanes<D> * kRun;
  decide_kernel<T><<<blocks((p.longest + kDecideBlock - 1) / kDecideBlock), kDecideThreads, kDecideBytes, stream>>>(p);
  take_kernel<<<blocks(1), kTakeThreads, kTakeBytes, stream>>>(p);
  merge_kernel<T, D, kPairing><<<blocks((p.longest + kMerged - 1) / kMerged), kMergeThreads, 0, stream>>>(p);
  if (on_hopper) return attend_hopper(p, dtype, stream);
  const auto attend = [&]<class S>() -> cudaError_t {
    using Memory = AttendMemory<T, S, D>;
    if (auto error = cudaFuncSetAttribute(attend_kernel<T, S, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, Memory::kBytes))
      return error;
    const int tiles = (p.longest * shape.group + Memory::kQueries - 1) / Memory::kQueries;
    attend_kernel<T, S, D><<<blocks(tiles), kAttendThreads, Memory::kBytes, stream>>>(p);
    return cudaGetLastError();
  };
  return p.cache.scales ? attend.template operator()<fp8>() : attend.template operator()<T>();
}

}  // namespace

cudaError_t paged_chunks(const PagedChunks& p, DType dtype, cudaStream_t stream) {
  return dispatch(dtype, p.in.shape.channels, p.in.rotary, [&]<class T, int D, Pairing kPairing>() {
    if constexpr (sizeof(T) == 2)
      return launch<T, D, kPairing>(p, dtype, stream);
    else
      return cudaErrorInvalidValue;  // caches hold 16-bit numbers
  });
}

}  // namespace dmc

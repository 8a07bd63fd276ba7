// New tokens meet the paged cache, one launch a layer: decide, merge or append, rotate, write, attend, combine.
//
// Work comes in units: for every sequence and KV head some for its new tokens, as many as they take time, and then one
// for every 16 entries. The units of a layer are numbered head by head and dealt out in equal runs to the workers. A
// worker is a warp, and all by itself: its copies of entries run ahead of it, over the borders of heads; no barrier stops
// them. Whoever gets a head's first unit merges its new tokens and writes them into the cache. Where a head's units fall
// to several workers, the first of them in each thread block combines what its block found, and the last block to finish
// combines that. Nothing that a launch reads is written in it: merging reads tokens that the ring still holds, attention
// reads entries that are closed, and lengths are committed after the step.
//
// Entries are the rows of the products on the tensor cores, queries their columns: of those there may be as few as eight.
//
// Queries, and what a new token is merged from, travel through the same stages as entries, ahead of their use. Loads would
// queue up behind the copies under way, and come microseconds later; merging has several that wait for one another.
//
// What runs once costs what fetching its code costs, tens of microseconds in all. So there is one loop, one place that
// copies, one that attends, one that combines.
#include <type_traits>

#include "hopper.cuh"
#include "paged.cuh"

namespace dmc {
namespace {

// One head of one sequence, and what a worker has to do with it.
struct Work {
  int head, batch, kv_head;
  int head_start, head_end;  // the head's units of work, of which the worker has
  int from, to;              // those of entries [from, to)
  bool has_new;              // and whether its new tokens
  bool merges;               // whether the first new token does
  int position, length, closed;  // tokens before; entries: all, and those that no new token changes
  int newest;                    // place of the first new token in the ring
  int64_t slot, kv_row;
  const int* table;

  __device__ bool nobody() const { return slot < 0; }
  // Its stages [first_stage, to): one that its queries pass through, one for its new tokens if it has them, then its units
  // of entries by their own numbers.
  __device__ int first_stage() const { return from - 1 - has_new; }
  __device__ bool is_new(int stage) const { return has_new && stage == from - 1; }
  __device__ bool is_entries(int stage) const { return stage >= from && stage < to; }
};

// What a worker found of some queries of a head: sums of values, and behind them each query's highest score and weight.
template <int D, int kQueries>
struct Partial {
  static constexpr int kFloats = kQueries * (D + 2), kBytes = kFloats * int(sizeof(float));
  static constexpr int kVector = D % 128 == 0 ? 4 : D % 64 == 0 ? 2 : 1, kVectors = D / 32 / kVector;
  float* data;

  __device__ explicit Partial(void* data) : data(static_cast<float*>(data)) {}
  __device__ float* sums(int row, int channel) const { return data + row * D + channel; }
  __device__ float2* total(int row) const { return reinterpret_cast<float2*>(data + kQueries * D) + row; }
  // The channels that a lane combines: kVectors times kVector of them side by side.
  __device__ static int channel(int vector) { return (vector * 32 + int(threadIdx.x) % 32) * kVector; }
};

// Where things lie in shared memory, for so many queries at once: new tokens times heads of a group.
template <class T, class S, int D, int kQueries>
struct PagedMemory {
  using Stage = Staging<T, S, D, kUnitEntries, 32>;
  using P = Partial<D, kQueries>;
  // Stages of about 16 KiB together: more copies under way only wait longer for each other.
  static constexpr int kStages = Stage::kScaled ? (kQueries == 8 ? 3 : 2) : D == 64 ? 4 : D == 96 ? 3 : 2;
  static constexpr bool kQueriesInRegisters = D * kQueries <= 2048;  // else they have memory of their own
  static constexpr int kQueryBytes = kQueriesInRegisters ? 0 : Rows<T, D>::bytes(kQueries);
  static constexpr int kAllQueries = kQueries;
  static constexpr int kWorkers = D <= 128 ? 8 : 4;  // of a block, at most; a multiprocessor of Hopper holds one
  static constexpr int kWorks = D == 64 ? 8 : 4;  // heads under way at once: the one at hand, and at most one for every stage
  static_assert(kStages < kWorks);
  static constexpr int kStagesBytes = kStages * (Stage::kStageBytes + sizeof(Barrier));
  // Copies into what 128 does not divide are slower.
  static constexpr int kWorkerBytes = (kQueryBytes + Stage::kReadyBytes + kStagesBytes + kWorks * int(sizeof(Work)) + 127) / 128 * 128;
  static constexpr int kBytes = kWorkerBytes + P::kBytes;  // of one worker; what they found lies behind all of them
  static_assert(P::kBytes % 16 == 0 && kWorkers * kBytes <= 227 * 1024);
  static_assert(kStages * Stage::kStageBytes >= P::kBytes);  // a worker's own, while it combines, lies in its stages
};

// A piece of input that is copied into a stage.
struct Piece {
  const void* from;
  int to, bytes;
};

// Bytes of one token's angles in each of the two tables, where they can be copied.
__device__ inline int angle_bytes(const Rotary& rotary) { return rotary.pairs % 4 ? 0 : rotary.pairs * int(sizeof(float)); }

// The stage that a head's queries pass through: a tile's rows, unrotated, behind the place of the rotated ones, and the
// angles of the new tokens' positions, if there is room for them.
template <class T, int D, class Memory>
struct QueryStage {
  static constexpr int kRowBytes = D * int(sizeof(T));
  static constexpr int kRows = Memory::kQueriesInRegisters && !Memory::Stage::kScaled ? Rows<T, D>::bytes(Memory::kAllQueries) : 0;
  static_assert(kRows + Memory::kAllQueries * kRowBytes <= Memory::Stage::kStageBytes);
  int rows, angles, table_bytes;  // where the angles begin, and the bytes of either table; 0: they are read from where they are

  __device__ QueryStage(const PagedAttention& p, int rows) : rows(rows), angles(kRows + rows * kRowBytes) {
    table_bytes = p.in.shape.tokens * angle_bytes(p.in.rotary);
    if (angles + 2 * table_bytes > Memory::Stage::kStageBytes) table_bytes = 0;
  }
  __device__ int pieces() const { return rows + 2; }
  __device__ int bytes() const { return rows * kRowBytes + 2 * table_bytes; }
  // `query(row)`: where a row is.
  template <class F>
  __device__ Piece piece(int i, const Rotary& rotary, int position, F query) const {
    if (i < rows) return {query(i), kRows + i * kRowBytes, kRowBytes};
    return {(i == rows ? rotary.cos : rotary.sin) + position * rotary.stride.token, angles + (i - rows) * table_bytes, table_bytes};
  }
  __device__ const T* row(const char* stage, int i) const { return reinterpret_cast<const T*>(stage + kRows) + i * D; }
};

// The tables to rotate with, and where position 0 of a sequence's new tokens is in them.
struct Angles {
  Rotary rotary;
  int first;

  __device__ Angles(const Rotary& rotary, int position, const char* staged, int table_bytes) : rotary(rotary), first(position) {
    if (!table_bytes) return;
    this->rotary.cos = reinterpret_cast<const float*>(staged);
    this->rotary.sin = reinterpret_cast<const float*>(staged + table_bytes);
    first = 0;
  }
};

// The stage of a head's one new token: its key and value, its angles, the last eight channels of its queries, and, if it
// merges, the ring's weights and the tokens before it, newest first, as many as there is room for. Several new tokens
// leave it empty, and what is not in it is read from where it is.
template <class T, int D, class Memory>
struct NewStage {
  static constexpr int kTokenBytes = 2 * D * int(sizeof(T)), kLastBytes = 8 * int(sizeof(T));
  bool used;
  int table_bytes, weight_bytes, tokens;
  int last, weights, recent;  // where they begin; angles lie behind the token

  __device__ NewStage(const PagedAttention& p, const Work& w) {
    table_bytes = angle_bytes(p.in.rotary);
    weight_bytes = p.in.window && w.merges ? p.cache.recent_tokens * int(sizeof(float)) : 0;
    last = kTokenBytes + 2 * table_bytes, weights = last + p.in.shape.group * kLastBytes, recent = weights + weight_bytes;
    used = p.in.shape.tokens == 1 && recent <= Memory::Stage::kStageBytes;
    tokens = used && weight_bytes ? min(min(p.in.window - 1, w.position), (Memory::Stage::kStageBytes - recent) / kTokenBytes) : 0;
    if (!used) table_bytes = 0;
  }
  __device__ int pieces() const { return used ? 5 + (last_pieces() + tokens) : 0; }
  __device__ int last_pieces() const { return (weights - last) / kLastBytes; }
  __device__ int bytes() const { return used ? recent + tokens * kTokenBytes : 0; }
  __device__ Piece piece(int i, const PagedAttention& p, const Work& w) const {
    const NewTokens& in = p.in;
    const T* const key = static_cast<const T*>(in.key) + w.batch * in.key_stride.batch + w.kv_head * in.key_stride.head;
    const T* const value = static_cast<const T*>(in.value) + w.batch * in.value_stride.batch + w.kv_head * in.value_stride.head;
    if (i < 2) return {i ? value : key, i * kTokenBytes / 2, kTokenBytes / 2};
    if (i < 4) return {(i == 2 ? in.rotary.cos : in.rotary.sin) + w.position * in.rotary.stride.token, kTokenBytes + (i - 2) * table_bytes, table_bytes};
    if (i == 4) return {p.cache.recent_weights + w.kv_row * p.cache.recent_tokens, weights, weight_bytes};
    i -= 5;
    if (i < last_pieces()) {
      const T* const query = static_cast<const T*>(in.query) + w.batch * in.query_stride.batch +
                             (int64_t(w.kv_head) * in.shape.group + i) * in.query_stride.head;
      return {query + D - 8, last + i * kLastBytes, kLastBytes};
    }
    i -= last_pieces();
    const int place = w.newest - 1 - i, ring = place < 0 ? place + p.cache.recent_tokens : place;
    return {static_cast<const T*>(p.cache.recent) + (w.kv_row * p.cache.recent_tokens + ring) * 2 * D, recent + i * kTokenBytes, kTokenBytes};
  }
};

#if (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900) || defined(MEGATRON_DMC_EMULATES_AMPERE)
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

// A warp's copies of units of entries into a ring of stages, which it waits for in their order.
template <class Memory, class S, int D>
struct Copies {
  using Stage = typename Memory::Stage;
  // A page has two parts, keys and values, and with scales two more.
  static constexpr int kStages = Memory::kStages, kPages = kUnitEntries > kPageEntries ? kUnitEntries / kPageEntries : 1;
  static constexpr int kParts = Stage::kScaled ? 4 : 2, kPieces = kPages * kParts;
  char* const stages;
  Barrier* const arrived;
  const int lane;
  int begun = 0, done = 0, parity = 0;  // the next stage to begin, and to wait for
  // The next unit: its first entry, how many there are to copy, and the page of this lane's piece.
  int first = 0, rows = 0, page = 0;
  // This lane's piece: where page 0 has it, the bytes of a row, its first row of a unit, and where it goes in a stage.
  const char* from;
  int row_bytes, in_unit, to;

  __device__ Copies(const PagedLayer& cache, char* stages)
      : stages(stages), arrived(reinterpret_cast<Barrier*>(stages + kStages * Stage::kStageBytes)), lane(threadIdx.x % 32) {
    const int part = lane % kParts, is_value = part % 2;
    const bool is_scale = part >= 2;
    row_bytes = is_scale ? 4 : D * int(sizeof(S));
    from = (is_scale ? reinterpret_cast<const char*>(cache.scales) : static_cast<const char*>(cache.pages)) +
           is_value * kPageEntries * row_bytes;
    in_unit = lane / kParts * kPageEntries;  // below kUnitEntries for lanes that have a piece
    to = (is_scale ? Stage::kRows * D : 0) + (is_value * kUnitEntries + in_unit) * row_bytes;
    if constexpr (kBulkCopies) {
      if (lane == 0) {
        for (int i = 0; i < kStages; ++i) start_barrier(arrived + i, kPieces);
        publish_barriers();
      }
      __syncwarp();
    }
  }

  // Where a stage of a head lies; if it is not of entries, there is nothing to copy.
  __device__ void look_up(const Work& w, int stage) {
    first = stage * kUnitEntries;
    rows = w.is_entries(stage) ? min(w.closed - first, kUnitEntries) : 0;
    page = lane < kPieces && in_unit < rows ? w.table[(first + in_unit) / kPageEntries] : 0;
  }

  // Begin to copy it.
  __device__ void begin() {
    const int held = max(min(rows - in_unit, min(kPageEntries, kUnitEntries)), 0);
    const int bytes = (held * row_bytes + 15) / 16 * 16;  // scales come in pieces of 16 bytes
    const char* const source = from + (int64_t(page) * 2 * kPageEntries + (kPages == 1 ? first % kPageEntries : 0)) * row_bytes;
    if constexpr (kBulkCopies) {
      if (lane < kPieces) {
        arrive_and_expect(arrived + begun, bytes);
        if (bytes) copy_bytes_once(beginning() + to, source, bytes, arrived + begun);
      }
    } else {
      for (int piece = 0; piece < kPieces; ++piece) {
        const auto of_piece = [&](auto x) { return __shfl_sync(~0u, x, piece); };
        copy_by_all({reinterpret_cast<const void*>(of_piece(reinterpret_cast<unsigned long long>(source))), of_piece(to), of_piece(bytes)});
      }
    }
    has_begun();
  }

  // Begin to copy something else, so many pieces of so many bytes together.
  template <class F>
  __device__ void begin(int pieces, int bytes, F piece) {
    if constexpr (kBulkCopies) {
      if (lane < kPieces) arrive_and_expect(arrived + begun, lane == 0 ? bytes : 0);
      __syncwarp();
    }
#pragma unroll 1
    for (int i = kBulkCopies ? lane : 0; i < pieces; i += kBulkCopies ? 32 : 1) {
      const Piece x = piece(i);
      if constexpr (!kBulkCopies)
        copy_by_all(x);
      else if (x.bytes)
        copy_bytes(beginning() + x.to, x.from, x.bytes, arrived + begun);
    }
    has_begun();
  }

  // The next stage, when all of it has arrived.
  __device__ char* next() {
    char* const stage = stages + done * Stage::kStageBytes;
    if constexpr (kBulkCopies)
      wait_for(arrived + done, parity);
    else
      wait_for_own_copies<kStages - 1>();
    done = done + 1 == kStages ? 0 : done + 1;
    parity ^= done == 0;
    return stage;
  }

 private:
  __device__ char* beginning() const { return stages + begun * Stage::kStageBytes; }
  __device__ void copy_by_all(const Piece& x) const {
    for (int i = lane * 16; i < x.bytes; i += 32 * 16) copy_16_bytes(shared_address(beginning() + x.to + i), static_cast<const char*>(x.from) + i, true);
  }
  __device__ void has_begun() {
    if constexpr (!kBulkCopies) end_of_copies();
    begun = begun + 1 == kStages ? 0 : begun + 1;
  }
};

// The work of a worker of units [begin, end) on one of its heads.
template <class T>
__device__ Work work_of(const PagedAttention& p, int head, int begin, int end) {
  const int kv_heads = p.in.shape.kv_heads;
  Work w;
  w.head = head, w.batch = head / kv_heads, w.kv_head = head - w.batch * kv_heads;
  const T* const key = static_cast<const T*>(p.in.key) + w.batch * p.in.key_stride.batch + w.kv_head * p.in.key_stride.head;
  const float decision = to_float(key[p.in.shape.channels - 1]);
  w.head_start = p.first_unit[head], w.head_end = p.first_unit[head + 1];
  w.slot = p.in.slots[w.batch];
  w.kv_row = w.nobody() ? 0 : w.slot * kv_heads + w.kv_head;
  w.position = w.nobody() ? 0 : int(p.cache.tokens[w.slot]);
  w.length = w.nobody() ? 0 : p.cache.lengths[w.kv_row];
  const int units = (w.length + kUnitEntries - 1) / kUnitEntries, first = w.head_end - units;  // before: new tokens'
  w.has_new = begin <= w.head_start && !w.nobody();
  w.from = max(begin - first, 0), w.to = max(min(end - first, units), w.from);
  w.merges = w.position > 0 && decision > p.in.offset;
  w.closed = w.length - w.merges;
  w.newest = p.in.window ? w.position % p.cache.recent_tokens : 0;
  w.table = p.cache.table + w.kv_row * p.cache.max_pages;
  return w;
}

// The new tokens of a head, as all lanes know them.
struct New {
  uint32_t merging, surviving;  // bit i: token i merges into the entry before; the next one does not merge into its own
  float weight;                 // of token `lane`
  int open;                     // tokens of the ring that the first one merges with
};

template <class T, int D, class Staged>
__device__ New decide(const PagedAttention& p, const Work& w, const Staged& staged, const char* stage) {
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
  const auto decision = [&](int back) {
    if (back <= staged.tokens) return reinterpret_cast<const T*>(stage + staged.recent)[(back - 1) * 2 * D + D - 1];
    const int place = w.newest - back;
    return recent[(place < 0 ? place + cache.recent_tokens : place) * 2 * D + D - 1];
  };
  const auto in_window = [&](int back) { return back < in.window - 1 && back < w.position; };
  T last{};
  if (looks_back && in_window(1 + lane)) last = decision(1 + lane);  // on its way meanwhile
  if (exists) {
    const T* key = static_cast<const T*>(in.key) + lane * in.key_stride.token + w.batch * in.key_stride.batch + w.kv_head * in.key_stride.head;
    const T* last = static_cast<const T*>(in.query) + lane * in.query_stride.token + w.batch * in.query_stride.batch +
                    int64_t(w.kv_head) * group * in.query_stride.head + D - 1;
    if (staged.used) key = reinterpret_cast<const T*>(stage), last = reinterpret_cast<const T*>(stage + staged.last) + 7;
    merges = w.position + lane > 0 && to_float(key[D - 1]) > in.offset;
    fresh.weight = importance(last, staged.used ? 8 : in.query_stride.head, group, 0, in.offset);
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

// Merge the new tokens: rotated keys become rows [0, 16), values rows [16, 32). With `keeps`, also take them into the
// cache. `rows` may lie in the stage.
template <class T, class S, int D, Pairing kPairing, class Staged>
__device__ void merge_new(const PagedAttention& p, const Work& w, const New& fresh, const Staged& staged, const char* stage,
                          const Rows<T, D>& rows, bool keeps) {
  const NewTokens& in = p.in;
  const PagedLayer& cache = p.cache;
  const int lane = threadIdx.x % 32, tokens = in.shape.tokens;
  constexpr int kParts = 32 / kLanes<D>;  // rows that a warp holds at once
  const LanePairs<D, kPairing> pairs(in.rotary, lane % kLanes<D> * 4);
  const int64_t parity = in.window ? 0 : cache.steps[w.slot] % 2;
  T* const recent = static_cast<T*>(cache.recent) + w.kv_row * cache.recent_tokens * 2 * D;
  float* const recent_weights = cache.recent_weights + w.kv_row * cache.recent_tokens;
  const float* const read_weights = staged.used ? reinterpret_cast<const float*>(stage + staged.weights) : recent_weights;
  const T* const staged_recent = reinterpret_cast<const T*>(stage + staged.recent);
  const Angles angles(in.rotary, w.position, stage + Staged::kTokenBytes, staged.table_bytes);
#pragma unroll 1
  for (int pass = 0; pass < (kParts == 1 ? 2 : 1); ++pass) {
    const int part = kParts == 1 ? pass : lane / kLanes<D>;  // keys, then values
    const bool takes_part = part < 2 && pairs.exist();
    const T* source = part == 0 ? static_cast<const T*>(in.key) + w.batch * in.key_stride.batch + w.kv_head * in.key_stride.head
                                      : static_cast<const T*>(in.value) + w.batch * in.value_stride.batch + w.kv_head * in.value_stride.head;
    const int64_t stride = part == 0 ? in.key_stride.token : in.value_stride.token;
    if (staged.used) source = reinterpret_cast<const T*>(stage) + part * D;
    PairValues sum = {};
    float total = 0.f;
    int entry = w.length - 1;
    if (!in.window && w.merges && takes_part) {  // the entry so far
      const int64_t state = w.kv_row + parity * cache.state_stride;
      total = cache.total[state];
      sum = pairs.read(cache.mean + (state * 2 + part) * D);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum.first[k] *= total, sum.second[k] *= total;
    }
#pragma unroll 1
    for (int i = 0; i < tokens; ++i) {
      const bool merges = fresh.merging >> i & 1;
      entry += !merges;
      // What is needed last is on its way first.
      const bool survives = keeps && takes_part && (fresh.surviving >> i & 1);
      const int64_t entry_at = survives ? entry_row(w.table, entry) : 0;
      Rotation rotation;
      if (part == 0 && pairs.exist()) rotation.read(angles.rotary, pairs, Rotation::offset(angles.rotary, angles.first + i, 0));
      if (in.window || !merges) sum = {}, total = 0.f;
      // The segment's tokens that the window reaches, newest first: new ones, then those of the ring.
      const int chain = __clz(~(fresh.merging << (31 - i)));  // new tokens up to here that merge, one after the other
      const int reached = !in.window ? 1 : min(chain > i ? i + 1 + fresh.open : chain + 1, in.window);
      constexpr int kAtOnce = 4;  // reads under way
      PairPack<T> own{};
#pragma unroll 1
      for (int n = 0; n < reached; n += kAtOnce) {
        PairPack<T> packs[kAtOnce] = {};
        float weights[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int token = i - n - k, place = w.newest + token, ring = place < 0 ? place + cache.recent_tokens : place;
          const bool exists = n + k < reached;
          weights[k] = __shfl_sync(~0u, fresh.weight, max(token, 0));
          if (exists && token < 0) weights[k] = read_weights[ring];
          if (!exists) weights[k] = 0.f;
          const T* from = source + token * stride;
          if (token < 0) from = -token <= staged.tokens ? staged_recent + ((-token - 1) * 2 + part) * D : recent + (ring * 2 + part) * D;
          if (exists && takes_part) packs[k] = pairs.read_pack(from);
        }
        if (n == 0) own = packs[0];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const PairValues x = pairs.values(packs[k]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sum.first[j] += weights[k] * x.first[j];
            sum.second[j] += weights[k] * x.second[j];
          }
          total += weights[k];
        }
      }
      const float weight = __shfl_sync(~0u, fresh.weight, i);
      __syncwarp();  // a staged token has been read by all lanes: rows may take its place
      if (!takes_part) continue;
      PairValues mean;
      const float inverse = reciprocal(total);
#pragma unroll
      for (int k = 0; k < 4; ++k) mean.first[k] = sum.first[k] * inverse, mean.second[k] = sum.second[k] * inverse;
      if (keeps && !in.window && i + 1 == tokens) {
        const int64_t state = w.kv_row + (1 - parity) * cache.state_stride;
        pairs.write(cache.mean + (state * 2 + part) * D, mean);
        if (part == 0 && pairs.have_last()) cache.total[state] = total;
      }
      if (keeps && in.window) {  // the ring has room for a step's tokens beside those that a window reaches
        const int place = w.newest + i, ring = place < cache.recent_tokens ? place : place - cache.recent_tokens;
        pairs.write_pack(recent + (ring * 2 + part) * D, own);
        if (part == 0 && pairs.have_last()) recent_weights[ring] = weight;
      }
      if (part == 0) mean = rotation.apply(mean, pairs.have_last());
      pairs.write_pack([&](int channel) { return rows.at(part * kUnitEntries + i, channel); }, pairs.template pack<T>(mean));
      if (survives) write_entry<S, D>(cache, entry_at + part * kPageEntries, pairs, mean);
    }
  }
}

// Softmax-weighted sums of values for N x 8 queries, which are columns of 16x8 products.
template <int D, int N>
struct ColumnSums {
  float value[D / 16][N][4] = {};  // rows are channels
  float highest[N][2];             // score so far, in powers of 2, of this lane's columns
  float weight[N][2] = {};         // of this lane's entries

  __device__ ColumnSums() {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) highest[i / 2][i % 2] = -INFINITY;
  }

  static __device__ float over_column(float x, auto merge) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) x = merge(x, __shfl_xor_sync(~0u, x, step));
    return x;
  }
  __device__ float total(int n, int i) const {
    return over_column(weight[n][i], [](float a, float b) { return a + b; });
  }

  // Scores of 16 entries, -inf where one is not seen, become weights; `scale`, above 0, makes them powers of 2. What was
  // summed before is scaled along.
  __device__ void weigh(float (&scores)[N][4], float scale) {
    float shrink[N][2];
    bool shrinks = false;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float own = over_column(fmaxf(scores[n][i], scores[n][2 + i]), [](float a, float b) { return fmaxf(a, b); });
        const float top = fmaxf(highest[n][i], own * scale), base = top == -INFINITY ? 0.f : top;  // nothing seen yet
        shrink[n][i] = power_of_2(highest[n][i] - base);
        shrinks |= shrink[n][i] != 1.f;
        highest[n][i] = top;
        scores[n][i] = power_of_2(fmaf(scores[n][i], scale, -base));
        scores[n][2 + i] = power_of_2(fmaf(scores[n][2 + i], scale, -base));
        weight[n][i] = weight[n][i] * shrink[n][i] + scores[n][i] + scores[n][2 + i];
      }
    }
    if (!__any_sync(~0u, shrinks)) return;  // soon, a new highest score is rare
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) value[c][i / 4][i % 4] *= shrink[i / 4][i % 2];
    }
  }
};

// Combine parts part(0) to part(count - 1), by a warp. `write` takes a row, its sums in this lane's channels, and its total.
template <class P, int D, class Part, class Write>
__device__ void combine(int count, int rows, Part part, Write write) {
  constexpr int kAtOnce = 9, kTogether = 256 / D;  // parts and rows, that is, reads under way
#pragma unroll 1
  for (int first = 0; first < rows; first += kTogether) {
    float sum[kTogether][P::kVectors][P::kVector] = {}, highest[kTogether], weight[kTogether] = {};
#pragma unroll
    for (int r = 0; r < kTogether; ++r) highest[r] = -INFINITY;
#pragma unroll 1
    for (int base = 0; base < count; base += kAtOnce) {
      float2 totals[kAtOnce][kTogether];
      Pack<float, P::kVector> found[kAtOnce][kTogether][P::kVectors];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const P from = part(min(base + k, count - 1));
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
          const bool exists = base + k < count && first + r < rows;
          totals[k][r] = exists ? *from.total(first + r) : make_float2(-INFINITY, 0.f);
#pragma unroll
          for (int i = 0; i < P::kVectors; ++i)
            found[k][r][i] = exists ? *reinterpret_cast<const Pack<float, P::kVector>*>(from.sums(first + r, P::channel(i))) : Pack<float, P::kVector>{};
        }
      }
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        float top = highest[r];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) top = fmaxf(top, totals[k][r].x);
        const float reference = top == -INFINITY ? 0.f : top;  // nothing seen yet
        const float shrink = power_of_2(highest[r] - reference);
        highest[r] = top;
        weight[r] *= shrink;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) sum[r][i / P::kVector][i % P::kVector] *= shrink;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const float factor = power_of_2(totals[k][r].x - reference);
          weight[r] += factor * totals[k][r].y;
#pragma unroll
          for (int i = 0; i < D / 32; ++i) sum[r][i / P::kVector][i % P::kVector] += factor * found[k][r][i / P::kVector][i % P::kVector];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kTogether; ++r) {
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

// Entries of 8 bits become operands in registers. A lane reads four of them side by side, and shifting makes pairs of the
// even ones and of the odd ones, so that is the order of channels here: of every 16 of a product, the even ones come first.
// Sign, exponent and mantissa come to lie where T has them, but exponents count from elsewhere: a number is too small by a
// power of 2 (2^-8 in half, 2^-120 in bfloat16, exact down to its smallest), which what it is multiplied with makes up for.
// Values become bfloat16 whatever T is: with their scales, weights need its range.
template <class T>
__device__ inline uint2 from_fp8(uint32_t four) {
  constexpr int kShift = std::is_same_v<T, half> ? 1 : 4;
  constexpr uint32_t kSigns = 0x80008000u, kOthers = 0x7f007f00u >> kShift;
  return make_uint2((four << 8 & kSigns) | (four << (8 - kShift) & kOthers), (four & kSigns) | (four >> kShift & kOthers));
}

// What makes up for it, so that all factors are within T's range: queries are multiplied by `kQuery`; then products with
// keys of 8 bits want `kOldKey`, those with new tokens' keys `kNewKey`. Weights of values of 8 bits are multiplied by
// `kOldValue`, those of new tokens' by `kNewValue`, and sums want `kSum`.
template <class T, class S>
struct Factors {
  static constexpr float kQuery = 1.f, kNewKey = 1.f, kNewValue = 1.f, kSum = 1.f;
};
template <>
struct Factors<bf16, fp8> {
  static constexpr float kQuery = 0x1p60f, kOldKey = 0x1p60f, kNewKey = 0x1p-60f, kOldValue = 0x1p60f, kNewValue = 0x1p-60f, kSum = 0x1p60f;
};
template <>
struct Factors<half, fp8> {  // scales of values are below 2^8, since their values were in half
  static constexpr float kQuery = 1.f, kOldKey = 0x1p8f, kNewKey = 1.f, kOldValue = 0x1p120f, kNewValue = 1.f, kSum = 1.f;
};

// A stage's entries of 8 bits: keys as rows [0, 16), behind them values.
template <class T, int D>
struct OldEntries {
  using Value = bf16;
  static constexpr int kPlanes = std::is_same_v<T, half> ? 2 : 1;  // of their weights, which are as exact as in T
  const char* stage;

  // Keys as two left operands, of 16 channels each.
  __device__ void keys(uint32_t (&to)[2][4], int channel) const {
    uint32_t words[4];
    read<false>(words, 0, channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 upper = from_fp8<T>(words[2 * i]), lower = from_fp8<T>(words[2 * i + 1]);
      to[i][0] = upper.x, to[i][1] = lower.x, to[i][2] = upper.y, to[i][3] = lower.y;
    }
  }
  // Values as two left operands whose rows are channels.
  __device__ void values(uint32_t (&to)[2][4], int channel) const {
    uint32_t words[4];
    read<true>(words, kUnitEntries, channel);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 first = from_fp8<bf16>(words[2 * i]), second = from_fp8<bf16>(words[2 * i + 1]);
      to[i][0] = first.x, to[i][1] = first.y, to[i][2] = second.x, to[i][3] = second.y;
    }
  }

 private:
  template <bool kTransposed>
  __device__ void read(uint32_t (&to)[4], int row, int channel) const {
    const int lane = threadIdx.x % 32;
    row += lane % 16;
    load_matrices<kTransposed>(to, shared_address(stage + row * D + Rows<fp8, D>::permuted(row, channel + lane / 16 * 16)));
  }
};

// Rows of T whose channels are read in the same order. There are few of them.
template <class T, int D>
struct EvenFirst {
  using Value = T;
  static constexpr int kPlanes = 1;
  Rows<T, D> rows;

  __device__ void keys(uint32_t (&to)[2][4], int channel) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 upper = pairs(0, channel + i * 16), lower = pairs(8, channel + i * 16);
      to[i][0] = upper.x, to[i][1] = lower.x, to[i][2] = upper.y, to[i][3] = lower.y;
    }
  }
  __device__ void values(uint32_t (&to)[2][4], int channel) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int row) {
        return *reinterpret_cast<const uint32_t*>(rows.at(kUnitEntries + i % 2 * 8 + lane % 4 * 2 + row, channel + i / 2 * 16 + lane / 4 * 2));
      };
      const uint32_t first = at(0), second = at(1);
      to[i / 2][i % 2 * 2] = __byte_perm(first, second, 0x5410), to[i / 2][i % 2 * 2 + 1] = __byte_perm(first, second, 0x7632);
    }
  }
  // Eight queries as two right operands.
  __device__ void right_of_8(uint32_t (&to)[4], int row, int channel) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 two = pairs(row, channel + i * 16);
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }

 private:
  __device__ uint2 pairs(int row, int channel) const {
    const int lane = threadIdx.x % 32;
    const uint2 four = *reinterpret_cast<const uint2*>(rows.at(row + lane / 4, channel + lane % 4 * 4));
    return make_uint2(__byte_perm(four.x, four.y, 0x5410), __byte_perm(four.x, four.y, 0x7632));
  }
};

// The same in order, of 16-bit entries.
template <class T, int D>
struct InOrder {
  using Value = T;
  static constexpr int kPlanes = 1;
  Rows<T, D> rows;

  __device__ void keys(uint32_t (&to)[2][4], int channel) const {
    uint32_t tile[1][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.left(tile, 0, channel + i * 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) to[i][k] = tile[0][k];
    }
  }
  __device__ void values(uint32_t (&to)[2][4], int channel) const {
    uint32_t tile[1][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.left_transposed(tile, kUnitEntries, channel + i * 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) to[i][k] = tile[0][k];
    }
  }
  __device__ void right_of_8(uint32_t (&to)[4], int row, int channel) const { rows.right_of_8(to, row, channel); }
};

template <class T, class S, int D, int kQueries>
__global__ void __launch_bounds__(32 * PagedMemory<T, S, D, kQueries>::kWorkers, 1)
    paged_attention_kernel(const __grid_constant__ PagedAttention p) {
  using Memory = PagedMemory<T, S, D, kQueries>;
  using Stage = typename Memory::Stage;
  using P = typename Memory::P;
  using Factor = Factors<T, S>;
  using NewEntries = std::conditional_t<Stage::kScaled, EvenFirst<T, D>, InOrder<T, D>>;
  constexpr int N = kQueries / 8;
  const NewTokens& in = p.in;
  const auto [tokens, sequences, heads, kv_heads, channels, group] = in.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block_workers = blockDim.x / 32;
  const int block_worker = blockIdx.x * block_workers, worker = block_worker + warp;
  const int tile = blockIdx.y, all_heads = sequences * kv_heads;
  const int first_row = tile * kQueries, tiles = gridDim.y, rows = min(kQueries, tokens * group - first_row);
  const float per_group = reciprocal(group);
  const auto token_of = [&](int row) { return int((first_row + row + 0.5f) * per_group); };  // a division, in short
  const auto head_of = [&](int row) { return first_row + row - token_of(row) * group; };     // of its group
  const bool ok = *in.ok;
  const int units = p.first_unit[all_heads], first_head = p.first_head[min(worker, p.workers - 1)];
  const int share = (units + p.workers - 1) / p.workers, begin = worker * share, end = min(units, begin + share);
  if (!ok || begin >= end) return;

  extern __shared__ __align__(128) char memory[];
  char* const own_memory = memory + warp * Memory::kWorkerBytes;
  char* const ready = own_memory + Memory::kQueryBytes;
  char* const stages = ready + Stage::kReadyBytes;
  Copies<Memory, S, D> copies(p.cache, stages);
  Work* const works = reinterpret_cast<Work*>(stages + Memory::kStagesBytes);

  // What is written here goes before copies that take the same place.
  const auto show_writes_of_warp = [] {
    if constexpr (kBulkCopies) show_writes();
    __syncwarp();
  };
  // Queries and values of no token must be 0: what is in memory may be NaN.
  const auto clear = [&](const Rows<T, D>& rows, int from, int to) {
#pragma unroll 1
    for (int i = from * (D / 8) + lane; i < to * (D / 8); i += 32)
      *reinterpret_cast<uint4*>(rows.at(i / (D / 8), i % (D / 8) * 8)) = uint4{};
  };

  const QueryStage<T, D, Memory> query_stage(p, rows);
  const auto query_at = [&](const Work& w, int row) {
    return static_cast<const T*>(in.query) + token_of(row) * in.query_stride.token + w.batch * in.query_stride.batch +
           (w.kv_head * group + head_of(row)) * in.query_stride.head;
  };
  constexpr bool kInRegisters = Memory::kQueriesInRegisters;
  uint32_t columns[D / 32][N][4];  // queries, rotated: right operands of two products each
  ColumnSums<D, N> sums;
  const float scale = in.scale * kLog2E;

  // The head and the stage that are copied, kStages - 1 ahead of those at hand; pages are looked up one stage before.
  Work copied{}, w{};
  copied.head = first_head - 1, copied.head_end = begin;
  int copied_stage = 0, stage = 0, begun_works = 0, done_works = 0;
#pragma unroll 1
  for (int turn = -Memory::kStages;; ++turn) {
    __syncwarp();  // the stage before is done with: it takes the next copies
    if (turn > -Memory::kStages) {
      if (copied_stage >= copied.from || copied.nobody()) {
        copies.begin();
      } else if (copied.is_new(copied_stage)) {
        const NewStage<T, D, Memory> staged(p, copied);
        copies.begin(staged.pieces(), staged.bytes(), [&](int i) { return staged.piece(i, p, copied); });
      } else {
        copies.begin(query_stage.pieces(), query_stage.bytes(), [&](int i) {
          return query_stage.piece(i, in.rotary, copied.position, [&](int row) { return query_at(copied, row); });
        });
      }
    }
    if (++copied_stage >= copied.to && copied.head_end < end) {
      copied = work_of<T>(p, copied.head + 1, begin, end);
      copied_stage = copied.first_stage();
      if (lane == 0) works[begun_works % Memory::kWorks] = copied;
      ++begun_works;
    }
    copies.look_up(copied, copied_stage);
    if (turn < 0) continue;

    char* const arrived = copies.next();
    if (++stage >= w.to) w = works[done_works++ % Memory::kWorks], stage = w.first_stage();
    const auto output_at = [&](int row) {
      return static_cast<T*>(in.output) + token_of(row) * in.output_stride.token + w.batch * in.output_stride.batch +
             (w.kv_head * group + head_of(row)) * in.output_stride.head;
    };
    const auto alpha_at = [&](int token) {
      return in.alpha + token * in.alpha_stride.token + w.batch * in.alpha_stride.batch + w.kv_head * in.alpha_stride.head;
    };

    const Rows<T, D> queries{reinterpret_cast<T*>(!kInRegisters ? own_memory : Stage::kScaled ? ready : arrived)};
    const auto read_queries = [&](int c) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        NewEntries{queries}.right_of_8(columns[c][n], n * 8, c * 32);
        if constexpr (Factor::kQuery != 1.f) {
#pragma unroll
          for (uint32_t& two : columns[c][n]) {
            const float2 x = unpack_two<T>(two);
            two = pack_two<T>(x.x * Factor::kQuery, x.y * Factor::kQuery);
          }
        }
      }
    };
    if (stage < w.from && !w.is_new(stage)) {
      if (w.nobody()) {
#pragma unroll 1
        for (int i = lane; i < rows * D; i += 32) output_at(i / D)[i % D] = from_float<T>(0.f);
        if (tile == 0 && lane < tokens) *alpha_at(lane) = 0.f;
        if (tile == 0 && lane == 0) in.new_lengths[w.head] = 0;
      } else {
        clear(queries, rows, kQueries);
        const Angles angles(in.rotary, w.position, arrived + query_stage.angles, query_stage.table_bytes);
        rotate_rows<T, D>(
            angles.rotary, queries, rows, lane, 32, [&](int row) { return query_stage.row(arrived, row); },
            [&](int row) { return angles.first + token_of(row); });
        __syncwarp();
        if (kInRegisters) {
#pragma unroll
          for (int c = 0; c < D / 32; ++c) read_queries(c);
          show_writes_of_warp();
        }
      }
    } else {
      // Entries, or new tokens as entries: keys as rows [0, 16), behind them values. `visible` has a bit for each of them.
      const Rows<T, D> entries{reinterpret_cast<T*>(Stage::kScaled ? ready : arrived)};
      const bool are_new = stage < w.from;
      uint32_t visible[N][2];  // for this lane's queries
      float key_scale[2] = {Factor::kNewKey, Factor::kNewKey}, value_scale[2] = {Factor::kNewValue, Factor::kNewValue};  // of this lane's entries
      int exist;
      if (are_new) {
        // New tokens are merged, and written into the cache.
        const NewStage<T, D, Memory> staged(p, w);
        const New fresh = decide<T, D>(p, w, staged, arrived);
        switch (pairing_of(in.rotary)) {
          case Pairing::kHalves: merge_new<T, S, D, Pairing::kHalves>(p, w, fresh, staged, arrived, entries, tile == 0); break;
          case Pairing::kInterleaved: merge_new<T, S, D, Pairing::kInterleaved>(p, w, fresh, staged, arrived, entries, tile == 0); break;
          default: merge_new<T, S, D, Pairing::kAny>(p, w, fresh, staged, arrived, entries, tile == 0);
        }
        if (tile == 0) {
          if (lane < tokens) *alpha_at(lane) = fresh.merging >> lane & 1;
          if (lane == 0) in.new_lengths[w.head] = w.length + tokens - __popc(fresh.merging);
        }
        exist = tokens;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {  // a token's own entry, and of those before it what later tokens do not change
          const int token = token_of(i / 2 * 8 + lane % 4 * 2 + i % 2);
          visible[i / 2][i % 2] = token < tokens ? 1u << token | (fresh.surviving & ((1u << token) - 1)) : 0u;
        }
      } else {
        exist = min(w.closed - stage * kUnitEntries, kUnitEntries);
        if constexpr (Stage::kScaled) {
          const float* const scales = reinterpret_cast<const float*>(arrived + Stage::kRows * D);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int entry = i * 8 + lane / 4;
            key_scale[i] = scales[entry] * Factor::kOldKey;
            value_scale[i] = entry < exist ? scales[kUnitEntries + entry] * Factor::kOldValue : 0.f;
          }
        }
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) visible[i / 2][i % 2] = (1u << exist) - 1;
      }
      if (exist < kUnitEntries && (are_new || !Stage::kScaled)) {  // what is in 8 bits is no NaN here
        clear(entries, kUnitEntries + exist, 2 * kUnitEntries);
        show_writes_of_warp();
      }
      const auto with_operands = [&](auto f) {
        if constexpr (Stage::kScaled) {
          if (!are_new) return f(OldEntries<T, D>{arrived});
        }
        f(NewEntries{entries});
      };

      float scores[N][4] = {}, others[N][4] = {};  // two sums at once: each waits for its last product
      with_operands([&](auto operands) {
#pragma unroll
        for (int c = 0; c < D / 32; ++c) {
          uint32_t keys[2][4];
          if (!kInRegisters) read_queries(c);
          operands.keys(keys, c * 32);
#pragma unroll
          for (int n = 0; n < N; ++n) {
            multiply_add(T{}, scores[n], keys[0], columns[c][n][0], columns[c][n][1]);
            multiply_add(T{}, others[n], keys[1], columns[c][n][2], columns[c][n][3]);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < 4 * N; ++i) scores[i / 4][i % 4] = (scores[i / 4][i % 4] + others[i / 4][i % 4]) * key_scale[i % 4 / 2];
      if (exist < kUnitEntries) {
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
          if (!(visible[i / 4][i % 2] >> (lane / 4 + i % 4 / 2 * 8) & 1)) scores[i / 4][i % 4] = -INFINITY;
        }
      }
      sums.weigh(scores, scale);
      with_operands([&](auto operands) {
        using Value = typename decltype(operands)::Value;
        constexpr int kPlanes = decltype(operands)::kPlanes;
        uint32_t weights[kPlanes][N][2];
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
          const float* const pair = scores[i / 2] + i % 2 * 2;
          float left[2] = {pair[0] * value_scale[i % 2], pair[1] * value_scale[i % 2]};
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            const uint32_t two = pack_two<Value>(left[0], left[1]);
            const float2 held = unpack_two<Value>(two);
            left[0] -= held.x, left[1] -= held.y;
            weights[plane][i / 2][i % 2] = transposed(two);
          }
        }
#pragma unroll
        for (int c = 0; c < D / 32; ++c) {
          uint32_t values[2][4];
          operands.values(values, c * 32);
#pragma unroll
          for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) {
              multiply_add(Value{}, sums.value[2 * c][n], values[0], weights[plane][n][0], weights[plane][n][1]);
              multiply_add(Value{}, sums.value[2 * c + 1][n], values[1], weights[plane][n][0], weights[plane][n][1]);
            }
          }
        }
      });
    }

    if (stage + 1 < w.to) continue;
    if (!w.nobody()) {
      // Workers [first, last] share the head; of this block, [own_first, own_last]. For all but `last` it is the last head
      // that they have, so that `own_first` can wait for the others.
      const int first = w.head_start / share, last = (w.head_end - 1) / share;
      const int own_first = max(first, block_worker), own_last = min(last, block_worker + block_workers - 1);
      const bool whole = first == last, together = own_first < own_last, combines = worker == own_first;
      // A block has at most two heads that it shares: the one that it begins with, and the one that it ends with.
      const auto of_block = [&](int block) {
        const bool begins_inside = w.head_start > block * block_workers * share;
        return P(p.partial + int64_t((block * 2 + begins_inside) * tiles + tile) * P::kFloats);
      };
      const auto of_worker = [&](int other) {  // of this block
        char* const places = memory + block_workers * Memory::kWorkerBytes;
        return P(other == own_first ? stages + (other - worker) * Memory::kWorkerBytes : places + (other - block_worker) * P::kBytes);
      };
      const P own = together ? of_worker(worker) : of_block(blockIdx.x);
      __syncwarp();  // stages have been read
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float weight[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) weight[i] = sums.total(n, i);
        if (whole) {
          const int row = n * 8 + lane / 4;
          T* const to = output_at(row);
          const float inverse[2] = {reciprocal(weight[0]) * Factor::kSum, reciprocal(weight[1]) * Factor::kSum};
#pragma unroll
          for (int c = 0; c < D / 16; ++c) {
            const float* const sum = sums.value[c][n];
            const uint32_t upper = transposed(pack_two<T>(sum[0] * inverse[0], sum[1] * inverse[1]));
            const uint32_t lower = transposed(pack_two<T>(sum[2] * inverse[0], sum[3] * inverse[1]));
            if (row >= rows) continue;
            if constexpr (Stage::kScaled) {  // even channels, and odd ones
              *reinterpret_cast<uint2*>(to + c * 16 + lane % 4 * 4) = make_uint2(__byte_perm(upper, lower, 0x5410), __byte_perm(upper, lower, 0x7632));
            } else {
              *reinterpret_cast<uint32_t*>(to + c * 16 + lane % 4 * 2) = upper;
              *reinterpret_cast<uint32_t*>(to + c * 16 + 8 + lane % 4 * 2) = lower;
            }
          }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = n * 8 + lane % 4 * 2 + i;
            if (row >= rows) continue;
            if (lane < 4) *own.total(row) = make_float2(sums.highest[n][i], weight[i]);
            float* const to = own.sums(row, 0);
#pragma unroll
            for (int c = 0; c < D / 16; ++c) {
              const float upper = sums.value[c][n][i] * Factor::kSum, lower = sums.value[c][n][2 + i] * Factor::kSum;
              if constexpr (Stage::kScaled)
                *reinterpret_cast<float2*>(to + c * 16 + lane / 4 * 2) = make_float2(upper, lower);
              else
                to[c * 16 + lane / 4] = upper, to[c * 16 + 8 + lane / 4] = lower;
            }
          }
        }
      }
      if (together) {
        const int barrier = 1 + own_first - block_worker, threads = 32 * (own_last - own_first + 1);
        if (combines)
          named_wait(barrier, threads);
        else
          named_arrive(barrier, threads);
      }
      const int first_block = first / block_workers, last_block = last / block_workers;
      const bool alone = first_block == last_block;
#pragma unroll 1
      for (int level = whole || !combines ? 2 : together ? 0 : 1; level < (alone ? 1 : 2); ++level) {
        if (level && !arrives_last(p.arrived + w.head * tiles + tile, last_block - first_block + 1)) break;
        combine<P, D>(
            level ? last_block - first_block + 1 : own_last - own_first + 1, rows,
            [&](int n) { return level ? of_block(first_block + n) : of_worker(own_first + n); },
            [&](int row, auto& sum, float2 total) {
              const bool done = level || alone;
              const float inverse = done ? reciprocal(total.y) : 1.f;
              const P found = of_block(blockIdx.x);
              T* const to = output_at(row);
#pragma unroll
              for (int i = 0; i < P::kVectors; ++i) {
#pragma unroll
                for (float& x : sum[i]) x *= inverse;
                if (done)
                  store(to + P::channel(i), sum[i]);
                else
                  store(found.sums(row, P::channel(i)), sum[i]);
              }
              if (!done && lane == 0) *found.total(row) = total;
            });
      }
    }
    if (w.head_end >= end) return;
    sums = {};
  }
}

// Calls f with a kernel's number of queries at once: as few as there are of a KV head, where that is possible.
template <class F>
auto with_queries(int queries, F&& f) {
  return queries <= 8 ? f(std::integral_constant<int, 8>{}) : f(std::integral_constant<int, 16>{});
}

// Workers of a thread block on the current device, as many as its shared memory has room for; 0 for an error.
template <class Memory>
int workers_of_block() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return 0;
  return min(Memory::kWorkers, bytes / Memory::kBytes);
}

template <class T, class S, int D>
cudaError_t launch(const PagedAttention& p, cudaStream_t stream) {
  const int queries = p.in.shape.tokens * p.in.shape.group;
  return with_queries(queries, [&](auto at_once) {
    constexpr int kQueries = at_once;
    using Memory = PagedMemory<T, S, D, kQueries>;
    const auto kernel = paged_attention_kernel<T, S, D, kQueries>;
    const int workers = workers_of_block<Memory>(), bytes = workers * Memory::kBytes;
    if (!workers) return cudaErrorInvalidConfiguration;
    if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
    const dim3 grid((p.workers + workers - 1) / workers, (queries + kQueries - 1) / kQueries);
    kernel<<<grid, 32 * workers, bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

// On the whole device at once, of the kernel that has room for fewer.
template <class T, class S, int D>
int workers() {
  int device = 0, processors = 0, least = 0;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return 0;
  for (const int queries : {8, 16}) {
    const int found = with_queries(queries, [&](auto at_once) {
      using Memory = PagedMemory<T, S, D, at_once>;
      const auto kernel = paged_attention_kernel<T, S, D, at_once>;
      const int of_block = workers_of_block<Memory>(), bytes = of_block * Memory::kBytes;
      int blocks = 0;
      if (!of_block || cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ||
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 32 * of_block, bytes))
        return 0;
      return blocks * processors * of_block;
    });
    least = queries == 8 ? found : min(least, found);
  }
  return least;
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

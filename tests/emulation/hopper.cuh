// The twin of csrc/hopper.cuh that runs on a CPU. Copies and products happen when they are waited for, not before.
#pragma once

#include "instructions.cuh"

namespace dmc {

struct BoxMap {
  const char* matrix;
  uint64_t rows, channels;
  int box_rows;
};

inline cudaError_t make_box_map(BoxMap* map, DType, void* matrix, uint64_t rows, uint64_t channels, int box_rows) {
  *map = {static_cast<const char*>(matrix), rows, channels, box_rows};
  return cudaSuccess;
}

struct Barrier {
  int16_t phase, arrivals, missing;
  int16_t pieces_missing;  // of 16 bytes
};
static_assert(sizeof(Barrier) == 8);

inline void start_barrier(Barrier* barrier, int arrivals) {
  *barrier = {0, int16_t(arrivals), int16_t(arrivals), 0};
}
inline void publish_barriers() {}
inline void came(Barrier* barrier, int arrivals, int bytes) {
  if (bytes % 16) emulation::fail("bytes of a barrier that are no multiple of 16");
  barrier->missing -= arrivals;
  barrier->pieces_missing += bytes / 16;
  if (barrier->missing < 0) emulation::fail("more arrivals than a barrier waits for");
  if (barrier->missing == 0 && barrier->pieces_missing == 0) {
    barrier->phase ^= 1;
    barrier->missing = barrier->arrivals;
  }
  ++emulation::block->progress;
}
inline void arrive(Barrier* barrier) { came(barrier, 1, 0); }
inline void arrive_and_expect(Barrier* barrier, int bytes) { came(barrier, 1, bytes); }
inline void wait_for(Barrier* barrier, int parity) {
  while (barrier->phase == parity) {
    auto& boxes = emulation::block->boxes;
    if (boxes.empty()) {
      emulation::yield();
      continue;
    }
    boxes.back()();
    boxes.pop_back();
    ++emulation::block->progress;
  }
}

inline void copy_box(void* to, const BoxMap* map, int row, int channel, Barrier* barrier) {
  const uint32_t address = shared_address(to);
  if (address % 128) emulation::fail("a box that is not aligned");
  emulation::block->boxes.push_back([=, box = *map] {  // the map may be a parameter of a thread that ends before
    for (int r = 0; r < box.box_rows; ++r) {
      for (int piece = 0; piece < 8; ++piece) {
        char* const target = emulation::shared_memory() + address + r * 128 + piece * 16;
        if (row >= 0 && uint64_t(row + r) < box.rows)
          std::memcpy(target, box.matrix + ((row + r) * box.channels + channel + piece * 8) * 2, 16);
        else
          std::memset(target, 0, 16);
      }
    }
    came(barrier, 0, -box.box_rows * 128);
  });
}

inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    emulation::fail("a copy that is not aligned to 16 bytes");
  emulation::block->boxes.push_back([=] {
    std::memcpy(to, from, bytes);
    came(barrier, 0, -bytes);
  });
}

inline void copy_bytes_once(void* to, const void* from, int bytes, Barrier* barrier) { copy_bytes(to, from, bytes, barrier); }

inline void show_writes() {}

inline void named_arrive(int number, int threads) {
  auto& barrier = emulation::block->named[number];
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.passed;
  ++emulation::block->progress;
}
inline void named_wait(int number, int threads) {
  auto& barrier = emulation::block->named[number];
  const uint64_t mine = barrier.passed;
  named_arrive(number, threads);
  while (barrier.passed == mine) emulation::yield();
}

template <int>
inline void fewer_registers() {}
template <int>
inline void more_registers() {}

inline uint64_t matrix_at(const void* first_row, int next = 16) {
  return 1ull << 62 | 64ull << 32 | uint64_t(next / 16) << 16 | (shared_address(first_row) & 0x3ffff) / 16;
}
inline uint64_t moved(uint64_t matrix, int bytes) { return matrix + bytes / 16; }

// The hardware permutes by bits of the address.
inline uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Element (row, column) of a matrix whose rows lie side by side, at most 64 columns of it.
template <class T>
inline float element(uint64_t matrix, int row, int column) {
  const uint32_t address = (matrix & 0x3fff) * 16 + row / 8 * uint32_t(matrix >> 32 & 0x3fff) * 16 + row % 8 * 128 + column * 2;
  return to_float(*reinterpret_cast<const T*>(emulation::shared_memory() + permuted(address)));
}

// c += a b, with a's element k of the lane's upper and lower row, and b's element (k, column).
template <int N, class A, class B>
inline void multiply(float (&c)[N][2][4], A&& a, B&& b) {
  const int lane = emulation::lane();
  for (int e = 0; e < 8 * N; ++e) {
    const int column = e / 4 * 8 + lane % 4 * 2 + e % 2;
    double sum = c[e / 8][e / 4 % 2][e % 4];
    for (int k = 0; k < 16; ++k) sum += double(a(e % 4 / 2, k)) * b(k, column);
    c[e / 8][e / 4 % 2][e % 4] = float(sum);
  }
}

template <class T, int N>
inline void begin_product(float (&c)[N][2][4], uint64_t a, uint64_t b, bool adds) {
  __syncwarp();
  emulation::fiber().products.back().push_back([&c, a, b, adds] {
    if (!adds) std::memset(c, 0, sizeof c);
    const int first_row = emulation::fiber().index.x % 128 / 32 * 16 + emulation::lane() / 4;
    float rows[2][16];
    for (int i = 0; i < 32; ++i) rows[i / 16][i % 16] = element<T>(a, first_row + i / 16 * 8, i % 16);
    multiply(c, [&](int lower, int k) { return rows[lower][k]; }, [&](int k, int column) { return element<T>(b, column, k); });
  });
}
template <class T, int N>
inline void begin_product(float (&c)[N][2][4], const uint32_t (&a)[4], uint64_t b) {
  struct Rows {
    float at[2][16];
  };
  const Rows rows = emulation::meet(~0u, {a[0], a[1], a[2], a[3], 0, 0}, [&](emulation::Warp& w) {
    Rows rows;
    for (int i = 0; i < 32; ++i) {
      const int k = i % 16;
      const uint64_t two = w.slots[emulation::lane() / 4 * 4 + k % 8 / 2][i / 16 + k / 8 * 2];
      rows.at[i / 16][k] = to_float(emulation::from_bits<T>(uint16_t(two >> 16 * (k % 2))));
    }
    return rows;
  });
  emulation::fiber().products.back().push_back([&c, rows, b] {
    multiply(c, [&](int lower, int k) { return rows.at[lower][k]; }, [&](int k, int column) {
      return element<T>(b + column / 64 * (b >> 16 & 0x3fff), k, column % 64);
    });
  });
}

inline void begin_products() {}
inline void end_of_products() { emulation::fiber().products.emplace_back(); }
template <int kPending>
inline void wait_for_products() {
  auto& groups = emulation::fiber().products;
  while (groups.size() > kPending + 1) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
  __syncwarp();
}
template <int N>
inline void pin(float (&)[N][2][4]) {}

}  // namespace dmc

// CUDA's execution model on a CPU, as far as the kernels in csrc/ use it, for testing them where there is no GPU.
//
// Every CUDA thread of a block is a fiber. Barriers, shuffles, votes and warp-wide instructions stop a fiber until all the
// lanes that take part have come: lanes that diverged or left make it an error, not a hang. Asynchronous copies arrive
// only when they are waited for, and shared memory starts as NaNs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using std::max, std::min;  // functions that CUDA has without a namespace

namespace emulation {

struct Copy {
  char* to;
  const void* from;
  bool exists;
};

struct Warp {
  uint64_t slots[32][6];  // what each lane brings to a collective
  uint32_t arrived = 0, left = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  bool done = false;
  std::vector<std::vector<Copy>> copies;  // groups, the last still open
  std::vector<std::vector<std::function<void()>>> products;
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t passed = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  uint3 index;
  dim3 grid, threads;
  int current = 0, at_barrier = 0;
  uint64_t barriers = 0, progress = 0;  // barriers passed; anything that let someone go on
  std::vector<std::function<void()>> boxes;  // on their way
  NamedBarrier named[16];
  ucontext_t scheduler;
};

constexpr uintptr_t kSharedAlignment = 1024;

inline Block* block;
inline const std::function<void()>* kernel;

inline Fiber& fiber() { return block->fibers[block->current]; }
inline int lane() { return block->current % 32; }
inline Warp& warp() { return block->warps[block->current / 32]; }
inline void yield() { swapcontext(&fiber().context, &block->scheduler); }

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulated kernel: " + what);
}

inline void barrier() {
  const uint64_t mine = block->barriers;
  int expected = 0;
  for (const Fiber& f : block->fibers) expected += !f.done;
  if (++block->at_barrier == expected) {
    block->at_barrier = 0;
    ++block->barriers;
    ++block->progress;
  }
  while (block->barriers == mine) yield();
}

// Meet the lanes of `mask`, see what each brought, and part together.
template <class See>
auto meet(uint32_t mask, const uint64_t (&brought)[6], See&& see) {
  Warp& w = warp();
  const uint32_t me = 1u << lane();
  if (!(mask & me)) fail("a lane takes part in a collective that its mask leaves out");
  while (w.left & me) yield();  // lanes of the last one are still looking
  std::memcpy(w.slots[lane()], brought, sizeof brought);
  w.arrived |= me;
  ++block->progress;
  while ((w.arrived & mask) != mask) yield();
  auto seen = see(w);
  w.left |= me;
  ++block->progress;
  if ((w.left & mask) == mask) {
    w.left &= ~mask;
    w.arrived &= ~mask;
  } else {
    while (w.left & me) yield();
  }
  return seen;
}

inline void run_fiber() {
  try {
    (*kernel)();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::abort();
  }
  fiber().done = true;
  ++block->progress;
  yield();
}

inline void launch(dim3 grid, dim3 threads, size_t shared, cudaStream_t, const std::function<void()>& body) {
  static bool backwards = false;  // every other time: blocks come in no order
  backwards = !backwards;
  kernel = &body;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned n = 0; n < blocks; ++n) {
    const unsigned b = backwards ? blocks - 1 - n : n;
    Block state;
    block = &state;
    state.grid = grid, state.threads = threads;
    state.index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    state.fibers.resize(threads.x);
    state.warps.resize((threads.x + 31) / 32);
    state.shared.assign(shared + kSharedAlignment, char(0xff));
    for (unsigned t = 0; t < threads.x; ++t) {
      Fiber& f = state.fibers[t];
      f.index = {t, 0, 0};
      f.copies.emplace_back();
      f.products.emplace_back();
      constexpr size_t kStack = 64 << 10;
      f.stack.reset(new char[kStack]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = &state.scheduler;
      makecontext(&f.context, run_fiber, 0);
    }
    for (bool alive = true; alive;) {
      const uint64_t before = state.progress;
      alive = false;
      for (unsigned t = 0; t < threads.x; ++t) {
        if (state.fibers[t].done) continue;
        alive = true;
        state.current = t;
        swapcontext(&state.scheduler, &state.fibers[t].context);
      }
      if (alive && state.progress == before) fail("threads wait for threads that never come");
    }
  }
}

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block->shared.data()) / kSharedAlignment + 1) * kSharedAlignment);
}

template <class T>
uint64_t bits(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t to = 0;
  std::memcpy(&to, &x, sizeof x);
  return to;
}
template <class T>
T from_bits(uint64_t x) {
  T to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

}  // namespace emulation

#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif
#define threadIdx (emulation::fiber().index)
#define blockIdx (emulation::block->index)
#define gridDim (emulation::block->grid)
#define blockDim (emulation::block->threads)

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp(uint32_t mask = ~0u) {
  emulation::meet(mask, {}, [](emulation::Warp&) { return 0; });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int step) {
  return emulation::meet(mask, {emulation::bits(x)}, [&](emulation::Warp& w) {
    return emulation::from_bits<T>(w.slots[emulation::lane() ^ step][0]);
  });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, int step) {
  const int from = emulation::lane() - step;
  return emulation::meet(mask, {emulation::bits(x)}, [&](emulation::Warp& w) {
    return from < 0 ? x : emulation::from_bits<T>(w.slots[from][0]);
  });
}
template <class T>
T __shfl_sync(uint32_t mask, T x, int from) {
  return emulation::meet(mask, {emulation::bits(x)}, [&](emulation::Warp& w) {
    return emulation::from_bits<T>(w.slots[from][0]);
  });
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t x) {
  return emulation::meet(mask, {x}, [&](emulation::Warp& w) {
    uint32_t highest = 0;
    for (int i = 0; i < 32; ++i)
      if (mask >> i & 1) highest = max(highest, uint32_t(w.slots[i][0]));
    return highest;
  });
}
inline int __any_sync(uint32_t mask, int vote) {
  return emulation::meet(mask, {uint64_t(vote != 0)}, [&](emulation::Warp& w) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= (mask >> i & 1) && w.slots[i][0];
    return any;
  });
}
inline int __all_sync(uint32_t mask, int vote) { return !__any_sync(mask, !vote); }
inline uint32_t __ballot_sync(uint32_t mask, int vote) {
  return emulation::meet(mask, {uint64_t(vote != 0)}, [&](emulation::Warp& w) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) votes |= uint32_t((mask >> i & 1) && w.slots[i][0]) << i;
    return votes;
  });
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t from) {
  uint32_t z = 0;
  for (int i = 0; i < 4; ++i) z |= uint32_t(((uint64_t(y) << 32 | x) >> 8 * (from >> 4 * i & 7)) & 0xff) << 8 * i;
  return z;
}
inline int __clz(uint32_t x) { return std::countl_zero(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
template <class T>
T atomicAdd(T* to, T x) {
  return (*to += x) - x;
}
inline void __threadfence() {}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t(a) * b >> 32; }
inline float __uint_as_float(uint32_t x) { return emulation::from_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return uint32_t(emulation::bits(x)); }

// The instructions that CUDA C++ has no name for. (tests/emulation/ has a twin of this file that runs on a CPU.)
#pragma once

#include "common.cuh"

namespace dmc {

// A pointer into shared memory, as these instructions take it.
__device__ inline uint32_t shared_address(const void* pointer) { return __cvta_generic_to_shared(pointer); }

// 2^x, to 2 units in the last place; 0 where that is below 2^-126.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, to 1 unit in the last place; 0 where that is below 2^-126.
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c (16x8) += a (16x16) b (16x8), by a warp.
__device__ inline void multiply_add(bf16, float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(half, float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers from shared memory; lane 8 i + j gives the address of row j of matrix i.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
  }
}

// An 8x8 matrix of 16-bit numbers, of which lane 4 r + c has columns 2 c and 2 c + 1 of row r, becomes its transpose.
__device__ inline uint32_t transposed(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Copy 16 bytes to shared memory, or zeros where they do not exist, without waiting for them.
__device__ inline void copy_16_bytes(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0));
}

// Copies since the last call form a group.
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;"); }

// What this thread has written is seen by those that see what it writes from now on, and the other way round.
__device__ inline void share_writes() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Until all but the last `kPending` groups of copies have arrived, for all threads.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncthreads();
}

// The same of this warp's own copies, for the warp alone.
template <int kPending>
__device__ inline void wait_for_own_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  __syncwarp();
}

}  // namespace dmc

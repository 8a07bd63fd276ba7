// Hopper's asynchronous instructions: copies of boxes that barriers count, and matrix products of four warps.
// (tests/emulation/ has a twin of this file that runs on a CPU.)
#pragma once

#include <cuda.h>

#include <type_traits>

#include "instructions.cuh"

namespace dmc {

// A matrix in global memory, of 16-bit numbers, whose boxes of 64 channels arrive in shared memory row after row. Rows that
// the matrix does not have arrive as zeros.
using BoxMap = CUtensorMap;

// For [rows, channels] at `matrix`, boxes of `box_rows` rows.
inline cudaError_t make_box_map(BoxMap* map, DType dtype, void* matrix, uint64_t rows, uint64_t channels, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode encode = nullptr;
  if (!encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result))
      return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode>(found);
  }
  const cuuint64_t sizes[] = {channels, rows}, strides[] = {2 * channels};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
  const auto type = dtype == DType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult done = encode(map, type, 2, matrix, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return done == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A barrier in shared memory: a phase ends when so many have arrived, and all bytes that they expect.
using Barrier = uint64_t;

__device__ inline void start_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Before anybody else, asynchronous copies among them, sees the barriers that this thread started.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; the first phase's is 0.
__device__ inline void wait_for(Barrier* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Begin to copy the box whose first element is (row, channel); its bytes count for `barrier`.
__device__ inline void copy_box(void* to, const BoxMap* map, int row, int channel, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(channel), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Begin to copy so many bytes, a multiple of 16.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// The same of what nothing else will read soon: it is the first to leave the L2 cache.
__device__ inline void copy_bytes_once(void* to, const void* from, int bytes, Barrier* barrier) {
  constexpr uint64_t kEvictFirst = 0x12f0000000000000;  // as createpolicy.fractional.L2::evict_first makes it
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(kEvictFirst)
               : "memory");
}

// What this thread wrote to shared memory becomes visible to asynchronous copies and products.
__device__ inline void show_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers of the block, by number (0 is __syncthreads), for so many threads.
__device__ inline void named_wait(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
__device__ inline void named_arrive(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

// Registers of this warp and of the three beside it.
template <int kRegisters>
__device__ inline void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters>
__device__ inline void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

// Where a matrix lies in shared memory: rows of 64 channels, their eight pieces of 16 bytes permuted by the row's number
// modulo 8, from an address that 1024 divides. `next` is how many bytes behind a row's 64
// channels its next 64 lie; only products that take the matrix as it is need it.
__device__ inline uint64_t matrix_at(const void* first_row, int next = 16) {
  constexpr uint64_t kPermuted128 = 1ull << 62, kEightRows = 1024 / 16;
  return kPermuted128 | kEightRows << 32 | uint64_t(next / 16) << 16 | (shared_address(first_row) & 0x3ffff) / 16;
}
// The same some bytes further.
__device__ inline uint64_t moved(uint64_t matrix, int bytes) { return matrix + bytes / 16; }

// clang-format off
#define DMC_ACCUMULATORS_8(i) "+f"(c[(i) / 8][0][0]), "+f"(c[(i) / 8][0][1]), "+f"(c[(i) / 8][0][2]), "+f"(c[(i) / 8][0][3]), \
                              "+f"(c[(i) / 8][1][0]), "+f"(c[(i) / 8][1][1]), "+f"(c[(i) / 8][1][2]), "+f"(c[(i) / 8][1][3])
#define DMC_ACCUMULATORS_32(i) DMC_ACCUMULATORS_8(i), DMC_ACCUMULATORS_8((i) + 8), DMC_ACCUMULATORS_8((i) + 16), DMC_ACCUMULATORS_8((i) + 24)
#define DMC_ACCUMULATORS_64 DMC_ACCUMULATORS_32(0), DMC_ACCUMULATORS_32(32)
#define DMC_ACCUMULATORS_128 DMC_ACCUMULATORS_64, DMC_ACCUMULATORS_32(64), DMC_ACCUMULATORS_32(96)
#define DMC_NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define DMC_NAMES_64 DMC_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define DMC_NAMES_128 DMC_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define DMC_PRODUCT(N, NAMES, ACCUMULATORS, OPERANDS, ADDS, TRANSPOSED, ...)                                      \
  if constexpr (std::is_same_v<T, bf16>)                                                                         \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" N      \
                 "k16.f32.bf16.bf16 {" NAMES "}, " OPERANDS ", adds, 1, 1, " TRANSPOSED ";\n}" : ACCUMULATORS : __VA_ARGS__); \
  else                                                                                                           \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" N      \
                 "k16.f32.f16.f16 {" NAMES "}, " OPERANDS ", adds, 1, 1, " TRANSPOSED ";\n}" : ACCUMULATORS : __VA_ARGS__)
#define DMC_IN_MEMORY "l"(a), "l"(b), "r"(int(adds))
#define DMC_IN_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)

// Begin c (64 x 16 N) = a (64 x 16) b (16 x 16 N), or add it to c, by four warps; every warp has 16 rows of c, as tiles
// of 16 columns like those of multiply_add_tiles. b's rows are the product's columns. Nothing of it may be touched until
// it has been waited for.
template <class T, int N>
__device__ inline void begin_product(float (&c)[N][2][4], uint64_t a, uint64_t b, bool adds) {
  static_assert(N == 4 || N == 8);
  if constexpr (N == 4) { DMC_PRODUCT("64", DMC_NAMES_32, DMC_ACCUMULATORS_32(0), "%32, %33", "%34", "0, 0", DMC_IN_MEMORY); }
  else { DMC_PRODUCT("128", DMC_NAMES_64, DMC_ACCUMULATORS_64, "%64, %65", "%66", "0, 0", DMC_IN_MEMORY); }
}
// The same, adding, of a left operand that each warp holds as for multiply_add, and a right one as it is.
template <class T, int N>
__device__ inline void begin_product(float (&c)[N][2][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 4 || N == 8 || N == 16);
  if constexpr (N == 4) { DMC_PRODUCT("64", DMC_NAMES_32, DMC_ACCUMULATORS_32(0), "{%32,%33,%34,%35}, %36", "1", "1", DMC_IN_REGISTERS); }
  else if constexpr (N == 8) { DMC_PRODUCT("128", DMC_NAMES_64, DMC_ACCUMULATORS_64, "{%64,%65,%66,%67}, %68", "1", "1", DMC_IN_REGISTERS); }
  else { DMC_PRODUCT("256", DMC_NAMES_128, DMC_ACCUMULATORS_128, "{%128,%129,%130,%131}, %132", "1", "1", DMC_IN_REGISTERS); }
}
#undef DMC_PRODUCT
// clang-format on

// Before the first product of a group: registers that were written are seen by it.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_of_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all but the last `kPending` groups of products are done.
template <int kPending>
__device__ inline void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// The compiler shall not move reads and writes of these registers over this point.
template <int N>
__device__ inline void pin(float (&c)[N][2][4]) {
#pragma unroll
  for (int i = 0; i < 8 * N; ++i) asm volatile("" : "+f"(c[i / 8][i / 4 % 2][i % 4])::"memory");
}

}  // namespace dmc

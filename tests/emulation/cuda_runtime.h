// The device's side of CUDA, as far as the kernels use it, and the launch of a kernel. See cuda_runtime_api.h.

#ifndef DEPLOYNORM_EMULATION_CUDA_RUNTIME_H_
#define DEPLOYNORM_EMULATION_CUDA_RUNTIME_H_

#include <link.h>
#include <math.h>

#include "cuda_runtime_api.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other, so that one copy serves them all. Being thread-local it all lies in one place, which
// is filled with NaN before each block: what a block has not written holds nothing.
#define __shared__ static thread_local

struct uint4 {
  uint32_t x, y, z, w;
} __align__(16);

inline void __stwb(uint4* to, uint4 value) { *to = value; }

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

inline thread_local char any_of_shared_memory = 0;

// Fills the thread-local memory of the library that this is compiled into.
inline void forget_shared_memory() {
  *static_cast<volatile char*>(&any_of_shared_memory) = 0;  // a library has none before something touches it
  const auto visit = [](dl_phdr_info* info, size_t, void* data) {
    char* const start = static_cast<char*>(info->dlpi_tls_data);
    for (int i = 0; start != nullptr && i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const char* const any = static_cast<char*>(data);
      if (header.p_type != PT_TLS || any < start || any >= start + header.p_memsz) continue;
      memset(start, 0xff, header.p_memsz);
      return 1;
    }
    return 0;
  };
  if (dl_iterate_phdr(visit, &any_of_shared_memory) != 1) fail("the shared memory is not found");
}

}  // namespace emulation

inline dim3 blockIdx, blockDim, gridDim;
struct ThreadIndex {
  struct {
    operator unsigned() const { return emulation::this_thread(); }
  } x;
};
inline ThreadIndex threadIdx;

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp() { emulation::wait_for_warp(); }

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::exchange(mask, value, emulation::this_thread() ^ static_cast<unsigned>(distance));
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <typename... Expected, typename... Actual>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                                      Actual&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  int max_grid = 0;
  cudaDeviceGetAttribute(&max_grid, cudaDevAttrMaxGridDimX, 0);
  const bool one_axis = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!one_axis || grid.x == 0 || grid.x > static_cast<unsigned>(max_grid) || block.x == 0 || block.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  ::gridDim = grid;
  ::blockDim = block;
  for (unsigned index = 0; index < grid.x; ++index) {
    blockIdx = dim3(index, 0, 0);
    emulation::forget_shared_memory();
    emulation::run_block(block.x, [&] { kernel(static_cast<Expected>(arguments)...); });
  }
  return cudaSuccess;
}

#endif  // DEPLOYNORM_EMULATION_CUDA_RUNTIME_H_

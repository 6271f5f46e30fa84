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
// That of the block that runs. Being thread-local it all lies in one place, which is filled with NaN before each block:
// what a block has not written holds nothing.
#define __shared__ thread_local

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

// Shared memory whose size the launch says, by the name that the kernels have for it.
constexpr size_t kMostOfDynamicShared = 227 * 1024;
inline thread_local uint4 dynamic_shared[kMostOfDynamicShared / sizeof(uint4)];

namespace emulation {

// The thread-local memory of the library that this is compiled into, once for each block of a cluster.
class SharedMemory {
 public:
  // For so many blocks, of which the first runs.
  void fill(unsigned blocks) {
    find();
    memset(start_, 0xff, size_);
    running_ = 0;
    blocks_ = blocks;
    for (unsigned block = 0; blocks > 1 && block < blocks; ++block) {
      if (kept_[block] == nullptr) kept_[block] = new char[size_];
      memset(kept_[block], 0xff, size_);
    }
  }

  void enter(unsigned block) {
    memcpy(kept_[running_], start_, size_);
    memcpy(start_, kept_[block], size_);
    running_ = block;
  }

  // Where another block of the cluster has what this one has at an address.
  char* of_block(char* address, int rank) {
    const unsigned block = static_cast<unsigned>(rank);
    if (address < start_ || address >= start_ + size_) fail("an address that is not in shared memory");
    if (block >= blocks_ || !is_there(block)) fail("the shared memory of a block that does not run");
    return block == running_ ? address : kept_[block] + (address - start_);
  }

  // After a launch with so many bytes of dynamic shared memory.
  void check_bounds(unsigned blocks, size_t bytes) {
    for (unsigned block = 0; block < blocks; ++block) {
      if (block != running_) enter(block);
      const char* const all = reinterpret_cast<const char*>(dynamic_shared);
      for (size_t at = bytes; at < sizeof dynamic_shared; ++at) {
        if (all[at] != static_cast<char>(0xff)) fail("a block has written beyond its dynamic shared memory");
      }
    }
  }

 private:
  void find() {
    *reinterpret_cast<volatile char*>(dynamic_shared) = 0;  // a library has none before something touches it
    start_ = nullptr;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          char* const start = static_cast<char*>(info->dlpi_tls_data);
          for (int i = 0; start != nullptr && i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            const char* const any = reinterpret_cast<const char*>(dynamic_shared);
            if (header.p_type != PT_TLS || any < start || any >= start + header.p_memsz) continue;
            static_cast<SharedMemory*>(data)->start_ = start;
            static_cast<SharedMemory*>(data)->size_ = header.p_memsz;
            return 1;
          }
          return 0;
        },
        this);
    if (start_ == nullptr) fail("the shared memory is not found");
  }

  char* start_;
  size_t size_;
  unsigned running_, blocks_;
  char* kept_[kMaxCluster] = {};
};

inline SharedMemory& shared_memory() {
  static SharedMemory all;
  return all;
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

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  const cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulation {

constexpr size_t kStaticShared = 16 * 1024;  // of any kernel

// Of each kernel, bytes of dynamic shared memory that it may be launched with.
inline size_t& most_dynamic_bytes(const void* kernel) {
  static struct {
    const void* kernel;
    size_t bytes;
  } all[64];
  for (auto& each : all) {
    if (each.kernel == nullptr) each = {kernel, 48 * 1024 - kStaticShared};
    if (each.kernel == kernel) return each.bytes;
  }
  fail("more kernels than are emulated");
}

inline size_t shared_bytes() {
  int bytes = 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  return static_cast<size_t>(bytes);
}

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs == 0 ? 1 : config.attrs[0].val.clusterDim.x;
}

}  // namespace emulation

template <typename Kernel>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->sharedSizeBytes = emulation::kStaticShared;
  attributes->ptxVersion = emulation::of_device("EMULATED_PTX", 90);
  return cudaSuccess;
}

template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes + emulation::kStaticShared > emulation::shared_bytes()) return cudaErrorInvalidValue;
  emulation::most_dynamic_bytes(reinterpret_cast<const void*>(kernel)) = static_cast<size_t>(bytes);
  return cudaSuccess;
}

template <typename Kernel>
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t* config) {
  *clusters = emulation::cluster_of(*config) <= static_cast<unsigned>(emulation::most_of_a_cluster());
  return cudaSuccess;
}

template <typename... Expected, typename... Actual>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                                      Actual&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned cluster = emulation::cluster_of(*config);
  int max_grid = 0, clusters = 0;
  cudaDeviceGetAttribute(&max_grid, cudaDevAttrMaxGridDimX, 0);
  cudaOccupancyMaxActiveClusters(&clusters, kernel, config);
  const bool one_axis = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!one_axis || grid.x == 0 || grid.x > static_cast<unsigned>(max_grid) || block.x == 0 || block.x > 1024 ||
      cluster == 0 || cluster > emulation::kMaxCluster || grid.x % cluster != 0 || (cluster > 1 && clusters == 0)) {
    return cudaErrorInvalidConfiguration;
  }
  const size_t dynamic_bytes = config->dynamicSmemBytes;
  if (dynamic_bytes > 0 && dynamic_bytes > emulation::most_dynamic_bytes(reinterpret_cast<const void*>(kernel))) {
    return cudaErrorInvalidValue;
  }
  ::gridDim = grid;
  ::blockDim = block;
  emulation::SharedMemory& shared = emulation::shared_memory();
  for (unsigned first = 0; first < grid.x; first += cluster) {
    blockIdx = dim3(first, 0, 0);
    shared.fill(cluster);
    emulation::run_cluster(
        cluster, block.x, [&] { kernel(static_cast<Expected>(arguments)...); },
        [&](unsigned entered) {
          shared.enter(entered);
          blockIdx = dim3(first + entered, 0, 0);
        });
    if (dynamic_bytes > 0) shared.check_bounds(cluster, dynamic_bytes);
  }
  return cudaSuccess;
}

#endif  // DEPLOYNORM_EMULATION_CUDA_RUNTIME_H_

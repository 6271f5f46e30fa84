// The host's side of CUDA, as far as the kernels and the TensorRT plugin use it, on a machine without CUDA.
//
// With this folder on the include path, plugins/kernels/*.cu and plugins/tensorrt/*.cpp compile unchanged as C++20 for
// the CPU: device memory is plain memory, a stream does its work at once, and a kernel runs block after block, or
// cluster of blocks after cluster, the threads taking turns at each barrier (fibers.h).

#ifndef DEPLOYNORM_EMULATION_CUDA_RUNTIME_API_H_
#define DEPLOYNORM_EMULATION_CUDA_RUNTIME_API_H_

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxGridDimX = 5,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
  }
  return "unknown";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // none is kept
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Of an emulated device a test may say how many multiprocessors it has, how large a grid may be, how many blocks a
// cluster may have (0: the device has no clusters), how many bytes of shared memory a block may have, and for which
// devices the kernels' code was made. So the paths for devices and tensors of all sizes are taken with small ones.
namespace emulation {

inline int of_device(const char* name, int otherwise) {
  const char* const set = getenv(name);
  return set != nullptr ? atoi(set) : otherwise;
}

inline int most_of_a_cluster() { return of_device("EMULATED_CLUSTER", 8); }

}  // namespace emulation

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrMaxGridDimX:
      *value = emulation::of_device("EMULATED_MAX_GRID", 0x7fffffff);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::of_device("EMULATED_MULTIPROCESSORS", 8);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::of_device("EMULATED_SHARED", 227 * 1024);
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = emulation::most_of_a_cluster() > 0;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  // cudaMalloc aligns to 256 bytes, and its memory holds anything.
  const size_t rounded = (bytes + 255) / 256 * 256;
  *memory = aligned_alloc(256, rounded == 0 ? 256 : rounded);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  memset(*memory, 0xff, rounded);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (bytes != 0) memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

#endif  // DEPLOYNORM_EMULATION_CUDA_RUNTIME_API_H_

// The host's side of CUDA, as far as the kernels and the TensorRT plugin use it, on a machine without CUDA.
//
// With this folder on the include path, plugins/kernels/*.cu and plugins/tensorrt/*.cpp compile unchanged as C++20 for
// the CPU: device memory is plain memory, a stream does its work at once, and a kernel runs block after block, its
// threads taking turns at each barrier (fibers.h).

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

enum cudaDeviceAttr { cudaDevAttrMaxGridDimX = 5, cudaDevAttrMultiProcessorCount = 16 };

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
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

// Of an emulated device a test may say how many multiprocessors it has and how large a grid may be, so that the paths
// for devices and tensors of all sizes are taken with small ones.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  const bool grid = attribute == cudaDevAttrMaxGridDimX;
  const char* set = getenv(grid ? "EMULATED_MAX_GRID" : "EMULATED_MULTIPROCESSORS");
  *value = set != nullptr ? atoi(set) : grid ? 0x7fffffff : 8;
  return cudaSuccess;
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

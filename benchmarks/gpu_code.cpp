// A CUDA runtime that only notes what is launched, for gpu_code.py: linked with the kernels as nvcc compiles them, it
// tells which of them a device of the H100's size would run, on a machine that has none.

#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

std::string& launches() {
  static std::string all;
  return all;
}

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

}  // namespace

extern "C" {

// Since the last call: the kernel's mangled name, threads of a block, blocks of a cluster and bytes of dynamic shared
// memory, a line each.
const char* take_launches() {
  static std::string taken;
  taken = launches();
  launches().clear();
  return taken.c_str();
}

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
  names()[host] = device;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
unsigned __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return 1; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 132
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 * 1024
           : attribute == cudaDevAttrClusterLaunch                ? 1
                                                                  : 0x7fffffff;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->sharedSizeBytes = 15 * 1024;  // at least what ptxas says of every kernel in clusters
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  launches() += names()[kernel] + " " + std::to_string(config->blockDim.x) + " " + std::to_string(cluster) + " " +
                std::to_string(config->dynamicSmemBytes) + "\n";
  return cudaSuccess;
}
}

// Runs every variant of the CUDA kernel in every layout and type on sizes around its turns, and stops at the first
// error of CUDA. What it computes is checked elsewhere: this is for compute-sanitizer to look at, and it also compiles
// for the emulation.

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "frn.h"

namespace {

void check(int error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorName(static_cast<cudaError_t>(error)));
  exit(1);
}

void* device_bytes(size_t bytes, int value) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes == 0 ? 1 : bytes), "cudaMalloc");
  check(cudaMemset(memory, value, bytes), "cudaMemset");
  return memory;
}

int runs = 0;

void run(int64_t samples, int64_t channels, int64_t spatial, int64_t lanes, int type, const char* variant) {
  const size_t sizes[] = {4, 8, 2, 2};
  const size_t elements = static_cast<size_t>(samples * spatial * (lanes == 1 ? channels : lanes));
  const size_t parameter = static_cast<size_t>(channels) * (type == DEPLOYNORM_FLOAT64 ? 8 : 4);
  deploynorm_frn call = {};
  call.samples = samples;
  call.channels = channels;
  call.spatial = spatial;
  call.lanes = lanes;
  call.type = type;
  void* const x = device_bytes(elements * sizes[type], 0x3c);  // small positive numbers in every type
  void* const y = device_bytes(elements * sizes[type], 0xff);
  void* parameters[4];
  for (void*& each : parameters) each = device_bytes(parameter, 0x3c);
  call.x = x;
  call.y = y;
  call.gamma = parameters[0];
  call.beta = parameters[1];
  call.tau = parameters[2];
  call.eps = parameters[3];
  const size_t bytes = deploynorm_frn_cuda_workspace(&call);
  void* const workspace = bytes == 0 ? nullptr : device_bytes(bytes, 0xff);
  const int error = deploynorm_frn_cuda(&call, workspace, nullptr, variant);
  if (error != cudaErrorInvalidValue) {
    check(error, variant);
    check(cudaDeviceSynchronize(), variant);
    ++runs;
  }
  for (void* each : {x, y, parameters[0], parameters[1], parameters[2], parameters[3], workspace}) {
    check(cudaFree(each), "cudaFree");
  }
}

}  // namespace

int main() {
  for (const char* const* variant = deploynorm_cuda_variants(); *variant != nullptr; ++variant) {
    for (int type = 0; type < 4; ++type) {
      for (const int64_t spatial : {1, 7, 49, 196, 785, 2049, 5000}) {
        run(2, 5, spatial, 1, type, *variant);
        run(2, 5, spatial, 5, type, *variant);
        run(2, 5, spatial, 8, type, *variant);
        run(1, 64, spatial, 64, type, *variant);
      }
    }
    run(1, 2, 40000, 1, DEPLOYNORM_FLOAT16, *variant);
  }
  printf("%d runs\n", runs);
  return runs > 200 ? 0 : 1;
}

// Runs every variant of the CUDA kernels, forward, with a residual and backward, in every layout and type on sizes
// around their turns, and stops at the first error of CUDA. What it computes is checked elsewhere: this is for
// compute-sanitizer to look at, and it also compiles for the emulation.

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

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

int runs = 0, backward_runs = 0;

// Whether the variant takes these sizes.
bool finish(int error, const char* variant) {
  if (error == cudaErrorInvalidValue) return false;
  check(error, variant);
  check(cudaDeviceSynchronize(), variant);
  return true;
}

void run(int64_t samples, int64_t channels, int64_t spatial, int64_t block, int type, const char* variant) {
  const size_t sizes[] = {4, 8, 2, 2};
  const size_t elements = static_cast<size_t>(samples * spatial * (block == 1 ? channels : block)) * sizes[type];
  const size_t parameter = static_cast<size_t>(channels) * (type == DEPLOYNORM_FLOAT64 ? 8 : 4);
  void *given[6], *written[6];
  for (void*& each : given) each = device_bytes(&each < given + 2 ? elements : parameter, 0x3c);  // small and positive
  for (void*& each : written) each = device_bytes(&each < written + 2 ? elements : parameter, 0xff);
  void* const rstd = device_bytes(static_cast<size_t>(samples) * parameter, 0xff);

  deploynorm_frn call = {samples, channels, spatial,  block,    type,     given[0], written[0],
                         nullptr, given[2], given[3], given[4], given[5], rstd};
  const size_t bytes = deploynorm_frn_cuda_workspace(&call);
  void* const workspace = bytes == 0 ? nullptr : device_bytes(bytes, 0xff);
  bool taken = false;
  for (const void* residual : {given[1], static_cast<void*>(nullptr)}) {
    call.residual = residual;
    taken = finish(deploynorm_frn_cuda(&call, workspace, nullptr, variant), variant);
    runs += taken;
  }
  if (!taken) finish(deploynorm_frn_cuda(&call, workspace, nullptr, nullptr), "forward");  // rstd is wanted below

  const deploynorm_frn_backward back = {samples,    channels,   spatial,    block,     type,     given[1],
                                        given[0],   rstd,       given[2],   given[3],  given[4], written[1],
                                        written[2], written[3], written[4], written[5]};
  void* const sums = device_bytes(deploynorm_frn_backward_cuda_workspace(&back), 0xff);
  backward_runs += finish(deploynorm_frn_backward_cuda(&back, sums, nullptr, variant), variant);

  for (void* each : given) check(cudaFree(each), "cudaFree");
  for (void* each : written) check(cudaFree(each), "cudaFree");
  for (void* each : {rstd, workspace, sums}) check(cudaFree(each), "cudaFree");
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
  printf("%d runs forward, %d backward\n", runs, backward_runs);
  return runs > 400 && backward_runs > 150 ? 0 : 1;
}

// PyTorch's threads for the kernels.

#ifndef DEPLOYNORM_TORCH_OPENMP_H_
#define DEPLOYNORM_TORCH_OPENMP_H_

#include "../kernels/frn.h"

#ifdef __cplusplus
extern "C" {
#endif

// What deploynorm_openmp_parallel_for gets as its host.
struct deploynorm_openmp {
  // GOMP_parallel of the OpenMP library that PyTorch itself has loaded, so that both share one pool of threads. It has
  // the same name and arguments in GNU's, LLVM's and Intel's.
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int32_t threads;
};

// A deploynorm_parallel_for.
DEPLOYNORM_API void deploynorm_openmp_parallel_for(void* host, int64_t count, deploynorm_task task, void* data);

#ifdef __cplusplus
}
#endif

#endif  // DEPLOYNORM_TORCH_OPENMP_H_

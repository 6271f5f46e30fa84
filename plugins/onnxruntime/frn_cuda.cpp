#include "frn_cuda.h"

#include <stdio.h>

#include "../contract.h"

namespace deploynorm {

using namespace ort;

#if defined(DEPLOYNORM_CUDA)

OrtStatus* run_on_cuda(const OrtApi* api, OrtKernelContext* context, OrtAllocator* allocator,
                       const deploynorm_frn& call) {
  void* stream = nullptr;
  if (OrtStatus* status = KernelContext_GetGPUComputeStream(api)(context, &stream)) return status;
  void* workspace = nullptr;
  if (const size_t bytes = deploynorm_frn_cuda_workspace(&call)) {
    const OrtMemoryInfo* info = nullptr;
    if (OrtStatus* status = AllocatorGetInfo(api)(allocator, &info)) return status;
    if (OrtStatus* status = KernelContext_GetScratchBuffer(api)(context, info, bytes, &workspace)) return status;
  }
  const int error = deploynorm_frn_cuda(&call, workspace, stream, /*variant=*/nullptr);
  // The allocator knows the stream that the memory was taken for, and gives it to another only behind this work.
  OrtStatus* status = workspace == nullptr ? nullptr : AllocatorFree(api)(allocator, workspace);
  if (error == 0 || status != nullptr) return status;
  char message[160];
  snprintf(message, sizeof message, "%s: CUDA error %d at the launch. Fix: run deploynorm doctor", kOpType, error);
  return CreateStatus(api)(kFail, message);
}

#else

OrtStatus* run_on_cuda(const OrtApi* api, OrtKernelContext*, OrtAllocator*, const deploynorm_frn&) {
  return CreateStatus(api)(kFail, "this library was built without CUDA");
}

#endif

}  // namespace deploynorm

// The operator's work on ONNX Runtime's CUDA provider.

#ifndef DEPLOYNORM_ONNXRUNTIME_FRN_CUDA_H_
#define DEPLOYNORM_ONNXRUNTIME_FRN_CUDA_H_

#include "../kernels/frn.h"
#include "ort_abi.h"

namespace deploynorm {

// Enqueues the call on the session's stream, with scratch memory of the session where the kernel asks for some.
OrtStatus* run_on_cuda(const OrtApi* api, OrtKernelContext* context, OrtAllocator* allocator,
                       const deploynorm_frn& call);

}  // namespace deploynorm

#endif  // DEPLOYNORM_ONNXRUNTIME_FRN_CUDA_H_

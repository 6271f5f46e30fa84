// Filter response normalization with a thresholded linear unit, for any host: the kernels' whole interface.
//
//     y = max(gamma * x / sqrt(mean(x^2 over the spatial positions) + eps) + beta [+ residual], tau)
//
// No header of a framework may be included here or in any file of this folder.
// Source: Singh & Krishnan, arXiv:1911.09737, eq. 1 to 3; the contract is deploynorm/contract.py.

#ifndef DEPLOYNORM_KERNELS_FRN_H_
#define DEPLOYNORM_KERNELS_FRN_H_

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define DEPLOYNORM_API __declspec(dllexport)
#else
#define DEPLOYNORM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Of x, residual and y. The parameters and all arithmetic are float32, or float64 where these are.
enum deploynorm_type {
  DEPLOYNORM_FLOAT32 = 0,
  DEPLOYNORM_FLOAT64 = 1,
  DEPLOYNORM_FLOAT16 = 2,
  DEPLOYNORM_BFLOAT16 = 3,
};

// One call. The tensors are dense, in the order (samples, channels / channel_block, spatial, channel_block), so that a
// channel_block of 1 is NCHW, of `channels` NHWC, and of 8 or 16 ONNX Runtime's blocked NCHWc.
// A size may be 0. The caller has checked shapes and types, and that every eps is positive.
// The CUDA kernels take no blocked layouts, but a channel_block above `channels`: NHWC whose rows are padded to as many
// elements, as TensorRT's kHWC8 is. The padding of x is ignored, and that of y becomes zero.
struct deploynorm_frn {
  int64_t samples;
  int64_t channels;  // a multiple of channel_block
  int64_t spatial;   // product of the spatial sizes; 1 for (N, C)
  int64_t channel_block;
  int32_t type;          // deploynorm_type
  const void* x;         // samples * channels * spatial elements
  void* y;               // the same; may be x or residual itself
  const void* residual;  // the same, added before the threshold; null for none
  const void* gamma;     // channels elements, as are the next three
  const void* beta;
  const void* tau;  // minus infinity for no threshold
  const void* eps;  // effective, greater than 0
  void* rstd;       // samples * channels: 1 / sqrt(mean(x^2) + eps), for the backward pass; null for none. Not written
                    // where spatial is 0, and not read there by the backward pass
};

// The gradients of a call without a residual. At a tie y == tau the gradient goes to y. With g = dy where y >= tau (or
// y is NaN) and 0 elsewhere, and sums over the spatial positions:
//
//     dx = gamma * rstd * g - x * gamma * rstd^3 * mean(g * x)
//     dgamma = sum(rstd * sum(g * x))   deps = sum(-gamma * rstd^3 * sum(g * x) / 2)   over the samples
//     dbeta = sum(sum(g))               dtau = sum(sum(dy - g))
//
// Sizes, type and layout as above. Source: arXiv:1911.09737, eq. 4 to 7; eq. 7 lacks a factor 1 / spatial.
struct deploynorm_frn_backward {
  int64_t samples;
  int64_t channels;
  int64_t spatial;
  int64_t channel_block;
  int32_t type;
  const void* dy;  // samples * channels * spatial elements
  const void* x;
  const void* rstd;   // as the forward pass gave it
  const void* gamma;  // channels elements, as are the next two
  const void* beta;
  const void* tau;
  void* dx;      // like x; may be dy itself
  void* dgamma;  // channels elements, as are the next three; in the type of the parameters
  void* dbeta;
  void* dtau;
  void* deps;
};

// The host's threads: runs task(data, 0) to task(data, count - 1), in any order and at once, and returns when all
// are done. Null runs them one after the other.
typedef void (*deploynorm_task)(void* data, int64_t index);
typedef void (*deploynorm_parallel_for)(void* host, int64_t count, deploynorm_task task, void* data);

// Names of the variants that this processor runs, the best first; null after the last.
DEPLOYNORM_API const char* const* deploynorm_cpu_variants(void);

// Computes y. Allocates nothing and never fails. The result does not depend on the number of threads.
//   variant: one of deploynorm_cpu_variants(), or null for the best.
// Returns 0; 1 for a type or variant that is not there, with y untouched.
DEPLOYNORM_API int deploynorm_frn_cpu(const struct deploynorm_frn* call, deploynorm_parallel_for parallel_for,
                                      void* host, const char* variant);

// Bytes of scratch memory, aligned to 8, that the backward pass requires; its pointer must not be null.
DEPLOYNORM_API size_t deploynorm_frn_backward_cpu_workspace(const struct deploynorm_frn_backward* call);

// Computes dx and the gradients of the parameters, as above.
DEPLOYNORM_API int deploynorm_frn_backward_cpu(const struct deploynorm_frn_backward* call, void* workspace,
                                               deploynorm_parallel_for parallel_for, void* host, const char* variant);

// ---- On a device. Only a library that was built with CUDA has these functions.

// Bytes of scratch memory, aligned to 16, with which few large planes are shared out over the whole device. It never
// shrinks as a size grows, so what serves the largest shapes serves all. 0 where no shape up to these needs any.
DEPLOYNORM_API size_t deploynorm_frn_cuda_workspace(const struct deploynorm_frn* call);

// Names of the variants of the CUDA kernels of both passes, which frn.cu describes; null after the last. Not every one
// takes every size.
DEPLOYNORM_API const char* const* deploynorm_cuda_variants(void);

// Enqueues the computation of y on a stream (a cudaStream_t) of the current device. All pointers are the device's.
// Allocates nothing and waits for nothing, so that a CUDA graph can capture it.
//   workspace: deploynorm_frn_cuda_workspace(call) bytes that nothing else uses until the stream has passed this
//     point; null is always allowed, and slower where there would be a use for it.
//   variant: one of deploynorm_cuda_variants(), or null for what suits the sizes and the device.
// Returns a cudaError_t: 0 for success; cudaErrorInvalidValue for a type, layout or variant that is not there or does
// not take these sizes, with nothing enqueued; else what CUDA says of the launch.
DEPLOYNORM_API int deploynorm_frn_cuda(const struct deploynorm_frn* call, void* workspace, void* stream,
                                       const char* variant);

// Bytes of scratch memory, aligned to 16, that the backward pass requires; its pointer must not be null.
DEPLOYNORM_API size_t deploynorm_frn_backward_cuda_workspace(const struct deploynorm_frn_backward* call);

// Enqueues the backward pass, as above. Deterministic: the sums over samples are taken in a fixed order.
//   variant: as for the forward pass.
DEPLOYNORM_API int deploynorm_frn_backward_cuda(const struct deploynorm_frn_backward* call, void* workspace,
                                                void* stream, const char* variant);

#ifdef __cplusplus
}
#endif

#endif  // DEPLOYNORM_KERNELS_FRN_H_

// The part of ONNX Runtime's C interface that the operator library uses.
//
// OrtApi is a table of function pointers that is only ever added to at its end, and OrtCustomOp a struct likewise, so
// a slot means the same in every release. Writing down the few that we call keeps the build free of a header that no
// Python package brings. tests/plugins/ort_abi_check.cpp holds this file against a real onnxruntime_c_api.h.
// The C++ header of ONNX Runtime is no choice: its inline wrappers call slots that older runtimes lack.

#ifndef DEPLOYNORM_ONNXRUNTIME_ORT_ABI_H_
#define DEPLOYNORM_ONNXRUNTIME_ORT_ABI_H_

#include <stddef.h>
#include <stdint.h>

struct OrtAllocator;
struct OrtApi;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtMemoryInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

namespace deploynorm {
namespace ort {

// The first interface in which an operator may write over its input: that of ONNX Runtime 1.18.
constexpr uint32_t kApiVersion = 18;
constexpr const char* kOldestRuntime = "1.18";

// OrtErrorCode
constexpr int kFail = 1;
constexpr int kInvalidArgument = 2;

// ONNXTensorElementDataType
constexpr int kFloat = 1;
constexpr int kFloat16 = 10;
constexpr int kDouble = 11;
constexpr int kBFloat16 = 16;

// OrtCustomOpInputOutputCharacteristic
constexpr int kRequired = 0;
constexpr int kOptional = 1;

// OrtMemType: memory of the provider's device
constexpr int kDeviceMemory = 0;

struct ApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null for a version that the runtime does not have
  const char* (*GetVersionString)();
};

struct CustomOp;

// DEPLOYNORM_ORT_MEMBERS(X): X(name in OrtCustomOp, return type, parameters) for each of its functions, in its order.
#define DEPLOYNORM_ORT_MEMBERS(X)                                                               \
  X(CreateKernel, void*, (const CustomOp*, const OrtApi*, const OrtKernelInfo*))                \
  X(GetName, const char*, (const CustomOp*))                                                    \
  X(GetExecutionProviderType, const char*, (const CustomOp*))                                   \
  X(GetInputType, int, (const CustomOp*, size_t))                                               \
  X(GetInputTypeCount, size_t, (const CustomOp*))                                               \
  X(GetOutputType, int, (const CustomOp*, size_t))                                              \
  X(GetOutputTypeCount, size_t, (const CustomOp*))                                              \
  X(KernelCompute, void, (void*, OrtKernelContext*))                                            \
  X(KernelDestroy, void, (void*))                                                               \
  X(GetInputCharacteristic, int, (const CustomOp*, size_t))                                     \
  X(GetOutputCharacteristic, int, (const CustomOp*, size_t))                                    \
  X(GetInputMemoryType, int, (const CustomOp*, size_t))                                         \
  X(GetVariadicInputMinArity, int, (const CustomOp*))                                           \
  X(GetVariadicInputHomogeneity, int, (const CustomOp*))                                        \
  X(GetVariadicOutputMinArity, int, (const CustomOp*))                                          \
  X(GetVariadicOutputHomogeneity, int, (const CustomOp*))                                       \
  X(CreateKernelV2, OrtStatus*, (const CustomOp*, const OrtApi*, const OrtKernelInfo*, void**)) \
  X(KernelComputeV2, OrtStatus*, (void*, OrtKernelContext*))                                    \
  X(InferOutputShapeFn, OrtStatus*, (const CustomOp*, OrtShapeInferContext*))                   \
  X(GetStartVersion, int, (const CustomOp*))                                                    \
  X(GetEndVersion, int, (const CustomOp*))                                                      \
  X(GetMayInplace, size_t, (int** input_index, int** output_index))                             \
  X(ReleaseMayInplace, void, (int* input_index, int* output_index))                             \
  X(GetAliasMap, size_t, (int** input_index, int** output_index))                               \
  X(ReleaseAliasMap, void, (int* input_index, int* output_index))

struct CustomOp {
  uint32_t version;
#define DEPLOYNORM_ORT_MEMBER(name, result, parameters) result(*name) parameters;
  DEPLOYNORM_ORT_MEMBERS(DEPLOYNORM_ORT_MEMBER)
#undef DEPLOYNORM_ORT_MEMBER
};

// DEPLOYNORM_ORT_FUNCTIONS(X): X(name in OrtApi, slot, return type, parameters) for each function that we call.
#define DEPLOYNORM_ORT_FUNCTIONS(X)                                                                                   \
  X(CreateStatus, 0, OrtStatus*, (int code, const char* message))                                                     \
  X(CreateCustomOpDomain, 26, OrtStatus*, (const char* domain, OrtCustomOpDomain** out))                              \
  X(CustomOpDomain_Add, 27, OrtStatus*, (OrtCustomOpDomain * domain, const CustomOp* op))                             \
  X(AddCustomOpDomain, 28, OrtStatus*, (OrtSessionOptions * options, OrtCustomOpDomain * domain))                     \
  X(GetTensorMutableData, 51, OrtStatus*, (OrtValue * value, void** out))                                             \
  X(GetDimensionsCount, 61, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, size_t* out))                         \
  X(GetDimensions, 62, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count))             \
  X(GetSymbolicDimensions, 63, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, const char** names, size_t count)) \
  X(GetTensorTypeAndShape, 65, OrtStatus*, (const OrtValue* value, OrtTensorTypeAndShapeInfo** out))                  \
  X(AllocatorFree, 76, OrtStatus*, (OrtAllocator * allocator, void* memory))                                          \
  X(AllocatorGetInfo, 77, OrtStatus*, (const OrtAllocator* allocator, const OrtMemoryInfo** out))                     \
  X(KernelInfoGetAttribute_int64, 86, OrtStatus*, (const OrtKernelInfo* info, const char* name, int64_t* out))        \
  X(KernelContext_GetInputCount, 88, OrtStatus*, (const OrtKernelContext* context, size_t* out))                      \
  X(KernelContext_GetInput, 90, OrtStatus*, (const OrtKernelContext* context, size_t index, const OrtValue** out))    \
  X(KernelContext_GetOutput, 91, OrtStatus*,                                                                          \
    (OrtKernelContext * context, size_t index, const int64_t* sizes, size_t count, OrtValue** out))                   \
  X(ReleaseStatus, 93, void, (OrtStatus * status))                                                                    \
  X(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo * info))                                      \
  X(ReleaseAllocator, 132, void, (OrtAllocator * allocator))                                                          \
  X(KernelContext_GetGPUComputeStream, 193, OrtStatus*, (const OrtKernelContext* context, void** out))                \
  X(ShapeInferContext_GetInputTypeShape, 268, OrtStatus*,                                                             \
    (const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** out))                             \
  X(ShapeInferContext_SetOutputTypeShape, 270, OrtStatus*,                                                            \
    (const OrtShapeInferContext* context, size_t index, const OrtTensorTypeAndShapeInfo* info))                       \
  X(KernelContext_ParallelFor, 274, OrtStatus*,                                                                       \
    (const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, size_t batches, void* data))         \
  X(KernelContext_GetScratchBuffer, 277, OrtStatus*,                                                                  \
    (const OrtKernelContext* context, const OrtMemoryInfo* info, size_t bytes, void** out))                           \
  X(KernelInfoGetAllocator, 278, OrtStatus*, (const OrtKernelInfo* info, int memory_type, OrtAllocator** out))

// deploynorm::ort::CreateStatus(api)(code, message), and so on for each.
#define DEPLOYNORM_ORT_ACCESSOR(name, slot, result, parameters)                          \
  using name##Function = result parameters;                                              \
  inline name##Function* name(const OrtApi* api) {                                       \
    return reinterpret_cast<name##Function*>(reinterpret_cast<void* const*>(api)[slot]); \
  }
DEPLOYNORM_ORT_FUNCTIONS(DEPLOYNORM_ORT_ACCESSOR)
#undef DEPLOYNORM_ORT_ACCESSOR

}  // namespace ort
}  // namespace deploynorm

#endif  // DEPLOYNORM_ONNXRUNTIME_ORT_ABI_H_

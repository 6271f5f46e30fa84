// The FRN operators for ONNX Runtime: checks the inputs, and hands pointers to the kernel, on the CPU with the
// session's threads. No exception; a run takes no lock, and allocates nothing but where parameters are to be widened;
// every status is passed on.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../contract.h"
#include "../kernels/frn.h"
#include "ort_abi.h"

namespace deploynorm {
namespace {

using namespace ort;

// Ranks above this are refused; ONNX Runtime's own convolutions end at 5.
constexpr size_t kMaxRank = 16;

// Which of the operators.
enum class Form { kPlain, kAdd, kBlocked };

struct Op : CustomOp {
  const OrtApi* api;
  Form form;
  bool cuda;      // for the CUDA provider, else for the CPU's
  int element;    // ONNXTensorElementDataType of X and Y
  int parameter;  // and of gamma, beta, tau and eps
  deploynorm_type type;
};

// What a node's kernel keeps.
struct Kernel {
  const Op* op;
  int64_t block;            // channels of a block; 0 for NCHW
  OrtAllocator* allocator;  // of the device; null for the CPU
};

// Returns the status from the enclosing function unless it is success.
#define DEPLOYNORM_RETURN_IF_ERROR(expression)           \
  do {                                                   \
    if (OrtStatus* status = (expression)) return status; \
  } while (false)

template <typename... Values>
OrtStatus* refuse(const OrtApi* api, int code, const char* format, Values... values) {
  char message[256];
  snprintf(message, sizeof message, format, values...);
  return CreateStatus(api)(code, message);
}

struct Shape {
  size_t rank;
  int64_t sizes[kMaxRank];
};

const char* name_of(const Op& op) {
  return op.form == Form::kPlain ? kOpType : op.form == Form::kAdd ? kAddOpType : kBlockedOpType;
}

OrtStatus* read_shape(const Op& op, const OrtValue* value, Shape* shape) {
  const OrtApi* api = op.api;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(GetTensorTypeAndShape(api)(value, &info));
  OrtStatus* status = GetDimensionsCount(api)(info, &shape->rank);
  if (status == nullptr && shape->rank > kMaxRank) {
    status = refuse(api, kInvalidArgument, "%s: a tensor has %zu axes; at most %zu are taken", name_of(op), shape->rank,
                    kMaxRank);
  }
  if (status == nullptr) status = GetDimensions(api)(info, shape->sizes, shape->rank);
  ReleaseTensorTypeAndShapeInfo(api)(info);
  return status;
}

OrtStatus* read_data(const Op& op, const OrtValue* value, const void** data) {
  // The function that gives the data has no twin for constants.
  void* mutable_data = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(GetTensorMutableData(op.api)(const_cast<OrtValue*>(value), &mutable_data));
  *data = mutable_data;
  return nullptr;
}

OrtStatus* read_parameter(const Op& op, OrtKernelContext* context, int index, int64_t channels, const void** data) {
  const OrtApi* api = op.api;
  const OrtValue* value = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetInput(api)(context, index, &value));
  Shape shape;
  DEPLOYNORM_RETURN_IF_ERROR(read_shape(op, value, &shape));
  if (shape.rank != 1 || shape.sizes[0] != channels) {
    return refuse(api, kInvalidArgument,
                  "%s: input %s has the wrong shape. Got %zu axes, the first of %lld; expected (%lld,)", name_of(op),
                  kInputNames[index], shape.rank, shape.rank == 0 ? 0LL : static_cast<long long>(shape.sizes[0]),
                  static_cast<long long>(channels));
  }
  return read_data(op, value, data);
}

// An IEEE 754 binary16 number as float32, exactly.
float widened(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31u, fraction = half & 1023u;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    memcpy(&magnitude, &bits, sizeof magnitude);
  }
  return half & 0x8000u ? -magnitude : magnitude;
}

// What converters to float16 make of the parameters, which the kernel takes in float32: they convert every weight.
// The memory is to be freed.
OrtStatus* widen_parameters(const Op& op, deploynorm_frn* call, float** memory) {
  const void** parameters[] = {&call->gamma, &call->beta, &call->tau, &call->eps};
  const size_t channels = static_cast<size_t>(call->channels);
  float* next = *memory = static_cast<float*>(malloc((kInputs - 1) * channels * sizeof(float) + 1));
  if (next == nullptr) return refuse(op.api, kFail, "%s: out of memory", name_of(op));
  for (const void** parameter : parameters) {
    const uint16_t* from = static_cast<const uint16_t*>(*parameter);
    *parameter = next;
    for (size_t channel = 0; channel < channels; ++channel) *next++ = widened(from[channel]);
  }
  return nullptr;
}

// The residual: null where the blocked operator has none.
OrtStatus* read_residual(const Op& op, OrtKernelContext* context, const Shape& x, const void** data) {
  const OrtApi* api = op.api;
  size_t count = 0;
  DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetInputCount(api)(context, &count));
  const OrtValue* value = nullptr;
  if (count > kResidual) DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetInput(api)(context, kResidual, &value));
  if (value == nullptr) return nullptr;
  Shape shape;
  DEPLOYNORM_RETURN_IF_ERROR(read_shape(op, value, &shape));
  bool same = shape.rank == x.rank;
  for (size_t axis = 0; same && axis < x.rank; ++axis) same = shape.sizes[axis] == x.sizes[axis];
  if (!same) return refuse(api, kInvalidArgument, "%s: the residual's shape is not that of X", name_of(op));
  return read_data(op, value, data);
}

// ONNX Runtime's threads, as the kernel asks for them.
struct Host {
  const OrtApi* api;
  OrtKernelContext* context;
  OrtStatus* status;
};

struct Loop {
  deploynorm_task task;
  void* data;
};

void parallel_for(void* opaque, int64_t count, deploynorm_task task, void* data) {
  Host* host = static_cast<Host*>(opaque);
  Loop loop = {task, data};
  OrtStatus* status = KernelContext_ParallelFor(host->api)(
      host->context,
      [](void* loop, size_t index) {
        static_cast<Loop*>(loop)->task(static_cast<Loop*>(loop)->data, static_cast<int64_t>(index));
      },
      static_cast<size_t>(count), /*batches=*/0, &loop);
  if (status == nullptr) return;
  if (host->status == nullptr) {
    host->status = status;
  } else {
    ReleaseStatus(host->api)(status);
  }
}

#if defined(DEPLOYNORM_CUDA)
// Enqueues the call on the session's stream, with scratch memory of the session where the kernel asks for some.
OrtStatus* run_on_cuda(const OrtApi* api, OrtKernelContext* context, OrtAllocator* allocator,
                       const deploynorm_frn& call) {
  void* stream = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetGPUComputeStream(api)(context, &stream));
  void* workspace = nullptr;
  if (const size_t bytes = deploynorm_frn_cuda_workspace(&call)) {
    const OrtMemoryInfo* info = nullptr;
    DEPLOYNORM_RETURN_IF_ERROR(AllocatorGetInfo(api)(allocator, &info));
    DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetScratchBuffer(api)(context, info, bytes, &workspace));
  }
  const int error = deploynorm_frn_cuda(&call, workspace, stream, /*variant=*/nullptr);
  // The allocator knows the stream that the memory was taken for, and gives it to another only behind this work.
  OrtStatus* status = workspace == nullptr ? nullptr : AllocatorFree(api)(allocator, workspace);
  if (error == 0 || status != nullptr) return status;
  return refuse(api, kFail, "%s: CUDA error %d at the launch. Fix: run deploynorm doctor", kOpType, error);
}
#endif

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(opaque);
  const Op& op = *kernel.op;
  const OrtApi* api = op.api;
  const OrtValue* x = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetInput(api)(context, 0, &x));
  Shape shape;
  DEPLOYNORM_RETURN_IF_ERROR(read_shape(op, x, &shape));
  if (shape.rank < 2) {
    return refuse(api, kInvalidArgument, "%s: input X has the wrong rank. Got %zu axes; expected (N, C, D1..Dk)",
                  name_of(op), shape.rank);
  }
  deploynorm_frn call = {};
  call.samples = shape.sizes[0];
  call.channels = shape.sizes[1];
  call.spatial = 1;
  for (size_t axis = 2; axis < shape.rank; ++axis) call.spatial *= shape.sizes[axis];
  call.channel_block = kernel.block == 0 ? 1 : kernel.block;
  call.type = op.type;
  if (call.channels % call.channel_block != 0) {
    return refuse(api, kInvalidArgument,
                  "%s: the channels are no multiple of the block. Got %lld; expected blocks of %lld", kBlockedOpType,
                  static_cast<long long>(call.channels), static_cast<long long>(call.channel_block));
  }
  const void** parameters[kInputs] = {&call.x, &call.gamma, &call.beta, &call.tau, &call.eps};
  for (int index = 1; index < kInputs; ++index) {
    DEPLOYNORM_RETURN_IF_ERROR(read_parameter(op, context, index, call.channels, parameters[index]));
  }
  if (op.form != Form::kPlain) DEPLOYNORM_RETURN_IF_ERROR(read_residual(op, context, shape, &call.residual));

  OrtValue* y = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(KernelContext_GetOutput(api)(context, 0, shape.sizes, shape.rank, &y));
  DEPLOYNORM_RETURN_IF_ERROR(read_data(op, x, &call.x));
  DEPLOYNORM_RETURN_IF_ERROR(GetTensorMutableData(api)(y, &call.y));
#if defined(DEPLOYNORM_CUDA)
  if (op.cuda) return run_on_cuda(api, context, kernel.allocator, call);
#endif
  float* wide = nullptr;
  if (op.parameter == kFloat16) DEPLOYNORM_RETURN_IF_ERROR(widen_parameters(op, &call, &wide));
  Host host = {api, context, nullptr};
  const int error = deploynorm_frn_cpu(&call, parallel_for, &host, /*variant=*/nullptr);
  free(wide);
  if (error != 0) return refuse(api, kFail, "%s: the kernel does not have type %d", name_of(op), op.element);
  return host.status;
}

// ONNX Runtime blocks 16 channels where there is AVX-512, else 8, and does not look what a file was made for: on the
// other processor its own operators would give wrong numbers, and say nothing.
OrtStatus* refuse_foreign_block(const OrtApi* api, int64_t block) {
#if defined(__x86_64__)
  const int64_t here = __builtin_cpu_supports("avx512f") ? 16 : 8;
  if ((block == 8 || block == 16) && block != here) {
    return refuse(api, kFail,
                  "%s: the file was rewritten for a processor with blocks of %d channels, and here they are of %d. "
                  "Fix: run deploynorm rewrite --optimize-for-cpu here, on the file it was made from",
                  kBlockedOpType, static_cast<int>(block), static_cast<int>(here));
  }
#endif
  return nullptr;
}

OrtStatus* create_kernel(const CustomOp* base, const OrtApi* api, const OrtKernelInfo* info, void** out) {
  const Op* op = static_cast<const Op*>(base);
  int64_t block = 0;
  if (op->form == Form::kBlocked) {
    // ONNX Runtime's own words name neither the operator nor, for one of another type, the attribute.
    if (OrtStatus* status = KernelInfoGetAttribute_int64(api)(info, kBlockAttribute, &block)) {
      ReleaseStatus(api)(status);
      block = 0;
    }
    if (block < 1) {
      return refuse(api, kInvalidArgument, "%s: attribute %s must be a positive integer", name_of(*op),
                    kBlockAttribute);
    }
    DEPLOYNORM_RETURN_IF_ERROR(refuse_foreign_block(api, block));
  }
  Kernel* kernel = static_cast<Kernel*>(malloc(sizeof(Kernel)));
  if (kernel == nullptr) return refuse(api, kFail, "%s: out of memory", name_of(*op));
  *kernel = {op, block, nullptr};
  if (op->cuda) {
    if (OrtStatus* status = KernelInfoGetAllocator(api)(info, kDeviceMemory, &kernel->allocator)) {
      free(kernel);
      return status;
    }
  }
  *out = kernel;
  return nullptr;
}

void destroy_kernel(void* opaque) {
  Kernel* kernel = static_cast<Kernel*>(opaque);
  if (kernel->allocator != nullptr) ReleaseAllocator(kernel->op->api)(kernel->allocator);
  free(kernel);
}

// Y has the shape of X. Without this ONNX Runtime knows no shape behind the node, and does not let it write over X.
OrtStatus* infer_shape(const CustomOp* base, OrtShapeInferContext* context) {
  const OrtApi* api = static_cast<const Op*>(base)->api;
  OrtTensorTypeAndShapeInfo* x = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(ShapeInferContext_GetInputTypeShape(api)(context, 0, &x));
  size_t rank = 0;
  DEPLOYNORM_RETURN_IF_ERROR(GetDimensionsCount(api)(x, &rank));
  // Of an unknown rank ONNX Runtime says 0, of a size without number or name -1, and would take both for known.
  if (rank == 0 || rank > kMaxRank) return nullptr;
  int64_t sizes[kMaxRank];
  const char* names[kMaxRank];
  DEPLOYNORM_RETURN_IF_ERROR(GetDimensions(api)(x, sizes, rank));
  DEPLOYNORM_RETURN_IF_ERROR(GetSymbolicDimensions(api)(x, names, rank));
  for (size_t axis = 0; axis < rank; ++axis) {
    if (sizes[axis] < 0 && names[axis][0] == '\0') return nullptr;
  }
  return ShapeInferContext_SetOutputTypeShape(api)(context, 0, x);
}

size_t may_write_over_x(int** input_index, int** output_index) {
  static int first = 0;
  *input_index = &first;
  *output_index = &first;
  return 1;
}

template <Form kForm, deploynorm_type kType, int kElement, bool kCuda = false,
          int kParameter = kElement == kDouble ? kDouble : kFloat>
Op make_op(const OrtApi* api) {
  Op op = {};
  op.api = api;
  op.version = kApiVersion;
  op.form = kForm;
  op.cuda = kCuda;
  op.element = kElement;
  op.parameter = kParameter;
  op.type = kType;
  op.GetName = [](const CustomOp* base) { return name_of(*static_cast<const Op*>(base)); };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* {
    return kCuda ? "CUDAExecutionProvider" : nullptr;  // null is the CPU
  };
  op.GetInputTypeCount = [](const CustomOp*) {
    return static_cast<size_t>(kForm == Form::kPlain ? kInputs : kResidual + 1);
  };
  op.GetInputType = [](const CustomOp*, size_t index) {
    const bool parameter = index > 0 && index < kInputs;
    return parameter ? kParameter : kElement;
  };
  op.GetOutputTypeCount = [](const CustomOp*) { return static_cast<size_t>(1); };
  op.GetOutputType = [](const CustomOp*, size_t) { return kElement; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) {
    return kForm == Form::kBlocked && index == kResidual ? kOptional : kRequired;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };  // OrtMemTypeDefault
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
  op.GetStartVersion = [](const CustomOp*) { return kVersion; };
  op.GetEndVersion = [](const CustomOp*) { return kVersion; };
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = destroy_kernel;
  op.InferOutputShapeFn = infer_shape;
  op.GetMayInplace = may_write_over_x;
  op.ReleaseMayInplace = [](int*, int*) {};
  return op;
}

// One domain for the whole process: sessions keep a pointer to it. Made at the first call, under a lock of one word
// because a static with a constructor would need the C++ runtime.
char lock = 0;
OrtCustomOpDomain* domain = nullptr;

// One operator for each form and type of X, those with parameters in float16 on the CPU alone; and for CUDA's provider
// too, all of a form under its name in the contract (ONNX Runtime makes one schema of them). They live as long as the
// library; the first call makes them.
OrtStatus* make_domain(const OrtApi* api) {
  static const Op ops[] = {
      make_op<Form::kPlain, DEPLOYNORM_FLOAT32, kFloat>(api),
      make_op<Form::kPlain, DEPLOYNORM_FLOAT64, kDouble>(api),
      make_op<Form::kPlain, DEPLOYNORM_FLOAT16, kFloat16>(api),
      make_op<Form::kPlain, DEPLOYNORM_BFLOAT16, kBFloat16>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT32, kFloat>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT64, kDouble>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT16, kFloat16>(api),
      make_op<Form::kAdd, DEPLOYNORM_BFLOAT16, kBFloat16>(api),
      make_op<Form::kPlain, DEPLOYNORM_FLOAT16, kFloat16, false, kFloat16>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT16, kFloat16, false, kFloat16>(api),
      make_op<Form::kBlocked, DEPLOYNORM_FLOAT32, kFloat>(api),
#if defined(DEPLOYNORM_CUDA)
      make_op<Form::kPlain, DEPLOYNORM_FLOAT32, kFloat, true>(api),
      make_op<Form::kPlain, DEPLOYNORM_FLOAT64, kDouble, true>(api),
      make_op<Form::kPlain, DEPLOYNORM_FLOAT16, kFloat16, true>(api),
      make_op<Form::kPlain, DEPLOYNORM_BFLOAT16, kBFloat16, true>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT32, kFloat, true>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT64, kDouble, true>(api),
      make_op<Form::kAdd, DEPLOYNORM_FLOAT16, kFloat16, true>(api),
      make_op<Form::kAdd, DEPLOYNORM_BFLOAT16, kBFloat16, true>(api),
#endif
  };
  OrtCustomOpDomain* made = nullptr;
  DEPLOYNORM_RETURN_IF_ERROR(CreateCustomOpDomain(api)(kDomain, &made));
  for (const Op& op : ops) DEPLOYNORM_RETURN_IF_ERROR(CustomOpDomain_Add(api)(made, &op));
#if defined(DEPLOYNORM_CUDA)
  // Those of CUDA's provider under the name that it has as a plug-in too. Of a provider that a runtime does not have it
  // never looks for a kernel.
  static Op plugged_in[sizeof ops / sizeof ops[0]];
  Op* next = plugged_in;
  for (const Op& op : ops) {
    if (!op.cuda) continue;
    *next = op;
    next->GetExecutionProviderType = [](const CustomOp*) { return "CudaPluginExecutionProvider"; };
    DEPLOYNORM_RETURN_IF_ERROR(CustomOpDomain_Add(api)(made, next++));
  }
#endif
  domain = made;
  return nullptr;
}

}  // namespace
}  // namespace deploynorm

// The entry point that SessionOptions.register_custom_ops_library calls.
extern "C" DEPLOYNORM_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                       const deploynorm::ort::ApiBase* base) {
  using namespace deploynorm;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    return refuse(base->GetApi(1), ort::kFail,
                  "deploynorm needs onnxruntime >= %s, and this is %s. Fix: upgrade onnxruntime", ort::kOldestRuntime,
                  base->GetVersionString());
  }
  while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {
  }
  OrtStatus* status = domain == nullptr ? make_domain(api) : nullptr;
  __atomic_clear(&lock, __ATOMIC_RELEASE);
  return status != nullptr ? status : ort::AddCustomOpDomain(api)(options, domain);
}

// The FRN operators as TensorRT plugins of the third generation, and the creators that TensorRT finds them by: checks
// what TensorRT hands over and passes pointers to the kernel. Nothing throws.
//
// Only interfaces are implemented that are the same in TensorRT 10, TensorRT 11 and TensorRT-RTX. Of the host's the
// logger alone is called, which changed: see host.h.

#include <NvInferRuntime.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <new>

#include "../contract.h"
#include "../kernels/frn.h"
#include "host.h"

namespace deploynorm {
namespace {

using namespace nvinfer1;

// ---- What it takes. What it refuses goes to the logger of the TensorRT that asked, and where there is none to stderr:
// TensorRT's own error names no more than the method that did not return 0.

// The code that called last in this thread, and of which operator; set by every method that may refuse.
struct Caller {
  const void* address;
  const char* op_type;
};
__thread Caller caller = {nullptr, kOpType};

__attribute__((format(printf, 1, 2))) int32_t refuse(const char* format, ...) noexcept {
  char message[384];
  const int named = snprintf(message, sizeof message, "%s::%s: ", kDomain, caller.op_type);
  va_list values;
  va_start(values, format);
  vsnprintf(message + named, sizeof message - named, format, values);
  va_end(values);
  if (!log_error(caller.address, message)) fprintf(stderr, "%s\n", message);
  return -1;
}

const char* name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    default:
      return "another type";
  }
}

bool takes_type(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

// Channels last, not filled up to eights.
constexpr TensorFormat kRows[] = {TensorFormat::kHWC, TensorFormat::kDHWC};

// TensorRT's channels-last formats count the channels' axis from the last: ours are two of (N, C, H, W), and two of
// (N, C, D, H, W).
bool takes_format(DataType type, TensorFormat format, int32_t rank) {
  switch (format) {
    case TensorFormat::kLINEAR:
      return true;
    case TensorFormat::kHWC:
      return rank == 4 && type != DataType::kBF16;
    case TensorFormat::kHWC8:
      return rank == 4 && type != DataType::kFLOAT;
    case TensorFormat::kDHWC:
      return rank == 5 && type == DataType::kFLOAT;
    case TensorFormat::kDHWC8:
      return rank == 5 && type != DataType::kFLOAT;
    default:
      return false;
  }
}

// Of an operator's inputs there are kInputs, or with the residual one more.
constexpr int32_t kMostInputs = kResidual + 1;

int32_t refuse_arity(int32_t inputs, int32_t outputs, bool adds) {
  return refuse(
      "wrong number of inputs or outputs. Got %d and %d; expected X, gamma, beta, tau and eps%s, and Y. "
      "Fix: export the model with deploynorm",
      inputs, outputs, adds ? ", and the residual" : "");
}

// Of two sizes, -1 being one that the shapes at run time will give.
bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

int32_t check_types(const DataType* types, int32_t inputs) {
  if (!takes_type(types[0])) {
    return refuse("input X is of the wrong type. Got %s; expected float32, float16 or bfloat16", name_of(types[0]));
  }
  for (int32_t input = 1; input < kInputs; ++input) {
    if (types[input] != DataType::kFLOAT) {
      return refuse("input %s is of the wrong type. Got %s; expected float32, whatever X is", kInputNames[input],
                    name_of(types[input]));
    }
  }
  if (inputs > kResidual && types[kResidual] != types[0]) {
    return refuse("the residual is of the wrong type. Got %s; expected that of X, %s", name_of(types[kResidual]),
                  name_of(types[0]));
  }
  return 0;
}

int32_t check_ranks(const int32_t* ranks, int32_t inputs) {
  if (ranks[0] < 2 || ranks[0] > Dims::MAX_DIMS) {
    return refuse("input X has the wrong rank. Got %d axes; expected (N, C, D1..Dk)", ranks[0]);
  }
  for (int32_t input = 1; input < kInputs; ++input) {
    if (ranks[input] != 1) {
      return refuse("input %s has the wrong rank. Got %d axes; expected (C,)", kInputNames[input], ranks[input]);
    }
  }
  if (inputs > kResidual && ranks[kResidual] != ranks[0]) {
    return refuse("the residual has the wrong rank. Got %d axes; expected those of X, %d", ranks[kResidual], ranks[0]);
  }
  return 0;
}

bool alike(const PluginTensorDesc& a, const PluginTensorDesc& b) {
  bool same = a.type == b.type && a.format == b.format && a.dims.nbDims == b.dims.nbDims;
  for (int32_t axis = 0; same && axis < b.dims.nbDims; ++axis) same = !differ(a.dims.d[axis], b.dims.d[axis]);
  return same;
}

int32_t check(const PluginTensorDesc* in, const PluginTensorDesc& y, int32_t inputs) {
  DataType types[kMostInputs];
  int32_t ranks[kMostInputs];
  for (int32_t input = 0; input < inputs; ++input) {
    types[input] = in[input].type;
    ranks[input] = in[input].dims.nbDims;
  }
  if (check_types(types, inputs) != 0 || check_ranks(ranks, inputs) != 0) return -1;
  const PluginTensorDesc& x = in[0];
  for (int32_t input = 1; input < kInputs; ++input) {
    if (differ(in[input].dims.d[0], x.dims.d[1])) {
      return refuse("input %s has the wrong size. Got %lld; expected as many as X has channels, %lld",
                    kInputNames[input], static_cast<long long>(in[input].dims.d[0]),
                    static_cast<long long>(x.dims.d[1]));
    }
    if (in[input].format != TensorFormat::kLINEAR) return refuse("input %s is not linear", kInputNames[input]);
  }
  if (!alike(y, x)) return refuse("the output is not of X's shape, type and format");
  if (inputs > kResidual && !alike(in[kResidual], x)) {
    return refuse("the residual is not of X's shape, type and format");
  }
  if (!takes_format(x.type, x.format, x.dims.nbDims)) {
    return refuse("input X is in a format that is not taken: %d, of %s with %d axes", static_cast<int>(x.format),
                  name_of(x.type), x.dims.nbDims);
  }
  return 0;
}

// ---- Plans

static_assert(kVersion == 1, "the string below is the contract's version");
constexpr const char* kPluginVersion = "1";
// A plan holds this number alone, so that a library to whom it means nothing can refuse the plan.
constexpr const char* kPlanField = "plan_version";
constexpr int32_t kPlanVersion = 1;
const PluginField kPlan(kPlanField, &kPlanVersion, PluginFieldType::kINT32, 1);
const PluginFieldCollection kPlanFields = {1, &kPlan};
const PluginFieldCollection kNoFields = {};

// The version that a plan's fields say; 0 if they are not ours.
int32_t plan_version(const PluginFieldCollection* fields) {
  if (fields == nullptr || fields->nbFields != 1) return 0;
  const PluginField& field = fields->fields[0];
  const bool ours = field.name != nullptr && strcmp(field.name, kPlanField) == 0 && field.data != nullptr &&
                    field.type == PluginFieldType::kINT32 && field.length == 1;
  int32_t version = 0;
  if (ours) memcpy(&version, field.data, sizeof version);
  return version;
}

// The first attribute that nobody knows; null if there is none. TensorRT's parser passes on what getFieldNames names
// and no more, other callers perhaps all that a node has, which with us are the two by which the plugin is found.
const char* unknown_attribute(const PluginFieldCollection* fields) {
  for (int32_t index = 0; fields != nullptr && index < fields->nbFields; ++index) {
    const char* name = fields->fields[index].name == nullptr ? "without a name" : fields->fields[index].name;
    if (strcmp(name, "plugin_namespace") != 0 && strcmp(name, "plugin_version") != 0) return name;
  }
  return nullptr;
}

// Sizes, layout and type of a call with this X.
deploynorm_frn call_of(const Dims& x, DataType type, TensorFormat format) {
  deploynorm_frn call = {};
  call.samples = x.d[0];
  call.channels = x.d[1];
  call.spatial = 1;
  for (int32_t axis = 2; axis < x.nbDims; ++axis) call.spatial *= x.d[axis];
  const bool rows = format == kRows[0] || format == kRows[1];
  call.channel_block = format == TensorFormat::kLINEAR ? 1 : rows ? call.channels : (call.channels + 7) / 8 * 8;
  call.type = type == DataType::kHALF   ? DEPLOYNORM_FLOAT16
              : type == DataType::kBF16 ? DEPLOYNORM_BFLOAT16
                                        : DEPLOYNORM_FLOAT32;
  return call;
}

// TensorRT-RTX compiles without a device, so that it times nothing: it takes the first format that it is offered, and
// that would be kLINEAR, between two transpositions of its own channels-last tensors. It has no kHWC of bfloat16 and no
// kDHWC of 16 bits, and into rows of eights it moves tensors twice.
TensorFormat format_for_rtx(DataType type, int32_t rank) {
  for (const TensorFormat rows : kRows) {
    if (takes_format(type, rows, rank)) return rows;
  }
  return TensorFormat::kLINEAR;
}

// Has no state: what a call needs is in the descriptions that come with it, so that shapes may change at any time.
template <bool kAdd>
class FrnPlugin final : public IPluginV3,
                        public IPluginV3OneCore,
                        public IPluginV3OneBuild,
                        public IPluginV3OneRuntime {
 public:
  static constexpr int32_t kCount = kAdd ? kMostInputs : kInputs;  // of inputs

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override { return new (std::nothrow) FrnPlugin(*this); }

  // ---- IPluginV3OneCore

  const char* getPluginName() const noexcept override { return kOperators[kAdd]; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }

  // ---- IPluginV3OneBuild

  int32_t getNbOutputs() const noexcept override { return 1; }
  const char* getTimingCacheID() noexcept override { return DEPLOYNORM_KERNELS; }  // a digest, of the build

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in,
                             int32_t inputs) const noexcept override {
    caller = {__builtin_return_address(0), kOperators[kAdd]};
    if (!has_arity(inputs, outputs)) return refuse_arity(inputs, outputs, kAdd);
    if (check_types(in, inputs) != 0) return -1;
    out[0] = in[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                          int32_t outputs, IExprBuilder&) noexcept override {
    caller = {__builtin_return_address(0), kOperators[kAdd]};
    if (!has_arity(inputs, outputs)) return refuse_arity(inputs, outputs, kAdd);
    int32_t ranks[kCount];
    for (int32_t input = 0; input < kCount; ++input) ranks[input] = in[input].nbDims;
    if (check_ranks(ranks, kCount) != 0) return -1;
    out[0] = in[0];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    const void* asking = __builtin_return_address(0);
    if (!has_arity(inputs, outputs)) return false;
    const PluginTensorDesc& x = tensors[0].desc;
    const PluginTensorDesc& asked = tensors[position].desc;
    if (position == 0) {
      if (!takes_type(x.type) || !takes_format(x.type, x.format, x.dims.nbDims)) return false;
      const char* path = nullptr;
      const Host* host = host_at(asking, &path);  // a process may have loaded TensorRT and TensorRT-RTX both
      return host == nullptr || !host->rtx || x.format == format_for_rtx(x.type, x.dims.nbDims);
    }
    // The residual and the output are as X is.
    if (position < kInputs) return asked.type == DataType::kFLOAT && asked.format == TensorFormat::kLINEAR;
    return asked.type == x.type && asked.format == x.format;
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc* out,
                          int32_t outputs) noexcept override {
    caller = {__builtin_return_address(0), kOperators[kAdd]};
    if (!has_arity(inputs, outputs)) return refuse_arity(inputs, outputs, kAdd);
    PluginTensorDesc tensors[kCount];
    for (int32_t input = 0; input < kCount; ++input) tensors[input] = in[input].desc;
    return check(tensors, out[0].desc, kCount);
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) const noexcept override {
    if (!has_arity(inputs, outputs)) return 0;
    const deploynorm_frn call = call_of(in[0].max, in[0].desc.type, in[0].desc.format);
    return deploynorm_frn_cuda_workspace(&call);
  }

  // ---- IPluginV3OneRuntime

  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
                        int32_t outputs) noexcept override {
    caller = {__builtin_return_address(0), kOperators[kAdd]};
    return has_arity(inputs, outputs) ? check(in, out[0], kCount) : refuse_arity(inputs, outputs, kAdd);
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    caller = {__builtin_return_address(0), kOperators[kAdd]};
    if (check(in, out[0], kCount) != 0) return -1;
    deploynorm_frn call = call_of(in[0].dims, in[0].type, in[0].format);
    call.x = inputs[0];
    call.gamma = inputs[1];
    call.beta = inputs[2];
    call.tau = inputs[3];
    call.eps = inputs[4];
    if constexpr (kAdd) call.residual = inputs[kResidual];
    call.y = outputs[0];
    const int error = deploynorm_frn_cuda(&call, workspace, stream, /*variant=*/nullptr);
    if (error == cudaSuccess) return 0;
    return refuse("CUDA: %s (%d)", cudaGetErrorString(static_cast<cudaError_t>(error)), error);
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &kPlanFields; }

 private:
  static bool has_arity(int32_t inputs, int32_t outputs) { return inputs == kCount && outputs == 1; }
};

template <bool kAdd>
class FrnCreator final : public IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return kOperators[kAdd]; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &kNoFields; }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, TensorRTPhase phase) noexcept override {
    caller = {__builtin_return_address(0), kOperators[kAdd]};
    if (phase == TensorRTPhase::kRUNTIME) {
      const int32_t version = plan_version(fields);
      if (version != kPlanVersion) {
        refuse(
            "the engine was built with another version of this plugin. Got plan version %d; expected %d. "
            "Fix: build the engine again",
            version, kPlanVersion);
        return nullptr;
      }
    } else if (const char* name = unknown_attribute(fields)) {
      refuse("there is no attribute %s. Fix: export the model with deploynorm, whose fifth input is epsilon", name);
      return nullptr;
    }
    auto* plugin = new (std::nothrow) FrnPlugin<kAdd>;
    if (plugin == nullptr) refuse("out of memory");
    return plugin;
  }
};

// Never destroyed: at the process's end the host's registry may outlive what this library destroys.
alignas(FrnCreator<false>) unsigned char creator[sizeof(FrnCreator<false>)];
alignas(FrnCreator<true>) unsigned char adding_creator[sizeof(FrnCreator<true>)];
IPluginCreatorInterface* const kCreators[] = {new (creator) FrnCreator<false>, new (adding_creator) FrnCreator<true>};

}  // namespace
}  // namespace deploynorm

// ---- The two functions by which TensorRT knows a plugin library

extern "C" DEPLOYNORM_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  count = sizeof deploynorm::kCreators / sizeof *deploynorm::kCreators;
  return deploynorm::kCreators;
}

// The logger is found without it, and in every host; see host.h.
extern "C" DEPLOYNORM_API void setLoggerFinder(nvinfer1::ILoggerFinder*) noexcept {}

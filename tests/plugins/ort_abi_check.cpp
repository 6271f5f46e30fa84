// Holds plugins/onnxruntime/ort_abi.h against a real onnxruntime_c_api.h: that this compiles is the test.

#include <onnxruntime_c_api.h>
#include <ort_abi.h>
#include <stddef.h>

#include <type_traits>

using namespace deploynorm;

static_assert(ort::kApiVersion <= ORT_API_VERSION, "kApiVersion: the header is older than the interface that is used");

// ---- Two functions are called alike if their parameters go into the same registers.

template <typename A, typename B>
constexpr bool passed_alike() {
  if constexpr (std::is_pointer_v<A> || std::is_pointer_v<B>) {
    return std::is_pointer_v<A> && std::is_pointer_v<B>;
  } else if constexpr (std::is_void_v<A> || std::is_void_v<B>) {
    return std::is_void_v<A> && std::is_void_v<B>;
  } else {
    return (std::is_integral_v<A> || std::is_enum_v<A>) && (std::is_integral_v<B> || std::is_enum_v<B>) &&
           sizeof(A) == sizeof(B);
  }
}

template <typename A, typename B>
struct CalledAlike : std::false_type {};

template <typename ResultA, typename... A, typename ResultB, typename... B>
struct CalledAlike<ResultA (*)(A...), ResultB (*)(B...)> {
  static constexpr bool all() {
    if constexpr (sizeof...(A) != sizeof...(B)) {
      return false;
    } else {
      return passed_alike<ResultA, ResultB>() && (passed_alike<A, B>() && ...);
    }
  }
  static constexpr bool value = all();
};

template <typename ResultA, typename... A, typename B>
struct CalledAlike<ResultA (*)(A...) noexcept, B> : CalledAlike<ResultA (*)(A...), B> {};

// ---- OrtApi

#define CHECK_SLOT(name, slot, result, parameters)                                                \
  static_assert(offsetof(OrtApi, name) == slot * sizeof(void*), "OrtApi::" #name ": wrong slot"); \
  static_assert(CalledAlike<decltype(OrtApi::name), ort::name##Function*>::value, "OrtApi::" #name ": wrong type");
DEPLOYNORM_ORT_FUNCTIONS(CHECK_SLOT)

// ---- OrtApiBase

#define CHECK_BASE(name)                                                                                           \
  static_assert(offsetof(OrtApiBase, name) == offsetof(ort::ApiBase, name), "OrtApiBase::" #name ": wrong place"); \
  static_assert(CalledAlike<decltype(OrtApiBase::name), decltype(ort::ApiBase::name)>::value,                      \
                "OrtApiBase::" #name ": wrong type");
CHECK_BASE(GetApi)
CHECK_BASE(GetVersionString)
static_assert(sizeof(OrtApiBase) == sizeof(ort::ApiBase), "OrtApiBase: wrong size");

// ---- OrtCustomOp

#define CHECK_MEMBER(name, result, parameters)                                                                        \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(ort::CustomOp, name), "OrtCustomOp::" #name ": wrong place"); \
  static_assert(CalledAlike<decltype(OrtCustomOp::name), decltype(ort::CustomOp::name)>::value,                       \
                "OrtCustomOp::" #name ": wrong type");
DEPLOYNORM_ORT_MEMBERS(CHECK_MEMBER)
static_assert(offsetof(OrtCustomOp, version) == offsetof(ort::CustomOp, version), "OrtCustomOp::version: wrong place");
static_assert(sizeof(OrtCustomOp::version) == sizeof(ort::CustomOp::version), "OrtCustomOp::version: wrong type");
// A later header may have more members; none of ours may be beyond its end.
static_assert(sizeof(ort::CustomOp) <= sizeof(OrtCustomOp), "OrtCustomOp: ours is larger");
#if ORT_API_VERSION < 22
static_assert(sizeof(ort::CustomOp) == sizeof(OrtCustomOp), "OrtCustomOp: wrong size");
#endif

// ---- Constants

#define CHECK_CONSTANT(ours, theirs) static_assert(ort::ours == static_cast<int>(theirs), #ours ": wrong value");
CHECK_CONSTANT(kFail, ORT_FAIL)
CHECK_CONSTANT(kInvalidArgument, ORT_INVALID_ARGUMENT)
CHECK_CONSTANT(kFloat, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
CHECK_CONSTANT(kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
CHECK_CONSTANT(kDouble, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE)
CHECK_CONSTANT(kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)
CHECK_CONSTANT(kRequired, INPUT_OUTPUT_REQUIRED)
CHECK_CONSTANT(kOptional, INPUT_OUTPUT_OPTIONAL)
CHECK_CONSTANT(kDeviceMemory, OrtMemTypeDefault)
static_assert(static_cast<int>(OrtMemTypeDefault) == 0, "GetInputMemoryType: wrong value");

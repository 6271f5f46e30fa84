// Which tensors the plugin takes: types, formats and shapes, and the words for those that it does not.
//
// What is refused is written to stderr, since TensorRT's own error names no more than the method that did not return 0.

#ifndef DEPLOYNORM_TENSORRT_INPUTS_H_
#define DEPLOYNORM_TENSORRT_INPUTS_H_

#include <NvInferRuntime.h>
#include <stdarg.h>
#include <stdio.h>

#include "../contract.h"

namespace deploynorm {
namespace {

using namespace nvinfer1;

__attribute__((format(printf, 1, 2))) int32_t refuse(const char* format, ...) noexcept {
  char message[320];
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  fprintf(stderr, "%s::%s: %s\n", kDomain, kOpType, message);
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

// TensorRT's channels-last formats count the channels' axis from the last, and so are ours for (N, C, H, W) alone.
bool takes_format(DataType type, TensorFormat format, int32_t rank) {
  switch (format) {
    case TensorFormat::kLINEAR:
      return true;
    case TensorFormat::kHWC:
      return rank == 4 && type != DataType::kBF16;
    case TensorFormat::kHWC8:
      return rank == 4 && type != DataType::kFLOAT;
    default:
      return false;
  }
}

bool has_arity(int32_t inputs, int32_t outputs) { return inputs == kInputs && outputs == 1; }

int32_t refuse_arity(int32_t inputs, int32_t outputs) {
  return refuse(
      "wrong number of inputs or outputs. Got %d and %d; expected X, gamma, beta, tau and eps, and Y. "
      "Fix: export the model with deploynorm",
      inputs, outputs);
}

// Of two sizes, -1 being one that the shapes at run time will give.
bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

int32_t check_types(const DataType* types) {
  if (!takes_type(types[0])) {
    return refuse("input X is of the wrong type. Got %s; expected float32, float16 or bfloat16", name_of(types[0]));
  }
  for (int32_t input = 1; input < kInputs; ++input) {
    if (types[input] != DataType::kFLOAT) {
      return refuse("input %s is of the wrong type. Got %s; expected float32, whatever X is", kInputNames[input],
                    name_of(types[input]));
    }
  }
  return 0;
}

int32_t check_ranks(const int32_t* ranks) {
  if (ranks[0] < 2 || ranks[0] > Dims::MAX_DIMS) {
    return refuse("input X has the wrong rank. Got %d axes; expected (N, C, D1..Dk)", ranks[0]);
  }
  for (int32_t input = 1; input < kInputs; ++input) {
    if (ranks[input] != 1) {
      return refuse("input %s has the wrong rank. Got %d axes; expected (C,)", kInputNames[input], ranks[input]);
    }
  }
  return 0;
}

int32_t check(const PluginTensorDesc* in, const PluginTensorDesc& y) {
  DataType types[kInputs];
  int32_t ranks[kInputs];
  for (int32_t input = 0; input < kInputs; ++input) {
    types[input] = in[input].type;
    ranks[input] = in[input].dims.nbDims;
  }
  if (check_types(types) != 0 || check_ranks(ranks) != 0) return -1;
  const PluginTensorDesc& x = in[0];
  for (int32_t input = 1; input < kInputs; ++input) {
    if (differ(in[input].dims.d[0], x.dims.d[1])) {
      return refuse("input %s has the wrong size. Got %lld; expected as many as X has channels, %lld",
                    kInputNames[input], static_cast<long long>(in[input].dims.d[0]),
                    static_cast<long long>(x.dims.d[1]));
    }
    if (in[input].format != TensorFormat::kLINEAR) return refuse("input %s is not linear", kInputNames[input]);
  }
  bool alike = y.type == x.type && y.format == x.format && y.dims.nbDims == x.dims.nbDims;
  for (int32_t axis = 0; alike && axis < x.dims.nbDims; ++axis) alike = !differ(y.dims.d[axis], x.dims.d[axis]);
  if (!alike) return refuse("the output is not of X's shape, type and format");
  if (!takes_format(x.type, x.format, x.dims.nbDims)) {
    return refuse("input X is in a format that is not taken: %d, of %s with %d axes", static_cast<int>(x.format),
                  name_of(x.type), x.dims.nbDims);
  }
  return 0;
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_TENSORRT_INPUTS_H_

// The operators as ONNX Runtime's structs: a list of them, for register.cpp.

#ifndef DEPLOYNORM_ONNXRUNTIME_FRN_OP_H_
#define DEPLOYNORM_ONNXRUNTIME_FRN_OP_H_

#include "ort_abi.h"

namespace deploynorm {

// One for each type of X, in a library with CUDA for its provider too, all under the contract's name (ONNX Runtime
// makes one schema of them), and the blocked one. Null after the last. They live as long as the library; only the first
// call makes them, and not from two threads.
const ort::CustomOp* const* frn_ops(const OrtApi* api);

}  // namespace deploynorm

#endif  // DEPLOYNORM_ONNXRUNTIME_FRN_OP_H_

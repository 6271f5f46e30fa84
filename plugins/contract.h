// The names of deploynorm/contract.py for C++. tests/test_contract.py holds the two against each other.

#ifndef DEPLOYNORM_CONTRACT_H_
#define DEPLOYNORM_CONTRACT_H_

namespace deploynorm {

constexpr const char* kDomain = "deploynorm";
constexpr const char* kOpType = "FilterResponseNormalization";
constexpr const char* kAddOpType = "FilterResponseNormalizationAdd";
constexpr const char* kOperators[] = {kOpType, kAddOpType};  // the order of the plugin library's creators
constexpr int kVersion = 1;

// Inputs, in this order. X is (N, C, D1..Dk), the others are (C,).
constexpr int kInputs = 5;
constexpr const char* kInputNames[kInputs] = {"X", "gamma", "beta", "tau", "eps"};
constexpr int kResidual = kInputs;  // of kAddOpType: like X, added before the threshold

// The operator on ONNX Runtime's blocked layout, where the residual is optional. Written by
// `deploynorm rewrite --optimize-for-cpu` alone, for one machine.
constexpr const char* kBlockedOpType = "BlockedFilterResponseNormalization";
constexpr const char* kBlockAttribute = "block";

}  // namespace deploynorm

#endif  // DEPLOYNORM_CONTRACT_H_

// The entry point that SessionOptions.register_custom_ops_library calls.

#include <stdio.h>

#include "../contract.h"
#include "../kernels/frn.h"
#include "frn_op.h"

namespace deploynorm {
namespace {

using namespace ort;

// One domain for the whole process: sessions keep a pointer to it. Made at the first call, under a lock of one word
// because a static with a constructor would need the C++ runtime.
char lock = 0;
OrtCustomOpDomain* domain = nullptr;

OrtStatus* make_domain(const OrtApi* api) {
  OrtCustomOpDomain* made = nullptr;
  if (OrtStatus* status = CreateCustomOpDomain(api)(kDomain, &made)) return status;
  for (const CustomOp* const* op = frn_ops(api); *op != nullptr; ++op) {
    if (OrtStatus* status = CustomOpDomain_Add(api)(made, *op)) return status;
  }
  domain = made;
  return nullptr;
}

}  // namespace
}  // namespace deploynorm

extern "C" DEPLOYNORM_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                       const deploynorm::ort::ApiBase* base) {
  using namespace deploynorm;
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    char message[160];
    snprintf(message, sizeof message, "deploynorm needs onnxruntime >= %s, and this is %s. Fix: upgrade onnxruntime",
             ort::kOldestRuntime, base->GetVersionString());
    return ort::CreateStatus(base->GetApi(1))(ort::kFail, message);
  }
  while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {
  }
  OrtStatus* status = domain == nullptr ? make_domain(api) : nullptr;
  __atomic_clear(&lock, __ATOMIC_RELEASE);
  return status != nullptr ? status : ort::AddCustomOpDomain(api)(options, domain);
}

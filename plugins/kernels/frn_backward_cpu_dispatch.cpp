// Which of the compiled variants of frn_backward_cpu.cpp runs.

#include "frn.h"
#include "variants.h"

namespace deploynorm {

using Function = int(const deploynorm_frn_backward&, void*, deploynorm_parallel_for, void*);

#if defined(DEPLOYNORM_X86_VARIANTS)
Function frn_backward_avx512, frn_backward_avx2;
#else
constexpr Function *frn_backward_avx512 = nullptr, *frn_backward_avx2 = nullptr;
#endif
Function frn_backward_baseline;

// Filled when the library is loaded, before anything can call it.
static const Variants<Function> variants(frn_backward_avx512, frn_backward_avx2, frn_backward_baseline);

}  // namespace deploynorm

size_t deploynorm_frn_backward_cpu_workspace(const struct deploynorm_frn_backward* call) {
  // Three sums of each plane.
  return static_cast<size_t>(call->samples * call->channels) * 3 * sizeof(double);
}

int deploynorm_frn_backward_cpu(const struct deploynorm_frn_backward* call, void* workspace,
                                deploynorm_parallel_for parallel_for, void* host, const char* variant) {
  const auto function = deploynorm::variants.find(variant);
  return function == nullptr ? 1 : function(*call, workspace, parallel_for, host);
}

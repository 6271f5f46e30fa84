// Which of the compiled variants of frn_cpu.cpp runs.

#include "frn.h"
#include "variants.h"

namespace deploynorm {

using Function = int(const deploynorm_frn&, deploynorm_parallel_for, void*);

#if defined(DEPLOYNORM_X86_VARIANTS)
Function frn_avx512, frn_avx2;
#else
constexpr Function *frn_avx512 = nullptr, *frn_avx2 = nullptr;
#endif
Function frn_baseline;

// Filled when the library is loaded, before anything can call it.
static const Variants<Function> variants(frn_avx512, frn_avx2, frn_baseline);

}  // namespace deploynorm

const char* const* deploynorm_cpu_variants(void) { return deploynorm::variants.names(); }

int deploynorm_frn_cpu(const struct deploynorm_frn* call, deploynorm_parallel_for parallel_for, void* host,
                       const char* variant) {
  const auto function = deploynorm::variants.find(variant);
  return function == nullptr ? 1 : function(*call, parallel_for, host);
}

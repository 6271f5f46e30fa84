// Which of the compiled variants of frn_cpu.cpp runs: the best that the processor has.

#include <string.h>

#include "frn.h"

namespace deploynorm {

using Variant = int(const deploynorm_frn&, deploynorm_parallel_for, void*);

// The build defines DEPLOYNORM_X86_VARIANTS where it compiles the two below.
#if defined(DEPLOYNORM_X86_VARIANTS)
Variant frn_avx512, frn_avx2;
#endif
Variant frn_baseline;

namespace {

constexpr int kVariants = 3;

struct Table {
  const char* names[kVariants + 1] = {};
  Variant* functions[kVariants] = {};
  int count = 0;

  Table() {
#if defined(DEPLOYNORM_X86_VARIANTS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq")) {
      add("avx512", frn_avx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add("avx2", frn_avx2);
#endif
    add("baseline", frn_baseline);
  }

  void add(const char* name, Variant* function) {
    names[count] = name;
    functions[count++] = function;
  }
};

// Filled when the library is loaded, before anything can call it.
const Table table;

}  // namespace
}  // namespace deploynorm

const char* const* deploynorm_cpu_variants(void) { return deploynorm::table.names; }

int deploynorm_frn_cpu(const struct deploynorm_frn* call, deploynorm_parallel_for parallel_for, void* host,
                       const char* variant) {
  const deploynorm::Table& table = deploynorm::table;
  for (int index = 0; index < table.count; ++index) {
    if (variant == nullptr || strcmp(variant, table.names[index]) == 0) {
      return table.functions[index](*call, parallel_for, host);
    }
  }
  return 1;
}

// The variants of a function that is compiled once for each instruction set: which of them this processor runs.

#ifndef DEPLOYNORM_KERNELS_VARIANTS_H_
#define DEPLOYNORM_KERNELS_VARIANTS_H_

#include <string.h>

namespace deploynorm {
namespace {

template <typename Function>
class Variants {
 public:
  // The best first. The first two may be null: the build has them on x86 alone.
  Variants(Function* avx512, Function* avx2, Function* baseline) {
#if defined(DEPLOYNORM_X86_VARIANTS)
    __builtin_cpu_init();
    // Every processor with AVX2 also has F16C, which older compilers cannot ask for.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
      add("avx512", avx512);
    }
    if (has_avx2) add("avx2", avx2);
#else
    (void)avx512;
    (void)avx2;
#endif
    add("baseline", baseline);
  }

  // Null after the last.
  const char* const* names() const { return names_; }

  // The best where `name` is null; null where there is none of this name.
  Function* find(const char* name) const {
    for (int index = 0; index < count_; ++index) {
      if (name == nullptr || strcmp(name, names_[index]) == 0) return functions_[index];
    }
    return nullptr;
  }

 private:
  static constexpr int kMost = 3;

  void add(const char* name, Function* function) {
    names_[count_] = name;
    functions_[count_++] = function;
  }

  const char* names_[kMost + 1] = {};
  Function* functions_[kMost] = {};
  int count_ = 0;
};

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_VARIANTS_H_

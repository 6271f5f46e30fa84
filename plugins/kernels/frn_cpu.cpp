// The forward pass on a CPU. Compiled once for each instruction set, as the function DEPLOYNORM_VARIANT;
// frn_cpu_dispatch.cpp chooses. All else is local to the file, so that the linker never puts code of one instruction
// set into another.

#include <math.h>

#include "columns.h"
#include "element.h"
#include "frn.h"
#include "rows.h"
#include "sizes.h"

namespace deploynorm {
namespace {

float square_root(float value) { return sqrtf(value); }
double square_root(double value) { return sqrt(value); }

template <typename Element_, bool kResidual>
class Forward {
 public:
  using Element = Element_;
  using Arithmetic = typename Element::Arithmetic;
  using Storage = typename Element::Storage;
  using Vector = typename Element::Vector;
  static constexpr int kInputs = kResidual ? 2 : 1, kSummed = 1;  // x, residual
  static constexpr int kSums = 1;                                 // sum of squares
  static constexpr int kUnroll = 4;
  enum { kScale, kBeta, kTau, kCoefficients, kBefore = 0 };
  using State = Arithmetic[kCoefficients][kWidth];

  const Storage* inputs[2];
  Storage* output;

  explicit Forward(const deploynorm_frn& call)
      : inputs{static_cast<const Storage*>(call.x), static_cast<const Storage*>(call.residual)},
        output(static_cast<Storage*>(call.y)),
        call_(call) {}

  static DEPLOYNORM_INLINE void accumulate(const Vector*, const Vector* in, Vector* sums) { sums[0] += in[0] * in[0]; }

  static DEPLOYNORM_INLINE Vector apply(const Vector* of, const Vector* in) {
    Vector value = in[0] * of[kScale] + of[kBeta];
    if (kResidual) value += in[kInputs - 1];
    return value < of[kTau] ? of[kTau] : value;  // a NaN is not less than tau, and so stays
  }

  void before(const Column&, State&) const {}

  void after(const Column& at, const double (*sums)[kWidth], State& state) const {
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma) + at.channel;
    const Arithmetic* beta = static_cast<const Arithmetic*>(call_.beta) + at.channel;
    const Arithmetic* tau = static_cast<const Arithmetic*>(call_.tau) + at.channel;
    const Arithmetic* eps = static_cast<const Arithmetic*>(call_.eps) + at.channel;
    const double share = 1.0 / static_cast<double>(call_.spatial);
    Arithmetic rstd[kWidth];
#pragma omp simd
    for (int j = 0; j < at.width; ++j) {
      rstd[j] = 1 / square_root(static_cast<Arithmetic>(sums[0][j] * share) + eps[j]);
      state[kScale][j] = gamma[j] * rstd[j];
      state[kBeta][j] = beta[j];
      state[kTau][j] = tau[j];
    }
    if (call_.rstd == nullptr) return;
    Arithmetic* saved = static_cast<Arithmetic*>(call_.rstd) + at.statistic;
    for (int j = 0; j < at.width; ++j) saved[j] = rstd[j];
  }

 private:
  const deploynorm_frn& call_;
};

template <typename Element, bool kResidual>
void run(const deploynorm_frn& call, const Threads& threads) {
  const Forward<Element, kResidual> forward(call);
  Columns<Forward<Element, kResidual>>(forward, call, threads).run();
}

}  // namespace

int DEPLOYNORM_VARIANT(const deploynorm_frn& call, deploynorm_parallel_for parallel_for, void* host) {
  return run_with_type(call.type, [&](auto element) {
    if (call.samples == 0 || call.channels == 0 || call.spatial == 0) return;
    const deploynorm_frn flat = side_by_side_if_flat(call);
    (call.residual == nullptr ? run<decltype(element), false> : run<decltype(element), true>)(flat,
                                                                                              {parallel_for, host});
  });
}

}  // namespace deploynorm

// The backward pass on a CPU, compiled once for each instruction set as the forward pass is.

#include "columns.h"
#include "element.h"
#include "frn.h"
#include "rows.h"
#include "sizes.h"

namespace deploynorm {
namespace {

// The sums over a column. g is dy where y is not below the threshold, and 0 where it is clamped to it.
enum { kSumG, kSumClamped, kDot, kGradientSums };  // of g, of dy - g, of g * x

template <typename Element_>
class Backward {
 public:
  using Element = Element_;
  using Arithmetic = typename Element::Arithmetic;
  using Storage = typename Element::Storage;
  using Vector = typename Element::Vector;
  static constexpr int kInputs = 2, kSummed = 2;  // dy, x
  static constexpr int kSums = kGradientSums;
  static constexpr int kUnroll = sizeof(Storage) == 2 ? 1 : 2;  // a conversion takes longer than an addition
  enum { kScale, kBeta, kTau, kXCoefficient, kCoefficients, kBefore = kXCoefficient };
  using State = Arithmetic[kCoefficients][kWidth];

  const Storage* inputs[kInputs];
  Storage* output;

  Backward(const deploynorm_frn_backward& call, double* sums)
      : inputs{static_cast<const Storage*>(call.dy), static_cast<const Storage*>(call.x)},
        output(static_cast<Storage*>(call.dx)),
        call_(call),
        sums_(sums) {}

  // By the operations of the forward pass, so that each element is on the side of its threshold on which it was there.
  static DEPLOYNORM_INLINE auto clamped(const Vector* of, Vector x) { return x * of[kScale] + of[kBeta] < of[kTau]; }

  static DEPLOYNORM_INLINE void accumulate(const Vector* of, const Vector* in, Vector* sums) {
    const auto is_clamped = clamped(of, in[1]);
    const Vector g = is_clamped ? Vector{} : in[0];
    sums[kSumG] += g;
    sums[kSumClamped] += is_clamped ? in[0] : Vector{};
    sums[kDot] += g * in[1];
  }

  static DEPLOYNORM_INLINE Vector apply(const Vector* of, const Vector* in) {
    const Vector g = clamped(of, in[1]) ? Vector{} : in[0];
    return of[kScale] * (g - of[kXCoefficient] * in[1]);
  }

  void before(const Column& at, State& state) const {
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma) + at.channel;
    const Arithmetic* beta = static_cast<const Arithmetic*>(call_.beta) + at.channel;
    const Arithmetic* tau = static_cast<const Arithmetic*>(call_.tau) + at.channel;
    const Arithmetic* rstd = static_cast<const Arithmetic*>(call_.rstd) + at.statistic;
    for (int j = 0; j < at.width; ++j) {
      state[kScale][j] = gamma[j] * rstd[j];
      state[kBeta][j] = beta[j];
      state[kTau][j] = tau[j];
    }
  }

  void after(const Column& at, const double (*sums)[kWidth], State& state) const {
    const int64_t statistics = call_.samples * call_.channels;
    for (int sum = 0; sum < kSums; ++sum) {
      for (int j = 0; j < at.width; ++j) sums_[sum * statistics + at.statistic + j] = sums[sum][j];
    }
    const Arithmetic* rstd = static_cast<const Arithmetic*>(call_.rstd) + at.statistic;
    const double share = 1.0 / static_cast<double>(call_.spatial);
    for (int j = 0; j < at.width; ++j) {
      // rstd * x is of the size of 1; the powers of rstd alone may be out of range.
      state[kXCoefficient][j] = rstd[j] * static_cast<Arithmetic>(rstd[j] * sums[kDot][j] * share);
    }
  }

  // The gradients of the parameters, from the sums of their planes.
  void add_up_samples() const {
    const int64_t channels = call_.channels, statistics = call_.samples * channels;
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma);
    const Arithmetic* rstd = static_cast<const Arithmetic*>(call_.rstd);
    for (int64_t channel = 0; channel < channels; ++channel) {
      double dgamma = 0, dbeta = 0, dtau = 0, deps = 0;
      for (int64_t sample = 0; sample < call_.samples; ++sample) {
        const int64_t at = sample * channels + channel;
        const double root = rstd[at], product = root * sums_[kDot * statistics + at];
        dgamma += product;
        dbeta += sums_[kSumG * statistics + at];
        dtau += sums_[kSumClamped * statistics + at];
        deps -= root * root * product;
      }
      static_cast<Arithmetic*>(call_.dgamma)[channel] = static_cast<Arithmetic>(dgamma);
      static_cast<Arithmetic*>(call_.dbeta)[channel] = static_cast<Arithmetic>(dbeta);
      static_cast<Arithmetic*>(call_.dtau)[channel] = static_cast<Arithmetic>(dtau);
      static_cast<Arithmetic*>(call_.deps)[channel] = static_cast<Arithmetic>(deps * gamma[channel] / 2);
    }
  }

 private:
  const deploynorm_frn_backward& call_;
  double* sums_;  // [kSums][samples][channels]
};

}  // namespace

int DEPLOYNORM_VARIANT(const deploynorm_frn_backward& call, void* workspace, deploynorm_parallel_for parallel_for,
                       void* host) {
  return run_with_type(call.type, [&](auto element) {
    double* sums = static_cast<double*>(workspace);
    deploynorm_frn_backward flat = side_by_side_if_flat(call);
    if (flat.spatial == 0) flat.samples = 0;  // there is nothing to sum, and the forward pass wrote no rstd
    const Backward<decltype(element)> backward(flat, sums);
    if (flat.samples > 0 && flat.channels > 0) {
      Columns<Backward<decltype(element)>>(backward, flat, {parallel_for, host}).run();
    }
    backward.add_up_samples();
  });
}

}  // namespace deploynorm

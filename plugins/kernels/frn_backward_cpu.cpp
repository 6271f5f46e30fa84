// The backward pass on a CPU, compiled once for each instruction set as the forward pass is.

#include "columns.h"
#include "element.h"
#include "frn.h"
#include "gradients.h"
#include "sizes.h"

namespace deploynorm {
namespace {

template <typename Element>
class Backward {
  using Storage = typename Element::Storage;
  using Arithmetic = typename Element::Arithmetic;

 public:
  static constexpr int kSums = kGradientSums;
  using State = Slope<Arithmetic>;

  Backward(const deploynorm_frn_backward& call, double* sums) : call_(call), sums_(sums) {}

  void reduce(const Column& at, int64_t begin, int64_t rows, double (*sums)[kWidth]) const {
    State slope;
    load(at, &slope);
    const int64_t lanes = call_.lanes;
    const Storage* dy = static_cast<const Storage*>(call_.dy) + at.offset + begin * lanes;
    const Storage* x = static_cast<const Storage*>(call_.x) + at.offset + begin * lanes;
    if (lanes == 1) {
      for (int j = 0; j < at.width; ++j) {
        const int64_t plane = j * call_.spatial;
        add_sums_of_plane<Element>(gradient_of_channel<Element>(slope, j), dy + plane, x + plane, rows, j, sums);
      }
      return;
    }
    using Sums = Arithmetic(*)[kWidth];
    reduce_tiles<Element, kSums>(
        tile_rows(call_.spatial, at.width), rows, at.width, sums,
        [&](int64_t row, int64_t count, int first, auto vectors, Sums partial) {
          add_sums_of_lanes<Element, vectors>(slope, first, dy, x, row, count, lanes, partial);
        },
        [&](int64_t row, int64_t count, int first, int some, Sums partial) {
          add_sums_of_some_lanes<Element>(slope, first, some, dy, x, row, count, lanes, partial);
        });
  }

  void prepare(const Column& at, const double (*sums)[kWidth], State* slope) const {
    load(at, slope);
    const int64_t statistics = call_.samples * call_.channels;
    for (int sum = 0; sum < kSums; ++sum) {
      for (int j = 0; j < at.width; ++j) sums_[sum * statistics + at.statistic + j] = sums[sum][j];
    }
    const Arithmetic* rstd = static_cast<const Arithmetic*>(call_.rstd) + at.statistic;
    const double share = 1.0 / static_cast<double>(call_.spatial);
    for (int j = 0; j < at.width; ++j) {
      // rstd * x is of the size of 1; the powers of rstd alone may be out of range.
      const double mean = rstd[j] * sums[kProduct][j] * share;
      slope->pull[j] = slope->scale[j] * (rstd[j] * static_cast<Arithmetic>(mean));
    }
  }

  void map(const Column& at, const State& slope, int64_t begin, int64_t rows) const {
    const int64_t lanes = call_.lanes;
    const int64_t offset = at.offset + begin * lanes;
    const Storage* dy = static_cast<const Storage*>(call_.dy) + offset;
    const Storage* x = static_cast<const Storage*>(call_.x) + offset;
    Storage* dx = static_cast<Storage*>(call_.dx) + offset;
    if (lanes == 1) {
      for (int j = 0; j < at.width; ++j) {
        const int64_t plane = j * call_.spatial;
        gradient_plane<Element>(gradient_of_channel<Element>(slope, j), dy + plane, x + plane, dx + plane, rows);
      }
      return;
    }
    over_tiles<Element>(
        tile_rows(call_.spatial, at.width), rows, at.width,
        [&](int64_t row, int64_t count, int first, auto vectors) {
          gradient_lanes<Element, vectors>(slope, first, dy, x, dx, row, count, lanes);
        },
        [&](int64_t row, int64_t count, int first, int some) {
          const Gradient<Element> gradient = gradient_of_lanes<Element>(slope, first);
          for (int64_t i = row; i < row + count; ++i) gradient.some(dy, x, dx, i * lanes + first, some);
        });
  }

  // The gradients of channels `begin` to `end`, from the sums of their planes.
  void add_up_samples(int64_t begin, int64_t end) const {
    const int64_t channels = call_.channels, statistics = call_.samples * channels;
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma);
    const Arithmetic* rstd = static_cast<const Arithmetic*>(call_.rstd);
    for (int64_t channel = begin; channel < end; ++channel) {
      double dgamma = 0, dbeta = 0, dtau = 0, deps = 0;
      for (int64_t sample = 0; sample < call_.samples; ++sample) {
        const int64_t at = sample * channels + channel;
        const double root = rstd[at], product = root * sums_[kProduct * statistics + at];
        dgamma += product;
        dbeta += sums_[kKept * statistics + at];
        dtau += sums_[kDropped * statistics + at];
        deps -= root * root * product;
      }
      static_cast<Arithmetic*>(call_.dgamma)[channel] = static_cast<Arithmetic>(dgamma);
      static_cast<Arithmetic*>(call_.dbeta)[channel] = static_cast<Arithmetic>(dbeta);
      static_cast<Arithmetic*>(call_.dtau)[channel] = static_cast<Arithmetic>(dtau);
      static_cast<Arithmetic*>(call_.deps)[channel] = static_cast<Arithmetic>(deps * gamma[channel] / 2);
    }
  }

 private:
  void load(const Column& at, State* slope) const {
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma) + at.channel;
    const Arithmetic* beta = static_cast<const Arithmetic*>(call_.beta) + at.channel;
    const Arithmetic* tau = static_cast<const Arithmetic*>(call_.tau) + at.channel;
    const Arithmetic* rstd = static_cast<const Arithmetic*>(call_.rstd) + at.statistic;
    for (int j = 0; j < at.width; ++j) {
      slope->scale[j] = gamma[j] * rstd[j];
      slope->beta[j] = beta[j];
      slope->tau[j] = tau[j];
      slope->pull[j] = 0;
    }
  }

  const deploynorm_frn_backward& call_;
  double* sums_;  // [kSums][samples][channels]
};

template <typename Element>
void run(const deploynorm_frn_backward& call, double* sums, const Threads& threads) {
  const deploynorm_frn_backward flat = in_lanes_if_flat(call);
  const Backward<Element> backward(flat, sums);
  if (flat.samples > 0 && flat.channels > 0 && flat.spatial > 0) {
    Columns<Backward<Element>>(backward, flat, threads).run();
  } else {
    for (int64_t i = 0; i < kGradientSums * flat.samples * flat.channels; ++i) sums[i] = 0;
  }
  backward.add_up_samples(0, flat.channels);
}

}  // namespace

int DEPLOYNORM_VARIANT(const deploynorm_frn_backward& call, void* workspace, deploynorm_parallel_for parallel_for,
                       void* host) {
  const Threads threads = {parallel_for, host};
  double* sums = static_cast<double*>(workspace);
  switch (call.type) {
    case DEPLOYNORM_FLOAT32:
      run<Float32>(call, sums, threads);
      return 0;
    case DEPLOYNORM_FLOAT64:
      run<Float64>(call, sums, threads);
      return 0;
    case DEPLOYNORM_FLOAT16:
      run<Float16>(call, sums, threads);
      return 0;
    case DEPLOYNORM_BFLOAT16:
      run<BFloat16>(call, sums, threads);
      return 0;
    default:
      return 1;
  }
}

}  // namespace deploynorm

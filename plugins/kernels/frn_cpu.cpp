// The forward pass on a CPU. Compiled once for each instruction set, as the function DEPLOYNORM_VARIANT;
// frn_cpu_dispatch.cpp chooses. All else is local to the file, so that the linker never puts code of one instruction
// set into another.

#include <math.h>

#include "affine.h"
#include "columns.h"
#include "element.h"
#include "frn.h"
#include "sizes.h"
#include "squares.h"

namespace deploynorm {
namespace {

float square_root(float value) { return sqrtf(value); }
double square_root(double value) { return sqrt(value); }

template <typename Element>
class Forward {
  using Storage = typename Element::Storage;
  using Arithmetic = typename Element::Arithmetic;

 public:
  static constexpr int kSums = 1;
  using State = Affine<Arithmetic>;

  explicit Forward(const deploynorm_frn& call) : call_(call) {}

  void reduce(const Column& at, int64_t begin, int64_t rows, double (*sums)[kWidth]) const {
    const int64_t lanes = call_.lanes;
    const Storage* x = static_cast<const Storage*>(call_.x) + at.offset + begin * lanes;
    if (lanes == 1) {
      for (int j = 0; j < at.width; ++j) sums[0][j] += squares_of_plane<Element>(x + j * call_.spatial, rows);
      return;
    }
    using Sums = Arithmetic(*)[kWidth];
    reduce_tiles<Element, kSums>(
        tile_rows(call_.spatial, at.width), rows, at.width, sums,
        [&](int64_t row, int64_t count, int first, auto vectors, Sums partial) {
          add_squares_of_lanes<Element, vectors>(x + row * lanes + first, count, lanes, partial[0] + first);
        },
        [&](int64_t row, int64_t count, int first, int some, Sums partial) {
          add_squares_of_some_lanes<Element>(x + row * lanes + first, count, lanes, some, partial[0] + first);
        });
  }

  void prepare(const Column& at, const double (*sums)[kWidth], State* state) const {
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma) + at.channel;
    const Arithmetic* beta = static_cast<const Arithmetic*>(call_.beta) + at.channel;
    const Arithmetic* tau = static_cast<const Arithmetic*>(call_.tau) + at.channel;
    const Arithmetic* eps = static_cast<const Arithmetic*>(call_.eps) + at.channel;
    const double share = 1.0 / static_cast<double>(call_.spatial);
    Arithmetic rstd[kWidth];
#pragma omp simd
    for (int j = 0; j < at.width; ++j) {
      rstd[j] = 1 / square_root(static_cast<Arithmetic>(sums[0][j] * share) + eps[j]);
      state->scale[j] = gamma[j] * rstd[j];
      state->beta[j] = beta[j];
      state->tau[j] = tau[j];
    }
    if (call_.rstd == nullptr) return;
    Arithmetic* kept = static_cast<Arithmetic*>(call_.rstd) + at.statistic;
    for (int j = 0; j < at.width; ++j) kept[j] = rstd[j];
  }

  void map(const Column& at, const State& affine, int64_t begin, int64_t rows) const {
    if (call_.residual == nullptr) {
      map_to<false>(at, affine, begin, rows);
    } else {
      map_to<true>(at, affine, begin, rows);
    }
  }

 private:
  template <bool kResidual>
  void map_to(const Column& at, const State& affine, int64_t begin, int64_t rows) const {
    const int64_t lanes = call_.lanes;
    const int64_t offset = at.offset + begin * lanes;
    const Storage* x = static_cast<const Storage*>(call_.x) + offset;
    const Storage* residual = kResidual ? static_cast<const Storage*>(call_.residual) + offset : nullptr;
    Storage* y = static_cast<Storage*>(call_.y) + offset;
    if (lanes == 1) {
      for (int j = 0; j < at.width; ++j) {
        const int64_t plane = j * call_.spatial;
        map_plane<Element, kResidual>(map_of_channel<Element, kResidual>(affine, j), x + plane,
                                      residual + (kResidual ? plane : 0), y + plane, rows);
      }
      return;
    }
    over_tiles<Element>(
        tile_rows(call_.spatial, at.width), rows, at.width,
        [&](int64_t row, int64_t count, int first, auto vectors) {
          map_lanes<Element, vectors, kResidual>(affine, first, x, residual, y, row, count, lanes);
        },
        [&](int64_t row, int64_t count, int first, int some) {
          const Map<Element, kResidual> map = map_of_lanes<Element, kResidual>(affine, first);
          for (int64_t i = row; i < row + count; ++i) map.some(x, residual, y, i * lanes + first, some);
        });
  }

  const deploynorm_frn& call_;
};

template <typename Element>
void run(const deploynorm_frn& call, const Threads& threads) {
  if (call.samples == 0 || call.channels == 0 || call.spatial == 0) return;
  const deploynorm_frn flat = in_lanes_if_flat(call);
  const Forward<Element> forward(flat);
  Columns<Forward<Element>>(forward, flat, threads).run();
}

}  // namespace

int DEPLOYNORM_VARIANT(const deploynorm_frn& call, deploynorm_parallel_for parallel_for, void* host) {
  const Threads threads = {parallel_for, host};
  switch (call.type) {
    case DEPLOYNORM_FLOAT32:
      run<Float32>(call, threads);
      return 0;
    case DEPLOYNORM_FLOAT64:
      run<Float64>(call, threads);
      return 0;
    case DEPLOYNORM_FLOAT16:
      run<Float16>(call, threads);
      return 0;
    case DEPLOYNORM_BFLOAT16:
      run<BFloat16>(call, threads);
      return 0;
    default:
      return 1;
  }
}

}  // namespace deploynorm

// The CPU kernel. Compiled once for each instruction set, as the function DEPLOYNORM_VARIANT; frn_cpu_dispatch.cpp
// chooses. All else is local to the file, so that the linker never puts code of one instruction set into another.
//
// The unit of work is a column: all positions of a few adjacent channels of one sample, be these planes one after the
// other (NCHW) or lanes side by side. It is read twice, for the sums of squares and for the result; the second time it
// comes out of a cache. What is done once a channel is done for the whole column at once, in vectors.

#include <math.h>

#include "affine.h"
#include "element.h"
#include "frn.h"
#include "sizes.h"
#include "squares.h"

namespace deploynorm {
namespace {

float square_root(float value) { return sqrtf(value); }
double square_root(double value) { return sqrt(value); }

template <typename Element>
class Kernel {
  using Storage = typename Element::Storage;
  using Arithmetic = typename Element::Arithmetic;
  static constexpr int kLanes = Element::kLanes;

  struct Column {
    int64_t offset;  // of its first element
    int64_t channel;
    int width;
  };

 public:
  Kernel(const deploynorm_frn& call, deploynorm_parallel_for parallel_for, void* host)
      : call_(call), parallel_for_(parallel_for), host_(host) {
    // One position a channel: NCHW and NHWC are the same, and lanes are the fast way through it.
    if (call_.spatial == 1 && call_.lanes == 1) call_.lanes = call_.channels;
    planes_ = call_.lanes == 1;
    channels_of_group_ = planes_ ? call_.channels : call_.lanes;
    groups_of_sample_ = planes_ ? 1 : call_.channels / call_.lanes;
    width_ = smaller(channels_of_group_, kWidth);
    if (planes_) width_ = smaller(width_, larger(1, kCachedElements / call_.spatial));
    columns_of_group_ = divided_up(channels_of_group_, width_);
    columns_ = call_.samples * groups_of_sample_ * columns_of_group_;
    segment_rows_ = larger(kSegment / width_, divided_up(call_.spatial, kMaxSegments));
    segments_ = divided_up(call_.spatial, segment_rows_);
  }

  void run() {
    if (columns_ < kManyColumns && segments_ > 1) {
      for (int64_t index = 0; index < columns_; ++index) run_column_on_all_threads(index);
      return;
    }
    columns_of_task_ = larger(1, kTask / (call_.spatial * width_));
    share(
        divided_up(columns_, columns_of_task_),
        [](void* self, int64_t task) { static_cast<Kernel*>(self)->run_columns(task); }, this);
  }

 private:
  void share(int64_t count, deploynorm_task task, void* data) const {
    if (parallel_for_ != nullptr && count > 1) {
      parallel_for_(host_, count, task, data);
      return;
    }
    for (int64_t index = 0; index < count; ++index) task(data, index);
  }

  Column column(int64_t index) const {
    const int64_t group = index / columns_of_group_;
    const int64_t first = index % columns_of_group_ * width_;
    return {group * call_.spatial * channels_of_group_ + first * (planes_ ? call_.spatial : 1),
            group % groups_of_sample_ * channels_of_group_ + first,
            static_cast<int>(smaller(width_, channels_of_group_ - first))};
  }

  void run_columns(int64_t task) const {
    const int64_t end = smaller(columns_, (task + 1) * columns_of_task_);
    for (int64_t index = task * columns_of_task_; index < end; ++index) {
      const Column at = column(index);
      double sums[kWidth];
      for (int j = 0; j < at.width; ++j) sums[j] = 0;
      add_squares(at, 0, call_.spatial, sums);
      apply(at, affine(at, sums), 0, call_.spatial);
    }
  }

  struct SharedColumn {
    const Kernel* kernel;
    Column at;
    double sums[kMaxSegments][kWidth];
    Affine<Arithmetic> affine;
  };

  void run_column_on_all_threads(int64_t index) const {
    SharedColumn shared = {this, column(index), {}, {}};
    share(
        segments_,
        [](void* data, int64_t segment) {
          SharedColumn& column = *static_cast<SharedColumn*>(data);
          const int64_t rows = column.kernel->segment_rows_;
          column.kernel->add_squares(column.at, segment * rows, (segment + 1) * rows, column.sums[segment]);
        },
        &shared);
    double sums[kWidth] = {};
    for (int64_t segment = 0; segment < segments_; ++segment) {
      for (int j = 0; j < shared.at.width; ++j) sums[j] += shared.sums[segment][j];
    }
    shared.affine = affine(shared.at, sums);
    share(
        segments_,
        [](void* data, int64_t segment) {
          SharedColumn& column = *static_cast<SharedColumn*>(data);
          const int64_t rows = column.kernel->segment_rows_;
          column.kernel->apply(column.at, column.affine, segment * rows, (segment + 1) * rows);
        },
        &shared);
  }

  // Of rows `begin` to `end` of a column, or to its own end.
  void add_squares(const Column& at, int64_t begin, int64_t end, double* sums) const {
    const int64_t rows = smaller(end, call_.spatial) - begin;
    const int64_t lanes = call_.lanes;
    const Storage* x = static_cast<const Storage*>(call_.x) + at.offset + begin * lanes;
    if (planes_) {
      for (int j = 0; j < at.width; ++j) {
        sums[j] += squares_of_plane<Element>(x + j * call_.spatial, rows);
      }
      return;
    }
    int first = 0;
    if (at.width == kWidth) {
      add_squares_of_lanes<Element, kWidth / kLanes>(x, rows, lanes, sums);
      first = kWidth;
    }
    for (; first + kBlockWidth <= at.width; first += kBlockWidth) {
      add_squares_of_lanes<Element, kBlockWidth / kLanes>(x + first, rows, lanes, sums + first);
    }
    for (; first + kLanes <= at.width; first += kLanes) {
      add_squares_of_lanes<Element, 1>(x + first, rows, lanes, sums + first);
    }
    if (first < at.width) {
      add_squares_of_some_lanes<Element>(x + first, rows, lanes, at.width - first, sums + first);
    }
  }

  Affine<Arithmetic> affine(const Column& at, const double* sums) const {
    Affine<Arithmetic> result;
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma) + at.channel;
    const Arithmetic* beta = static_cast<const Arithmetic*>(call_.beta) + at.channel;
    const Arithmetic* tau = static_cast<const Arithmetic*>(call_.tau) + at.channel;
    const Arithmetic* eps = static_cast<const Arithmetic*>(call_.eps) + at.channel;
    const double share = 1.0 / static_cast<double>(call_.spatial);
#pragma omp simd
    for (int j = 0; j < at.width; ++j) {
      result.scale[j] = gamma[j] / square_root(static_cast<Arithmetic>(sums[j] * share) + eps[j]);
      result.beta[j] = beta[j];
      result.tau[j] = tau[j];
    }
    return result;
  }

  // Rows `begin` to `end` of a column, or to its own end.
  void apply(const Column& at, const Affine<Arithmetic>& affine, int64_t begin, int64_t end) const {
    const int64_t rows = smaller(end, call_.spatial) - begin;
    if (call_.residual == nullptr) {
      apply_to<false>(at, affine, begin, rows);
    } else {
      apply_to<true>(at, affine, begin, rows);
    }
  }

  template <bool kResidual>
  void apply_to(const Column& at, const Affine<Arithmetic>& affine, int64_t begin, int64_t rows) const {
    const int64_t lanes = call_.lanes;
    const int64_t offset = at.offset + begin * lanes;
    const Storage* x = static_cast<const Storage*>(call_.x) + offset;
    const Storage* residual = kResidual ? static_cast<const Storage*>(call_.residual) + offset : nullptr;
    Storage* y = static_cast<Storage*>(call_.y) + offset;
    if (planes_) {
      for (int j = 0; j < at.width; ++j) {
        const int64_t plane = j * call_.spatial;
        map_plane<Element, kResidual>(map_of_channel<Element, kResidual>(affine, j), x + plane,
                                      residual + (kResidual ? plane : 0), y + plane, rows);
      }
      return;
    }
    int first = 0;
    if (at.width == kWidth) {
      map_lanes<Element, kWidth / kLanes, kResidual>(affine, first, x, residual, y, rows, lanes);
      first = kWidth;
    }
    for (; first + kBlockWidth <= at.width; first += kBlockWidth) {
      map_lanes<Element, kBlockWidth / kLanes, kResidual>(affine, first, x, residual, y, rows, lanes);
    }
    for (; first + kLanes <= at.width; first += kLanes) {
      map_lanes<Element, 1, kResidual>(affine, first, x, residual, y, rows, lanes);
    }
    if (first < at.width) {
      const Map<Element, kResidual> map = map_of_lanes<Element, kResidual>(affine, first);
      for (int64_t row = 0; row < rows; ++row) map.some(x, residual, y, row * lanes + first, at.width - first);
    }
  }

  deploynorm_frn call_;
  deploynorm_parallel_for parallel_for_;
  void* host_;
  bool planes_;                // lanes == 1
  int64_t channels_of_group_;  // a group is a sample's planes, or its channels that share rows
  int64_t groups_of_sample_;
  int64_t width_;  // channels of a column; the last of a group may have fewer
  int64_t columns_of_group_;
  int64_t columns_;       // of the tensor
  int64_t segment_rows_;  // positions of a segment
  int64_t segments_;      // of a column
  int64_t columns_of_task_ = 1;
};

template <typename Element>
void run(const deploynorm_frn& call, deploynorm_parallel_for parallel_for, void* host) {
  if (call.samples == 0 || call.channels == 0 || call.spatial == 0) return;
  Kernel<Element>(call, parallel_for, host).run();
}

}  // namespace

int DEPLOYNORM_VARIANT(const deploynorm_frn& call, deploynorm_parallel_for parallel_for, void* host) {
  switch (call.type) {
    case DEPLOYNORM_FLOAT32:
      run<Float32>(call, parallel_for, host);
      return 0;
    case DEPLOYNORM_FLOAT64:
      run<Float64>(call, parallel_for, host);
      return 0;
    case DEPLOYNORM_FLOAT16:
      run<Float16>(call, parallel_for, host);
      return 0;
    case DEPLOYNORM_BFLOAT16:
      run<BFloat16>(call, parallel_for, host);
      return 0;
    default:
      return 1;
  }
}

}  // namespace deploynorm

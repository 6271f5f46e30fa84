// The CPU kernel. Compiled once for each instruction set, as the function DEPLOYNORM_VARIANT; frn_cpu_dispatch.cpp
// chooses. All else is local to the file, so that the linker never puts code of one instruction set into another.
//
// The unit of work is a column: all positions of a few adjacent channels of one sample, be these planes one after the
// other (NCHW) or lanes side by side. It is read twice, for the sums of squares and for the result; the second time it
// comes out of a cache. What is done once a channel is done for the whole column at once, in vectors.

#include <math.h>

#include "element.h"
#include "frn.h"

// Where a call would pass vectors through memory.
#define DEPLOYNORM_INLINE inline __attribute__((always_inline))

namespace deploynorm {
namespace {

// Channels of a column at most: as lanes four cache lines of float32, since a processor fetches single lines out of
// long rows slowly. Of planes only so many as stay in the first-level cache, which holds kCachedElements of x and of y.
constexpr int kWidth = 64;
constexpr int64_t kCachedElements = 4096;
// ONNX Runtime's larger block, the width next to the largest that is worth code of its own.
constexpr int kBlockWidth = 16;
// Elements summed in the arithmetic type before going on in float64: of four vectors of float32, each lane adds 256 of
// them, or 512.
constexpr int64_t kBlock = 8192;
// Fewer columns than kManyColumns are shared out among the threads in segments. The sizes alone decide, so that the
// result does not depend on the number of threads.
constexpr int64_t kSegment = 4 * kBlock;
constexpr int kMaxSegments = 64;
constexpr int64_t kManyColumns = 16;
// Elements below which a task is not worth handing to another thread.
constexpr int64_t kTask = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
float square_root(float value) { return sqrtf(value); }
double square_root(double value) { return sqrt(value); }

// ---- Sums of squares

// True in the lanes from `first` on, as vectors have it.
template <typename Element>
auto lanes_from(int first) {
  typename Element::Vector lane;
  for (int i = 0; i < Element::kLanes; ++i) lane[i] = static_cast<typename Element::Arithmetic>(i);
  return lane >= static_cast<typename Element::Arithmetic>(first);
}

// Halves are added until one lane is left; compilers add the lanes one after the other.
template <typename Scalar, int kLanes>
Scalar sum_of_lanes(typename VectorOf<Scalar, kLanes>::Type vector) {
  if constexpr (kLanes == 1) {
    return vector[0];
  } else {
    typename VectorOf<Scalar, kLanes / 2>::Type halves[2];
    __builtin_memcpy(halves, &vector, sizeof vector);
    return sum_of_lanes<Scalar, kLanes / 2>(halves[0] + halves[1]);
  }
}

template <typename Element>
typename Element::Arithmetic sum_of_lanes(typename Element::Vector vector) {
  return sum_of_lanes<typename Element::Arithmetic, Element::kLanes>(vector);
}

// Of at most kBlock adjacent elements. Four partial sums hide the latency of a fused multiply-add.
template <typename Element>
typename Element::Arithmetic squares_of_block(const typename Element::Storage* x, int64_t count) {
  using Vector = typename Element::Vector;
  constexpr int kLanes = Element::kLanes;
  if (count < kLanes) {
    const Vector value = load_some<Element>(x, static_cast<int>(count));
    return sum_of_lanes<Element>(value * value);
  }
  Vector sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    const Vector value0 = Element::load(x + i), value1 = Element::load(x + i + kLanes);
    const Vector value2 = Element::load(x + i + 2 * kLanes), value3 = Element::load(x + i + 3 * kLanes);
    sum0 += value0 * value0;
    sum1 += value1 * value1;
    sum2 += value2 * value2;
    sum3 += value3 * value3;
  }
  for (; i + kLanes <= count; i += kLanes) {
    const Vector value = Element::load(x + i);
    sum0 += value * value;
  }
  if (i < count) {
    // One more vector, which ends with the block; what it has in common with the one before is left out.
    const Vector value = Element::load(x + count - kLanes);
    sum1 += lanes_from<Element>(static_cast<int>(kLanes - (count - i))) ? value * value : Vector{};
  }
  return sum_of_lanes<Element>((sum0 + sum1) + (sum2 + sum3));
}

// Of any number of adjacent elements.
template <typename Element>
double squares_of_plane(const typename Element::Storage* x, int64_t count) {
  double sum = 0;
  for (; count > 0; x += kBlock, count -= kBlock) sum += squares_of_block<Element>(x, smaller(count, kBlock));
  return sum;
}

// Of each of kVectors vectors of lanes, over `rows` rows that lie `stride` elements apart; added to sums.
template <typename Element, int kVectors>
void add_squares_of_lanes(const typename Element::Storage* x, int64_t rows, int64_t stride, double* sums) {
  using Vector = typename Element::Vector;
  constexpr int kLanes = Element::kLanes;
  constexpr int kRows = kVectors >= 4 ? 1 : 4 / kVectors;
  while (rows > 0) {
    const int64_t block = smaller(rows, kBlock / kBlockWidth);
    Vector partial[kRows][kVectors] = {};
    int64_t row = 0;
    for (; row + kRows <= block; row += kRows) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          const Vector value = Element::load(x + (row + r) * stride + v * kLanes);
          partial[r][v] += value * value;
        }
      }
    }
    for (; row < block; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector value = Element::load(x + row * stride + v * kLanes);
        partial[0][v] += value * value;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      Vector total = partial[0][v];
      for (int r = 1; r < kRows; ++r) total += partial[r][v];
      for (int lane = 0; lane < kLanes; ++lane) sums[v * kLanes + lane] += total[lane];
    }
    x += block * stride;
    rows -= block;
  }
}

// The same for fewer lanes than a vector has.
template <typename Element>
void add_squares_of_some_lanes(const typename Element::Storage* x, int64_t rows, int64_t stride, int lanes,
                               double* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    const typename Element::Vector value = load_some<Element>(x + row * stride, lanes);
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += value[lane] * value[lane];
  }
}

// ---- From x to y

// What turns a channel's x into y, for each channel of a column.
template <typename Arithmetic>
struct Affine {
  Arithmetic scale[kWidth];  // gamma / sqrt(mean + eps)
  Arithmetic beta[kWidth];
  Arithmetic tau[kWidth];
};

// The same in a vector, be it of one channel or of many.
template <typename Element, bool kResidual>
struct Map {
  using Storage = typename Element::Storage;
  using Vector = typename Element::Vector;
  static constexpr int kLanes = Element::kLanes;

  Vector scale, beta, tau;

  Vector of(Vector x, Vector residual) const {
    Vector value = x * scale + beta;
    if (kResidual) value += residual;
    return value < tau ? tau : value;  // a NaN is not less than tau, and so stays
  }

  Vector at(const Storage* x, const Storage* residual, int64_t i) const {
    return of(Element::load(x + i), kResidual ? Element::load(residual + i) : Vector{});
  }

  void some(const Storage* x, const Storage* residual, Storage* y, int64_t i, int count) const {
    const Vector addend = kResidual ? load_some<Element>(residual + i, count) : Vector{};
    store_some<Element>(of(load_some<Element>(x + i, count), addend), y + i, count);
  }
};

template <typename Element, bool kResidual>
Map<Element, kResidual> map_of_channel(const Affine<typename Element::Arithmetic>& affine, int channel) {
  using Vector = typename Element::Vector;
  return {affine.scale[channel] - Vector{}, affine.beta[channel] - Vector{}, affine.tau[channel] - Vector{}};
}

template <typename Element, bool kResidual>
Map<Element, kResidual> map_of_lanes(const Affine<typename Element::Arithmetic>& affine, int first) {
  using Vector = typename Element::Vector;
  return {unaligned<Vector>(affine.scale + first), unaligned<Vector>(affine.beta + first),
          unaligned<Vector>(affine.tau + first)};
}

// Adjacent elements of one channel. y may be x or residual.
template <typename Element, bool kResidual>
DEPLOYNORM_INLINE void map_run(const Map<Element, kResidual> map, const typename Element::Storage* x,
                               const typename Element::Storage* residual, typename Element::Storage* y, int64_t count) {
  constexpr int kLanes = Element::kLanes;
  if (count < kLanes) {
    map.some(x, residual, y, 0, static_cast<int>(count));
    return;
  }
  // The last vector overlaps the one before it, so it is read before that is written.
  const typename Element::Vector last = map.at(x, residual, count - kLanes);
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) Element::store(map.at(x, residual, i), y + i);
  Element::store(last, y + count - kLanes);
}

// The same; begins with the end, which the sum of squares has left in the first-level cache.
template <typename Element, bool kResidual>
DEPLOYNORM_INLINE void map_plane(const Map<Element, kResidual> map, const typename Element::Storage* x,
                                 const typename Element::Storage* residual, typename Element::Storage* y,
                                 int64_t count) {
  const int64_t first = larger(0, count - kCachedElements);
  map_run<Element, kResidual>(map, x + first, residual + (kResidual ? first : 0), y + first, count - first);
  if (first > 0) map_run<Element, kResidual>(map, x, residual, y, first);
}

// kVectors vectors of lanes, from lane `first` on, in each of `rows` rows.
template <typename Element, int kVectors, bool kResidual>
void map_lanes(const Affine<typename Element::Arithmetic>& affine, int first, const typename Element::Storage* x,
               const typename Element::Storage* residual, typename Element::Storage* y, int64_t rows, int64_t stride) {
  constexpr int kLanes = Element::kLanes;
  Map<Element, kResidual> maps[kVectors];
  for (int v = 0; v < kVectors; ++v) maps[v] = map_of_lanes<Element, kResidual>(affine, first + v * kLanes);
  for (int64_t row = 0; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row * stride + first + v * kLanes;
      Element::store(maps[v].at(x, residual, i), y + i);
    }
  }
}

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

// The CPU kernel. Compiled once for each instruction set, as the function DEPLOYNORM_VARIANT; frn_cpu_dispatch.cpp
// chooses. All else is local to the file, so that the linker never puts code of one instruction set into another.
//
// The unit of work is a column: all positions of a few adjacent channels of one sample, be these planes one after the
// other (NCHW) or lanes side by side. It is read twice, for the sums of squares and for the result; the second time it
// comes out of a cache. What is done once a channel is done for the whole column at once, in vectors.

#include <math.h>

#include "element.h"
#include "frn.h"

namespace deploynorm {
namespace {

// Channels of a column: a cache line of float32, and a vector of AVX-512; fewer where so many planes would not stay in
// the first-level cache.
constexpr int kWidth = 16;
constexpr int64_t kCachedElements = 4096;
// Independent partial sums: on 4 vectors of AVX-512 they hide the latency of a fused multiply-add.
constexpr int kPartialSums = 64;
// Elements summed in the arithmetic type before going on in float64: a partial sum adds 128 of them.
constexpr int64_t kBlock = 8192;
// Where there are few columns, the threads share each in segments; so that nothing depends on the number of threads,
// a column is always summed by segments.
constexpr int64_t kSegment = 4 * kBlock;
constexpr int kMaxSegments = 64;
constexpr int64_t kManyColumns = 16;
// Elements below which a task is not worth handing to another thread.
constexpr int64_t kTask = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds the squares of `count` adjacent elements, where element i belongs to channel i % W, to sums[0 .. W - 1].
template <typename Element, int W>
void add_squares_dense(const typename Element::Storage* x, int64_t count, double* sums) {
  using Arithmetic = typename Element::Arithmetic;
  while (count > 0) {
    const int64_t block = smaller(count, kBlock);
    const int64_t even = block / kPartialSums * kPartialSums;
    Arithmetic partial[kPartialSums] = {};
    for (int64_t i = 0; i < even; i += kPartialSums) {
#pragma omp simd
      for (int j = 0; j < kPartialSums; ++j) {
        const Arithmetic value = Element::load(x[i + j]);
        partial[j] += value * value;
      }
    }
    if (W == 1) {
      Arithmetic sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int j = 0; j < kPartialSums; ++j) sum += partial[j];
#pragma omp simd reduction(+ : sum)
      for (int64_t i = even; i < block; ++i) {
        const Arithmetic value = Element::load(x[i]);
        sum += value * value;
      }
      sums[0] += sum;
    } else {
      for (int64_t i = even; i < block; i += W) {
#pragma omp simd
        for (int j = 0; j < W; ++j) {
          const Arithmetic value = Element::load(x[i + j]);
          partial[j] += value * value;
        }
      }
      for (int j = 0; j < kPartialSums; ++j) sums[j % W] += partial[j];
    }
    x += block;
    count -= block;
  }
}

// The same for rows that lie `stride` elements apart. W is the width where it is kWidth, else 0.
template <typename Element, int W>
void add_squares_strided(const typename Element::Storage* x, int64_t rows, int64_t stride, int any_width,
                         double* sums) {
  using Arithmetic = typename Element::Arithmetic;
  constexpr int kRows = kPartialSums / kWidth;
  const int width = W == 0 ? any_width : W;
  while (rows > 0) {
    const int64_t block = smaller(rows, kBlock / kWidth);
    Arithmetic partial[kRows][kWidth] = {};
    for (int64_t row = 0; row < block; row += kRows) {
      const int unrolled = static_cast<int>(smaller(kRows, block - row));
      for (int r = 0; r < unrolled; ++r) {
        const typename Element::Storage* from = x + (row + r) * stride;
#pragma omp simd
        for (int j = 0; j < width; ++j) {
          const Arithmetic value = Element::load(from[j]);
          partial[r][j] += value * value;
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < width; ++j) sums[j] += partial[r][j];
    }
    x += block * stride;
    rows -= block;
  }
}

// The four numbers that turn a channel's x into y.
template <typename Arithmetic>
struct Affine {
  Arithmetic scale[kWidth];  // gamma / sqrt(mean + eps)
  Arithmetic beta[kWidth];
  Arithmetic tau[kWidth];
};

// A NaN is not less than tau, and so stays.
template <typename Arithmetic>
inline Arithmetic bounded(Arithmetic value, Arithmetic tau) {
  return value < tau ? tau : value;
}

template <typename Element, bool kResidual>
void apply_plane(const typename Element::Storage* x, const typename Element::Storage* residual,
                 typename Element::Storage* y, int64_t count, typename Element::Arithmetic scale,
                 typename Element::Arithmetic beta, typename Element::Arithmetic tau) {
  using Arithmetic = typename Element::Arithmetic;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    Arithmetic value = Element::load(x[i]) * scale + beta;
    if (kResidual) value += Element::load(residual[i]);
    y[i] = Element::store(bounded(value, tau));
  }
}

// W is the width where it is 8 or 16, else 0.
template <typename Element, int W, bool kResidual>
void apply_rows(const typename Element::Storage* x, const typename Element::Storage* residual,
                typename Element::Storage* y, int64_t rows, int64_t stride, int any_width,
                const Affine<typename Element::Arithmetic>& affine) {
  using Arithmetic = typename Element::Arithmetic;
  const int width = W == 0 ? any_width : W;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = row * stride;
#pragma omp simd
    for (int j = 0; j < width; ++j) {
      Arithmetic value = Element::load(x[at + j]) * affine.scale[j] + affine.beta[j];
      if (kResidual) value += Element::load(residual[at + j]);
      y[at + j] = Element::store(bounded(value, affine.tau[j]));
    }
  }
}

template <typename Element>
class Kernel {
  using Storage = typename Element::Storage;
  using Arithmetic = typename Element::Arithmetic;

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
    const int64_t cached = planes_ ? larger(1, kCachedElements / larger(1, call_.spatial)) : kWidth;
    width_ = smaller(smaller(channels_of_group_, kWidth), cached);
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
    share(divided_up(columns_, columns_of_task_), [](void* self, int64_t task) {
      static_cast<Kernel*>(self)->run_columns(task);
    }, this);
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
      double sums[kWidth] = {};
      for (int64_t segment = 0; segment < segments_; ++segment) add_segment(at, segment, sums);
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
    share(segments_, [](void* data, int64_t segment) {
      SharedColumn& column = *static_cast<SharedColumn*>(data);
      column.kernel->add_segment(column.at, segment, column.sums[segment]);
    }, &shared);
    double sums[kWidth] = {};
    for (int64_t segment = 0; segment < segments_; ++segment) {
      for (int j = 0; j < shared.at.width; ++j) sums[j] += shared.sums[segment][j];
    }
    shared.affine = affine(shared.at, sums);
    share(segments_, [](void* data, int64_t segment) {
      SharedColumn& column = *static_cast<SharedColumn*>(data);
      const int64_t rows = column.kernel->segment_rows_;
      column.kernel->apply(column.at, column.affine, segment * rows, (segment + 1) * rows);
    }, &shared);
  }

  void add_segment(const Column& at, int64_t segment, double* sums) const {
    const int64_t begin = segment * segment_rows_;
    const int64_t rows = smaller(segment_rows_, call_.spatial - begin);
    const int64_t lanes = call_.lanes;
    const Storage* x = static_cast<const Storage*>(call_.x) + at.offset + begin * lanes;
    if (planes_) {
      for (int j = 0; j < at.width; ++j) {
        double sum = 0;
        add_squares_dense<Element, 1>(x + j * call_.spatial, rows, &sum);
        sums[j] += sum;
      }
      return;
    }
    double sum[kWidth] = {};
    if (lanes == 8) {
      add_squares_dense<Element, 8>(x, rows * 8, sum);
    } else if (lanes == 16) {
      add_squares_dense<Element, 16>(x, rows * 16, sum);
    } else if (at.width == kWidth) {
      add_squares_strided<Element, kWidth>(x, rows, lanes, kWidth, sum);
    } else {
      add_squares_strided<Element, 0>(x, rows, lanes, at.width, sum);
    }
    for (int j = 0; j < at.width; ++j) sums[j] += sum[j];
  }

  Affine<Arithmetic> affine(const Column& at, const double* sums) const {
    Affine<Arithmetic> result;
    const Arithmetic* gamma = static_cast<const Arithmetic*>(call_.gamma) + at.channel;
    const Arithmetic* beta = static_cast<const Arithmetic*>(call_.beta) + at.channel;
    const Arithmetic* tau = static_cast<const Arithmetic*>(call_.tau) + at.channel;
    const Arithmetic* eps = static_cast<const Arithmetic*>(call_.eps) + at.channel;
    const double count = static_cast<double>(call_.spatial);
#pragma omp simd
    for (int j = 0; j < at.width; ++j) {
      result.scale[j] = static_cast<Arithmetic>(gamma[j] / sqrt(sums[j] / count + eps[j]));
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
        apply_plane<Element, kResidual>(x + plane, residual + (kResidual ? plane : 0), y + plane, rows,
                                        affine.scale[j], affine.beta[j], affine.tau[j]);
      }
    } else if (at.width == 16) {
      apply_rows<Element, 16, kResidual>(x, residual, y, rows, lanes, 16, affine);
    } else if (at.width == 8) {
      apply_rows<Element, 8, kResidual>(x, residual, y, rows, lanes, 8, affine);
    } else {
      apply_rows<Element, 0, kResidual>(x, residual, y, rows, lanes, at.width, affine);
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

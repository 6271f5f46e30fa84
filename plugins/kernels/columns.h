// How the work on a tensor is cut and shared out among threads, for every pass that first reduces and then maps.
//
// The unit of work is a column: all positions of a few adjacent channels of one sample, be these planes one after the
// other (NCHW) or lanes side by side. It is read twice, for the sums and for the result; the second time it comes out
// of a cache. What is done once a channel is done for the whole column at once, in vectors.

#ifndef DEPLOYNORM_KERNELS_COLUMNS_H_
#define DEPLOYNORM_KERNELS_COLUMNS_H_

#include <type_traits>

#include "frn.h"
#include "sizes.h"

namespace deploynorm {
namespace {

// How many lanes of so many positions stay in the second-level cache; 0: too few to be worth a column of their own.
inline int64_t lanes_in_cache(int64_t spatial) { return kCachedLanes / spatial / kNarrowest * kNarrowest; }

// Rows of a tile: few where they come from memory, which is read in order best.
inline int64_t tile_rows(int64_t spatial, int width) {
  if (width <= kBlockWidth) return kBlockRows;
  return lanes_in_cache(spatial) > 0 ? kTileRows : larger(1, kTileElements / width);
}

struct Column {
  int64_t offset;     // of its first element
  int64_t channel;    // its first
  int64_t statistic;  // that of its first channel, in (samples, channels)
  int width;          // channels
};

// A host's threads, or none.
struct Threads {
  deploynorm_parallel_for parallel_for;
  void* host;

  void share(int64_t count, deploynorm_task task, void* data) const {
    if (parallel_for != nullptr && count > 1) {
      parallel_for(host, count, task, data);
      return;
    }
    for (int64_t index = 0; index < count; ++index) task(data, index);
  }
};

// Runs a pass over all columns of a call. Neither may have a size of 0. A pass has
//   kSums                                       sums of each channel
//   State                                       what these make of a column
//   void reduce(column, begin, rows, sums)      adds those of some of its rows; sums is double[kSums][kWidth]
//   void prepare(column, sums, State*)          once a column
//   void map(column, state, begin, rows)        writes the result in some of its rows
// all const, and called from several threads at once.
template <typename Pass>
class Columns {
 public:
  template <typename Call>
  Columns(const Pass& pass, const Call& call, const Threads& threads)
      : pass_(pass), threads_(threads), channels_(call.channels), spatial_(call.spatial) {
    planes_ = call.lanes == 1;
    channels_of_group_ = planes_ ? call.channels : call.lanes;
    groups_of_sample_ = planes_ ? 1 : call.channels / call.lanes;
    const int64_t cached = planes_ ? larger(1, kCachedElements / spatial_) : lanes_in_cache(spatial_);
    width_ = smaller(channels_of_group_, smaller(kWidth, cached > 0 ? cached : kWidth));
    columns_of_group_ = divided_up(channels_of_group_, width_);
    columns_ = call.samples * groups_of_sample_ * columns_of_group_;
    segment_rows_ = larger(kSegment / width_, divided_up(spatial_, kMaxSegments));
    segments_ = divided_up(spatial_, segment_rows_);
  }

  void run() {
    if (columns_ < kManyColumns && segments_ > 1) {
      for (int64_t index = 0; index < columns_; ++index) run_column_on_all_threads(index);
      return;
    }
    columns_of_task_ = larger(1, kTask / (spatial_ * width_));
    threads_.share(
        divided_up(columns_, columns_of_task_),
        [](void* self, int64_t task) { static_cast<Columns*>(self)->run_columns(task); }, this);
  }

 private:
  Column column(int64_t index) const {
    const int64_t group = index / columns_of_group_;
    const int64_t first = index % columns_of_group_ * width_;
    const int64_t channel = group % groups_of_sample_ * channels_of_group_ + first;
    return {group * spatial_ * channels_of_group_ + first * (planes_ ? spatial_ : 1), channel,
            group / groups_of_sample_ * channels_ + channel,
            static_cast<int>(smaller(width_, channels_of_group_ - first))};
  }

  void run_columns(int64_t task) const {
    const int64_t end = smaller(columns_, (task + 1) * columns_of_task_);
    for (int64_t index = task * columns_of_task_; index < end; ++index) {
      const Column at = column(index);
      double sums[Pass::kSums][kWidth];
      clear(at, sums);
      pass_.reduce(at, 0, spatial_, sums);
      typename Pass::State state;
      pass_.prepare(at, sums, &state);
      pass_.map(at, state, 0, spatial_);
    }
  }

  static void clear(const Column& at, double (*sums)[kWidth]) {
    for (int sum = 0; sum < Pass::kSums; ++sum) {
      for (int j = 0; j < at.width; ++j) sums[sum][j] = 0;
    }
  }

  struct SharedColumn {
    const Columns* columns;
    Column at;
    double sums[kMaxSegments][Pass::kSums][kWidth];
    typename Pass::State state;

    int64_t begin(int64_t segment) const { return segment * columns->segment_rows_; }
    int64_t rows(int64_t segment) const { return smaller(columns->segment_rows_, columns->spatial_ - begin(segment)); }
  };

  void run_column_on_all_threads(int64_t index) const {
    SharedColumn shared;
    shared.columns = this;
    shared.at = column(index);
    threads_.share(
        segments_,
        [](void* data, int64_t segment) {
          SharedColumn& column = *static_cast<SharedColumn*>(data);
          clear(column.at, column.sums[segment]);
          column.columns->pass_.reduce(column.at, column.begin(segment), column.rows(segment), column.sums[segment]);
        },
        &shared);
    double sums[Pass::kSums][kWidth];
    clear(shared.at, sums);
    for (int64_t segment = 0; segment < segments_; ++segment) {
      for (int sum = 0; sum < Pass::kSums; ++sum) {
        for (int j = 0; j < shared.at.width; ++j) sums[sum][j] += shared.sums[segment][sum][j];
      }
    }
    pass_.prepare(shared.at, sums, &shared.state);
    threads_.share(
        segments_,
        [](void* data, int64_t segment) {
          const SharedColumn& column = *static_cast<SharedColumn*>(data);
          column.columns->pass_.map(column.at, column.state, column.begin(segment), column.rows(segment));
        },
        &shared);
  }

  const Pass& pass_;
  Threads threads_;
  int64_t channels_;
  int64_t spatial_;
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

// A column of lanes in tiles: wide(row, rows, first, vectors) for each block of as many vectors as the constant
// `vectors` says, some(row, rows, first, count) for what is left and is less than a vector.
template <typename Element, typename Wide, typename Some>
inline __attribute__((always_inline)) void over_tiles(int64_t tile, int64_t rows, int width, Wide wide, Some some) {
  constexpr int kLanes = Element::kLanes;
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t count = smaller(tile, rows - row);
    int first = 0;
    for (; first + kBlockWidth <= width; first += kBlockWidth) {
      wide(row, count, first, std::integral_constant<int, kBlockWidth / kLanes>());
    }
    for (; first + kLanes <= width; first += kLanes) wide(row, count, first, std::integral_constant<int, 1>());
    if (first < width) some(row, count, first, width - first);
  }
}

// The same for sums: wide and some get sums in the arithmetic type too, which are of at most kBlockRows rows and go
// into the float64 ones after these.
template <typename Element, int kSums, typename Wide, typename Some>
inline __attribute__((always_inline)) void reduce_tiles(int64_t tile, int64_t rows, int width, double (*sums)[kWidth],
                                                        Wide wide, Some some) {
  for (int64_t block = 0; block < rows; block += kBlockRows) {
    typename Element::Arithmetic partial[kSums][kWidth];
    for (int sum = 0; sum < kSums; ++sum) {
      for (int j = 0; j < width; ++j) partial[sum][j] = 0;
    }
    over_tiles<Element>(
        tile, smaller(kBlockRows, rows - block), width,
        [&](int64_t row, int64_t count, int first, auto vectors) { wide(block + row, count, first, vectors, partial); },
        [&](int64_t row, int64_t count, int first, int lanes) { some(block + row, count, first, lanes, partial); });
    for (int sum = 0; sum < kSums; ++sum) {
#pragma omp simd
      for (int j = 0; j < width; ++j) sums[sum][j] += partial[sum][j];
    }
  }
}

// NCHW and NHWC are the same where a channel has one position, and lanes are the fast way through it.
template <typename Call>
Call in_lanes_if_flat(Call call) {
  if (call.spatial == 1 && call.lanes == 1) call.lanes = call.channels;
  return call;
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_COLUMNS_H_

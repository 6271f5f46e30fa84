// How the work on a tensor is cut and shared out among threads, for every pass that first reduces and then applies.
//
// The unit of work is a column: all positions of a few adjacent channels of one sample, be these planes one after the
// other (NCHW) or side by side. It is read twice, for the sums and for the output; the second time it comes out of a
// cache. What is done once for each channel is done for the whole column at once, in vectors.

#ifndef DEPLOYNORM_KERNELS_COLUMNS_H_
#define DEPLOYNORM_KERNELS_COLUMNS_H_

#include <type_traits>

#include "frn.h"
#include "rows.h"
#include "sizes.h"

namespace deploynorm {
namespace {

// How many channels of so many positions stay in the second-level cache; 0: too few for a column of their own.
inline int64_t channels_in_cache(int64_t spatial) { return kCachedRows / spatial / kNarrowest * kNarrowest; }

// Rows of a tile: few where they come from memory, which is read in order best.
inline int64_t tile_rows(int64_t spatial, int width) {
  if (width <= kBlockWidth) return kBlockRows;
  return channels_in_cache(spatial) > 0 ? kTileRows : larger(1, kTileElements / width);
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

// Runs a pass over all columns of a call, none of whose sizes may be 0. Besides what rows.h asks of it, a pass has
//   State                              Arithmetic[kCoefficients][kWidth]
//   void before(column, state)         the coefficients that the sums need
//   void after(column, sums, state)    all, from the sums, double[kSums][kWidth]; once for each column
// all const, and called from several threads at once.
template <typename Pass>
class Columns {
 public:
  template <typename Call>
  Columns(const Pass& pass, const Call& call, const Threads& threads)
      : pass_(pass), threads_(threads), channels_(call.channels), spatial_(call.spatial) {
    planes_ = call.channel_block == 1;
    channels_of_group_ = planes_ ? call.channels : call.channel_block;
    groups_of_sample_ = planes_ ? 1 : call.channels / call.channel_block;
    const int64_t cached = planes_ ? larger(1, kCachedElements / spatial_) : channels_in_cache(spatial_);
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
      typename Pass::State state;
      pass_.before(at, state);
      reduce(at, state, 0, spatial_, sums);
      pass_.after(at, sums, state);
      apply(at, state, 0, spatial_);
    }
  }

  // Adds the sums of `rows` of a column's positions, from `begin` on. A function of its own, as apply is: the loops
  // then have the registers for themselves.
  __attribute__((noinline)) void reduce(const Column& at, const typename Pass::State& state, int64_t begin,
                                        int64_t rows, double (*sums)[kWidth]) const {
    if (planes_) {
      for (int j = 0; j < at.width; ++j) {
        reduce_plane(pass_, Before<Pass>::of_channel(state, j), at.offset + j * spatial_ + begin, rows, j, sums);
      }
      return;
    }
    for (int64_t block = begin; block < begin + rows; block += kBlockRows) {
      typename Pass::Element::Arithmetic partial[Pass::kSums][kWidth];
      clear(at, partial);
      over_tiles(
          at, block, smaller(kBlockRows, begin + rows - block),
          [&](int64_t offset, int64_t count, int first, auto vectors) DEPLOYNORM_INLINED {
            reduce_rows<Pass, vectors>(pass_, state, first, offset, count, channels_of_group_, partial);
          },
          [&](int64_t offset, int64_t count, int first, int some) {
            reduce_some(pass_, state, first, some, offset, count, channels_of_group_, partial);
          });
      for (int sum = 0; sum < Pass::kSums; ++sum) {
#pragma omp simd
        for (int j = 0; j < at.width; ++j) sums[sum][j] += partial[sum][j];
      }
    }
  }

  // Writes the output at `rows` of a column's positions, from `begin` on.
  __attribute__((noinline)) void apply(const Column& at, const typename Pass::State& state, int64_t begin,
                                       int64_t rows) const {
    if (planes_) {
      for (int j = 0; j < at.width; ++j) {
        apply_plane(pass_, After<Pass>::of_channel(state, j), at.offset + j * spatial_ + begin, rows);
      }
      return;
    }
    over_tiles(
        at, begin, rows,
        [&](int64_t offset, int64_t count, int first, auto vectors)
            DEPLOYNORM_INLINED { apply_rows<Pass, vectors>(pass_, state, first, offset, count, channels_of_group_); },
        [&](int64_t offset, int64_t count, int first, int some) {
          const After<Pass> channels = After<Pass>::of_channels(state, first);
          for (int64_t row = 0; row < count; ++row) {
            apply_some(pass_, channels, offset + row * channels_of_group_ + first, some);
          }
        });
  }

  // Rows `begin` to `begin + rows` of channels side by side, in tiles: wide(offset, rows, first, vectors) for each
  // block of as many vectors as the constant `vectors` says, some(offset, rows, first, count) for the rest, less than a
  // vector.
  template <typename Wide, typename Some>
  DEPLOYNORM_INLINE void over_tiles(const Column& at, int64_t begin, int64_t rows, Wide wide, Some some) const {
    constexpr int kVecSize = Pass::Element::kVecSize;
    const int64_t tile = tile_rows(spatial_, at.width);
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = smaller(tile, rows - row), offset = at.offset + (begin + row) * channels_of_group_;
      int first = 0;
      for (; first + kBlockWidth <= at.width; first += kBlockWidth) {
        wide(offset, count, first, std::integral_constant<int, kBlockWidth / kVecSize>());
      }
      for (; first + kVecSize <= at.width; first += kVecSize) {
        wide(offset, count, first, std::integral_constant<int, 1>());
      }
      if (first < at.width) some(offset, count, first, at.width - first);
    }
  }

  template <typename Arithmetic>
  static void clear(const Column& at, Arithmetic (*sums)[kWidth]) {
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
    pass_.before(shared.at, shared.state);
    threads_.share(
        segments_,
        [](void* data, int64_t segment) {
          SharedColumn& column = *static_cast<SharedColumn*>(data);
          clear(column.at, column.sums[segment]);
          column.columns->reduce(column.at, column.state, column.begin(segment), column.rows(segment),
                                 column.sums[segment]);
        },
        &shared);
    double sums[Pass::kSums][kWidth];
    clear(shared.at, sums);
    for (int64_t segment = 0; segment < segments_; ++segment) {
      for (int sum = 0; sum < Pass::kSums; ++sum) {
        for (int j = 0; j < shared.at.width; ++j) sums[sum][j] += shared.sums[segment][sum][j];
      }
    }
    pass_.after(shared.at, sums, shared.state);
    threads_.share(
        segments_,
        [](void* data, int64_t segment) {
          const SharedColumn& column = *static_cast<SharedColumn*>(data);
          column.columns->apply(column.at, column.state, column.begin(segment), column.rows(segment));
        },
        &shared);
  }

  const Pass& pass_;
  Threads threads_;
  int64_t channels_;
  int64_t spatial_;
  bool planes_;                // channel_block == 1
  int64_t channels_of_group_;  // a group is a sample's planes, or its channels that share rows
  int64_t groups_of_sample_;
  int64_t width_;  // channels of a column; the last of a group may have fewer
  int64_t columns_of_group_;
  int64_t columns_;       // of the tensor
  int64_t segment_rows_;  // positions of a segment
  int64_t segments_;      // of a column
  int64_t columns_of_task_ = 1;
};

// NCHW and NHWC are the same where a channel has one position, and channels side by side are the fast way through it.
template <typename Call>
Call side_by_side_if_flat(Call call) {
  if (call.spatial == 1 && call.channel_block == 1) call.channel_block = call.channels;
  return call;
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_COLUMNS_H_

// How a pass over a tensor reads it on a CPU, in vectors: planes (NCHW), and rows of channels side by side (all other
// layouts). Both passes read alike: first every input for the sums, then every input again for the output.
//
// A pass (Forward of frn_cpu.cpp, Backward of frn_backward_cpu.cpp) is handed over by value: no store through its
// output then seems to change its pointers. It has
//
//     Element                         of element.h
//     kInputs, kSummed                tensors that are read, and how many of them, the first, the sums need
//     kSums, kUnroll                  sums for each channel; vectors that are summed independently, to hide latency
//     kCoefficients, kBefore          numbers for each channel that apply takes, and how many of them accumulate does
//     accumulate(of, in, sums)        adds the terms of the input vectors to Vector[kSums]
//     apply(of, in)                   the output vector
//     inputs, output                  the tensors

#ifndef DEPLOYNORM_KERNELS_ROWS_H_
#define DEPLOYNORM_KERNELS_ROWS_H_

#include "element.h"
#include "sizes.h"

namespace deploynorm {
namespace {

// The first kCount inputs at one offset: whole vectors, or `count` elements and zeros.
template <typename Pass, int kCount>
struct Inputs {
  using Element = typename Pass::Element;
  typename Element::Vector at[kCount];

  DEPLOYNORM_INLINE Inputs(const Pass& pass, int64_t offset) {
    unrolled<kCount>([&](int input) DEPLOYNORM_INLINED { at[input] = Element::load(pass.inputs[input] + offset); });
  }
  DEPLOYNORM_INLINE Inputs(const Pass& pass, int64_t offset, int count) {
    unrolled<kCount>([&](int input)
                         DEPLOYNORM_INLINED { at[input] = load_some<Element>(pass.inputs[input] + offset, count); });
  }
};

// The coefficients of a column's channels, [kCount][kWidth], in vectors: of one channel, or of as many as have room.
template <typename Element, int kCount>
struct Coefficients {
  using Arithmetic = typename Element::Arithmetic;
  using Vector = typename Element::Vector;
  Vector of[kCount];

  static DEPLOYNORM_INLINE Coefficients of_channel(const Arithmetic (*all)[kWidth], int channel) {
    Coefficients result;
    unrolled<kCount>([&](int i) DEPLOYNORM_INLINED { result.of[i] = all[i][channel] - Vector{}; });
    return result;
  }
  static DEPLOYNORM_INLINE Coefficients of_channels(const Arithmetic (*all)[kWidth], int first) {
    Coefficients result;
    unrolled<kCount>([&](int i) DEPLOYNORM_INLINED { result.of[i] = unaligned<Vector>(all[i] + first); });
    return result;
  }
};

template <typename Pass>
using Before = Coefficients<typename Pass::Element, Pass::kBefore>;
template <typename Pass>
using After = Coefficients<typename Pass::Element, Pass::kCoefficients>;
template <typename Pass>
using Summed = Inputs<Pass, Pass::kSummed>;
template <typename Pass>
using All = Inputs<Pass, Pass::kInputs>;

// Adds the sums over `count` adjacent elements of one channel to sums[...][index].
template <typename Pass>
DEPLOYNORM_INLINE void reduce_plane(const Pass pass, const Before<Pass> channel, int64_t begin, int64_t count,
                                    int index, double (*sums)[kWidth]) {
  using Element = typename Pass::Element;
  using Vector = typename Element::Vector;
  constexpr int kVecSize = Element::kVecSize, kUnroll = Pass::kUnroll;
  while (count > 0) {
    const int64_t block = smaller(count, kBlock * kUnroll);
    Vector partial[kUnroll][Pass::kSums] = {};
    int64_t i = 0;
    for (; i + kUnroll * kVecSize <= block; i += kUnroll * kVecSize) {
      unrolled<kUnroll>([&](int u) DEPLOYNORM_INLINED {
        Pass::accumulate(channel.of, Summed<Pass>(pass, begin + i + u * kVecSize).at, partial[u]);
      });
    }
    for (; i + kVecSize <= block; i += kVecSize) {
      Pass::accumulate(channel.of, Summed<Pass>(pass, begin + i).at, partial[0]);
    }
    if (i < block && block >= kVecSize) {
      // One more vector, which ends with the block; what it has in common with the one before is left out.
      Summed<Pass> last(pass, begin + block - kVecSize);
      for (Vector& each : last.at) each = from_lane<Element>(static_cast<int>(kVecSize - (block - i)), each);
      Pass::accumulate(channel.of, last.at, partial[kUnroll - 1]);
    } else if (i < block) {
      Pass::accumulate(channel.of, Summed<Pass>(pass, begin, static_cast<int>(block)).at, partial[kUnroll - 1]);
    }
    unrolled<Pass::kSums>([&](int sum) DEPLOYNORM_INLINED {
      Vector total = partial[0][sum];
      unrolled<kUnroll - 1>([&](int u) DEPLOYNORM_INLINED { total += partial[u + 1][sum]; });
      sums[sum][index] += reduce_add<typename Element::Arithmetic, kVecSize>(total);
    });
    begin += block;
    count -= block;
  }
}

// Adds the sums of kVectors vectors of channels, from channel `first` on, over `rows` rows, `stride` elements apart.
template <typename Pass, int kVectors>
DEPLOYNORM_INLINE void reduce_rows(const Pass pass, const typename Pass::State& state, int first, int64_t begin,
                                   int64_t rows, int64_t stride, typename Pass::Element::Arithmetic (*sums)[kWidth]) {
  using Vector = typename Pass::Element::Vector;
  constexpr int kVecSize = Pass::Element::kVecSize;
  constexpr int kRows = kVectors >= Pass::kUnroll ? 1 : Pass::kUnroll / kVectors;
  Before<Pass> channels[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    channels[v] = Before<Pass>::of_channels(state, first + v * kVecSize);
  }
  Vector partial[kRows][kVectors][Pass::kSums] = {};
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int r = i / kVectors, v = i % kVectors;
      const Summed<Pass> in(pass, begin + (row + r) * stride + first + v * kVecSize);
      Pass::accumulate(channels[v].of, in.at, partial[r][v]);
    }
  }
  for (; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const Summed<Pass> in(pass, begin + row * stride + first + v * kVecSize);
      Pass::accumulate(channels[v].of, in.at, partial[0][v]);
    }
  }
  for (int i = 0; i < kVectors * Pass::kSums; ++i) {
    const int v = i / Pass::kSums, sum = i % Pass::kSums;
    Vector total = partial[0][v][sum];
    for (int r = 1; r < kRows; ++r) total += partial[r][v][sum];
    add_unaligned(sums[sum] + first + v * kVecSize, total);
  }
}

// As reduce_rows, for `count` channels, fewer than a vector has.
template <typename Pass>
DEPLOYNORM_INLINE void reduce_some(const Pass pass, const typename Pass::State& state, int first, int count,
                                   int64_t begin, int64_t rows, int64_t stride,
                                   typename Pass::Element::Arithmetic (*sums)[kWidth]) {
  const Before<Pass> channels = Before<Pass>::of_channels(state, first);
  typename Pass::Element::Vector partial[Pass::kSums] = {};
  for (int64_t row = 0; row < rows; ++row) {
    Pass::accumulate(channels.of, Summed<Pass>(pass, begin + row * stride + first, count).at, partial);
  }
  for (int sum = 0; sum < Pass::kSums; ++sum) {
    for (int i = 0; i < count; ++i) sums[sum][first + i] += partial[sum][i];
  }
}

template <typename Pass>
DEPLOYNORM_INLINE void apply_some(const Pass pass, const After<Pass>& channels, int64_t at, int count) {
  store_some<typename Pass::Element>(Pass::apply(channels.of, All<Pass>(pass, at, count).at), pass.output + at, count);
}

// The output for adjacent elements of one channel. It may lie over an input.
template <typename Pass>
DEPLOYNORM_INLINE void apply_run(const Pass pass, const After<Pass> channel, int64_t begin, int64_t count) {
  using Element = typename Pass::Element;
  constexpr int kVecSize = Element::kVecSize;
  if (count < kVecSize) {
    apply_some(pass, channel, begin, static_cast<int>(count));
    return;
  }
  // The last vector overlaps the one before it, so it is read before that is written.
  const int64_t end = begin + count;
  const typename Element::Vector last = Pass::apply(channel.of, All<Pass>(pass, end - kVecSize).at);
  for (int64_t i = begin; i + kVecSize <= end; i += kVecSize) {
    Element::store(Pass::apply(channel.of, All<Pass>(pass, i).at), pass.output + i);
  }
  Element::store(last, pass.output + end - kVecSize);
}

// As apply_run; begins with the end, which the sums have left in the first-level cache.
template <typename Pass>
DEPLOYNORM_INLINE void apply_plane(const Pass pass, const After<Pass> channel, int64_t begin, int64_t count) {
  const int64_t first = larger(0, count - kCachedElements / Pass::kSummed);
  apply_run(pass, channel, begin + first, count - first);
  if (first > 0) apply_run(pass, channel, begin, first);
}

// The output for kVectors vectors of channels, from channel `first` on, in `rows` rows, `stride` elements apart.
template <typename Pass, int kVectors>
DEPLOYNORM_INLINE void apply_rows(const Pass pass, const typename Pass::State& state, int first, int64_t begin,
                                  int64_t rows, int64_t stride) {
  using Element = typename Pass::Element;
  After<Pass> channels[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    channels[v] = After<Pass>::of_channels(state, first + v * Element::kVecSize);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = begin + row * stride + first + v * Element::kVecSize;
      Element::store(Pass::apply(channels[v].of, All<Pass>(pass, i).at), pass.output + i);
    }
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ROWS_H_

// Sums of squares, of planes and of lanes.

#ifndef DEPLOYNORM_KERNELS_SQUARES_H_
#define DEPLOYNORM_KERNELS_SQUARES_H_

#include "element.h"
#include "sizes.h"

namespace deploynorm {
namespace {

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

// Of each of kVectors vectors of lanes, over a tile's rows, which lie `stride` elements apart; added to sums.
template <typename Element, int kVectors>
void add_squares_of_lanes(const typename Element::Storage* x, int64_t rows, int64_t stride,
                          typename Element::Arithmetic* sums) {
  using Vector = typename Element::Vector;
  constexpr int kLanes = Element::kLanes;
  constexpr int kRows = kVectors >= 4 ? 1 : 4 / kVectors;
  Vector partial[kRows][kVectors] = {};
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector value = Element::load(x + (row + r) * stride + v * kLanes);
        partial[r][v] += value * value;
      }
    }
  }
  for (; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const Vector value = Element::load(x + row * stride + v * kLanes);
      partial[0][v] += value * value;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Vector total = partial[0][v];
    for (int r = 1; r < kRows; ++r) total += partial[r][v];
    add_to(sums + v * kLanes, total);
  }
}

// The same for fewer lanes than a vector has.
template <typename Element>
void add_squares_of_some_lanes(const typename Element::Storage* x, int64_t rows, int64_t stride, int lanes,
                               typename Element::Arithmetic* sums) {
  typename Element::Vector total = {};
  for (int64_t row = 0; row < rows; ++row) {
    const typename Element::Vector value = load_some<Element>(x + row * stride, lanes);
    total += value * value;
  }
  for (int lane = 0; lane < lanes; ++lane) sums[lane] += total[lane];
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_SQUARES_H_

// From x to y, once the scale of each channel is known.

#ifndef DEPLOYNORM_KERNELS_AFFINE_H_
#define DEPLOYNORM_KERNELS_AFFINE_H_

#include "element.h"
#include "sizes.h"

// Where a call would pass vectors through memory.
#define DEPLOYNORM_INLINE inline __attribute__((always_inline))

namespace deploynorm {
namespace {

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

// kVectors vectors of lanes, from lane `first` on, in rows `begin` to `begin + rows`, which are `stride` elements
// apart.
template <typename Element, int kVectors, bool kResidual>
void map_lanes(const Affine<typename Element::Arithmetic>& affine, int first, const typename Element::Storage* x,
               const typename Element::Storage* residual, typename Element::Storage* y, int64_t begin, int64_t rows,
               int64_t stride) {
  constexpr int kLanes = Element::kLanes;
  Map<Element, kResidual> maps[kVectors];
  for (int v = 0; v < kVectors; ++v) maps[v] = map_of_lanes<Element, kResidual>(affine, first + v * kLanes);
  for (int64_t row = begin; row < begin + rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row * stride + first + v * kLanes;
      Element::store(maps[v].at(x, residual, i), y + i);
    }
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_AFFINE_H_

// From dy and x to the sums that the gradients need, and to dx.

#ifndef DEPLOYNORM_KERNELS_GRADIENTS_H_
#define DEPLOYNORM_KERNELS_GRADIENTS_H_

#include "affine.h"
#include "element.h"
#include "sizes.h"
#include "squares.h"

namespace deploynorm {
namespace {

// What is known of each channel of a column before its sums are, and `pull` after.
template <typename Arithmetic>
struct Slope {
  Arithmetic scale[kWidth];  // gamma * rstd
  Arithmetic beta[kWidth];
  Arithmetic tau[kWidth];
  Arithmetic pull[kWidth];  // gamma * rstd^3 * mean(g * x)
};

// The same in a vector, be it of one channel or of many.
template <typename Element>
struct Gradient {
  using Storage = typename Element::Storage;
  using Vector = typename Element::Vector;

  Vector scale, beta, tau, pull;

  // y as the forward pass had it, by the same operations, so that the threshold falls alike.
  auto below(Vector x) const { return x * scale + beta < tau; }

  Vector dx(Vector dy, Vector x) const { return (below(x) ? Vector{} : dy) * scale - x * pull; }

  Vector at(const Storage* dy, const Storage* x, int64_t i) const {
    return dx(Element::load(dy + i), Element::load(x + i));
  }

  void some(const Storage* dy, const Storage* x, Storage* to, int64_t i, int count) const {
    store_some<Element>(dx(load_some<Element>(dy + i, count), load_some<Element>(x + i, count)), to + i, count);
  }
};

template <typename Element>
Gradient<Element> gradient_of_channel(const Slope<typename Element::Arithmetic>& slope, int channel) {
  using Vector = typename Element::Vector;
  return {slope.scale[channel] - Vector{}, slope.beta[channel] - Vector{}, slope.tau[channel] - Vector{},
          slope.pull[channel] - Vector{}};
}

template <typename Element>
Gradient<Element> gradient_of_lanes(const Slope<typename Element::Arithmetic>& slope, int first) {
  using Vector = typename Element::Vector;
  return {unaligned<Vector>(slope.scale + first), unaligned<Vector>(slope.beta + first),
          unaligned<Vector>(slope.tau + first), unaligned<Vector>(slope.pull + first)};
}

// The sums, in vectors.
template <typename Element>
struct Partial {
  using Vector = typename Element::Vector;
  Vector kept = {};     // g: dy where y is at or above the threshold
  Vector dropped = {};  // dy - g
  Vector product = {};  // g * x

  void add(const Gradient<Element>& gradient, Vector dy, Vector x) {
    const auto below = gradient.below(x);
    const Vector g = below ? Vector{} : dy;
    kept += g;
    dropped += below ? dy : Vector{};
    product += g * x;
  }

  void add(const Partial& other) {
    kept += other.kept;
    dropped += other.dropped;
    product += other.product;
  }
};

constexpr int kKept = 0, kDropped = 1, kProduct = 2, kGradientSums = 3;

// Of any number of adjacent elements of one channel; added to sums[...][channel].
template <typename Element>
void add_sums_of_plane(const Gradient<Element> gradient, const typename Element::Storage* dy,
                       const typename Element::Storage* x, int64_t count, int channel, double (*sums)[kWidth]) {
  using Vector = typename Element::Vector;
  constexpr int kLanes = Element::kLanes;
  while (count > 0) {
    const int64_t block = smaller(count, kBlock / 2);
    Partial<Element> partial, other;
    int64_t i = 0;
    for (; i + 2 * kLanes <= block; i += 2 * kLanes) {
      partial.add(gradient, Element::load(dy + i), Element::load(x + i));
      other.add(gradient, Element::load(dy + i + kLanes), Element::load(x + i + kLanes));
    }
    if (i + kLanes <= block) {
      partial.add(gradient, Element::load(dy + i), Element::load(x + i));
      i += kLanes;
    }
    if (i < block && block >= kLanes) {
      // One more vector, which ends with the block; what it has in common with the one before is left out.
      const auto inside = lanes_from<Element>(static_cast<int>(kLanes - (block - i)));
      const Vector last_dy = Element::load(dy + block - kLanes), last_x = Element::load(x + block - kLanes);
      other.add(gradient, inside ? last_dy : Vector{}, inside ? last_x : Vector{});
    } else if (i < block) {
      const int rest = static_cast<int>(block);
      other.add(gradient, load_some<Element>(dy, rest), load_some<Element>(x, rest));
    }
    partial.add(other);
    sums[kKept][channel] += sum_of_lanes<Element>(partial.kept);
    sums[kDropped][channel] += sum_of_lanes<Element>(partial.dropped);
    sums[kProduct][channel] += sum_of_lanes<Element>(partial.product);
    dy += block;
    x += block;
    count -= block;
  }
}

// Of kVectors vectors of lanes, from lane `first` on, over rows `begin` to `begin + rows` of a tile.
template <typename Element, int kVectors>
void add_sums_of_lanes(const Slope<typename Element::Arithmetic>& slope, int first, const typename Element::Storage* dy,
                       const typename Element::Storage* x, int64_t begin, int64_t rows, int64_t stride,
                       typename Element::Arithmetic (*sums)[kWidth]) {
  constexpr int kLanes = Element::kLanes;
  Gradient<Element> gradients[kVectors];
  Partial<Element> partial[kVectors];
  for (int v = 0; v < kVectors; ++v) gradients[v] = gradient_of_lanes<Element>(slope, first + v * kLanes);
  for (int64_t row = begin; row < begin + rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row * stride + first + v * kLanes;
      partial[v].add(gradients[v], Element::load(dy + i), Element::load(x + i));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    add_to(sums[kKept] + first + v * kLanes, partial[v].kept);
    add_to(sums[kDropped] + first + v * kLanes, partial[v].dropped);
    add_to(sums[kProduct] + first + v * kLanes, partial[v].product);
  }
}

// The same for fewer lanes than a vector has.
template <typename Element>
void add_sums_of_some_lanes(const Slope<typename Element::Arithmetic>& slope, int first, int count,
                            const typename Element::Storage* dy, const typename Element::Storage* x, int64_t begin,
                            int64_t rows, int64_t stride, typename Element::Arithmetic (*sums)[kWidth]) {
  const Gradient<Element> gradient = gradient_of_lanes<Element>(slope, first);
  Partial<Element> partial;
  for (int64_t row = begin; row < begin + rows; ++row) {
    const int64_t i = row * stride + first;
    partial.add(gradient, load_some<Element>(dy + i, count), load_some<Element>(x + i, count));
  }
  for (int lane = 0; lane < count; ++lane) {
    sums[kKept][first + lane] += partial.kept[lane];
    sums[kDropped][first + lane] += partial.dropped[lane];
    sums[kProduct][first + lane] += partial.product[lane];
  }
}

// Adjacent elements of one channel. dx may be dy.
template <typename Element>
DEPLOYNORM_INLINE void gradient_run(const Gradient<Element> gradient, const typename Element::Storage* dy,
                                    const typename Element::Storage* x, typename Element::Storage* dx, int64_t count) {
  constexpr int kLanes = Element::kLanes;
  if (count < kLanes) {
    gradient.some(dy, x, dx, 0, static_cast<int>(count));
    return;
  }
  // The last vector overlaps the one before it, so it is read before that is written.
  const typename Element::Vector last = gradient.at(dy, x, count - kLanes);
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) Element::store(gradient.at(dy, x, i), dx + i);
  Element::store(last, dx + count - kLanes);
}

// The same; begins with the end, which the sums have left in the first-level cache.
template <typename Element>
DEPLOYNORM_INLINE void gradient_plane(const Gradient<Element> gradient, const typename Element::Storage* dy,
                                      const typename Element::Storage* x, typename Element::Storage* dx,
                                      int64_t count) {
  const int64_t first = larger(0, count - kCachedElements / 2);
  gradient_run<Element>(gradient, dy + first, x + first, dx + first, count - first);
  if (first > 0) gradient_run<Element>(gradient, dy, x, dx, first);
}

// kVectors vectors of lanes, from lane `first` on, in rows `begin` to `begin + rows`.
template <typename Element, int kVectors>
void gradient_lanes(const Slope<typename Element::Arithmetic>& slope, int first, const typename Element::Storage* dy,
                    const typename Element::Storage* x, typename Element::Storage* dx, int64_t begin, int64_t rows,
                    int64_t stride) {
  constexpr int kLanes = Element::kLanes;
  Gradient<Element> gradients[kVectors];
  for (int v = 0; v < kVectors; ++v) gradients[v] = gradient_of_lanes<Element>(slope, first + v * kLanes);
  for (int64_t row = begin; row < begin + rows; ++row) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = row * stride + first + v * kLanes;
      Element::store(gradients[v].at(dy, x, i), dx + i);
    }
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_GRADIENTS_H_

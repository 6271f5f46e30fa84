// How the kernels read and write each element type: load to a vector of the arithmetic type, store with one rounding.
//
// Vectors are those of GCC and Clang (attribute vector_size), so that one source serves every instruction set.

#ifndef DEPLOYNORM_KERNELS_ELEMENT_H_
#define DEPLOYNORM_KERNELS_ELEMENT_H_

#include <stdint.h>

namespace deploynorm {
namespace {

// Of AVX-512 the 32 registers and the masks are used, but not their 64 bytes: an access of those crosses a cache line
// wherever a plane does not begin on one, and was up to a tenth slower in all.
#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Scalar, int kLanes>
struct VectorOf {
  typedef Scalar Type __attribute__((vector_size(kLanes * sizeof(Scalar))));
};

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector, typename Scalar>
inline Vector unaligned(const Scalar* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

// to[0] to to[lanes - 1] += vector.
template <typename Vector, typename Scalar>
inline void add_to(Scalar* to, Vector vector) {
  const Vector sum = unaligned<Vector>(to) + vector;
  __builtin_memcpy(to, &sum, sizeof sum);
}

constexpr int kFloatLanes = kVectorBytes / 4;
using FloatVector = VectorOf<float, kFloatLanes>::Type;
using BitsVector = VectorOf<uint32_t, kFloatLanes>::Type;
using HalfVector = VectorOf<uint16_t, kFloatLanes>::Type;

// The types whose arithmetic is their own.
template <typename Scalar>
struct Native {
  using Storage = Scalar;
  using Arithmetic = Scalar;
  static constexpr int kLanes = kVectorBytes / sizeof(Scalar);
  using Vector = typename VectorOf<Scalar, kLanes>::Type;
  static Vector load(const Scalar* from) { return unaligned<Vector>(from); }
  static void store(Vector value, Scalar* to) { __builtin_memcpy(to, &value, sizeof value); }
};

using Float32 = Native<float>;
using Float64 = Native<double>;

// The 16-bit types, computed in float32. Bits says how their bits become those of a float32, and back.
template <typename Bits>
struct Half {
  using Storage = uint16_t;
  using Arithmetic = float;
  static constexpr int kLanes = kFloatLanes;
  using Vector = FloatVector;
  static Vector load(const uint16_t* from) {
    return Bits::widen(__builtin_convertvector(unaligned<HalfVector>(from), BitsVector));
  }
  static void store(Vector value, uint16_t* to) {
    const HalfVector half = __builtin_convertvector(Bits::narrow(value), HalfVector);
    __builtin_memcpy(to, &half, sizeof half);
  }
};

// IEEE 754 binary16: 1 sign, 5 exponent (bias 15) and 10 fraction bits.
struct Binary16 {
  static constexpr uint32_t kRebias = (127u - 15u) << 23;

  static FloatVector widen(BitsVector half) {
    const BitsVector magnitude = (half & 0x7fffu) << 13;
    const BitsVector normal = magnitude + kRebias;
    const BitsVector not_finite = normal + kRebias;  // exponent 31 becomes 255
    // With exponent 1 in the place of 0 a subnormal is too large by exactly 2^-14. No float32 subnormal arises, so
    // that a host which flushes those to zero gets the same.
    const BitsVector subnormal = bits_as<BitsVector>(bits_as<FloatVector>(normal + (1u << 23)) - 0x1p-14f);
    const BitsVector finite = magnitude < (1u << 23) ? subnormal : normal;
    const BitsVector value = magnitude >= (31u << 23) ? not_finite : finite;
    return bits_as<FloatVector>(value | (half & 0x8000u) << 16);
  }

  static BitsVector narrow(FloatVector value) {
    const BitsVector bits = bits_as<BitsVector>(value);
    const BitsVector magnitude = bits & 0x7fffffffu;
    // Half a unit of the kept fraction, less one where that fraction is even: ties go to even.
    const BitsVector normal = (magnitude - kRebias + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // The unit of 0.5 in float32 is 2^-24, that of a half's subnormals, so the addition rounds.
    const BitsVector subnormal = bits_as<BitsVector>(bits_as<FloatVector>(magnitude) + 0.5f) - 0x3f000000u;
    const BitsVector finite = magnitude < (113u << 23) ? subnormal : normal;
    const BitsVector infinity = BitsVector{} + 0x7c00u;
    const BitsVector not_finite = magnitude > 0x7f800000u ? infinity + 0x200u : infinity;
    const BitsVector half = magnitude >= (143u << 23) ? not_finite : finite;
    return half | (bits >> 16 & 0x8000u);
  }
};

// The upper half of a float32.
struct Upper16 {
  static FloatVector widen(BitsVector half) { return bits_as<FloatVector>(half << 16); }

  static BitsVector narrow(FloatVector value) {
    const BitsVector bits = bits_as<BitsVector>(value);
    const BitsVector rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded;
  }
};

using Float16 = Half<Binary16>;
using BFloat16 = Half<Upper16>;

// Fewer elements than a vector: the lanes beyond are zero, and are not written.
template <typename Element>
inline typename Element::Vector load_some(const typename Element::Storage* from, int count) {
  typename Element::Storage lanes[Element::kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return Element::load(lanes);
}

template <typename Element>
inline void store_some(typename Element::Vector value, typename Element::Storage* to, int count) {
  typename Element::Storage lanes[Element::kLanes];
  Element::store(value, lanes);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ELEMENT_H_

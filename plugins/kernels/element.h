// How the kernels read and write each element type: load to a vector of the arithmetic type, store with one rounding.
//
// Vectors are those of GCC and Clang (attribute vector_size), so that one source serves every instruction set.

#ifndef DEPLOYNORM_KERNELS_ELEMENT_H_
#define DEPLOYNORM_KERNELS_ELEMENT_H_

#include <stdint.h>
#if defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "frn.h"

// Where a call would pass vectors through memory.
#define DEPLOYNORM_INLINE inline __attribute__((always_inline))
#define DEPLOYNORM_INLINED __attribute__((always_inline))  // of a lambda

namespace deploynorm {
namespace {

// Of AVX-512 the 32 registers and the masks are used, but not their 64 bytes: an access of those crosses a cache line
// wherever a plane does not begin on one, and was up to a tenth slower in all.
#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename Scalar, int kVecSize>
struct VectorOf {
  typedef Scalar Type __attribute__((vector_size(kVecSize * sizeof(Scalar))));
};

// work(index) for each index below kCount, a constant: what arrays hold in such a loop stays in registers.
template <int kCount, typename Work>
DEPLOYNORM_INLINE void unrolled(Work work) {
  if constexpr (kCount > 0) {
    unrolled<kCount - 1>(work);
    work(std::integral_constant<int, kCount - 1>());
  }
}

template <typename To, typename From>
DEPLOYNORM_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector, typename Scalar>
DEPLOYNORM_INLINE Vector unaligned(const Scalar* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

// to[0] and so on += vector.
template <typename Vector, typename Scalar>
DEPLOYNORM_INLINE void add_unaligned(Scalar* to, Vector vector) {
  const Vector sum = unaligned<Vector>(to) + vector;
  __builtin_memcpy(to, &sum, sizeof sum);
}

constexpr int kFloats = kVectorBytes / 4;
using FloatVector = VectorOf<float, kFloats>::Type;
using BitsVector = VectorOf<uint32_t, kFloats>::Type;
using HalfVector = VectorOf<uint16_t, kFloats>::Type;

// The types whose arithmetic is their own.
template <typename Scalar>
struct Native {
  using Storage = Scalar;
  using Arithmetic = Scalar;
  static constexpr int kVecSize = kVectorBytes / sizeof(Scalar);
  using Vector = typename VectorOf<Scalar, kVecSize>::Type;
  static DEPLOYNORM_INLINE Vector load(const Scalar* from) { return unaligned<Vector>(from); }
  static DEPLOYNORM_INLINE void store(Vector value, Scalar* to) { __builtin_memcpy(to, &value, sizeof value); }
};

using Float32 = Native<float>;
using Float64 = Native<double>;

// The 16-bit types, computed in float32. Format widens them to it, and rounds back to nearest, ties to even.
template <typename Format>
struct Half {
  using Storage = uint16_t;
  using Arithmetic = float;
  static constexpr int kVecSize = kFloats;
  using Vector = FloatVector;
  static DEPLOYNORM_INLINE Vector load(const uint16_t* from) { return Format::widen(unaligned<HalfVector>(from)); }
  static DEPLOYNORM_INLINE void store(Vector value, uint16_t* to) {
    const HalfVector half = Format::narrow(value);
    __builtin_memcpy(to, &half, sizeof half);
  }
};

// IEEE 754 binary16: 1 sign, 5 exponent (bias 15) and 10 fraction bits.
struct Binary16 {
#if defined(__F16C__) && defined(__AVX2__)
  static DEPLOYNORM_INLINE FloatVector widen(HalfVector half) { return _mm256_cvtph_ps(bits_as<__m128i>(half)); }

  static DEPLOYNORM_INLINE HalfVector narrow(FloatVector value) {
    return bits_as<HalfVector>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static constexpr uint32_t kRebias = (127u - 15u) << 23;

  static DEPLOYNORM_INLINE FloatVector widen(HalfVector from) {
    const BitsVector half = __builtin_convertvector(from, BitsVector);
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

  static DEPLOYNORM_INLINE HalfVector narrow(FloatVector value) {
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
    return __builtin_convertvector(half | (bits >> 16 & 0x8000u), HalfVector);
  }
#endif
};

// The upper half of a float32.
struct Upper16 {
  static DEPLOYNORM_INLINE FloatVector widen(HalfVector half) {
    return bits_as<FloatVector>(__builtin_convertvector(half, BitsVector) << 16);
  }

  static DEPLOYNORM_INLINE HalfVector narrow(FloatVector value) {
    const BitsVector bits = bits_as<BitsVector>(value);
    const BitsVector rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const BitsVector half = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded;
    return __builtin_convertvector(half, HalfVector);
  }
};

using Float16 = Half<Binary16>;
using BFloat16 = Half<Upper16>;

// run(Element()) for the element of a type. Returns 0; 1 for a type that is not there.
template <typename Run>
inline int run_with_type(int32_t type, Run run) {
  switch (type) {
    case DEPLOYNORM_FLOAT32:
      run(Float32());
      return 0;
    case DEPLOYNORM_FLOAT64:
      run(Float64());
      return 0;
    case DEPLOYNORM_FLOAT16:
      run(Float16());
      return 0;
    case DEPLOYNORM_BFLOAT16:
      run(BFloat16());
      return 0;
    default:
      return 1;
  }
}

// Fewer elements than a vector: the lanes beyond are zero, and are not written.
template <typename Element>
inline typename Element::Vector load_some(const typename Element::Storage* from, int count) {
  typename Element::Storage lanes[Element::kVecSize] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i];
  return Element::load(lanes);
}

template <typename Element>
inline void store_some(typename Element::Vector value, typename Element::Storage* to, int count) {
  typename Element::Storage lanes[Element::kVecSize];
  Element::store(value, lanes);
  for (int i = 0; i < count; ++i) to[i] = lanes[i];
}

// The elements from `first` on, with zeros before them.
template <typename Element>
DEPLOYNORM_INLINE typename Element::Vector from_lane(int first, typename Element::Vector vector) {
  typename Element::Vector lane;
  for (int i = 0; i < Element::kVecSize; ++i) lane[i] = static_cast<typename Element::Arithmetic>(i);
  return lane >= static_cast<typename Element::Arithmetic>(first) ? vector : typename Element::Vector{};
}

// The sum of a vector's lanes. Halves are added until one lane is left; compilers add the lanes one after the other.
template <typename Scalar, int kVecSize>
DEPLOYNORM_INLINE Scalar reduce_add(typename VectorOf<Scalar, kVecSize>::Type vector) {
  if constexpr (kVecSize == 1) {
    return vector[0];
  } else {
    typename VectorOf<Scalar, kVecSize / 2>::Type halves[2];
    __builtin_memcpy(halves, &vector, sizeof vector);
    return reduce_add<Scalar, kVecSize / 2>(halves[0] + halves[1]);
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ELEMENT_H_

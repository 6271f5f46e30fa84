// How the kernels read and write each element type: load to the arithmetic type, store with one rounding.
//
// The conversions are integer arithmetic without branches, which compilers turn into vector code for every target.

#ifndef DEPLOYNORM_KERNELS_ELEMENT_H_
#define DEPLOYNORM_KERNELS_ELEMENT_H_

#include <stdint.h>

namespace deploynorm {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float32 {
  using Storage = float;
  using Arithmetic = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct Float64 {
  using Storage = double;
  using Arithmetic = double;
  static double load(double value) { return value; }
  static double store(double value) { return value; }
};

// IEEE 754 binary16: 1 sign, 5 exponent (bias 15) and 10 fraction bits.
struct Float16 {
  using Storage = uint16_t;
  using Arithmetic = float;

  static float load(uint16_t half) {
    constexpr uint32_t kRebias = (127u - 15u) << 23;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
    const uint32_t normal = magnitude + kRebias;
    const uint32_t not_finite = normal + kRebias;  // exponent 31 becomes 255
    // With exponent 1 in the place of 0 a subnormal is too large by exactly 2^-14. No float32 subnormal arises, so
    // that a host which flushes those to zero gets the same.
    const uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - 0x1p-14f);
    const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
    const uint32_t value = magnitude >= (31u << 23) ? not_finite : finite;
    return float_of(value | static_cast<uint32_t>(half & 0x8000u) << 16);
  }

  static uint16_t store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    constexpr uint32_t kRebias = (127u - 15u) << 23;
    // Half a unit of the kept fraction, less one where that fraction is even: ties go to even.
    const uint32_t normal = (magnitude - kRebias + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // The unit of 0.5f is 2^-24, the unit of a half's subnormals, so the addition rounds.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t not_finite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t half = magnitude >= (143u << 23) ? not_finite : finite;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
};

// The upper half of a float32.
struct BFloat16 {
  using Storage = uint16_t;
  using Arithmetic = float;

  static float load(uint16_t value) { return float_of(static_cast<uint32_t>(value) << 16); }

  static uint16_t store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t nan = bits >> 16 | 0x40u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
};

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ELEMENT_H_

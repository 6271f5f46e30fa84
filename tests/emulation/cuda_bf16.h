// __nv_bfloat16 for the CPU: the upper half of a float32, rounded to nearest, ties to even. See cuda_runtime_api.h.

#ifndef DEPLOYNORM_EMULATION_CUDA_BF16_H_
#define DEPLOYNORM_EMULATION_CUDA_BF16_H_

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
  unsigned short bits;
};

inline float __bfloat162float(__nv_bfloat16 half) {
  const uint32_t bits = static_cast<uint32_t>(half.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = nan ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return {static_cast<unsigned short>(rounded >> 16)};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

#endif  // DEPLOYNORM_EMULATION_CUDA_BF16_H_

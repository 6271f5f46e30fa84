// __half for the CPU: IEEE 754 binary16, rounded to nearest, ties to even. See cuda_runtime_api.h.

#ifndef DEPLOYNORM_EMULATION_CUDA_FP16_H_
#define DEPLOYNORM_EMULATION_CUDA_FP16_H_

#include <string.h>

struct __half {
  unsigned short bits;
};

inline float __half2float(__half half) {
  _Float16 value;
  memcpy(&value, &half, sizeof value);
  return static_cast<float>(value);
}

inline __half __float2half_rn(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  __half half;
  memcpy(&half, &rounded, sizeof half);
  return half;
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

#endif  // DEPLOYNORM_EMULATION_CUDA_FP16_H_

// How the CUDA kernels read and write each element type, alone and in packs of 16 bytes.

#ifndef DEPLOYNORM_KERNELS_ELEMENT_CUH_
#define DEPLOYNORM_KERNELS_ELEMENT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace deploynorm {
namespace {

constexpr int kPackBytes = 16;  // the widest access that every device has

// The type that an element is computed in, and the one rounding on the way back.
template <typename Storage>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <typename Storage>
using Arithmetic = typename ArithmeticOf<Storage>::Type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void narrow(double value, double* to) { *to = value; }
__device__ __forceinline__ void narrow(float value, __half* to) { *to = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }

// Neighbouring elements, read or written by one instruction where there are as many as 16 bytes hold.
template <typename Storage, int kCount>
struct Pack {
  static constexpr bool kWhole = kCount * sizeof(Storage) == kPackBytes;
  static_assert(kWhole || kCount == 1, "16 bytes, or one element");

  Storage elements[kCount];

  static __device__ __forceinline__ Pack load(const Storage* from) {
    Pack pack;
    if constexpr (kWhole) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(from);
      memcpy(&pack, &bytes, sizeof pack);
    } else {
      pack.elements[0] = *from;
    }
    return pack;
  }

  static __device__ __forceinline__ void copy(const Storage* from, Storage* to) {
    if constexpr (kWhole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      *to = *from;
    }
  }

  __device__ __forceinline__ void store(Storage* to) const {
    if constexpr (kWhole) {
      uint4 bytes;
      memcpy(&bytes, this, sizeof bytes);
      *reinterpret_cast<uint4*>(to) = bytes;
    } else {
      *to = elements[0];
    }
  }
};

template <typename Storage>
constexpr int kPackElements = kPackBytes / sizeof(Storage);

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ELEMENT_CUH_

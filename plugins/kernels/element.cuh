// How the CUDA kernels read and write each element type, alone and in packs of 16 bytes.

#ifndef DEPLOYNORM_KERNELS_ELEMENT_CUH_
#define DEPLOYNORM_KERNELS_ELEMENT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

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

// Neighbouring elements, read or written by one instruction where there are as many as 16 bytes hold. 16-bit elements
// stay two to a register: alone, each would take a whole one.
template <typename Storage, int kCount>
struct Pack {
  static constexpr int kElements = kCount;
  static constexpr bool kWhole = kCount * sizeof(Storage) == kPackBytes;
  static_assert(kWhole || kCount == 1, "16 bytes, or one element");
  static constexpr bool kPairs = kWhole && sizeof(Storage) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, Storage>;

  __align__(kWhole ? kPackBytes : sizeof(Storage)) Word words[kPairs ? kCount / 2 : kCount];

  static __device__ __forceinline__ Pack load(const Storage* from) {
    Pack pack;
    copy(from, reinterpret_cast<Storage*>(pack.words));
    return pack;
  }

  __device__ __forceinline__ void store(Storage* to) const { copy(reinterpret_cast<const Storage*>(words), to); }

  // Both begin at 16 bytes, where there are as many, or are in registers.
  static __device__ __forceinline__ void copy(const Storage* from, Storage* to) {
    if constexpr (kWhole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      *to = *from;
    }
  }

  __device__ __forceinline__ Arithmetic<Storage> get(int lane) const {
    if constexpr (kPairs) {
      const uint16_t bits = static_cast<uint16_t>(words[lane / 2] >> (lane % 2 * 16));
      Storage element;
      memcpy(&element, &bits, sizeof element);
      return widen(element);
    } else {
      return widen(words[lane]);
    }
  }

  __device__ __forceinline__ void set(int lane, Arithmetic<Storage> value) {
    if constexpr (kPairs) {
      Storage element;
      uint16_t bits;
      narrow(value, &element);
      memcpy(&bits, &element, sizeof bits);
      const int shift = lane % 2 * 16;
      words[lane / 2] = (words[lane / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(bits) << shift;
    } else {
      narrow(value, &words[lane]);
    }
  }
};

template <typename Storage>
constexpr int kPackElements = kPackBytes / sizeof(Storage);

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ELEMENT_CUH_

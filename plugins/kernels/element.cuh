// How the CUDA kernels read and write each element type, alone and in vectors of 16 bytes.

#ifndef DEPLOYNORM_KERNELS_ELEMENT_CUH_
#define DEPLOYNORM_KERNELS_ELEMENT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

namespace deploynorm {
namespace {

constexpr int kVecBytes = 16;  // the widest load and store that every device has

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

// Two values by one instruction, the first in the lower half.
template <typename Storage>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<Storage, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// x normalised. Both passes compute it by this one rounding, from a scale that is one product of gamma and rstd: so the
// backward pass finds each element on the side of its threshold on which the forward pass had it.
__device__ __forceinline__ float normalised(float x, float scale, float beta) { return fmaf(x, scale, beta); }
__device__ __forceinline__ double normalised(double x, double scale, double beta) { return fma(x, scale, beta); }

// Neighbouring elements, read or written by one instruction where there are as many as 16 bytes hold. 16-bit elements
// stay two to a register: alone, each would take a whole one.
template <typename Storage, int kVecSize>
struct Vec {
  static constexpr int kSize = kVecSize;
  static constexpr bool kWhole = kVecSize * sizeof(Storage) == kVecBytes;
  static_assert(kWhole || kVecSize == 1, "16 bytes, or one element");
  static constexpr bool kPairs = kWhole && sizeof(Storage) == 2;
  using Word = std::conditional_t<kPairs, uint32_t, Storage>;

  __align__(kWhole ? kVecBytes : sizeof(Storage)) Word words[kPairs ? kVecSize / 2 : kVecSize];

  static __device__ __forceinline__ Vec load(const Storage* from) {
    Vec vec;
    copy(from, reinterpret_cast<Storage*>(vec.words));
    return vec;
  }

  // To global memory. The function is one instruction; of an assignment the compiler may make four of 4 bytes.
  __device__ __forceinline__ void store(Storage* to) const {
    if constexpr (kWhole) {
      uint4 all;
      memcpy(&all, words, sizeof all);
      __stwb(reinterpret_cast<uint4*>(to), all);
    } else {
      *to = words[0];
    }
  }

  // Both begin at 16 bytes, where there are as many, or are in registers.
  static __device__ __forceinline__ void copy(const Storage* from, Storage* to) {
    if constexpr (kWhole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      *to = *from;
    }
  }

  __device__ __forceinline__ Arithmetic<Storage> get(int i) const {
    if constexpr (kPairs) {
      const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      Storage element;
      memcpy(&element, &bits, sizeof element);
      return widen(element);
    } else {
      return widen(words[i]);
    }
  }

  // Replaces each element i by work(i, element).
  template <typename Work>
  __device__ __forceinline__ void transform(Work work) {
    if constexpr (kPairs) {
#pragma unroll
      for (int i = 0; i < kSize; i += 2) {
        words[i / 2] = narrow_pair<Storage>(work(i, get(i)), work(i + 1, get(i + 1)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) narrow(work(i, get(i)), &words[i]);
    }
  }

  // Makes an element zero.
  __device__ __forceinline__ void clear(int i) {
    if constexpr (kPairs) {
      words[i / 2] &= ~(0xffffu << (i % 2 * 16));
    } else {
      narrow(Arithmetic<Storage>(0), &words[i]);
    }
  }
};

template <typename Storage>
constexpr int kWholeVec = kVecBytes / sizeof(Storage);  // elements of a vector of 16 bytes

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_ELEMENT_CUH_

// How a tensor is cut for CUDA: the tile of a block, the part of it that a thread reads, and the sums over both.
//
// A *group* is what shares one mean: a plane in NCHW; in NHWC a *strip*, some neighbouring channels of one sample over
// all positions, with one mean for each channel. A block works on one group, or on a chunk of it, and reads it row by
// row, in vectors of 16 bytes or of one element:
//
//     layout  row                             vectors of a row    channels of a vector
//     NCHW    a vector of the plane           1                   1
//     NHWC    the strip's part of a position  2^log2_columns      one for each element
//
// All else is the same code for both.

#ifndef DEPLOYNORM_KERNELS_TILE_CUH_
#define DEPLOYNORM_KERNELS_TILE_CUH_

#include "element.cuh"

namespace deploynorm {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

// Of a block. Threads need twice the registers over a strip, and for vectors of float64.
__host__ __device__ constexpr int max_threads(bool channels_last, int vec_size) {
  const bool of_float64 = vec_size == 2;
  return channels_last || of_float64 ? kMaxThreads / 2 : kMaxThreads;
}

// What sizes are divided by. A division of 64 bits takes a device some hundred instructions, which would stand before
// the first load; with the reciprocal, which the host knows, it takes ten.
struct Divisor {
  int64_t by = 1;
  uint64_t reciprocal = ~uint64_t{0};  // of 2^64

  Divisor() = default;
  explicit Divisor(int64_t by) : by(by), reciprocal(~uint64_t{0} / static_cast<uint64_t>(by)) {}
};

struct Divided {
  int64_t quotient, remainder;

  __device__ __forceinline__ Divided(int64_t value, const Divisor& divisor) {
    quotient = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(value), divisor.reciprocal));
    remainder = value - quotient * divisor.by;
    // The reciprocal is rounded down, and so the quotient of a value below 2^63 may be one too small.
    if (remainder >= divisor.by) {
      ++quotient;
      remainder -= divisor.by;
    }
  }
};

// How a launch is cut. Each kernel's argument begins with it, and is passed by value.
struct Tiling {
  Divisor channels;
  Divisor strips;          // of a sample; 1 in NCHW
  Divisor chunks;          // into which the rows of a group are cut, each for one block
  int64_t spatial, pitch;  // pitch: elements from one position of NHWC to the next; 1 in NCHW
  int64_t tiles;           // planes, or samples * strips; times chunks
  int log2_columns;        // vectors of a strip's row; 0 in NCHW
};

// Who has a group. Where it is held on the chip, 32 bits count the elements of a sample of NHWC, or of a plane of NCHW.
enum class Group { kHeldByBlock, kHeldByCluster, kNotHeld };

// The part of a tile that one thread reads, in any number of tensors of the same layout.
template <typename Storage_, int kVecSize, bool kChannelsLast, Group kGroup>
struct ThreadTile {
  static constexpr bool kInChunks = kGroup != Group::kHeldByBlock;
  using Index = std::conditional_t<kGroup == Group::kNotHeld, int64_t, int>;
  using Storage = Storage_;
  using A = Arithmetic<Storage>;
  using V = Vec<Storage, kVecSize>;
  static constexpr bool kStrip = kChannelsLast;
  static constexpr int kChannels = kChannelsLast ? kVecSize : 1;  // of a vector

  int64_t offset;        // of this thread's first vector in a tensor,
  Index stride;          // and from there to its next
  Index first_row, end;  // this thread's first row, and where those of its block's chunk end
  int64_t channel;       // the first of the row
  int64_t statistic;     // that of the row's first channel, in (samples, channels)
  int64_t partial;       // that in the partial sums of chunk 0: [planes or samples][chunks][1 or pitch]
  int valid;             // elements of the vector that are channels; fewer in a row's padding, 0 beyond the row
  int row, step;         // this thread's first row in the chunk, and how many all threads have at once
  int column;
  int log2_columns;
  int64_t chunk;
  // NCHW: an element before the first or behind the last whole vector, of which a thread has one at most.
  bool has_edge;
  int64_t edge;  // its offset in a tensor

  // tensor: any of them; all are misaligned to 16 bytes by the same amount.
  __device__ ThreadTile(const Tiling& tiling, const Storage* tensor, int64_t tile) {
    const int thread = threadIdx.x, threads = blockDim.x;
    int64_t strip = 0, group = tile;
    chunk = 0;
    if constexpr (kInChunks) {
      const Divided by_chunks(group, tiling.chunks);
      chunk = by_chunks.remainder;
      group = by_chunks.quotient;
    }
    if constexpr (kChannelsLast) {
      const Divided by_strips(group, tiling.strips);
      strip = by_strips.remainder;
      group = by_strips.quotient;
    }
    log2_columns = kChannelsLast ? tiling.log2_columns : 0;
    column = thread & ((1 << log2_columns) - 1);
    row = thread >> log2_columns;
    step = threads >> log2_columns;
    has_edge = false;
    edge = 0;
    int64_t first;  // offset of the first row,
    Index pitch;    // and from one row to the next
    Index rows = static_cast<Index>(tiling.spatial);
    bool inside = true;  // whether the vector is in the row, be it in its padding
    if constexpr (kChannelsLast) {
      channel = (strip << log2_columns) * kVecSize;
      const int64_t of_vector = channel + column * kVecSize;
      first = group * tiling.spatial * tiling.pitch + of_vector;
      pitch = static_cast<Index>(tiling.pitch);
      const int64_t left = tiling.channels.by - of_vector;
      valid = left < 0 ? 0 : left > kVecSize ? kVecSize : static_cast<int>(left);
      inside = of_vector < tiling.pitch;
      statistic = group * tiling.channels.by + channel;
      partial = group * tiling.chunks.by * tiling.pitch + channel;
    } else {
      channel = Divided(group, tiling.channels).remainder;
      first = group * tiling.spatial;
      pitch = kVecSize;
      valid = kVecSize;
      statistic = group;
      partial = group * tiling.chunks.by;
      // Planes of an odd size begin anywhere; whole vectors begin at 16 bytes.
      const int misplaced =
          static_cast<int>(reinterpret_cast<uintptr_t>(tensor + first) % (kVecSize * sizeof(Storage))) /
          static_cast<int>(sizeof(Storage));
      int head = misplaced == 0 ? 0 : kVecSize - misplaced;
      if (head > tiling.spatial) head = static_cast<int>(tiling.spatial);
      const Index behind_head = rows - head;
      rows = behind_head / kVecSize;
      const int tail = static_cast<int>(behind_head % kVecSize);
      const int before = thread, behind = before - kVecSize;  // other threads, so that both are read at once
      const bool in_head = chunk == 0 && before < head;
      const bool in_tail = chunk == tiling.chunks.by - 1 && behind >= 0 && behind < tail;
      has_edge = in_head || in_tail;
      edge = first + (in_head ? before : head + rows * kVecSize + behind);
      first += head;
    }
    first_row = row;
    end = rows;
    if constexpr (kInChunks) {
      const Index share = static_cast<Index>(Divided(rows + tiling.chunks.by - 1, tiling.chunks).quotient);
      const Index begin = static_cast<Index>(chunk) * share;
      first_row += begin;
      if (begin + share < rows) end = begin + share;
    }
    offset = first + first_row * pitch;
    stride = step * pitch;
    if (!inside) end = 0;
  }

  // Whether this thread has an i-th vector.
  __device__ bool has(Index i) const { return first_row + i * step < end; }

  // Its offset in a tensor.
  __device__ int64_t at(Index i) const { return offset + i * stride; }
};

// The sum over 2^log2_threads neighbouring threads. All threads of the warp call it.
template <typename A>
__device__ __forceinline__ A sum_of_threads(A sum, int log2_threads) {
  for (int distance = 1 << log2_threads >> 1; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  return sum;
}

// The sums over the threads of a block, for each column: in shared memory, one row of it per warp. There are kSums sums
// for each column, and kColumns columns at most.
template <typename A, int kSums, int kColumns, int kThreads>
struct BlockSums {
  const A* of_warps;
  int width;  // columns times sums

  __device__ BlockSums(int log2_columns, A (&sums)[kSums]) {
    __shared__ A shared[kThreads / kWarp * kColumns * kSums];
    const int columns = 1 << log2_columns, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    of_warps = shared;
    width = columns * kSums;
    for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum] += __shfl_xor_sync(0xffffffffu, sums[sum], distance);
    }
    if (lane < columns) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) shared[warp * width + lane * kSums + sum] = sums[sum];
    }
    __syncthreads();
  }

  // Of all threads: sum index % kSums of the column index / kSums.
  __device__ A total(int index) const {
    const int warps = blockDim.x / kWarp;
    A sum = of_warps[index];
    for (int warp = 1; warp < warps; ++warp) sum += of_warps[warp * width + index];
    return sum;
  }
};

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_TILE_CUH_

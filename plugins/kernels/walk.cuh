// How the work of filter response normalization is cut for CUDA: what a launch works on, and what of it a thread has.
//
// A *group* is what shares one mean: a plane in NCHW, and in NHWC a *strip* of one sample, that is, some neighbouring
// channels over all positions, one mean for each. A block walks over the *rows* of its group: in NCHW a row is a pack
// of the plane, in NHWC the strip's part of one position. `lanes` of a pack are the same channel in NCHW and one
// channel each in NHWC; all else is the same code.

#ifndef DEPLOYNORM_KERNELS_WALK_CUH_
#define DEPLOYNORM_KERNELS_WALK_CUH_

#include "element.cuh"

namespace deploynorm {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;      // of a block over a plane
constexpr int kMaxStripThreads = 512;  // of a block over a strip, whose threads need twice the registers
constexpr int kUnroll = 4;             // loads on their way at once, where a group is too large to be held
constexpr int kSplitThreads = 256;     // of a block that has a part of a group,
constexpr int kSplitBlocks = 3;        // and how many of those a multiprocessor has at once
constexpr int kTeamThreads = 256;      // of a block whose teams of threads have a plane each
constexpr int kTeamHeld = 4;           // packs that a thread of a team holds
constexpr int kPackedThreads = 256;
constexpr int kPackedBytes = 16384;  // of shared memory, for several small planes

constexpr int most_threads(bool channels_last) { return channels_last ? kMaxStripThreads : kMaxThreads; }

// How a launch is cut. What a kernel works on begins with it, and is passed by value.
struct Cut {
  int64_t channels, spatial, pitch;  // pitch: elements from one position of NHWC to the next; 1 in NCHW
  int64_t tiles;                     // planes, or samples * strips; times chunks
  int64_t chunks;                    // into which the rows of a group are cut, each for one block
  int strips;                        // of a sample; 1 in NCHW
  int column_bits;                   // a row of a strip is 2^column_bits packs; 0 in NCHW
};

// A division of 64 bits takes a device some hundred instructions, which stand before the first load: few need them.
struct Divided {
  int64_t quotient, remainder;

  __device__ __forceinline__ Divided(int64_t value, int64_t by) {
    if (by == 1) {
      quotient = value;
      remainder = 0;
    } else if (((value | by) >> 32) == 0) {
      quotient = static_cast<uint32_t>(value) / static_cast<uint32_t>(by);
      remainder = static_cast<uint32_t>(value) % static_cast<uint32_t>(by);
    } else {
      quotient = value / by;
      remainder = value % by;
    }
  }
};

// The part of a tile that one thread walks over, in any number of tensors that are laid out alike. Its threads are
// those of a block, or fewer that number themselves.
template <typename Storage, int kLanes, bool kChannelsLast>
struct Walk {
  using A = Arithmetic<Storage>;
  using P = Pack<Storage, kLanes>;
  static constexpr bool kStrip = kChannelsLast;
  static constexpr int kSums = kChannelsLast ? kLanes : 1;  // of a pack: one for each channel
  static constexpr int kThreads = most_threads(kChannelsLast);

  int64_t first, leap;      // offset in a tensor of this thread's first row, and from there to its next
  int64_t begin, end;       // rows of this block's chunk
  int64_t first_channel;    // of the row
  int64_t first_mean;       // of the row in what there is once for each sample and channel
  int64_t first_statistic;  // of the row in the partial sums of chunk 0: [planes or samples][chunks][1 or pitch]
  int lanes;                // of the pack that are channels; fewer in a row's padding, 0 beyond the row
  bool inside;              // of the row, be it in its padding
  int row, step;            // this thread's first row in the chunk, and how many all threads have at once
  int column, column_bits;
  int64_t chunk;
  // NCHW: what lies before the first and behind the last whole pack, one element a thread.
  bool has_edge;
  int64_t edge;  // its offset in a tensor

  // tensor: any of them; all stand off 16 bytes by as much.
  __device__ Walk(const Cut& cut, const Storage* tensor, int64_t tile, int thread = threadIdx.x,
                  int threads = blockDim.x) {
    const Divided by_strips(tile, cut.strips), by_chunks(by_strips.quotient, cut.chunks);
    const int64_t strip = by_strips.remainder, group = by_chunks.quotient;
    chunk = by_chunks.remainder;
    column_bits = cut.column_bits;
    column = thread & ((1 << column_bits) - 1);
    row = thread >> column_bits;
    step = threads >> column_bits;
    has_edge = false;
    edge = 0;
    int64_t offset, stride, rows;  // of the first row, and from one to the next
    if constexpr (kChannelsLast) {
      first_channel = (strip << column_bits) * kLanes;
      const int64_t channel = first_channel + column * kLanes;
      offset = group * cut.spatial * cut.pitch + channel;
      stride = cut.pitch;
      rows = cut.spatial;
      const int64_t left = cut.channels - channel;
      lanes = left < 0 ? 0 : left > kLanes ? kLanes : static_cast<int>(left);
      inside = channel < cut.pitch;
      first_mean = group * cut.channels + first_channel;
      first_statistic = group * cut.chunks * cut.pitch + first_channel;
    } else {
      first_channel = Divided(group, cut.channels).remainder;
      offset = group * cut.spatial;
      stride = kLanes;
      lanes = kLanes;
      inside = true;
      first_mean = group;
      first_statistic = group * cut.chunks;
      // Planes of an odd size begin anywhere; whole packs begin at 16 bytes.
      const int64_t misplaced =
          reinterpret_cast<uintptr_t>(tensor + offset) % (kLanes * sizeof(Storage)) / sizeof(Storage);
      int64_t head = misplaced == 0 ? 0 : kLanes - misplaced;
      if (head > cut.spatial) head = cut.spatial;
      rows = (cut.spatial - head) / kLanes;
      const int64_t tail = cut.spatial - head - rows * kLanes;
      const int64_t before = thread, behind = before - kLanes;  // other threads, so that both are read at once
      const bool in_head = chunk == 0 && before < head;
      const bool in_tail = chunk == cut.chunks - 1 && behind >= 0 && behind < tail;
      has_edge = in_head || in_tail;
      edge = offset + (in_head ? before : head + rows * kLanes + behind);
      offset += head;
    }
    const int64_t share = Divided(rows + cut.chunks - 1, cut.chunks).quotient;
    begin = chunk * share;
    if (begin > rows) begin = rows;
    end = begin + share < rows ? begin + share : rows;
    first = offset + (begin + row) * stride;
    leap = step * stride;
  }

  // Whether this thread has row i of its chunk.
  __device__ bool has(int64_t i) const { return begin + row + i * step < end && inside; }

  // Leaves this thread with nothing.
  __device__ void leave() { inside = has_edge = false; }

  // Its offset in a tensor.
  __device__ int64_t at(int64_t i) const { return first + i * leap; }
};

// What 2^team_bits neighbouring threads have summed. All threads of the warp call it.
template <typename A>
__device__ __forceinline__ A sum_of_team(A sum, int team_bits) {
  for (int distance = 1 << team_bits >> 1; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  return sum;
}

// What the threads of a block have summed, column by column: in shared memory, one row of it a warp. There are kSums
// sums of each column, and kColumns columns at most.
template <typename A, int kSums, int kColumns, int kThreads>
struct ColumnSums {
  static constexpr int kMost = kColumns * kSums;

  const A* of_warps;
  int width;  // columns times sums

  __device__ ColumnSums(int column_bits, A (&sums)[kSums]) {
    __shared__ A shared[kThreads / kWarp * kMost];
    const int columns = 1 << column_bits, warp = threadIdx.x / kWarp, thread = threadIdx.x % kWarp;
    of_warps = shared;
    width = columns * kSums;
    for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum] += __shfl_xor_sync(0xffffffffu, sums[sum], distance);
    }
    if (thread < columns) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) shared[warp * width + thread * kSums + sum] = sums[sum];
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

#endif  // DEPLOYNORM_KERNELS_WALK_CUH_

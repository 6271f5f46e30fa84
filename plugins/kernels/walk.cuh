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

// What a launch works on. Passed by value.
template <typename Storage>
struct Problem {
  const Storage* x;
  Storage* y;
  const Arithmetic<Storage>*gamma, *beta, *tau, *eps;
  Arithmetic<Storage>* partials;     // sums of squares: [planes or samples][chunks][1 or pitch]
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

// The part of a tile that one thread walks over.
template <typename Storage, int kLanes, bool kChannelsLast>
struct Walk {
  using A = Arithmetic<Storage>;
  using P = Pack<Storage, kLanes>;
  static constexpr bool kStrip = kChannelsLast;
  static constexpr int kSums = kChannelsLast ? kLanes : 1;

  const Storage* x;  // of the first row
  Storage* y;
  int64_t stride;           // elements from one row to the next
  int64_t begin, end;       // rows of this block's chunk
  int64_t first_channel;    // of the row
  int64_t first_statistic;  // of the row in the partial sums of chunk 0
  int lanes;                // of the pack that are channels; fewer in a row's padding, 0 beyond the row
  bool inside;              // of the row, be it in its padding
  int row, step;            // this thread's first row in the chunk, and how many all threads have at once
  int column, column_bits;
  int64_t chunk;
  // NCHW: what lies before the first and behind the last whole pack, one element a thread.
  bool has_edge;
  int64_t edge;  // its offset from x

  __device__ Walk(const Problem<Storage>& problem, int64_t tile) {
    const Divided by_strips(tile, problem.strips), by_chunks(by_strips.quotient, problem.chunks);
    const int64_t strip = by_strips.remainder, group = by_chunks.quotient;
    chunk = by_chunks.remainder;
    column_bits = problem.column_bits;
    column = threadIdx.x & ((1 << column_bits) - 1);
    row = threadIdx.x >> column_bits;
    step = blockDim.x >> column_bits;
    has_edge = false;
    edge = 0;
    int64_t rows;
    if constexpr (kChannelsLast) {
      first_channel = (strip << column_bits) * kLanes;
      const int64_t channel = first_channel + column * kLanes;
      const int64_t start = group * problem.spatial * problem.pitch + channel;
      x = problem.x + start;
      y = problem.y + start;
      stride = problem.pitch;
      rows = problem.spatial;
      const int64_t left = problem.channels - channel;
      lanes = left < 0 ? 0 : left > kLanes ? kLanes : static_cast<int>(left);
      inside = channel < problem.pitch;
      first_statistic = group * problem.chunks * problem.pitch + first_channel;
    } else {
      first_channel = Divided(group, problem.channels).remainder;
      const int64_t start = group * problem.spatial;
      x = problem.x + start;
      y = problem.y + start;
      stride = kLanes;
      lanes = kLanes;
      inside = true;
      first_statistic = group * problem.chunks;
      // Planes of an odd size begin anywhere; whole packs begin at 16 bytes.
      const int64_t misplaced = reinterpret_cast<uintptr_t>(x) % (kLanes * sizeof(Storage)) / sizeof(Storage);
      int64_t head = misplaced == 0 ? 0 : kLanes - misplaced;
      if (head > problem.spatial) head = problem.spatial;
      rows = (problem.spatial - head) / kLanes;
      const int64_t tail = problem.spatial - head - rows * kLanes;
      const int64_t before = threadIdx.x, behind = before - kLanes;  // other threads, so that both are read at once
      const bool in_head = chunk == 0 && before < head;
      const bool in_tail = chunk == problem.chunks - 1 && behind >= 0 && behind < tail;
      has_edge = in_head || in_tail;
      edge = in_head ? before - head : rows * kLanes + behind;
      x += head;
      y += head;
    }
    const int64_t share = Divided(rows + problem.chunks - 1, problem.chunks).quotient;
    begin = chunk * share;
    if (begin > rows) begin = rows;
    end = begin + share < rows ? begin + share : rows;
  }

  // Whether this thread has row i of its chunk.
  __device__ bool has(int64_t i) const { return begin + row + i * step < end && inside; }

  __device__ P load(int64_t i) const { return P::load(x + (begin + row + i * step) * stride); }

  static __device__ __forceinline__ A square(const P& pack, int lane) {
    const A value = pack.get(lane);
    return value * value;
  }

  __device__ void add(const P& pack, A (&sums)[kSums]) const {
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += square(pack, lane);
    } else {
      A sum = 0;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) sum += square(pack, lane);
      sums[0] += sum;
    }
  }

  __device__ void add_edge(A (&sums)[kSums]) const {
    if (!has_edge) return;
    const A value = widen(x[edge]);
    sums[0] += value * value;
  }
};

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_WALK_CUH_

// The CUDA kernels of filter response normalization. frn.cu says which runs when.
//
// A *group* is what shares one mean: a plane in NCHW, and in NHWC a *strip* of one sample, that is, some neighbouring
// channels over all positions, one mean for each. A block walks over the *rows* of its group: in NCHW a row is a pack
// of the plane, in NHWC the strip's part of one position. `lanes` of a pack are the same channel in NCHW and one
// channel each in NHWC; all else is the same code.

#ifndef DEPLOYNORM_KERNELS_FRN_CUH_
#define DEPLOYNORM_KERNELS_FRN_CUH_

#include "element.cuh"

namespace deploynorm {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;      // of a block over a plane
constexpr int kMaxStripThreads = 512;  // of a block over a strip, whose threads need twice the registers
constexpr int kPackedThreads = 256;
constexpr int kPackedBytes = 16384;  // of shared memory, for several small planes

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

// The part of a tile that one thread walks over.
template <typename Storage, int kLanes, bool kChannelsLast>
struct Walk {
  using A = Arithmetic<Storage>;
  using P = Pack<Storage, kLanes>;
  static constexpr int kSums = kChannelsLast ? kLanes : 1;

  const Storage* x;  // of the first row
  Storage* y;
  int64_t stride;      // elements from one row to the next
  int64_t begin, end;  // rows of this block's chunk
  int64_t channel;     // of the first lane
  int64_t statistic;   // of the first lane in the partial sums of chunk 0
  int lanes;           // that are channels; fewer than kLanes in a row's padding, 0 beyond the row
  bool inside;         // of the row, be it in its padding
  int row, step;       // this thread's first row in the chunk, and how many all threads have at once
  int column;
  int64_t chunk;
  // NCHW: what lies before the first and behind the last whole pack, one element a thread.
  bool has_edge;
  int64_t edge;  // its offset from x

  __device__ Walk(const Problem<Storage>& problem, int64_t tile) {
    const int64_t strip = tile % problem.strips;
    chunk = tile / problem.strips % problem.chunks;
    const int64_t group = tile / problem.strips / problem.chunks;
    column = threadIdx.x & ((1 << problem.column_bits) - 1);
    row = threadIdx.x >> problem.column_bits;
    step = blockDim.x >> problem.column_bits;
    has_edge = false;
    edge = 0;
    int64_t rows;
    if constexpr (kChannelsLast) {
      channel = ((strip << problem.column_bits) + column) * kLanes;
      const int64_t start = group * problem.spatial * problem.pitch + channel;
      x = problem.x + start;
      y = problem.y + start;
      stride = problem.pitch;
      rows = problem.spatial;
      const int64_t left = problem.channels - channel;
      lanes = left < 0 ? 0 : left > kLanes ? kLanes : static_cast<int>(left);
      inside = channel < problem.pitch;
      statistic = group * problem.chunks * problem.pitch + channel;
    } else {
      channel = group % problem.channels;
      const int64_t start = group * problem.spatial;
      x = problem.x + start;
      y = problem.y + start;
      stride = kLanes;
      lanes = kLanes;
      inside = true;
      statistic = group * problem.chunks;
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
    const int64_t share = (rows + problem.chunks - 1) / problem.chunks;
    begin = chunk * share;
    if (begin > rows) begin = rows;
    end = begin + share < rows ? begin + share : rows;
  }

  // Whether this thread has row i of its chunk.
  __device__ bool has(int64_t i) const { return begin + row + i * step < end && inside; }

  __device__ P load(int64_t i) const { return P::load(x + (begin + row + i * step) * stride); }

  static __device__ __forceinline__ A square(const P& pack, int lane) {
    const A value = widen(pack.elements[lane]);
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

template <typename A>
__device__ __forceinline__ A apply(A x, A scale, A beta, A tau) {
  const A value = x * scale + beta;
  return value < tau ? tau : value;  // in this order NaN stays NaN
}

// scale * x + beta, bounded by tau, for the lanes of a pack.
template <typename W>
struct Affine {
  using A = typename W::A;
  A scale[W::kSums], beta[W::kSums], tau[W::kSums];

  template <typename Storage>
  __device__ Affine(const Problem<Storage>& problem, const W& walk, const A (&sums)[W::kSums]) {
#pragma unroll
    for (int lane = 0; lane < W::kSums; ++lane) {
      const bool there = lane < walk.lanes;
      const int64_t channel = there ? walk.channel + lane : 0;
      const A mean = sums[lane] / static_cast<A>(problem.spatial);
      scale[lane] = problem.gamma[channel] / sqrt(mean + problem.eps[channel]);
      beta[lane] = problem.beta[channel];
      tau[lane] = problem.tau[channel];
    }
  }

  __device__ void store(const W& walk, typename W::P pack, int64_t i) const {
    constexpr int kCount = sizeof(pack.elements) / sizeof(pack.elements[0]);
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) {
      const int sum = W::kSums == 1 ? 0 : lane;
      const A value = apply(static_cast<A>(widen(pack.elements[lane])), scale[sum], beta[sum], tau[sum]);
      // What fills a row up may be anything, NaN too, and becomes zero.
      narrow(lane < walk.lanes ? value : A(0), &pack.elements[lane]);
    }
    pack.store(walk.y + (walk.begin + walk.row + i * walk.step) * walk.stride);
  }

  __device__ void store_edge(const W& walk) const {
    if (!walk.has_edge) return;
    narrow(apply(static_cast<A>(widen(walk.x[walk.edge])), scale[0], beta[0], tau[0]), &walk.y[walk.edge]);
  }
};

// Adds up what the threads of a block have, column by column; all get the result.
template <typename A, int kSums, bool kChannelsLast>
__device__ void reduce(A (&sums)[kSums], int column_bits, int column) {
  constexpr int kColumns = kChannelsLast ? kWarp : 1;
  constexpr int kWarps = (kChannelsLast ? kMaxStripThreads : kMaxThreads) / kWarp;
  __shared__ A shared[kWarps * kColumns * kSums];
  const int columns = 1 << column_bits, width = columns * kSums;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, thread = threadIdx.x;
  for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += __shfl_xor_sync(0xffffffffu, sums[lane], distance);
  }
  if (thread % kWarp < columns) {
#pragma unroll
    for (int lane = 0; lane < kSums; ++lane) shared[warp * width + column * kSums + lane] = sums[lane];
  }
  __syncthreads();
  for (int index = thread; index < width; index += blockDim.x) {
    A sum = shared[index];
    for (int other = 1; other < warps; ++other) sum += shared[other * width + index];
    shared[index] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int lane = 0; lane < kSums; ++lane) sums[lane] = shared[column * kSums + lane];
  __syncthreads();  // before the next tile writes
}

// One read, one write: a thread holds up to kHeld packs of its group in registers.
template <typename Storage, int kLanes, bool kChannelsLast, int kHeld>
__global__ void __launch_bounds__(kChannelsLast ? kMaxStripThreads : kMaxThreads)
    frn_in_registers(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, tile);
    typename W::P held[kHeld] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (walk.has(i)) held[i] = walk.load(i);
    }
    typename W::A sums[W::kSums] = {};
    walk.add_edge(sums);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) walk.add(held[i], sums);
    reduce<typename W::A, W::kSums, kChannelsLast>(sums, problem.column_bits, walk.column);
    const Affine<W> affine(problem, walk, sums);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (walk.has(i)) affine.store(walk, held[i], i);
    }
    affine.store_edge(walk);
  }
}

constexpr int kUnroll = 4;  // loads on their way at once, where a group is too large to be held

template <typename W>
__device__ void add_rows(const W& walk, typename W::A (&sums)[W::kSums]) {
  int64_t i = 0;
  for (; walk.has(i + kUnroll - 1); i += kUnroll) {
    typename W::P packs[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) packs[j] = walk.load(i + j);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) walk.add(packs[j], sums);
  }
  for (; walk.has(i); ++i) walk.add(walk.load(i), sums);
  walk.add_edge(sums);
}

template <typename W>
__device__ void store_rows(const W& walk, const Affine<W>& affine) {
  int64_t i = 0;
  for (; walk.has(i + kUnroll - 1); i += kUnroll) {
    typename W::P packs[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) packs[j] = walk.load(i + j);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) affine.store(walk, packs[j], i + j);
  }
  for (; walk.has(i); ++i) affine.store(walk, walk.load(i), i);
  affine.store_edge(walk);
}

// Two reads, one write, a group a block.
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kChannelsLast ? kMaxStripThreads : kMaxThreads)
    frn_in_two_passes(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, tile);
    typename W::A sums[W::kSums] = {};
    add_rows(walk, sums);
    reduce<typename W::A, W::kSums, kChannelsLast>(sums, problem.column_bits, walk.column);
    store_rows(walk, Affine<W>(problem, walk, sums));
  }
}

// The same with a group shared out over `chunks` blocks: first their sums,
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxStripThreads) frn_partial_sums(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, tile);
    typename W::A sums[W::kSums] = {};
    add_rows(walk, sums);
    reduce<typename W::A, W::kSums, kChannelsLast>(sums, problem.column_bits, walk.column);
    if (walk.row != 0) continue;
#pragma unroll
    for (int lane = 0; lane < W::kSums; ++lane) {
      if (lane < walk.lanes) problem.partials[walk.statistic + walk.chunk * problem.pitch + lane] = sums[lane];
    }
  }
}

// then, in a second launch, y. The tiles that were read last come first: they are still in the cache.
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxStripThreads) frn_from_partial_sums(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.tiles - 1 - tile);
    typename W::A sums[W::kSums] = {};
    for (int64_t chunk = walk.row; chunk < problem.chunks; chunk += walk.step) {
#pragma unroll
      for (int lane = 0; lane < W::kSums; ++lane) {
        if (lane < walk.lanes) sums[lane] += problem.partials[walk.statistic + chunk * problem.pitch + lane];
      }
    }
    reduce<typename W::A, W::kSums, kChannelsLast>(sums, problem.column_bits, walk.column);
    store_rows(walk, Affine<W>(problem, walk, sums));
  }
}

// Small planes of NCHW, several to a block: they lie end to end, so that together they are read and written in whole
// packs, and each is normalised in shared memory by 2^team_bits threads.
template <typename Storage, int kLanes>
__global__ void __launch_bounds__(kPackedThreads)
    frn_packed(const Problem<Storage> problem, const int64_t planes, const int planes_of_a_tile, const int team_bits) {
  using A = Arithmetic<Storage>;
  using P = Pack<Storage, kLanes>;
  __shared__ __align__(kPackBytes) Storage memory[kPackedBytes / sizeof(Storage)];
  const int length = static_cast<int>(problem.spatial);
  const int lane = threadIdx.x & ((1 << team_bits) - 1), lanes = 1 << team_bits;
  const int team = threadIdx.x >> team_bits, teams = blockDim.x >> team_bits;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const int64_t first = tile * planes_of_a_tile;
    const int count = static_cast<int>(planes - first < planes_of_a_tile ? planes - first : planes_of_a_tile);
    const int elements = count * length, whole = elements / kLanes;
    const Storage* x = problem.x + first * length;
    Storage* y = problem.y + first * length;
#pragma unroll 4
    for (int pack = threadIdx.x; pack < whole; pack += blockDim.x) {
      P::load(x + pack * kLanes).store(memory + pack * kLanes);
    }
    for (int i = whole * kLanes + threadIdx.x; i < elements; i += blockDim.x) memory[i] = x[i];
    __syncthreads();
    // All threads go round equally often: those of a warp shuffle together.
    for (int start = 0; start < count; start += teams) {
      const int plane = start + team;
      Storage* values = memory + plane * length;
      A sum = 0;
      if (plane < count) {
#pragma unroll 4
        for (int i = lane; i < length; i += lanes) {
          const A value = widen(values[i]);
          sum += value * value;
        }
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (plane >= count) continue;
      const int64_t channel = (first + plane) % problem.channels;
      const A scale = problem.gamma[channel] / sqrt(sum / static_cast<A>(length) + problem.eps[channel]);
      const A beta = problem.beta[channel], tau = problem.tau[channel];
#pragma unroll 4
      for (int i = lane; i < length; i += lanes) {
        narrow(apply(static_cast<A>(widen(values[i])), scale, beta, tau), &values[i]);
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int pack = threadIdx.x; pack < whole; pack += blockDim.x) {
      P::load(memory + pack * kLanes).store(y + pack * kLanes);
    }
    for (int i = whole * kLanes + threadIdx.x; i < elements; i += blockDim.x) y[i] = memory[i];
    __syncthreads();  // before the next tile comes in
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_FRN_CUH_

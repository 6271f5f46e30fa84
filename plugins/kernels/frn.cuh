// The CUDA kernels of filter response normalization. walk.cuh says how the work is cut, frn.cu which runs when.

#ifndef DEPLOYNORM_KERNELS_FRN_CUH_
#define DEPLOYNORM_KERNELS_FRN_CUH_

#include "element.cuh"
#include "walk.cuh"

namespace deploynorm {
namespace {

constexpr int kPackedThreads = 256;
constexpr int kPackedBytes = 16384;  // of shared memory, for several small planes

template <typename A>
__device__ __forceinline__ A apply(A x, A scale, A beta, A tau) {
  const A value = x * scale + beta;
  return value < tau ? tau : value;  // in this order NaN stays NaN
}

// What the threads of a block have summed, column by column: in shared memory, one row of it a warp.
template <typename W>
struct ColumnSums {
  using A = typename W::A;
  static constexpr int kColumns = W::kSums == 1 && !W::kStrip ? 1 : kWarp;
  static constexpr int kWarps = (W::kStrip ? kMaxStripThreads : kMaxThreads) / kWarp;

  const A* of_warps;
  int width;  // columns times lanes

  __device__ ColumnSums(const W& walk, A (&sums)[W::kSums]) {
    __shared__ A shared[kWarps * kColumns * W::kSums];
    const int columns = 1 << walk.column_bits, warp = threadIdx.x / kWarp, thread = threadIdx.x % kWarp;
    of_warps = shared;
    width = columns * W::kSums;
    for (int distance = kWarp / 2; distance >= columns; distance /= 2) {
#pragma unroll
      for (int lane = 0; lane < W::kSums; ++lane) sums[lane] += __shfl_xor_sync(0xffffffffu, sums[lane], distance);
    }
    if (thread < columns) {
#pragma unroll
      for (int lane = 0; lane < W::kSums; ++lane) shared[warp * width + thread * W::kSums + lane] = sums[lane];
    }
    __syncthreads();
  }

  // Of the lane `index` of the whole row.
  __device__ A total(int index) const {
    const int warps = blockDim.x / kWarp;
    A sum = of_warps[index];
    for (int warp = 1; warp < warps; ++warp) sum += of_warps[warp * width + index];
    return sum;
  }
};

// scale * x + beta, bounded by tau, for the lanes of a pack. Roots and quotients are taken once a channel, and all
// threads of the block get them.
template <typename W>
struct Affine {
  using A = typename W::A;
  A scale[W::kSums], beta[W::kSums], tau[W::kSums];

  template <typename Storage>
  __device__ Affine(const Problem<Storage>& problem, const W& walk, A (&sums)[W::kSums]) {
    constexpr int kValues = ColumnSums<W>::kColumns * W::kSums;
    __shared__ __align__(kPackBytes) A scales[kValues], betas[kValues], taus[kValues];
    const ColumnSums<W> columns(walk, sums);
    for (int index = threadIdx.x; index < columns.width; index += blockDim.x) {
      const int64_t channel = walk.first_channel + index;
      if (channel >= problem.channels) break;  // a row's padding
      const A mean = columns.total(index) / static_cast<A>(problem.spatial);
      scales[index] = problem.gamma[channel] / sqrt(mean + problem.eps[channel]);
      betas[index] = problem.beta[channel];
      taus[index] = problem.tau[channel];
    }
    __syncthreads();
#pragma unroll
    for (int lane = 0; lane < W::kSums; ++lane) {
      const int index = walk.column * W::kSums + lane;
      scale[lane] = scales[index];
      beta[lane] = betas[index];
      tau[lane] = taus[index];
    }
    __syncthreads();  // before the next tile writes
  }

  __device__ void store(const W& walk, typename W::P pack, int64_t i) const {
#pragma unroll
    for (int lane = 0; lane < W::P::kElements; ++lane) {
      const int sum = W::kSums == 1 ? 0 : lane;
      const A value = apply(pack.get(lane), scale[sum], beta[sum], tau[sum]);
      // What fills a row up may be anything, NaN too, and becomes zero.
      pack.set(lane, lane < walk.lanes ? value : A(0));
    }
    pack.store(walk.y + (walk.begin + walk.row + i * walk.step) * walk.stride);
  }

  __device__ void store_edge(const W& walk) const {
    if (!walk.has_edge) return;
    narrow(apply(static_cast<A>(widen(walk.x[walk.edge])), scale[0], beta[0], tau[0]), &walk.y[walk.edge]);
  }
};

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
    const ColumnSums<W> columns(walk, sums);
    for (int index = threadIdx.x; index < columns.width; index += blockDim.x) {
      if (walk.first_channel + index >= problem.channels) break;  // a row's padding
      problem.partials[walk.first_statistic + walk.chunk * problem.pitch + index] = columns.total(index);
    }
    __syncthreads();  // before the next tile writes
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
        if (lane < walk.lanes)
          sums[lane] += problem.partials[walk.first_statistic + chunk * problem.pitch + walk.column * W::kSums + lane];
      }
    }
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
      P::copy(x + pack * kLanes, memory + pack * kLanes);
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
      const int64_t channel = Divided(first + plane, problem.channels).remainder;
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
      P::copy(memory + pack * kLanes, y + pack * kLanes);
    }
    for (int i = whole * kLanes + threadIdx.x; i < elements; i += blockDim.x) y[i] = memory[i];
    __syncthreads();  // before the next tile comes in
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_FRN_CUH_

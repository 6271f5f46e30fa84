// The CUDA kernels of filter response normalization. walk.cuh says how the work is cut, frn.cu which runs when.

#ifndef DEPLOYNORM_KERNELS_FRN_CUH_
#define DEPLOYNORM_KERNELS_FRN_CUH_

#include "element.cuh"
#include "walk.cuh"

namespace deploynorm {
namespace {

// What a launch works on. Passed by value.
template <typename Storage>
struct Problem : Cut {
  const Storage* x;
  Storage* y;
  const Arithmetic<Storage>*gamma, *beta, *tau, *eps;
  Arithmetic<Storage>* rstd;      // may be null
  Arithmetic<Storage>* partials;  // sums of squares: [planes or samples][chunks][1 or pitch]
};

template <typename A>
__device__ __forceinline__ A apply(A x, A scale, A beta, A tau) {
  const A value = normalised(x, scale, beta);
  return value < tau ? tau : value;  // in this order NaN stays NaN
}

template <typename P>
__device__ __forceinline__ Arithmetic<typename P::Element> square(const P& pack, int lane) {
  const auto value = pack.get(lane);
  return value * value;
}

// Adds the squares of a pack to what its channels have.
template <typename W>
__device__ __forceinline__ void add(const typename W::P& pack, typename W::A (&sums)[W::kSums]) {
  if constexpr (W::kStrip) {
#pragma unroll
    for (int lane = 0; lane < W::kSums; ++lane) sums[lane] += square(pack, lane);
  } else {
    typename W::A sum = 0;
#pragma unroll
    for (int lane = 0; lane < W::P::kElements; ++lane) sum += square(pack, lane);
    sums[0] += sum;
  }
}

template <typename Storage, typename W>
__device__ __forceinline__ void add_edge(const Problem<Storage>& problem, const W& walk,
                                         typename W::A (&sums)[W::kSums]) {
  if (!walk.has_edge) return;
  const typename W::A value = widen(problem.x[walk.edge]);
  sums[0] += value * value;
}

template <typename W>
using Columns = ColumnSums<typename W::A, W::kSums, W::kStrip ? kWarp : 1, W::kThreads>;

// scale * x + beta, bounded by tau, for the lanes of a pack. Roots and quotients are taken once a channel, and all
// threads of the block get them.
template <typename W>
struct Affine {
  using A = typename W::A;
  A scale[W::kSums], beta[W::kSums], tau[W::kSums];

  template <typename Storage>
  __device__ Affine(const Problem<Storage>& problem, const W& walk, A (&sums)[W::kSums]) {
    constexpr int kValues = Columns<W>::kMost;
    __shared__ __align__(kPackBytes) A scales[kValues], betas[kValues], taus[kValues];
    const Columns<W> columns(walk.column_bits, sums);
    for (int index = threadIdx.x; index < columns.width; index += blockDim.x) {
      const int64_t channel = walk.first_channel + index;
      if (channel >= problem.channels) break;  // a row's padding
      const A mean = columns.total(index) / static_cast<A>(problem.spatial);
      const A rstd = A(1) / sqrt(mean + problem.eps[channel]);
      if (problem.rstd != nullptr && walk.chunk == 0) problem.rstd[walk.first_mean + index] = rstd;
      scales[index] = problem.gamma[channel] * rstd;
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

  // Of a plane that a team of threads has, all of which know its sum.
  template <typename Storage>
  __device__ Affine(const Problem<Storage>& problem, const W& walk, A sum) {
    const A rstd = A(1) / sqrt(sum / static_cast<A>(problem.spatial) + problem.eps[walk.first_channel]);
    if (problem.rstd != nullptr && walk.row == 0 && walk.inside) problem.rstd[walk.first_mean] = rstd;
    scale[0] = problem.gamma[walk.first_channel] * rstd;
    beta[0] = problem.beta[walk.first_channel];
    tau[0] = problem.tau[walk.first_channel];
  }

  template <typename Storage>
  __device__ void store(const Problem<Storage>& problem, const W& walk, typename W::P pack, int64_t i) const {
    pack.transform([&](int lane, A x) {
      const int sum = W::kSums == 1 ? 0 : lane;
      // What fills a row up may be anything, NaN too, and becomes zero.
      return lane < walk.lanes ? apply(x, scale[sum], beta[sum], tau[sum]) : A(0);
    });
    pack.store(problem.y + walk.at(i));
  }

  template <typename Storage>
  __device__ void store_edge(const Problem<Storage>& problem, const W& walk) const {
    if (!walk.has_edge) return;
    narrow(apply(A(widen(problem.x[walk.edge])), scale[0], beta[0], tau[0]), &problem.y[walk.edge]);
  }
};

// What a thread holds of its group: up to kHeld packs, and an element at the edge of a plane.
template <typename Storage, typename W, int kHeld>
struct Held {
  typename W::P packs[kHeld] = {};

  __device__ Held(const Problem<Storage>& problem, const W& walk) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (walk.has(i)) packs[i] = W::P::load(problem.x + walk.at(i));
    }
  }

  __device__ void add_to(const Problem<Storage>& problem, const W& walk, typename W::A (&sums)[W::kSums]) const {
    add_edge(problem, walk, sums);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) add<W>(packs[i], sums);
  }

  __device__ void store(const Problem<Storage>& problem, const W& walk, const Affine<W>& affine) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (walk.has(i)) affine.store(problem, walk, packs[i], i);
    }
    affine.store_edge(problem, walk);
  }
};

// One read, one write: a block holds its group in registers.
template <typename Storage, int kLanes, bool kChannelsLast, int kHeld>
__global__ void __launch_bounds__(most_threads(kChannelsLast)) frn_in_registers(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, tile);
    const Held<Storage, W, kHeld> held(problem, walk);
    typename W::A sums[W::kSums] = {};
    held.add_to(problem, walk, sums);
    held.store(problem, walk, Affine<W>(problem, walk, sums));
  }
}

// The same of small planes, each of which a team of 2^team_bits threads holds, without a barrier.
template <typename Storage, int kLanes>
__global__ void __launch_bounds__(kTeamThreads) frn_by_teams(const Problem<Storage> problem, const int team_bits) {
  using W = Walk<Storage, kLanes, false>;
  const int thread = threadIdx.x & ((1 << team_bits) - 1);
  const int team = threadIdx.x >> team_bits, teams = blockDim.x >> team_bits;
  // All threads go round equally often: those of a warp shuffle together.
  for (int64_t first = int64_t{blockIdx.x} * teams; first < problem.tiles; first += int64_t{gridDim.x} * teams) {
    const bool there = first + team < problem.tiles;
    W walk(problem, problem.x, there ? first + team : first, thread, 1 << team_bits);
    if (!there) walk.leave();
    const Held<Storage, W, kTeamHeld> held(problem, walk);
    typename W::A sums[1] = {};
    held.add_to(problem, walk, sums);
    held.store(problem, walk, Affine<W>(problem, walk, sum_of_team(sums[0], team_bits)));
  }
}

template <typename Storage, typename W>
__device__ void add_rows(const Problem<Storage>& problem, const W& walk, typename W::A (&sums)[W::kSums]) {
  int64_t i = 0;
  for (; walk.has(i + kUnroll - 1); i += kUnroll) {
    typename W::P packs[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) packs[j] = W::P::load(problem.x + walk.at(i + j));
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) add<W>(packs[j], sums);
  }
  for (; walk.has(i); ++i) add<W>(W::P::load(problem.x + walk.at(i)), sums);
  add_edge(problem, walk, sums);
}

template <typename Storage, typename W>
__device__ void store_rows(const Problem<Storage>& problem, const W& walk, const Affine<W>& affine) {
  int64_t i = 0;
  for (; walk.has(i + kUnroll - 1); i += kUnroll) {
    typename W::P packs[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) packs[j] = W::P::load(problem.x + walk.at(i + j));
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) affine.store(problem, walk, packs[j], i + j);
  }
  for (; walk.has(i); ++i) affine.store(problem, walk, W::P::load(problem.x + walk.at(i)), i);
  affine.store_edge(problem, walk);
}

// Two reads, one write, a group a block.
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(most_threads(kChannelsLast)) frn_in_two_passes(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, tile);
    typename W::A sums[W::kSums] = {};
    add_rows(problem, walk, sums);
    store_rows(problem, walk, Affine<W>(problem, walk, sums));
  }
}

// The same with a group shared out over `chunks` blocks: first their sums,
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks) frn_partial_sums(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, tile);
    typename W::A sums[W::kSums] = {};
    add_rows(problem, walk, sums);
    const Columns<W> columns(walk.column_bits, sums);
    for (int index = threadIdx.x; index < columns.width; index += blockDim.x) {
      if (walk.first_channel + index >= problem.channels) break;  // a row's padding
      problem.partials[walk.first_statistic + walk.chunk * problem.pitch + index] = columns.total(index);
    }
    __syncthreads();  // before the next tile writes
  }
}

// then, in a second launch, y. The tiles that were read last come first: they are still in the cache.
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks) frn_from_partial_sums(const Problem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, problem.tiles - 1 - tile);
    typename W::A sums[W::kSums] = {};
    for (int64_t chunk = walk.row; chunk < problem.chunks; chunk += walk.step) {
#pragma unroll
      for (int lane = 0; lane < W::kSums; ++lane) {
        if (lane < walk.lanes)
          sums[lane] += problem.partials[walk.first_statistic + chunk * problem.pitch + walk.column * W::kSums + lane];
      }
    }
    store_rows(problem, walk, Affine<W>(problem, walk, sums));
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
      sum = sum_of_team(sum, team_bits);
      if (plane >= count) continue;
      const int64_t channel = Divided(first + plane, problem.channels).remainder;
      const A rstd = A(1) / sqrt(sum / static_cast<A>(length) + problem.eps[channel]);
      if (problem.rstd != nullptr && lane == 0) problem.rstd[first + plane] = rstd;
      const A scale = problem.gamma[channel] * rstd;
      const A beta = problem.beta[channel], tau = problem.tau[channel];
#pragma unroll 4
      for (int i = lane; i < length; i += lanes) {
        narrow(apply(A(widen(values[i])), scale, beta, tau), &values[i]);
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

// The CUDA kernels of the backward pass. walk.cuh says how the work is cut, frn_backward.cu which runs when, frn.h what
// they compute.

#ifndef DEPLOYNORM_KERNELS_FRN_BACKWARD_CUH_
#define DEPLOYNORM_KERNELS_FRN_BACKWARD_CUH_

#include "element.cuh"
#include "walk.cuh"

namespace deploynorm {
namespace {

// The sums over a group. g is dy where y reached the threshold and 0 elsewhere; the bounded part is what g lacks of dy.
enum Kind { kGradient, kBounded, kProduct, kKinds };  // of g, of dy - g, of g * x

constexpr int kPacksHeld = 4;                                // that a thread holds of dy, and of x
constexpr int kMostHeld = 8;                                 // the same where no second block is on the multiprocessor
constexpr int kStripColumns = 8;                             // packs of a strip's row at most: 128 bytes
constexpr int kMeanBits = 3, kMeanColumns = 1 << kMeanBits;  // channels of a block that sums over the samples
constexpr int kMaxMeanThreads = 1024;                        // of it

// What a launch works on. Passed by value.
template <typename Storage>
struct BackwardProblem : Cut {
  const Storage *dy, *x;
  Storage* dx;
  const Arithmetic<Storage>*rstd, *gamma, *beta, *tau;
  Arithmetic<Storage>* sums;      // [kKinds][samples][channels]
  Arithmetic<Storage>* partials;  // [kKinds][planes or samples][chunks][1 or pitch]
  int64_t means;                  // samples * channels
  int64_t statistics;             // planes or samples, times chunks, times 1 or pitch
};

// What sums over the samples.
template <typename A>
struct ParameterProblem {
  const A *sums, *rstd, *gamma;
  A *dgamma, *dbeta, *dtau, *deps;
  int64_t samples, channels, means;
};

// dx = gamma * rstd * (g - pull * x), where product is sum(g * x). rstd * x is of the size of 1, and so is what is
// multiplied here: rstd^3 would be out of float32's range where x is very large or very small.
template <typename A>
__device__ __forceinline__ A pull_of(A rstd, A product, int64_t spatial) {
  return rstd * (rstd * (product / static_cast<A>(spatial)));
}

// The sums over a group, and dx for the lanes of a pack.
template <typename Storage, typename W>
struct Gradient {
  using A = typename W::A;
  static constexpr int kColumns = !W::kStrip ? 1 : W::P::kElements == 1 ? kWarp : kStripColumns;
  using Columns = ColumnSums<A, kKinds * W::kSums, kColumns, W::kThreads>;

  const BackwardProblem<Storage>& problem;
  const W& walk;
  const A* rstds;                                    // of a strip's row
  A rstd;                                            // of a plane
  A scale[W::kSums], beta[W::kSums], tau[W::kSums];  // of the pack
  A pull[W::kSums];                                  // dx = scale * (g - pull * x)
  A sums[kKinds * W::kSums] = {};                    // of this thread: [kind][lane]

  __device__ Gradient(const BackwardProblem<Storage>& problem, const W& walk) : problem(problem), walk(walk) {
    if constexpr (W::kStrip) {
      constexpr int kValues = kColumns * W::kSums;
      __shared__ __align__(kPackBytes) A scales[kValues], betas[kValues], taus[kValues], shared_rstds[kValues];
      rstds = shared_rstds;
      for (int index = threadIdx.x; index < W::kSums << walk.column_bits; index += blockDim.x) {
        const int64_t channel = walk.first_channel + index;
        if (channel >= problem.channels) break;  // beyond the row
        shared_rstds[index] = problem.rstd[walk.first_mean + index];
        scales[index] = problem.gamma[channel] * shared_rstds[index];
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
    } else {
      rstd = problem.rstd[walk.first_mean];
      scale[0] = problem.gamma[walk.first_channel] * rstd;
      beta[0] = problem.beta[walk.first_channel];
      tau[0] = problem.tau[walk.first_channel];
    }
  }

  // Where the threshold was above y, which then had no part in the output. False for a NaN.
  __device__ __forceinline__ bool bounded(A x, int sum) const {
    return normalised(x, scale[sum], beta[sum]) < tau[sum];
  }

  // Makes dy g, and adds to the sums.
  template <typename P>
  __device__ __forceinline__ void add(P& dy, const P& x) {
    // Of a plane those of a pack first: fewer are added one after the other, and less is lost.
    A of_pack[kKinds * W::kSums] = {};
    A(&to)[kKinds * W::kSums] = W::kStrip ? sums : of_pack;
#pragma unroll
    for (int lane = 0; lane < P::kElements; ++lane) {
      const int sum = W::kSums == 1 ? 0 : lane;
      const A gradient = dy.get(lane), value = x.get(lane);
      const bool is_bounded = bounded(value, sum);
      const A g = is_bounded ? A(0) : gradient;
      to[kGradient * W::kSums + sum] += g;
      to[kBounded * W::kSums + sum] += is_bounded ? gradient : A(0);
      to[kProduct * W::kSums + sum] += g * value;
      if (is_bounded) dy.clear(lane);
    }
    if constexpr (!W::kStrip) {
#pragma unroll
      for (int i = 0; i < kKinds * W::kSums; ++i) sums[i] += of_pack[i];
    }
  }

  // Makes dy g.
  template <typename P>
  __device__ __forceinline__ void bound(P& dy, const P& x) const {
#pragma unroll
    for (int lane = 0; lane < P::kElements; ++lane) {
      if (bounded(x.get(lane), W::kSums == 1 ? 0 : lane)) dy.clear(lane);
    }
  }

  // The sums of the block, with work(kind, index in the row, sum) by one thread each.
  template <typename Work>
  __device__ void for_sums(Work work) {
    const Columns columns(walk.column_bits, sums);
    for (int index = threadIdx.x; index < columns.width; index += blockDim.x) {
      constexpr int kOfColumn = kKinds * W::kSums;
      const int of_column = index % kOfColumn;
      const int of_row = index / kOfColumn * W::kSums + of_column % W::kSums;
      if (walk.first_channel + of_row >= problem.channels) continue;  // beyond the row
      work(of_column / W::kSums, of_row, columns.total(index));
    }
  }

  // From what the threads have added. The next tile may follow without a barrier: before it writes to what is read
  // last here, all threads have to come to a barrier of its own.
  __device__ void finish() {
    __shared__ __align__(kPackBytes) A pulls[kColumns * W::kSums];
    for_sums([&](int kind, int of_row, A sum) {
      if (walk.chunk == 0) problem.sums[kind * problem.means + walk.first_mean + of_row] = sum;
      if (kind == kProduct) pulls[of_row] = pull_of(W::kStrip ? rstds[of_row] : rstd, sum, problem.spatial);
    });
    __syncthreads();
#pragma unroll
    for (int lane = 0; lane < W::kSums; ++lane) pull[lane] = pulls[walk.column * W::kSums + lane];
  }

  // The same of a plane that a team of 2^team_bits threads has.
  __device__ void finish_in_team(int team_bits) {
#pragma unroll
    for (A& sum : sums) sum = sum_of_team(sum, team_bits);
    if (walk.row == 0 && walk.inside) {
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) problem.sums[kind * problem.means + walk.first_mean] = sums[kind];
    }
    pull[0] = pull_of(rstd, sums[kProduct], problem.spatial);
  }

  // dx of g and x.
  template <typename P>
  __device__ __forceinline__ void store(P g, const P& x, int64_t at) const {
    g.transform([&](int lane, A value) {
      const int sum = W::kSums == 1 ? 0 : lane;
      return scale[sum] * (value - pull[sum] * x.get(lane));
    });
    g.store(problem.dx + at);
  }
};

// What a thread holds of its group: up to kHeld packs of dy and x, and an element at the edge of a plane.
template <typename Storage, typename W, int kHeld>
struct Held {
  using Edge = Pack<Storage, 1>;
  typename W::P dy[kHeld] = {}, x[kHeld] = {};
  Edge edge_dy = {}, edge_x = {};

  __device__ Held(const BackwardProblem<Storage>& problem, const W& walk) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (!walk.has(i)) continue;
      dy[i] = W::P::load(problem.dy + walk.at(i));
      x[i] = W::P::load(problem.x + walk.at(i));
    }
    if (walk.has_edge) {
      edge_dy = Edge::load(problem.dy + walk.edge);
      edge_x = Edge::load(problem.x + walk.edge);
    }
  }

  __device__ void add_to(Gradient<Storage, W>& gradient) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) gradient.add(dy[i], x[i]);
    if constexpr (!W::kStrip) gradient.add(edge_dy, edge_x);
  }

  __device__ void store(const Gradient<Storage, W>& gradient) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (gradient.walk.has(i)) gradient.store(dy[i], x[i], gradient.walk.at(i));
    }
    if constexpr (!W::kStrip) {
      if (gradient.walk.has_edge) gradient.store(edge_dy, edge_x, gradient.walk.edge);
    }
  }
};

// One read of dy and x, one write of dx: a block holds its group in registers.
template <typename Storage, int kLanes, bool kChannelsLast, int kHeld>
__global__ void __launch_bounds__(most_threads(kChannelsLast))
    frn_backward_in_registers(const BackwardProblem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, tile);
    Held<Storage, W, kHeld> held(problem, walk);
    Gradient<Storage, W> gradient(problem, walk);
    held.add_to(gradient);
    gradient.finish();
    held.store(gradient);
  }
}

// The same of small planes, each of which a team of 2^team_bits threads holds, without a barrier.
template <typename Storage, int kLanes>
__global__ void __launch_bounds__(kTeamThreads)
    frn_backward_by_teams(const BackwardProblem<Storage> problem, const int team_bits) {
  using W = Walk<Storage, kLanes, false>;
  const int thread = threadIdx.x & ((1 << team_bits) - 1);
  const int team = threadIdx.x >> team_bits, teams = blockDim.x >> team_bits;
  // All threads go round equally often: those of a warp shuffle together.
  for (int64_t first = int64_t{blockIdx.x} * teams; first < problem.tiles; first += int64_t{gridDim.x} * teams) {
    const bool there = first + team < problem.tiles;
    W walk(problem, problem.x, there ? first + team : first, thread, 1 << team_bits);
    if (!there) walk.leave();
    Held<Storage, W, kTeamHeld> held(problem, walk);
    Gradient<Storage, W> gradient(problem, walk);
    held.add_to(gradient);
    gradient.finish_in_team(team_bits);
    held.store(gradient);
  }
}

// work(dy, x, at) for all that a thread has of a tile: packs, and one element at the edge of a plane.
template <typename Storage, typename W, typename Work>
__device__ void for_rows(const BackwardProblem<Storage>& problem, const W& walk, Work work) {
  using P = typename W::P;
  int64_t i = 0;
  for (; walk.has(i + kUnroll - 1); i += kUnroll) {
    P dy[kUnroll], x[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      dy[j] = P::load(problem.dy + walk.at(i + j));
      x[j] = P::load(problem.x + walk.at(i + j));
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) work(dy[j], x[j], walk.at(i + j));
  }
  for (; walk.has(i); ++i) {
    P dy = P::load(problem.dy + walk.at(i));
    work(dy, P::load(problem.x + walk.at(i)), walk.at(i));
  }
  if constexpr (!W::kStrip) {
    using Edge = Pack<Storage, 1>;
    if (!walk.has_edge) return;
    Edge dy = Edge::load(problem.dy + walk.edge);
    work(dy, Edge::load(problem.x + walk.edge), walk.edge);
  }
}

template <typename Storage, typename W>
__device__ void add_rows(Gradient<Storage, W>& gradient) {
  for_rows(gradient.problem, gradient.walk, [&](auto& dy, const auto& x, int64_t) { gradient.add(dy, x); });
}

template <typename Storage, typename W>
__device__ void store_rows(const Gradient<Storage, W>& gradient) {
  for_rows(gradient.problem, gradient.walk, [&](auto& dy, const auto& x, int64_t at) {
    gradient.bound(dy, x);
    gradient.store(dy, x, at);
  });
}

// Two reads, one write, a group a block.
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(most_threads(kChannelsLast))
    frn_backward_in_two_passes(const BackwardProblem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, tile);
    Gradient<Storage, W> gradient(problem, walk);
    add_rows(gradient);
    gradient.finish();
    store_rows(gradient);
  }
}

// The same with a group shared out over `chunks` blocks: first their sums,
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads) frn_backward_partial_sums(const BackwardProblem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, tile);
    Gradient<Storage, W> gradient(problem, walk);
    add_rows(gradient);
    gradient.for_sums([&](int kind, int of_row, typename W::A sum) {
      const int64_t at = walk.first_statistic + walk.chunk * problem.pitch + of_row;
      problem.partials[kind * problem.statistics + at] = sum;
    });
    __syncthreads();  // before the next tile writes
  }
}

// then, in a second launch, dx. The tiles that were read last come first: they are still in the cache.
template <typename Storage, int kLanes, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    frn_backward_from_partial_sums(const BackwardProblem<Storage> problem) {
  using W = Walk<Storage, kLanes, kChannelsLast>;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const W walk(problem, problem.x, problem.tiles - 1 - tile);
    Gradient<Storage, W> gradient(problem, walk);
    for (int64_t chunk = walk.row; chunk < problem.chunks; chunk += walk.step) {
      const int64_t at = walk.first_statistic + chunk * problem.pitch + walk.column * W::kSums;
#pragma unroll
      for (int i = 0; i < kKinds * W::kSums; ++i) {
        const int kind = i / W::kSums, lane = i % W::kSums;
        if (lane < walk.lanes) gradient.sums[i] += problem.partials[kind * problem.statistics + at + lane];
      }
    }
    gradient.finish();
    store_rows(gradient);
  }
}

// Small planes of NCHW, several to a block: they lie end to end, so that together they are read and written in whole
// packs, and each is worked on in shared memory by 2^team_bits threads.
template <typename Storage, int kLanes>
__global__ void __launch_bounds__(kPackedThreads)
    frn_backward_packed(const BackwardProblem<Storage> problem, const int planes_of_a_tile, const int team_bits) {
  using A = Arithmetic<Storage>;
  using P = Pack<Storage, kLanes>;
  constexpr int kCapacity = kPackedBytes / sizeof(Storage);
  __shared__ __align__(kPackBytes) Storage all_dy[kCapacity], all_x[kCapacity];
  const int length = static_cast<int>(problem.spatial);
  const int lane = threadIdx.x & ((1 << team_bits) - 1), lanes = 1 << team_bits;
  const int team = threadIdx.x >> team_bits, teams = blockDim.x >> team_bits;
  for (int64_t tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const int64_t first = tile * planes_of_a_tile, left = problem.means - first;
    const int count = static_cast<int>(left < planes_of_a_tile ? left : planes_of_a_tile);
    const int elements = count * length, whole = elements / kLanes;
    const Storage *from_dy = problem.dy + first * length, *from_x = problem.x + first * length;
    Storage* to = problem.dx + first * length;
#pragma unroll 4
    for (int pack = threadIdx.x; pack < whole; pack += blockDim.x) {
      P::copy(from_dy + pack * kLanes, all_dy + pack * kLanes);
      P::copy(from_x + pack * kLanes, all_x + pack * kLanes);
    }
    for (int i = whole * kLanes + threadIdx.x; i < elements; i += blockDim.x) {
      all_dy[i] = from_dy[i];
      all_x[i] = from_x[i];
    }
    __syncthreads();
    // All threads go round equally often: those of a warp shuffle together.
    for (int start = 0; start < count; start += teams) {
      const int plane = start + team;
      Storage *dy = all_dy + plane * length, *x = all_x + plane * length;
      A sums[kKinds] = {}, rstd = 0, scale = 0;
      if (plane < count) {
        const int64_t channel = Divided(first + plane, problem.channels).remainder;
        rstd = problem.rstd[first + plane];
        scale = problem.gamma[channel] * rstd;
        const A beta = problem.beta[channel], tau = problem.tau[channel];
#pragma unroll 4
        for (int i = lane; i < length; i += lanes) {
          const A gradient = widen(dy[i]), value = widen(x[i]);
          const bool bounded = normalised(value, scale, beta) < tau;
          const A g = bounded ? A(0) : gradient;
          sums[kGradient] += g;
          sums[kBounded] += bounded ? gradient : A(0);
          sums[kProduct] += g * value;
          if (bounded) narrow(A(0), &dy[i]);
        }
      }
#pragma unroll
      for (A& sum : sums) sum = sum_of_team(sum, team_bits);
      if (plane >= count) continue;
      if (lane == 0) {
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind) problem.sums[kind * problem.means + first + plane] = sums[kind];
      }
      const A pull = pull_of(rstd, sums[kProduct], problem.spatial);
#pragma unroll 4
      for (int i = lane; i < length; i += lanes) narrow(scale * (widen(dy[i]) - pull * widen(x[i])), &dy[i]);
    }
    __syncthreads();
#pragma unroll 4
    for (int pack = threadIdx.x; pack < whole; pack += blockDim.x) {
      P::copy(all_dy + pack * kLanes, to + pack * kLanes);
    }
    for (int i = whole * kLanes + threadIdx.x; i < elements; i += blockDim.x) to[i] = all_dy[i];
    __syncthreads();  // before the next tile comes in
  }
}

// The gradients of the parameters: sums over the samples, kMeanColumns channels a block, always in the same order. In
// float32 a sum of N samples is off by (N / 128 + 37) * 2^-24 of its terms' sizes at most.
template <typename A>
__global__ void __launch_bounds__(kMaxMeanThreads) frn_parameter_gradients(const ParameterProblem<A> problem) {
  enum { kGamma, kBeta, kTau, kEps, kParameters };
  const int column = threadIdx.x % kMeanColumns, row = threadIdx.x / kMeanColumns, rows = blockDim.x / kMeanColumns;
  for (int64_t first = int64_t{blockIdx.x} * kMeanColumns; first < problem.channels;
       first += int64_t{gridDim.x} * kMeanColumns) {
    A sums[kParameters] = {};
    if (first + column < problem.channels) {
#pragma unroll 4
      for (int64_t sample = row; sample < problem.samples; sample += rows) {
        const int64_t at = sample * problem.channels + first + column;
        const A rstd = problem.rstd[at], product = rstd * problem.sums[kProduct * problem.means + at];
        sums[kGamma] += product;
        sums[kBeta] += problem.sums[kGradient * problem.means + at];
        sums[kTau] += problem.sums[kBounded * problem.means + at];
        sums[kEps] += rstd * product * rstd;
      }
    }
    const ColumnSums<A, kParameters, kMeanColumns, kMaxMeanThreads> columns(kMeanBits, sums);
    const int index = threadIdx.x;
    const int64_t channel = first + index / kParameters;
    if (index < columns.width && channel < problem.channels) {
      const A sum = columns.total(index);
      switch (index % kParameters) {
        case kGamma:
          problem.dgamma[channel] = sum;
          break;
        case kBeta:
          problem.dbeta[channel] = sum;
          break;
        case kTau:
          problem.dtau[channel] = sum;
          break;
        default:
          problem.deps[channel] = A(-0.5) * problem.gamma[channel] * sum;
      }
    }
    __syncthreads();  // before the next channels come in
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_FRN_BACKWARD_CUH_

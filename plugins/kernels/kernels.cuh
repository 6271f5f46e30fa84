// The CUDA kernels of both passes: frn.cu has the arithmetic of the forward pass, frn_backward.cu that of the backward
// pass, tile.cuh says how a tensor is cut, and launch.cuh picks the kernel.
//
// A pass (Op: Forward, Backward) sums over a group and then computes each output element from that element and the
// sums. It has
//
//     kInputs, kSums              tensors that are read, and sums for each channel
//     Problem                     the kernels' argument: a ProblemOf with what else the pass needs
//     Thread<T>(problem, tile)    what a thread of a block knows of the channels of its vectors, with
//       sums                        of this thread: [kSums][T::kChannels]
//       add(in, i, channel, to)     adds the terms of element i of the input vectors to the sums `to`
//       finish()                    sums over the block, and makes of the sums what apply needs
//       finish_in_subwarp(log2)     the same for a plane that 2^log2 neighbouring threads have
//       mask(in)                    what add has changed in the inputs, on reading them again
//       apply(in, i, channel)       element i of the output
//
// Each kernel replaces the vectors of the first input by those of the output, which may lie over it in memory.

#ifndef DEPLOYNORM_KERNELS_KERNELS_CUH_
#define DEPLOYNORM_KERNELS_KERNELS_CUH_

#include "element.cuh"
#include "tile.cuh"

namespace deploynorm {
namespace {

constexpr int kUnroll = 4;            // loads in flight, where a group is too large to be held
constexpr int kSplitThreads = 256;    // of a block that has a chunk of a group,
constexpr int kSplitBlocks = 3;       // and how many of those a multiprocessor has at once
constexpr int kSubwarpThreads = 256;  // of a block whose subwarps have a plane each
constexpr int kSubwarpHeld = 4;       // vectors that a thread of a subwarp holds
constexpr int kPackedThreads = 256;
constexpr int kPackedBytes = 16384;  // of shared memory for each input, for several small planes

template <typename Storage, int kInputs>
struct ProblemOf : Tiling {
  using A = Arithmetic<Storage>;
  const Storage* inputs[kInputs];
  Storage* output;
  const A *gamma, *beta, *tau;
  A* partials;  // of a split: [sums][planes or samples][chunks][1 or pitch]
  int64_t partials_of_one_sum;
};

// The input vectors at one offset.
template <typename V, typename Problem, int kInputs>
__device__ __forceinline__ void load(const Problem& problem, int64_t at, V (&in)[kInputs]) {
#pragma unroll
  for (int input = 0; input < kInputs; ++input) in[input] = V::load(problem.inputs[input] + at);
}

// Adds the terms of the input vectors to the thread's sums.
template <typename T, typename Thread, typename V, int kInputs>
__device__ __forceinline__ void accumulate(Thread& thread, V (&in)[kInputs]) {
  if constexpr (T::kStrip || V::kSize == 1) {
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) thread.add(in, i, T::kStrip ? i : 0, thread.sums);
  } else {
    // Of a plane those of a vector first: fewer are added one after the other, and less is lost.
    std::remove_reference_t<decltype(thread.sums)> of_vector = {};
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) thread.add(in, i, 0, of_vector);
#pragma unroll
    for (size_t sum = 0; sum < sizeof of_vector / sizeof *of_vector; ++sum) thread.sums[sum] += of_vector[sum];
  }
}

// Writes the output for the input vectors. `in` is a copy: its first vector becomes the output.
template <typename T, typename Thread, typename V, int kInputs>
__device__ __forceinline__ void store(const Thread& thread, const V (&in)[kInputs], typename T::Storage* to) {
  V out = in[0];
  out.transform([&](int i, typename T::A) { return thread.apply(in, i, T::kStrip ? i : 0); });
  out.store(to);
}

// The sums of the block: work(sum, index of the channel in the row, total), by one thread each.
template <typename Op, typename T, typename Work>
__device__ __forceinline__ void for_block_sums(const typename Op::Problem& problem, const T& tile,
                                               typename T::A (&sums)[Op::kSums * T::kChannels], Work work) {
  constexpr int kOfColumn = Op::kSums * T::kChannels;
  const BlockSums<typename T::A, kOfColumn, Op::max_columns(T::kStrip, T::V::kSize), T::kThreads> block(
      tile.log2_columns, sums);
  for (int index = threadIdx.x; index < block.width; index += blockDim.x) {
    const int sum = index % kOfColumn / T::kChannels;
    const int of_row = index / kOfColumn * T::kChannels + index % T::kChannels;
    if (tile.channel + of_row >= problem.channels) continue;  // a row's padding
    work(sum, of_row, block.total(index));
  }
}

// What a thread holds of its group in registers: up to kHeld vectors of each input, and an element at a plane's edge.
template <typename Op, typename T, int kHeld>
struct Held {
  using Edge = Vec<typename T::Storage, 1>;
  typename T::V vecs[kHeld][Op::kInputs] = {};
  Edge edge[Op::kInputs] = {};

  __device__ Held(const typename Op::Problem& problem, const T& tile) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (tile.has(i)) load(problem, tile.at(i), vecs[i]);
    }
    if (tile.has_edge) load(problem, tile.edge, edge);
  }

  template <typename Thread>
  __device__ void accumulate(Thread& thread) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) deploynorm::accumulate<T>(thread, vecs[i]);
    if constexpr (!T::kStrip) deploynorm::accumulate<T>(thread, edge);
  }

  template <typename Thread>
  __device__ void store(const Thread& thread) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (thread.tile.has(i)) deploynorm::store<T>(thread, vecs[i], thread.problem.output + thread.tile.at(i));
    }
    if constexpr (!T::kStrip) {
      if (thread.tile.has_edge) deploynorm::store<T>(thread, edge, thread.problem.output + thread.tile.edge);
    }
  }
};

// "registers": a block holds its group. Each input is read once, the output written once.
template <typename Op, int kVecSize, bool kChannelsLast, int kHeld>
__global__ void __launch_bounds__(max_threads(kChannelsLast), Op::min_blocks(kChannelsLast, kVecSize, kHeld))
    frn_in_registers(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], index);
    Held<Op, T, kHeld> held(problem, tile);
    typename Op::template Thread<T> thread(problem, tile);
    held.accumulate(thread);
    thread.finish();
    held.store(thread);
  }
}

// "registers" for small planes: a subwarp of 2^log2_threads threads holds a plane, and there is no barrier.
template <typename Op, int kVecSize>
__global__ void __launch_bounds__(kSubwarpThreads)
    frn_in_subwarps(const typename Op::Problem problem, const int log2_threads) {
  using T = ThreadTile<typename Op::Storage, kVecSize, false>;
  const int lane = threadIdx.x & ((1 << log2_threads) - 1);
  const int subwarp = threadIdx.x >> log2_threads, subwarps = blockDim.x >> log2_threads;
  // All threads make the same number of rounds: those of a warp shuffle together.
  for (int64_t first = int64_t{blockIdx.x} * subwarps; first < problem.tiles; first += int64_t{gridDim.x} * subwarps) {
    const bool there = first + subwarp < problem.tiles;
    T tile(problem, problem.inputs[0], there ? first + subwarp : first, lane, 1 << log2_threads);
    if (!there) tile.leave();
    Held<Op, T, kSubwarpHeld> held(problem, tile);
    typename Op::template Thread<T> thread(problem, tile);
    held.accumulate(thread);
    thread.finish_in_subwarp(log2_threads);
    held.store(thread);
  }
}

// work(in, at) for all that a thread has of a tile: vectors, kUnroll of them in flight, and one element at the edge.
template <typename Op, typename T, typename Work>
__device__ void for_rows(const typename Op::Problem& problem, const T& tile, Work work) {
  int64_t i = 0;
  for (; tile.has(i + kUnroll - 1); i += kUnroll) {
    typename T::V in[kUnroll][Op::kInputs];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) load(problem, tile.at(i + j), in[j]);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) work(in[j], tile.at(i + j));
  }
  for (; tile.has(i); ++i) {
    typename T::V in[Op::kInputs];
    load(problem, tile.at(i), in);
    work(in, tile.at(i));
  }
  if constexpr (!T::kStrip) {
    if (!tile.has_edge) return;
    Vec<typename T::Storage, 1> edge[Op::kInputs];
    load(problem, tile.edge, edge);
    work(edge, tile.edge);
  }
}

template <typename Op, typename T, typename Thread>
__device__ void accumulate_rows(Thread& thread) {
  for_rows<Op>(thread.problem, thread.tile, [&](auto& in, int64_t) { accumulate<T>(thread, in); });
}

template <typename Op, typename T, typename Thread>
__device__ void store_rows(const Thread& thread) {
  for_rows<Op>(thread.problem, thread.tile, [&](auto& in, int64_t at) {
    thread.mask(in);
    store<T>(thread, in, thread.problem.output + at);
  });
}

// "two_passes": a block reads its group twice, for the sums and for the output, which is written once.
template <typename Op, int kVecSize, bool kChannelsLast>
__global__ void __launch_bounds__(max_threads(kChannelsLast)) frn_in_two_passes(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], index);
    typename Op::template Thread<T> thread(problem, tile);
    accumulate_rows<Op, T>(thread);
    thread.finish();
    store_rows<Op, T>(thread);
  }
}

// "split": two passes as well, with a group shared out over `chunks` blocks. The first launch writes their sums,
template <typename Op, int kVecSize, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, Op::kPartialSumsBlocks)
    frn_partial_sums(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], index);
    typename Op::template Thread<T> thread(problem, tile);
    accumulate_rows<Op, T>(thread);
    for_block_sums<Op>(problem, tile, thread.sums, [&](int sum, int of_row, typename T::A total) {
      problem.partials[sum * problem.partials_of_one_sum + tile.partial + tile.chunk * problem.pitch + of_row] = total;
    });
    __syncthreads();  // before the next tile writes
  }
}

// the second the output. The tiles that were read last come first: they are still in the cache.
template <typename Op, int kVecSize, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, kSplitBlocks)
    frn_from_partial_sums(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], problem.tiles - 1 - index);
    typename Op::template Thread<T> thread(problem, tile);
    for (int64_t chunk = tile.row; chunk < problem.chunks; chunk += tile.step) {
      const int64_t at = tile.partial + chunk * problem.pitch + tile.column * T::kChannels;
#pragma unroll
      for (int i = 0; i < Op::kSums * T::kChannels; ++i) {
        const int sum = i / T::kChannels, channel = i % T::kChannels;
        if (channel < tile.valid) thread.sums[i] += problem.partials[sum * problem.partials_of_one_sum + at + channel];
      }
    }
    thread.finish();
    store_rows<Op, T>(thread);
  }
}

// A plane in shared memory that a subwarp has, element by element; see ThreadTile.
template <typename Storage_>
struct PlaneTile {
  using Storage = Storage_;
  using A = Arithmetic<Storage>;
  static constexpr bool kStrip = false;
  static constexpr int kChannels = 1;
  static constexpr int valid = 1;
  int64_t channel, statistic;
  int row;      // the thread's number in its subwarp
  bool inside;  // false for a subwarp that is left without a plane
};

// "packed": small planes of NCHW, several to a block. They lie end to end, so that together they are read and written
// in whole vectors, and a subwarp of 2^log2_threads threads computes each in shared memory.
template <typename Op, int kVecSize>
__global__ void __launch_bounds__(kPackedThreads) frn_packed(const typename Op::Problem problem, const int64_t planes,
                                                             const int planes_of_a_tile, const int log2_threads) {
  using Storage = typename Op::Storage;
  using V = Vec<Storage, kVecSize>;
  using T = PlaneTile<Storage>;
  __shared__ __align__(kVecBytes) Storage memory[Op::kInputs][kPackedBytes / sizeof(Storage)];
  const int length = static_cast<int>(problem.spatial);
  const int lane = threadIdx.x & ((1 << log2_threads) - 1), lanes = 1 << log2_threads;
  const int subwarp = threadIdx.x >> log2_threads, subwarps = blockDim.x >> log2_threads;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const int64_t first = index * planes_of_a_tile, left = planes - first;
    const int count = static_cast<int>(left < planes_of_a_tile ? left : planes_of_a_tile);
    const int elements = count * length, whole = elements / kVecSize * kVecSize;
#pragma unroll 4
    for (int i = threadIdx.x * kVecSize; i < whole; i += blockDim.x * kVecSize) {
#pragma unroll
      for (int input = 0; input < Op::kInputs; ++input) {
        V::copy(problem.inputs[input] + first * length + i, memory[input] + i);
      }
    }
    for (int i = whole + threadIdx.x; i < elements; i += blockDim.x) {
#pragma unroll
      for (int input = 0; input < Op::kInputs; ++input) memory[input][i] = problem.inputs[input][first * length + i];
    }
    __syncthreads();
    // All threads make the same number of rounds: those of a warp shuffle together.
    for (int start = 0; start < count; start += subwarps) {
      const bool there = start + subwarp < count;
      const int plane = there ? start + subwarp : start;
      const int begin = plane * length + lane, end = there ? plane * length + length : 0;
      const T tile = {Divided(first + plane, problem.channels).remainder, first + plane, lane, there};
      typename Op::template Thread<T> thread(problem, tile);
      const auto load_element = [&](int i, auto& in) {
#pragma unroll
        for (int input = 0; input < Op::kInputs; ++input) in[input] = Vec<Storage, 1>::load(&memory[input][i]);
      };
#pragma unroll 4
      for (int i = begin; i < end; i += lanes) {
        Vec<Storage, 1> in[Op::kInputs];
        load_element(i, in);
        accumulate<T>(thread, in);
      }
      thread.finish_in_subwarp(log2_threads);
#pragma unroll 4
      for (int i = begin; i < end; i += lanes) {
        Vec<Storage, 1> in[Op::kInputs];
        load_element(i, in);
        thread.mask(in);
        store<T>(thread, in, &memory[0][i]);
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x * kVecSize; i < whole; i += blockDim.x * kVecSize) {
      V::copy(memory[0] + i, problem.output + first * length + i);
    }
    for (int i = whole + threadIdx.x; i < elements; i += blockDim.x) problem.output[first * length + i] = memory[0][i];
    __syncthreads();  // before the next tile comes in
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_KERNELS_CUH_

// The CUDA kernels of both passes: frn.cu has the arithmetic of the forward pass, frn_backward.cu that of the backward
// pass, tile.cuh says how a tensor is cut, and launch.cuh picks the kernel.
//
// A pass (Op: Forward, Backward) sums over a group and then computes each output element from that element and the
// sums. It has
//
//     kInputs, kSums                 tensors that are read, and sums for each channel
//     kAddsByChannel, kPadded        whether add needs the channel, and whether the rows of NHWC may have padding
//     Problem                        the kernels' argument: a ProblemOf with what else the pass needs
//     Channel                        numbers of type A of one channel of a sample, `statistic` in (samples, channels):
//       (problem, channel, statistic)  read from memory
//       add(in, i, sums)               adds the terms of element i of the input vectors to sums[kSums]
//       finish(problem, statistic, sums, writes)  makes of the sums what apply needs; writes what others are to have
//       mask(in, i)                    what add has changed in the inputs, on reading them again
//       apply(in, i)                   element i of the output
//
// What is read of a channel is asked for before the elements are: it arrives as they do, not one latency of memory
// later. Each kernel replaces the vectors of the first input by those of the output, which may lie over it in memory.

#ifndef DEPLOYNORM_KERNELS_KERNELS_CUH_
#define DEPLOYNORM_KERNELS_KERNELS_CUH_

#include "element.cuh"
#include "tile.cuh"

namespace deploynorm {
namespace {

constexpr int kUnroll = 4;            // loads in flight, where a group is too large to be held
constexpr int kSplitThreads = 256;    // of a block that has a chunk of a group
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
  A positions;  // of a plane: the spatial size
  A* partials;  // of a split: [sums][planes or samples][chunks][1 or pitch]
  int64_t partials_of_one_sum;
};

// The input vectors at one offset.
template <typename V, typename Problem, int kInputs>
__device__ __forceinline__ void load(const Problem& problem, int64_t at, V (&in)[kInputs]) {
#pragma unroll
  for (int input = 0; input < kInputs; ++input) in[input] = V::load(problem.inputs[input] + at);
}

// What a thread of a block has of the channels of its vectors, and its sums for them. Every thread reads the channel of
// a plane; those of a strip's row are each read by one thread, which also finishes them, and shares them.
template <typename Op, typename T>
struct Thread {
  using A = typename T::A;
  using Channel = typename Op::Channel;
  static constexpr int kSums = Op::kSums;
  static constexpr int kFields = sizeof(Channel) / sizeof(A);
  static constexpr int kValues = Op::max_columns(T::kStrip, T::V::kSize) * T::kChannels;
  const typename Op::Problem& problem;
  const T& tile;
  Channel own = {}, channels[T::kChannels];
  A sums[T::kChannels * kSums] = {};

  __device__ Thread(const typename Op::Problem& problem, const T& tile) : problem(problem), tile(tile) {
    const int index = T::kStrip ? threadIdx.x : 0;
    if (!T::kStrip || owns()) own = Channel(problem, tile.channel + index, tile.statistic + index);
  }

  // Whether this thread reads and finishes a channel of the row: that of its number.
  __device__ bool owns() const {
    const int thread = threadIdx.x;
    if constexpr (!T::kStrip)
      return thread == 0;
    else
      return thread < T::kChannels << tile.log2_columns && tile.channel + thread < problem.channels.by;
  }

  // Before add.
  __device__ void begin() {
    if constexpr (!T::kStrip) channels[0] = own;
    if constexpr (T::kStrip && Op::kAddsByChannel) share<false>();
  }

  // What a thread holds. Of a strip channel after channel, so that only one has its numbers in registers.
  template <typename V, int kVecs, int kInputs>
  __device__ __forceinline__ void add_all(V (&vecs)[kVecs][kInputs]) {
    if constexpr (T::kStrip) {
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) {
        Channel channel = {};
        if constexpr (Op::kAddsByChannel) read(&channel, shared<false>(), tile.column * T::kChannels + i);
#pragma unroll
        for (int vec = 0; vec < kVecs; ++vec) channel.add(vecs[vec], i, sums + i * kSums);
      }
    } else {
#pragma unroll
      for (int vec = 0; vec < kVecs; ++vec) add(vecs[vec]);
    }
  }

  template <typename V, int kInputs>
  __device__ __forceinline__ void add(V (&in)[kInputs]) {
    if constexpr (T::kStrip || V::kSize == 1) {
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) channels[T::kStrip ? i : 0].add(in, i, sums + (T::kStrip ? i * kSums : 0));
    } else {
      // Of a plane those of a vector first: fewer are added one after the other, and less is lost.
      A of_vector[kSums] = {};
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) channels[0].add(in, i, of_vector);
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum] += of_vector[sum];
    }
  }

  // The sums over the block: work(sums), by the thread that the channel is of.
  template <typename Work>
  __device__ void with_block_sums(Work work) {
    const BlockSums<A, T::kChannels * kSums, Op::max_columns(T::kStrip, T::V::kSize), T::kThreads> block(
        tile.log2_columns, sums);
    if (!owns()) return;
    A totals[kSums];
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) totals[sum] = block.total(threadIdx.x * kSums + sum);
    work(totals);
  }

  // Between add and apply.
  __device__ void finish() {
    with_block_sums([&](const A(&totals)[kSums]) {
      // What add needs of a strip's channels is shared already, and takes no registers meanwhile.
      if constexpr (T::kStrip && Op::kAddsByChannel) read(&own, shared<false>(), threadIdx.x);
      own.finish(problem, tile.statistic + threadIdx.x, totals, tile.chunk == 0);
    });
    share<true>();
  }

  // The same where 2^log2_threads neighbouring threads have the plane.
  __device__ void finish_in_subwarp(int log2_threads, bool writes) {
#pragma unroll
    for (A& sum : sums) sum = sum_of_threads(sum, log2_threads);
    channels[0].finish(problem, tile.statistic, sums, writes);
  }

  // Gives each channel to all threads. The next tile may follow without a barrier: before it writes to what is read
  // last here, all threads have to come to a barrier of its own.
  template <bool kFinished>
  __device__ void share() {
    if (owns()) {
#pragma unroll
      for (int field = 0; field < kFields; ++field) {
        shared<kFinished>()[field][threadIdx.x] = reinterpret_cast<A*>(&own)[field];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T::kChannels; ++i) read(channels + i, shared<kFinished>(), tile.column * T::kChannels + i);
  }

  using Fields = A[kFields][kValues];

  template <bool kFinished>
  static __device__ __forceinline__ Fields& shared() {
    __shared__ __align__(kVecBytes) Fields fields;
    return fields;
  }

  static __device__ __forceinline__ void read(Channel* channel, const Fields& fields, int index) {
#pragma unroll
    for (int field = 0; field < kFields; ++field) reinterpret_cast<A*>(channel)[field] = fields[field][index];
  }

  template <typename V, int kInputs>
  __device__ __forceinline__ void mask(V (&in)[kInputs]) const {
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) channels[T::kStrip ? i : 0].mask(in, i);
  }

  // Writes the output for the input vectors. `in` is a copy: its first vector becomes the output. What fills a row up
  // may be anything, NaN too, and becomes zero.
  template <typename V, int kInputs>
  __device__ __forceinline__ void store(const V (&in)[kInputs], typename T::Storage* to) const {
    V out = in[0];
    out.transform([&](int i, A) {
      const A value = channels[T::kStrip ? i : 0].apply(in, i);
      return T::kStrip && Op::kPadded && i >= tile.valid ? A(0) : value;
    });
    out.store(to);
  }
};

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

  __device__ void add_to(Thread<Op, T>& thread) {
    thread.add_all(vecs);
    if constexpr (!T::kStrip) thread.add(edge);
  }

  __device__ void store(const Thread<Op, T>& thread) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (thread.tile.has(i)) thread.store(vecs[i], thread.problem.output + thread.tile.at(i));
    }
    if constexpr (!T::kStrip) {
      if (thread.tile.has_edge) thread.store(edge, thread.problem.output + thread.tile.edge);
    }
  }
};

// "registers": a block holds its group. Each input is read once, the output written once.
template <typename Op, int kVecSize, bool kChannelsLast, int kHeld>
__global__ void __launch_bounds__(max_threads(kChannelsLast), Op::min_blocks(kChannelsLast, kVecSize, kHeld))
    frn_in_registers(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, true>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], index);
    Thread<Op, T> thread(problem, tile);
    Held<Op, T, kHeld> held(problem, tile);
    thread.begin();
    held.add_to(thread);
    thread.finish();
    held.store(thread);
  }
}

// "registers" for small planes: a subwarp of 2^log2_threads threads holds a plane, and there is no barrier.
template <typename Op, int kVecSize>
__global__ void __launch_bounds__(kSubwarpThreads)
    frn_in_subwarps(const typename Op::Problem problem, const int log2_threads) {
  using T = ThreadTile<typename Op::Storage, kVecSize, false, true>;
  const int lane = threadIdx.x & ((1 << log2_threads) - 1);
  const int subwarp = threadIdx.x >> log2_threads, subwarps = blockDim.x >> log2_threads;
  // All threads make the same number of rounds: those of a warp shuffle together.
  for (int64_t first = int64_t{blockIdx.x} * subwarps; first < problem.tiles; first += int64_t{gridDim.x} * subwarps) {
    const bool there = first + subwarp < problem.tiles;
    T tile(problem, problem.inputs[0], there ? first + subwarp : first, lane, 1 << log2_threads);
    if (!there) tile.leave();
    Thread<Op, T> thread(problem, tile);
    Held<Op, T, kSubwarpHeld> held(problem, tile);
    thread.begin();
    held.add_to(thread);
    thread.finish_in_subwarp(log2_threads, there && lane == 0);
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

template <typename Op, typename T>
__device__ void add_rows(Thread<Op, T>& thread) {
  thread.begin();
  for_rows<Op>(thread.problem, thread.tile, [&](auto& in, int64_t) { thread.add(in); });
}

template <typename Op, typename T>
__device__ void store_rows(const Thread<Op, T>& thread) {
  for_rows<Op>(thread.problem, thread.tile, [&](auto& in, int64_t at) {
    thread.mask(in);
    thread.store(in, thread.problem.output + at);
  });
}

// "two_passes": a block reads its group twice, for the sums and for the output, which is written once.
template <typename Op, int kVecSize, bool kChannelsLast>
__global__ void __launch_bounds__(max_threads(kChannelsLast)) frn_in_two_passes(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, false>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], index);
    Thread<Op, T> thread(problem, tile);
    add_rows(thread);
    thread.finish();
    store_rows(thread);
  }
}

// Blocks on a multiprocessor of the second launch of a split: those with sums of eight channels need more registers.
constexpr int split_blocks(bool channels_last, int vec_size) { return channels_last && vec_size == 8 ? 2 : 3; }

// "split": two passes as well, with a group shared out over `chunks` blocks. The first launch writes their sums,
template <typename Op, int kVecSize, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, Op::kPartialSumsBlocks)
    frn_partial_sums(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, false>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], index);
    Thread<Op, T> thread(problem, tile);
    add_rows(thread);
    thread.with_block_sums([&](const typename T::A(&totals)[Op::kSums]) {
      const int64_t at = tile.partial + tile.chunk * problem.pitch + threadIdx.x;
#pragma unroll
      for (int sum = 0; sum < Op::kSums; ++sum) problem.partials[sum * problem.partials_of_one_sum + at] = totals[sum];
    });
    __syncthreads();  // before the next tile writes
  }
}

// the second the output. The tiles that were read last come first: they are still in the cache.
template <typename Op, int kVecSize, bool kChannelsLast>
__global__ void __launch_bounds__(kSplitThreads, split_blocks(kChannelsLast, kVecSize))
    frn_from_partial_sums(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, false>;
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    const T tile(problem, problem.inputs[0], problem.tiles - 1 - index);
    Thread<Op, T> thread(problem, tile);
    thread.begin();
    for (int64_t chunk = tile.row; chunk < problem.chunks.by; chunk += tile.step) {
      const int64_t at = tile.partial + chunk * problem.pitch + tile.column * T::kChannels;
#pragma unroll
      for (int i = 0; i < Op::kSums * T::kChannels; ++i) {
        const int sum = i % Op::kSums, channel = i / Op::kSums;
        if (channel < tile.valid) thread.sums[i] += problem.partials[sum * problem.partials_of_one_sum + at + channel];
      }
    }
    thread.finish();
    store_rows(thread);
  }
}

// A plane in shared memory that a subwarp has, element by element; see ThreadTile.
template <typename Storage_>
struct PlaneTile {
  using Storage = Storage_;
  using A = Arithmetic<Storage>;
  using V = Vec<Storage, 1>;
  static constexpr bool kStrip = false;
  static constexpr int kChannels = 1;
  static constexpr int valid = 1;
  int64_t channel, statistic;
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
      const T tile = {Divided(first + plane, problem.channels).remainder, first + plane};
      Thread<Op, T> thread(problem, tile);
      thread.begin();
      const auto load_element = [&](int i, auto& in) {
#pragma unroll
        for (int input = 0; input < Op::kInputs; ++input) in[input] = Vec<Storage, 1>::load(&memory[input][i]);
      };
#pragma unroll 4
      for (int i = begin; i < end; i += lanes) {
        Vec<Storage, 1> in[Op::kInputs];
        load_element(i, in);
        thread.add(in);
      }
      thread.finish_in_subwarp(log2_threads, there && lane == 0);
#pragma unroll 4
      for (int i = begin; i < end; i += lanes) {
        Vec<Storage, 1> in[Op::kInputs];
        load_element(i, in);
        thread.mask(in);
        thread.store(in, &memory[0][i]);
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

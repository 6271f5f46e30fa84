// What a thread does of a pass: it reads its channels' numbers, adds up its elements, finishes the sums with the other
// threads of its block or cluster, and computes its outputs.
//
// A pass (Op: Forward, Backward) sums over a group and then computes each output element from that element and the
// sums. It has
//
//     kInputs, kAdded, kSums         tensors that are read, of them the first that add reads, and sums for each channel
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
// later.

#ifndef DEPLOYNORM_KERNELS_THREAD_CUH_
#define DEPLOYNORM_KERNELS_THREAD_CUH_

#include <cooperative_groups.h>

#include "element.cuh"
#include "tile.cuh"

// Whether the device that this is compiled for has clusters of blocks; the host's side is compiled with them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DEPLOYNORM_CLUSTERS 1
#else
#define DEPLOYNORM_CLUSTERS 0
#endif

namespace deploynorm {
namespace {

constexpr int kMostOfACluster = 8;  // blocks, that every device with clusters has room for

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
template <typename Op, typename T, int kMaxThreads = max_threads(T::kStrip, T::V::kSize),
          int kMaxColumns = Op::max_columns(T::kStrip, T::V::kSize)>
struct Thread {
  using A = typename T::A;
  using Channel = typename Op::Channel;
  static constexpr int kSums = Op::kSums;
  static constexpr int kFields = sizeof(Channel) / sizeof(A);
  static constexpr int kValues = kMaxColumns * T::kChannels;
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
    const BlockSums<A, T::kChannels * kSums, kMaxColumns, kMaxThreads> block(tile.log2_columns, sums);
    if (!owns()) return;
    A totals[kSums];
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) totals[sum] = block.total(threadIdx.x * kSums + sum);
    work(totals);
  }

  // Between add and apply.
  __device__ void finish() {
    with_block_sums([&](const A(&totals)[kSums]) { finish_own(totals); });
    share<true>();
  }

#if DEPLOYNORM_CLUSTERS
  // Finishes the sums over all blocks of a cluster, each of which gives its own to all. Every thread has arrived at
  // the cluster's barrier before: when it had read what others gave of the last tile.
  __device__ void finish(const cooperative_groups::cluster_group& cluster) {
    __shared__ A of_blocks[kMostOfACluster][kValues][kSums];
    const int blocks = static_cast<int>(cluster.num_blocks());
    cluster.barrier_wait();
    with_block_sums([&](const A(&totals)[kSums]) {
      for (int rank = 0; rank < blocks; ++rank) {
        A* const to = cluster.map_shared_rank(of_blocks[cluster.block_rank()][threadIdx.x], rank);
#pragma unroll
        for (int sum = 0; sum < kSums; ++sum) to[sum] = totals[sum];
      }
    });
    cluster.sync();
    if (owns()) {
      A totals[kSums] = {};
      for (int rank = 0; rank < blocks; ++rank) {
#pragma unroll
        for (int sum = 0; sum < kSums; ++sum) totals[sum] += of_blocks[rank][threadIdx.x][sum];
      }
      finish_own(totals);
    }
    share<true>();
  }
#endif

  __device__ void finish_own(const A (&totals)[kSums]) {
    // What add needs of a strip's channels is shared already, and takes no registers meanwhile.
    if constexpr (T::kStrip && Op::kAddsByChannel) read(&own, shared<false>(), threadIdx.x);
    own.finish(problem, tile.statistic + threadIdx.x, totals, tile.chunk == 0);
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

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_THREAD_CUH_

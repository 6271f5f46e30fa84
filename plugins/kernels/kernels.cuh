// The CUDA kernels of both passes: frn.cu has the arithmetic of the forward pass, frn_backward.cu that of the backward
// pass, tile.cuh says how a tensor is cut, and launch.cuh picks the kernel.
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
// later. Each kernel replaces the vectors of the first input by those of the output, which may lie over it in memory.

#ifndef DEPLOYNORM_KERNELS_KERNELS_CUH_
#define DEPLOYNORM_KERNELS_KERNELS_CUH_

#include <cooperative_groups.h>

#include "element.cuh"
#include "tile.cuh"

// Whether the device that this is compiled for has clusters of blocks; the host's side is compiled with them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DEPLOYNORM_CLUSTERS 1
#else
#define DEPLOYNORM_CLUSTERS 0
#endif

extern __shared__ uint4 dynamic_shared[];  // of a size that the launch says

namespace deploynorm {
namespace {

constexpr int kUnroll = 4;          // loads in flight, where a group is too large to be held
constexpr int kSplitThreads = 256;  // of a block that has a chunk of a group
constexpr int kRunThreads = 128;
constexpr int kMostOfACluster = 8;  // blocks, that every device with clusters has room for
constexpr int kClusterColumns = 8;  // vectors of a strip's row at most: 128 bytes
constexpr int kClusterBlocks = 2;   // on a multiprocessor, of which one reads while the other writes

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
  // The same of the sums over all blocks of a cluster, each of which gives its own to all. Every thread has arrived at
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
__global__ void __launch_bounds__(max_threads(kChannelsLast, kVecSize), Op::min_blocks(kChannelsLast, kVecSize, kHeld))
    frn_in_registers(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, Group::kHeldByBlock>;
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

// work(in, i) for each vector that a thread has of a tile, where read(in, i) reads it: kUnroll of them are in flight.
template <typename Op, int kUnroll, typename T, typename Read, typename Work>
__device__ __forceinline__ void for_vectors(const T& tile, Read read, Work work) {
  typename T::Index i = 0;
  for (; tile.has(i + kUnroll - 1); i += kUnroll) {
    typename T::V in[kUnroll][Op::kInputs];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) read(in[j], i + j);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) work(in[j], i + j);
  }
  for (; tile.has(i); ++i) {
    typename T::V in[Op::kInputs];
    read(in, i);
    work(in, i);
  }
}

// work(in, at) for all that a thread has of a tile: vectors, and one element at the edge.
template <typename Op, typename T, typename Work>
__device__ void for_rows(const typename Op::Problem& problem, const T& tile, Work work) {
  for_vectors<Op, kUnroll>(
      tile, [&](auto& in, int64_t i) { load(problem, tile.at(i), in); },
      [&](auto& in, int64_t i) { work(in, tile.at(i)); });
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
__global__ void __launch_bounds__(max_threads(kChannelsLast, kVecSize), 1)
    frn_in_two_passes(const typename Op::Problem problem) {
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, Group::kNotHeld>;
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
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, Group::kNotHeld>;
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
  using T = ThreadTile<typename Op::Storage, kVecSize, kChannelsLast, Group::kNotHeld>;
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

// "clusters": NHWC on devices that have clusters of blocks. A cluster has a group, and a block holds its chunk of it in
// shared memory, `vectors` of each input that is added up; what is not, it reads for the output alone. Each input is
// read once, the output written once.
template <typename Op>
__global__ void __launch_bounds__(Op::kClusterThreads, kClusterBlocks)
    frn_in_clusters(const typename Op::Problem problem, const int vectors) {
#if DEPLOYNORM_CLUSTERS
  using T = ThreadTile<typename Op::Storage, kWholeVec<typename Op::Storage>, true, Group::kHeldByCluster>;
  using V = typename T::V;
  const auto cluster = cooperative_groups::this_cluster();
  V* const mine = reinterpret_cast<V*>(dynamic_shared) + threadIdx.x;  // no other thread reads or writes these
  const auto held = [&](int input, int i) -> V& { return mine[input * vectors + i * static_cast<int>(blockDim.x)]; };
  for (int64_t index = blockIdx.x; index < problem.tiles; index += gridDim.x) {
    cluster.barrier_arrive();
    const T tile(problem, problem.inputs[0], index);
    Thread<Op, T, Op::kClusterThreads, kClusterColumns> thread(problem, tile);
    thread.begin();
    for_vectors<Op, kUnroll>(
        tile,
        [&](auto& in, int i) {
#pragma unroll
          for (int input = 0; input < Op::kAdded; ++input) in[input] = V::load(problem.inputs[input] + tile.at(i));
        },
        [&](auto& in, int i) {
          thread.add(in);
#pragma unroll
          for (int input = 0; input < Op::kAdded; ++input) held(input, i) = in[input];
        });
    thread.finish(cluster);
    for_vectors<Op, kUnroll / 2>(
        tile,
        [&](auto& in, int i) {
#pragma unroll
          for (int input = 0; input < Op::kInputs; ++input) {
            in[input] = input < Op::kAdded ? held(input, i) : V::load(problem.inputs[input] + tile.at(i));
          }
        },
        [&](auto& in, int i) { thread.store(in, problem.output + tile.at(i)); });
  }
#endif
}

// "runs": small planes of NCHW. They lie end to end, and a warp holds a run of 2^log2_planes of them, so many that they
// are whole vectors together; a vector has elements of kParts planes, one or two. Of each plane's sums as many threads
// of the warp take care as it has for one plane. At the end of the tensor a run may be of fewer planes, and not of
// whole vectors.
template <typename Op, int kVecSize, int kParts, int kHeld>
__global__ void __launch_bounds__(kRunThreads)
    frn_in_runs(const typename Op::Problem problem, const int64_t planes, const int log2_planes) {
  using Storage = typename Op::Storage;
  using A = Arithmetic<Storage>;
  using V = Vec<Storage, kVecSize>;
  using Channel = typename Op::Channel;
  constexpr int kWarps = kRunThreads / kWarp;
  __shared__ A all_partials[kWarps][Op::kSums][kHeld * kWarp + kVecSize][kParts];  // of each vector, and end's elements
  __shared__ Channel all_channels[kWarps][kWarp + 1];                              // of each plane
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  auto& partials = all_partials[warp];
  auto& channels = all_channels[warp];
  const int length = static_cast<int>(problem.spatial);
  const float planes_of_an_element = 1.0f / static_cast<float>(length);
  const int log2_lanes = 5 - log2_planes;  // threads of a plane
  const int plane = lane >> log2_lanes, place = lane & ((1 << log2_lanes) - 1);

  for (int64_t run = int64_t{blockIdx.x} * warps + warp; run < problem.tiles; run += int64_t{gridDim.x} * warps) {
    const int64_t first = run << log2_planes, left = planes - first, offset = first * length;
    const int count = left < 1 << log2_planes ? static_cast<int>(left) : 1 << log2_planes;
    const int elements = count * length, whole = elements / kVecSize;
    const bool has_end = whole * kVecSize + lane < elements;
    const bool has_plane = plane < count;

    Channel own = {};
    if (has_plane) own = Channel(problem, Divided(first + plane, problem.channels).remainder, first + plane);
    V vecs[kHeld][Op::kInputs] = {};
    Vec<Storage, 1> end[Op::kInputs] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kWarp + lane < whole) load(problem, offset + (i * kWarp + lane) * kVecSize, vecs[i]);
    }
    if (has_end) load(problem, offset + whole * kVecSize + lane, end);
    const auto share = [&] {
      if (place == 0) channels[plane] = own;
      __syncwarp();
    };
    // work(input vectors, number, channel_of, is_first) for each held vector, of whose elements i is_first(i) are of
    // one plane, and the others of the next.
    const auto for_held = [&](auto work) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int vec = i * kWarp + lane;
        if (vec >= whole) continue;
        // Half an element is further from a whole plane than the product is off.
        const int of = static_cast<int>((static_cast<float>(vec * kVecSize) + 0.5f) * planes_of_an_element);
        const int of_first = (of + 1) * length - vec * kVecSize;
        const Channel one = channels[of], next = channels[of + kParts - 1];
        const auto is_first = [&](int element) { return kParts == 1 || element < of_first; };
        work(vecs[i], vec, [&](int element) { return is_first(element) ? one : next; }, is_first);
      }
    };

    if constexpr (Op::kAddsByChannel) share();
    for_held([&](auto& in, int vec, auto channel_of, auto is_first) {
      A sums[Op::kSums][2] = {};
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) {
        A terms[Op::kSums] = {};
        channel_of(i).add(in, i, terms);
#pragma unroll
        for (int sum = 0; sum < Op::kSums; ++sum) {
          if (is_first(i)) {
            sums[sum][0] += terms[sum];
          } else {
            sums[sum][1] += terms[sum];
          }
        }
      }
#pragma unroll
      for (int sum = 0; sum < Op::kSums; ++sum) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) partials[sum][vec][part] = sums[sum][part];
      }
    });
    if (has_end) {
      A sums[Op::kSums] = {};
      channels[count - 1].add(end, 0, sums);
#pragma unroll
      for (int sum = 0; sum < Op::kSums; ++sum) partials[sum][whole + lane][0] = sums[sum];
    }
    __syncwarp();
    A sums[Op::kSums] = {};
    const int begin = plane * length, behind = begin + length;
    const int stop = behind == elements ? whole + elements % kVecSize : (behind + kVecSize - 1) / kVecSize;
    for (int vec = begin / kVecSize + place; has_plane && vec < stop; vec += 1 << log2_lanes) {
      const int part = vec * kVecSize < begin ? kParts - 1 : 0;
#pragma unroll
      for (int sum = 0; sum < Op::kSums; ++sum) sums[sum] += partials[sum][vec][part];
    }
#pragma unroll
    for (A& sum : sums) sum = sum_of_threads(sum, log2_lanes);
    own.finish(problem, first + plane, sums, has_plane && place == 0);
    share();
    for_held([&](auto& in, int vec, auto channel_of, auto) {
      V out = in[0];
      out.transform([&](int i, A) { return channel_of(i).apply(in, i); });
      out.store(problem.output + offset + vec * kVecSize);
    });
    if (has_end) {
      Vec<Storage, 1> out;
      out.transform([&](int, A) { return channels[count - 1].apply(end, 0); });
      out.store(problem.output + offset + whole * kVecSize + lane);
    }
    __syncwarp();  // before the next run is written over this one
  }
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_KERNELS_CUH_

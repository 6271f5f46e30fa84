// The CUDA kernels of both passes: frn.cu has the arithmetic of the forward pass, frn_backward.cu that of the backward
// pass, tile.cuh says how a tensor is cut, thread.cuh what a thread does; plan.cuh picks the kernel.
//
// Each kernel replaces the vectors of the first input by those of the output, which may lie over it in memory.

#ifndef DEPLOYNORM_KERNELS_KERNELS_CUH_
#define DEPLOYNORM_KERNELS_KERNELS_CUH_

#include "element.cuh"
#include "thread.cuh"
#include "tile.cuh"

extern __shared__ uint4 dynamic_shared[];  // of a size that the launch says

namespace deploynorm {
namespace {

constexpr int kUnroll = 4;          // loads in flight, where a group is too large to be held
constexpr int kSplitThreads = 256;  // of a block that has a chunk of a group
constexpr int kRunThreads = 128;
constexpr int kClusterColumns = 8;  // vectors of a strip's row at most: 128 bytes
constexpr int kClusterBlocks = 2;   // on a multiprocessor, of which one reads while the other writes

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

// Which variant meets a call of either pass, cut how: by the sizes, the alignment and the device.

#ifndef DEPLOYNORM_KERNELS_PLAN_CUH_
#define DEPLOYNORM_KERNELS_PLAN_CUH_

#include <limits.h>

#include "frn.h"
#include "kernels.cuh"

namespace deploynorm {
namespace {

constexpr const char* kRuns = "runs";
constexpr const char* kRegisters = "registers";
constexpr const char* kClusters = "clusters";
constexpr const char* kTwoPasses = "two_passes";
constexpr const char* kSplit = "split";
constexpr const char* kVariants[] = {kRuns, kRegisters, kClusters, kTwoPasses, kSplit, nullptr};

constexpr int kFewestHeld = 2, kUsuallyHeld = 4;  // vectors of a thread in a run
constexpr int kFewRows = 1024;                    // of a strip: a block holds 64 bytes of each in registers
constexpr int64_t kReservedShared = 1024;         // bytes of each block's shared memory, by the system
constexpr int64_t kSmallPlane = 4096;             // bytes; it is never split
constexpr int64_t kBlocksWanted = 1024;           // of a split: some for each multiprocessor of the largest devices
constexpr int64_t kRowsOfAChunk = 64;             // at least, for each thread's worth of columns
constexpr int64_t kWorthSplitting = 131072;       // bytes of a plane: two launches take as long as a block with less

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// 2 to this power is count, or the next power of two above it.
int log2_up(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

// Of an element; 0 for a type that is not there.
int64_t bytes_of(int32_t type) {
  if (type == DEPLOYNORM_FLOAT16 || type == DEPLOYNORM_BFLOAT16) return 2;
  return type == DEPLOYNORM_FLOAT32 ? 4 : type == DEPLOYNORM_FLOAT64 ? 8 : 0;
}

struct Device {
  int multiprocessors = 0;
  int max_grid = 0;
  int has_clusters = 0;
  int shared_bytes = 0;  // that a block may have

  cudaError_t read() {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const struct {
      int* value;
      cudaDeviceAttr attribute;
    } all[] = {{&multiprocessors, cudaDevAttrMultiProcessorCount},
               {&max_grid, cudaDevAttrMaxGridDimX},
               {&has_clusters, cudaDevAttrClusterLaunch},
               {&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}};
    for (const auto& each : all) {
      if (const cudaError_t error = cudaDeviceGetAttribute(each.value, each.attribute, device)) return error;
    }
    return cudaSuccess;
  }
};

// What the choice depends on.
struct Request {
  int64_t samples, channels, spatial, channel_block;
  bool whole;           // whether all tensors begin at 16 bytes,
  bool alike;           // or are misaligned to them by the same amount
  bool workspace;       // whether there is one
  const char* variant;  // that is asked for; null for none

  template <typename Call, int kTensors>
  Request(const Call& call, bool workspace, const char* variant, const void* const (&tensors)[kTensors])
      : samples(call.samples),
        channels(call.channels),
        spatial(call.spatial),
        channel_block(call.channel_block),
        whole(true),
        alike(true),
        workspace(workspace),
        variant(variant) {
    for (const void* each : tensors) {
      const uintptr_t misaligned = reinterpret_cast<uintptr_t>(each) % kVecBytes;
      whole = whole && misaligned == 0;
      alike = alike && misaligned == reinterpret_cast<uintptr_t>(tensors[0]) % kVecBytes;
    }
  }
};

// How a request is met.
struct Plan {
  const char* variant = nullptr;  // null: none takes these sizes
  bool channels_last = false;
  int vec_size = 1;
  int threads = 0;
  int held = 0;  // vectors of an input: for registers and runs that a thread holds, for clusters that a block holds
  int log2_planes = 0;  // for runs: of a warp
  int log2_columns = 0;
  int64_t strips = 1;
  int64_t groups = 0;
  int64_t chunks = 1;

  Tiling tiling(const Request& request) const {
    return {Divisor(request.channels), Divisor(strips), Divisor(chunks), request.spatial,
            request.channel_block,     groups * chunks, log2_columns};
  }

  // Whether the vectors of a group fit into the registers of a block whose threads hold so many at most; the kernels
  // are compiled for 4, 8 and so on. They hold more rather than be more threads than wanted.
  bool hold(int64_t vectors, int wanted_threads, int most_threads, int max_held) {
    if (vectors > int64_t{max_held} * most_threads) return false;
    for (held = 4; held < max_held && vectors > int64_t{held} * wanted_threads;) held *= 2;
    return true;
  }
};

// Threads in whole warps.
int whole_warps(int64_t threads, int most) {
  return static_cast<int>(smaller(divided_up(larger(threads, 1), kWarp) * kWarp, most));
}

// How a warp holds planes, so many that they are whole vectors together.
struct Run {
  int vec_size = 1;
  int log2_planes = 0;
  int held = 0;  // vectors of a thread; 0 where the planes are too large

  Run(const Request& request, const Device& device, int whole_vec, int max_held) {
    const int64_t spatial = request.spatial, planes = request.samples * request.channels;
    // A vector has elements of two planes at most. Where that cannot be, each element is read by itself.
    if (request.whole && (spatial >= whole_vec - 1 || 2 * spatial == whole_vec)) vec_size = whole_vec;
    const auto vectors = [&](int log2) { return divided_up(spatial << log2, vec_size); };
    while ((spatial << log2_planes) % vec_size != 0) ++log2_planes;
    // A large plane of whole vectors is better off with a block than with a warp.
    const int usual = vec_size > 1 ? kUsuallyHeld : max_held;
    if (vectors(log2_planes) > kWarp * (log2_planes == 0 ? usual : max_held)) return;
    // What a warp does once pays for more planes, where each multiprocessor still has blocks enough.
    while (int64_t{kWarp} >> log2_planes > 1 && vectors(log2_planes + 1) <= kWarp * usual &&
           planes >> (log2_planes + 1) >= int64_t{device.multiprocessors} * kRunThreads / kWarp) {
      ++log2_planes;
    }
    held = vec_size > 1 ? kFewestHeld : max_held;
    while (vectors(log2_planes) > held * kWarp) held *= 2;
  }
};

// How a kernel is launched: blocks, in clusters of so many, each with so much dynamic shared memory.
struct Grid {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};

  Grid(const Device& device, int64_t blocks, int threads, cudaStream_t stream = nullptr, int cluster_size = 1,
       int64_t dynamic_bytes = 0) {
    const int most = device.max_grid / cluster_size * cluster_size;
    config.gridDim = dim3(static_cast<unsigned>(smaller(blocks, most)), 1, 1);
    config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
    config.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes);
    config.stream = stream;
    if (cluster_size == 1) return;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(cluster_size);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Grid(const Grid&) = delete;
};

// How clusters of blocks hold strips of NHWC.
template <typename Op>
struct Clusters {
  static constexpr int kWhole = kWholeVec<typename Op::Storage>;
  int size = 0;  // blocks of a cluster; 0 where there are none, or none that strips fit into
  int threads = 0;
  int log2_columns = 0;
  int64_t held = 0;    // vectors of an input in a block
  bool fills = false;  // whether there are blocks for all multiprocessors

  int64_t bytes() const { return Op::kAdded * held * kVecBytes; }

  Clusters(const Request& request, const Device& device) {
    const int64_t columns = request.channel_block / kWhole;
    const bool vectors = request.whole && request.channel_block % kWhole == 0;
    if (!vectors || request.spatial * request.channel_block > INT_MAX || device.has_clusters == 0) return;
    const auto kernel = frn_in_clusters<Op>;
    cudaFuncAttributes compiled = {};
    // Code for earlier devices, compiled again by the driver, is without them.
    if (cudaFuncGetAttributes(&compiled, kernel) != cudaSuccess || compiled.ptxVersion < 90) return;
    const int64_t own = static_cast<int64_t>(compiled.sharedSizeBytes), most = device.shared_bytes - own;
    const int64_t most_of_two = (device.shared_bytes + kReservedShared) / kClusterBlocks - kReservedShared - own;
    // As wide as fits, and as few blocks as have room two by two, but no multiprocessor idle.
    const int widest = static_cast<int>(log2_up(smaller(columns, kClusterColumns)));
    const int narrowest = static_cast<int>(smaller(widest, 1));
    int blocks = 0;
    for (log2_columns = widest;; --log2_columns) {
      const int64_t groups = request.samples * divided_up(columns, int64_t{1} << log2_columns);
      for (blocks = 2;; blocks *= 2) {
        held = divided_up(request.spatial, blocks) << log2_columns;
        fills = groups * blocks >= device.multiprocessors;
        if (blocks == kMostOfACluster || (fills && bytes() <= most_of_two)) break;
      }
      if (log2_columns == narrowest || (fills && bytes() <= most)) break;
    }
    const int64_t row = int64_t{1} << log2_columns;
    threads = whole_warps(larger(divided_up(held, kUnroll), row * kWhole), Op::kClusterThreads);
    if (bytes() > most || blocks > device.max_grid) return;
    // A part of a device may have no room for as many blocks side by side.
    int room = 0;
    const Grid grid(device, blocks, threads, nullptr, blocks, bytes());
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&room, kernel, &grid.config) == cudaSuccess && room > 0) {
      size = blocks;
    } else {
      cudaGetLastError();  // another kernel is launched
    }
  }
};

// Into how many chunks a split cuts a group that has work for at most so many blocks.
int64_t chunks_of_split(int64_t groups, int64_t most) {
  return larger(1, smaller(divided_up(kBlocksWanted, groups), most));
}

template <typename Op>
Plan plan_planes(const Request& request, const Device& device) {
  constexpr int kElementBytes = sizeof(typename Op::Storage), kWhole = kWholeVec<typename Op::Storage>;
  Plan plan;
  plan.groups = request.samples * request.channels;
  // Vectors begin at 16 bytes: of tensors that are misaligned differently, elements are read one by one.
  plan.vec_size = request.alike ? kWhole : 1;
  const int64_t vectors = divided_up(request.spatial, kWhole);
  const Run run(request, device, kWhole, Op::kMaxRunHeld);
  // Two blocks of half as many threads have room on a multiprocessor: one reads while the other writes.
  const bool fits_registers =
      request.alike && plan.hold(vectors, kMaxThreads / 2, max_threads(false, kWhole), Op::max_held(false, kWhole));
  const bool few = plan.groups < device.multiprocessors && request.spatial * kElementBytes >= kWorthSplitting;
  const char* best = run.held > 0               ? kRuns
                     : fits_registers           ? kRegisters
                     : request.workspace && few ? kSplit
                                                : kTwoPasses;
  const char* variant = request.variant == nullptr ? best : request.variant;
  if ((variant == kRuns && run.held == 0) || variant == kClusters) return plan;
  if (variant == kRegisters && !fits_registers) return plan;
  if (variant == kSplit && (!request.workspace || plan.groups > kBlocksWanted)) return plan;
  plan.variant = variant;
  const int64_t read = request.spatial / plan.vec_size;
  if (variant == kRuns) {
    plan.vec_size = run.vec_size;
    plan.held = run.held;
    plan.log2_planes = run.log2_planes;
    const int64_t runs = divided_up(plan.groups, int64_t{1} << run.log2_planes);
    plan.threads = whole_warps(runs / device.multiprocessors * kWarp, kRunThreads);
  } else if (variant == kRegisters) {
    plan.threads = whole_warps(divided_up(vectors, plan.held), max_threads(false, kWhole));
  } else if (variant == kTwoPasses) {
    plan.threads = whole_warps(divided_up(read, kUnroll), max_threads(false, plan.vec_size));
  } else {
    plan.threads = kSplitThreads;
    plan.chunks = chunks_of_split(plan.groups, divided_up(read, int64_t{plan.threads} * kUnroll));
  }
  return plan;
}

template <typename Op>
Plan plan_strips(const Request& request, const Device& device) {
  constexpr int kWhole = kWholeVec<typename Op::Storage>, kMost = max_threads(true, kWhole);
  Plan plan;
  plan.channels_last = true;
  plan.vec_size = request.whole && request.channel_block % kWhole == 0 ? kWhole : 1;
  const int64_t columns = request.channel_block / plan.vec_size;
  const int widest = static_cast<int>(smaller(log2_up(columns), log2_up(Op::max_columns(true, plan.vec_size))));
  // As wide as fits, but not so wide that multiprocessors are idle; 32 bytes is what memory gives at least. What fits
  // still fits when it is narrower.
  const int narrowest = static_cast<int>(smaller(widest, plan.vec_size == 1 ? 3 : 1));
  int width = widest;
  bool fits_registers = false;
  for (;; --width) {
    const int64_t blocks = request.samples * divided_up(columns, int64_t{1} << width);
    const int max_held = Op::max_held_of_strip(plan.vec_size, width, width == narrowest);
    fits_registers = request.spatial * request.channel_block <= INT_MAX &&
                     plan.hold(request.spatial << width, kMost, kMost, max_held);
    if (width == narrowest || (fits_registers && blocks >= device.multiprocessors)) break;
  }
  const int64_t groups_if_wide = request.samples * divided_up(columns, int64_t{1} << widest);
  const bool fits_split = request.workspace && groups_if_wide < kBlocksWanted;
  const char* best = fits_registers ? kRegisters : fits_split ? kSplit : kTwoPasses;
  const char* variant = request.variant == nullptr ? best : request.variant;
  if (variant == kClusters || (request.variant == nullptr && request.spatial > kFewRows)) {
    const Clusters<Op> clusters(request, device);
    // A split alone has blocks for all multiprocessors where clusters have not.
    if (clusters.size > 0 && (variant == kClusters || clusters.fills || best != kSplit)) {
      plan.variant = kClusters;
      plan.log2_columns = clusters.log2_columns;
      plan.strips = divided_up(columns, int64_t{1} << clusters.log2_columns);
      plan.groups = request.samples * plan.strips;
      plan.chunks = clusters.size;
      plan.threads = clusters.threads;
      plan.held = static_cast<int>(clusters.held);
      return plan;
    }
  }
  if (variant == kRuns || variant == kClusters) return plan;
  if (variant == kRegisters && !fits_registers) return plan;
  if (variant == kSplit && !fits_split) return plan;
  plan.variant = variant;
  plan.log2_columns = variant == kSplit ? widest : width;
  const int64_t row = int64_t{1} << plan.log2_columns;
  plan.strips = divided_up(columns, row);
  plan.groups = request.samples * plan.strips;
  const int64_t owners = row * plan.vec_size;  // a thread for each channel of the row
  if (variant == kRegisters) {
    plan.threads = whole_warps(larger(divided_up(request.spatial, plan.held) * row, owners), kMost);
  } else if (variant == kTwoPasses) {
    plan.threads = whole_warps(larger(divided_up(request.spatial, kUnroll) * row, owners), kMost);
  } else {
    plan.threads = kSplitThreads;
    const int64_t rows = larger(kRowsOfAChunk, kUnroll * plan.threads / row);
    plan.chunks = chunks_of_split(plan.groups, divided_up(request.spatial, rows));
  }
  return plan;
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_PLAN_CUH_

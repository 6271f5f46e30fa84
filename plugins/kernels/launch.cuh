// How a launch is cut to the sizes and the device, for the forward and the backward pass.

#ifndef DEPLOYNORM_KERNELS_LAUNCH_CUH_
#define DEPLOYNORM_KERNELS_LAUNCH_CUH_

#include <string.h>

#include "frn.h"
#include "walk.cuh"

namespace deploynorm {
namespace {

constexpr const char* kPacked = "packed";
constexpr const char* kRegisters = "registers";
constexpr const char* kTwoPasses = "two_passes";
constexpr const char* kSplit = "split";
constexpr const char* kVariants[] = {kPacked, kRegisters, kTwoPasses, kSplit, nullptr};

constexpr int64_t kSmallPlane = 4096;        // bytes; at least four of them are packed
constexpr int64_t kBlocksWanted = 1024;      // of a split: some for each multiprocessor of the largest devices
constexpr int64_t kRowsOfAChunk = 64;        // at least, for each thread's worth of columns
constexpr int64_t kWorthSplitting = 131072;  // bytes of a plane: two launches take as long as a block with less

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// 2 to this power is count, or the next power of two above it.
int bits_for(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

int64_t bytes_of(int32_t type) {
  switch (type) {
    case DEPLOYNORM_FLOAT32:
      return 4;
    case DEPLOYNORM_FLOAT64:
      return 8;
    case DEPLOYNORM_FLOAT16:
    case DEPLOYNORM_BFLOAT16:
      return 2;
    default:
      return 0;
  }
}

// The variant of this name. False: there is none, and null means that none is asked for.
bool find_variant(const char* name, const char** variant) {
  *variant = nullptr;
  for (const char* const* each = kVariants; name != nullptr && *each != nullptr; ++each) {
    if (strcmp(name, *each) == 0) *variant = *each;
  }
  return name == nullptr || *variant != nullptr;
}

struct Device {
  int multiprocessors = 0;
  int max_grid = 0;

  cudaError_t read() {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
      return error;
    }
    return cudaDeviceGetAttribute(&max_grid, cudaDevAttrMaxGridDimX, device);
  }
};

// A call with its sizes in the kernels' terms, and how it is cut.
struct Plan {
  const char* variant = nullptr;  // null: none takes these sizes
  bool channels_last = false;
  int pack = 1;  // elements of an access
  int threads = 0;
  int held = 0;        // packs that a thread holds, for registers
  bool teams = false;  // for registers: 2^team_bits threads have a plane, not a block
  int team_bits = 0;
  int column_bits = 0;
  int64_t strips = 1;
  int64_t groups = 0;
  int64_t chunks = 1;

  Cut cut(int64_t channels, int64_t spatial, int64_t lanes) const {
    return {channels, spatial, lanes, groups * chunks, chunks, static_cast<int>(strips), column_bits};
  }
};

// Threads in whole warps.
int whole_warps(int64_t threads, int most) {
  return static_cast<int>(smaller(divided_up(larger(threads, 1), kWarp) * kWarp, most));
}

// For planes of so few packs that a team of threads holds one, how many threads it has, and false for larger ones. It
// is as small as can hold them: what a team does once is done for fewer threads. Where planes begin anywhere, a team
// has a thread for each element that may stand before or behind the whole packs.
bool find_team(int64_t spatial, int64_t pack, int* team_bits) {
  const int64_t threads = divided_up(divided_up(spatial, pack), kTeamHeld);
  *team_bits = bits_for(spatial % pack == 0 ? threads : larger(threads, 2 * pack));
  return threads <= kWarp;
}

// Whether small planes are better packed than held by teams: most of a team is there for the edges alone.
bool better_packed(int64_t spatial, int64_t pack) { return spatial % pack != 0 && spatial < 3 * pack * pack; }

// Into how many chunks a split cuts a group that has work for at most so many blocks.
int64_t chunks_of_split(int64_t groups, int64_t most) {
  return larger(1, smaller(divided_up(kBlocksWanted, groups), most));
}

// Threads and chunks of the variants that read a plane twice; packed has its own.
void plan_two_passes_over_planes(int64_t spatial, Plan* plan) {
  const int64_t packs = spatial / plan->pack;
  if (plan->variant == kTwoPasses) {
    plan->threads = whole_warps(divided_up(packs, kUnroll), kMaxThreads);
  } else if (plan->variant == kSplit) {
    plan->threads = kSplitThreads;
    plan->chunks = chunks_of_split(plan->groups, divided_up(packs, int64_t{plan->threads} * kUnroll));
  }
}

// The same of strips that are `width` packs wide.
void plan_two_passes_over_strips(int64_t spatial, int64_t width, Plan* plan) {
  if (plan->variant == kTwoPasses) {
    plan->threads = whole_warps(divided_up(spatial, kUnroll) * width, kMaxStripThreads);
  } else {
    plan->threads = kSplitThreads;
    const int64_t rows = larger(kRowsOfAChunk, kUnroll * plan->threads / width);
    plan->chunks = chunks_of_split(plan->groups, divided_up(spatial, rows));
  }
}

// How many planes, end to end, make up whole packs.
int64_t planes_of_whole_packs(int64_t spatial, int64_t pack) {
  int64_t count = 1;
  while (count * spatial % pack != 0) count *= 2;
  return count;
}

// Whether planes of this size are packed.
bool fit_packed(int64_t spatial, int64_t bytes_of_one) {
  const int64_t plane_bytes = spatial * bytes_of_one;
  return plane_bytes <= kSmallPlane &&
         planes_of_whole_packs(spatial, kPackBytes / bytes_of_one) * plane_bytes <= kPackedBytes;
}

// How planes are packed.
struct PackedTiles {
  int planes;     // of a tile
  int team_bits;  // 2^team_bits threads have a plane
  int64_t tiles;

  // capacity: elements of a tile.
  PackedTiles(int64_t groups, int64_t spatial, int64_t capacity, int64_t pack, const Device& device) {
    // So many planes that the next tile begins at 16 bytes, and so few that every multiprocessor has some.
    const int64_t multiple = planes_of_whole_packs(spatial, pack);
    const int64_t share = divided_up(groups, int64_t{2} * device.multiprocessors);
    const int64_t count = larger(smaller(capacity / spatial, share) / multiple * multiple, multiple);
    planes = static_cast<int>(count);
    tiles = divided_up(groups, count);
    // As many threads a plane as leave none of a block idle.
    const int64_t most = smaller(larger(kPackedThreads / count, 1), smaller(spatial, kWarp));
    team_bits = bits_for(most);
    if ((int64_t{1} << team_bits) > most) --team_bits;
  }
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Device& device, int64_t blocks, int threads, cudaStream_t stream,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(smaller(blocks, device.max_grid)), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Kernel, typename Problem>
cudaError_t launch_teams(const Plan& plan, const Device& device, cudaStream_t stream, Kernel* kernel,
                         const Problem& problem) {
  return launch(device, divided_up(problem.tiles, kTeamThreads >> plan.team_bits), kTeamThreads, stream, kernel,
                problem, plan.team_bits);
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_LAUNCH_CUH_

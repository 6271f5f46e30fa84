// Which CUDA kernel runs, cut how, and its launch: the C interface of frn.h.
//
// What has to move, S being the bytes of x: S read and S written where a group fits on the chip, else 2 S read and S
// written, of which a last-level cache that holds the groups in flight serves the second reading. The parameters are
// nothing beside that, nor is arithmetic: some 10 instructions an element, where a device has time for 50 and more.
// At the bandwidth of a copy, B bytes read and written a second, the time is 2 S / B. On an H200 (B about 4e12 of its
// 4.8e12) and an H100 (about 2.8e12 of 3.35e12), for ResNet-50's shapes in float16 at batch 64:
//     64x64x112x112  103 MB   51 us   73 us       64x512x28x28   51 MB   26 us   37 us
//     64x256x56x56   103 MB   51 us   73 us       64x1024x14x14  26 MB   13 us   18 us   (fits the second-level cache)
// and twice that in float32. Batch 1 is a matter of the launch, 2 to 3 us, not of bytes.
//
// variant     layout  one block has                      runs where
// packed      NCHW    several planes, shared memory      a plane is at most 4 KiB (2 of 16-bit types of odd size)
// registers   both    a group, in registers              a plane is at most 128 KiB; a strip 32 bytes by 4096 rows
// two_passes  both    a group, read twice                it is larger, and there are groups for all multiprocessors
// split       both    a part of a group, two launches    it is larger, there are few, and there is a workspace

#include <string.h>

#include "frn.cuh"
#include "frn.h"

namespace deploynorm {
namespace {

constexpr const char* kPacked = "packed";
constexpr const char* kRegisters = "registers";
constexpr const char* kTwoPasses = "two_passes";
constexpr const char* kSplit = "split";
constexpr const char* kVariants[] = {kPacked, kRegisters, kTwoPasses, kSplit, nullptr};

constexpr int64_t kSmallPlane = 4096;       // bytes; at least four of them are packed
constexpr int64_t kBlocksWanted = 1024;     // of a split: some for each multiprocessor of the largest devices
constexpr int64_t kRowsOfAChunk = 64;       // at least, for each thread's worth of columns
constexpr int64_t kWorthSplitting = 65536;  // bytes of a group

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The power of two that is count or the next above.
int bits_for(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
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
  int held = 0;  // packs that a thread holds, for registers
  int column_bits = 0;
  int64_t strips = 1;
  int64_t groups = 0;
  int64_t chunks = 1;
};

// Threads in whole warps.
int whole_warps(int64_t threads, int most) {
  return static_cast<int>(smaller(divided_up(larger(threads, 1), kWarp) * kWarp, most));
}

// How many planes, end to end, make up whole packs.
int64_t planes_of_whole_packs(int64_t spatial, int64_t pack) {
  int64_t count = 1;
  while (count * spatial % pack != 0) count *= 2;
  return count;
}

// For each capacity that registers is compiled for, whether `packs` of a group fit into a block's.
bool hold(int64_t packs, int most_threads, int most_held, Plan* plan) {
  for (int held = 4; held <= most_held; held *= 2) {
    if (packs <= int64_t{held} * most_threads) {
      plan->held = held;
      return true;
    }
  }
  return false;
}

void plan_planes(const deploynorm_frn& call, const Device& device, int64_t bytes_of_one, bool aligned, bool workspace,
                 const char* wanted, Plan* plan) {
  const int64_t plane_bytes = call.spatial * bytes_of_one;
  const int whole = static_cast<int>(kPackBytes / bytes_of_one);
  const bool fits_packed =
      plane_bytes <= kSmallPlane && planes_of_whole_packs(call.spatial, whole) * plane_bytes <= kPackedBytes;
  plan->groups = call.samples * call.channels;
  // Packs begin at 16 bytes: of two tensors that stand off those differently, elements are read one by one.
  plan->pack = aligned ? whole : 1;
  const int64_t packs = divided_up(call.spatial, whole);
  const bool fits_registers = aligned && hold(packs, kMaxThreads, 8, plan);
  const bool few = plan->groups < device.multiprocessors;
  const char* best = fits_packed                                          ? kPacked
                     : workspace && few && plane_bytes >= kWorthSplitting ? kSplit
                     : fits_registers                                     ? kRegisters
                                                                          : kTwoPasses;
  const char* variant = wanted == nullptr ? best : wanted;
  if (variant == kPacked && !fits_packed) return;
  if (variant == kRegisters && !fits_registers) return;
  if (variant == kSplit && (!workspace || plan->groups > kBlocksWanted)) return;
  plan->variant = variant;
  if (variant == kRegisters) {
    plan->threads = whole_warps(divided_up(packs, plan->held), kMaxThreads);
  } else if (variant == kTwoPasses) {
    plan->threads = whole_warps(divided_up(call.spatial / plan->pack, kUnroll), kMaxThreads);
  } else if (variant == kSplit) {
    plan->threads = 256;
    const int64_t most = divided_up(call.spatial / plan->pack, int64_t{plan->threads} * kUnroll);
    plan->chunks = larger(1, smaller(divided_up(kBlocksWanted, plan->groups), most));
  }
}

void plan_strips(const deploynorm_frn& call, const Device& device, int64_t bytes_of_one, bool aligned, bool workspace,
                 const char* wanted, Plan* plan) {
  const int whole = static_cast<int>(kPackBytes / bytes_of_one);
  plan->channels_last = true;
  plan->pack = aligned && call.lanes % whole == 0 ? whole : 1;
  const int64_t columns = call.lanes / plan->pack;
  const int widest = static_cast<int>(smaller(bits_for(columns), bits_for(kWarp)));
  // As wide as fits, but not so wide that multiprocessors stand idle; 32 bytes is what memory gives at least. What
  // fits stays so as it gets narrower.
  const int narrowest = static_cast<int>(smaller(widest, plan->pack == 1 ? 3 : 1));
  int bits = widest;
  bool fits_registers = false;
  for (;; --bits) {
    const int64_t blocks = call.samples * divided_up(columns, int64_t{1} << bits);
    fits_registers = hold(call.spatial << bits, kMaxStripThreads, bits == narrowest ? 16 : 8, plan);
    if (bits == narrowest || (fits_registers && blocks >= device.multiprocessors)) break;
  }
  const int64_t groups_if_wide = call.samples * divided_up(columns, int64_t{1} << widest);
  const char* best = fits_registers ? kRegisters : workspace && groups_if_wide < kBlocksWanted ? kSplit : kTwoPasses;
  const char* variant = wanted == nullptr ? best : wanted;
  if (variant == kPacked) return;
  if (variant == kRegisters && !fits_registers) return;
  if (variant == kSplit && (!workspace || groups_if_wide >= kBlocksWanted)) return;
  plan->variant = variant;
  plan->column_bits = variant == kSplit ? widest : bits;
  const int64_t width = int64_t{1} << plan->column_bits;
  plan->strips = divided_up(columns, width);
  plan->groups = call.samples * plan->strips;
  if (variant == kRegisters) {
    plan->threads = whole_warps(divided_up(call.spatial, plan->held) * width, kMaxStripThreads);
  } else if (variant == kTwoPasses) {
    plan->threads = whole_warps(divided_up(call.spatial, kUnroll) * width, kMaxStripThreads);
  } else {
    plan->threads = 256;
    const int64_t most = divided_up(call.spatial, larger(kRowsOfAChunk, kUnroll * plan->threads / width));
    plan->chunks = larger(1, smaller(divided_up(kBlocksWanted, plan->groups), most));
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Device& device, int64_t blocks, int threads, cudaStream_t stream,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(smaller(blocks, device.max_grid)), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(threads), 1, 1);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Storage, int kLanes, bool kChannelsLast>
cudaError_t launch_groups(const Plan& plan, const Device& device, const Problem<Storage>& problem,
                          cudaStream_t stream) {
  if (plan.variant == kTwoPasses) {
    return launch(device, problem.tiles, plan.threads, stream, frn_in_two_passes<Storage, kLanes, kChannelsLast>,
                  problem);
  }
  if (plan.variant == kSplit) {
    const cudaError_t error =
        launch(device, problem.tiles, plan.threads, stream, frn_partial_sums<Storage, kLanes, kChannelsLast>, problem);
    if (error != cudaSuccess) return error;
    return launch(device, problem.tiles, plan.threads, stream, frn_from_partial_sums<Storage, kLanes, kChannelsLast>,
                  problem);
  }
  // Planes are held in whole packs alone, strips in single elements too.
  if constexpr (kChannelsLast || kLanes > 1) {
    if (plan.held == 4) {
      return launch(device, problem.tiles, plan.threads, stream, frn_in_registers<Storage, kLanes, kChannelsLast, 4>,
                    problem);
    }
    if (plan.held == 8) {
      return launch(device, problem.tiles, plan.threads, stream, frn_in_registers<Storage, kLanes, kChannelsLast, 8>,
                    problem);
    }
    if constexpr (kChannelsLast) {
      return launch(device, problem.tiles, plan.threads, stream, frn_in_registers<Storage, kLanes, kChannelsLast, 16>,
                    problem);
    }
  }
  return cudaErrorInvalidValue;
}

template <typename Storage>
cudaError_t launch_packed(const Plan& plan, const Device& device, Problem<Storage> problem, cudaStream_t stream) {
  constexpr int kWhole = kPackElements<Storage>;
  const int64_t capacity = kPackedBytes / sizeof(Storage) / problem.spatial;
  // So many planes that the next tile begins at 16 bytes, and so few that every multiprocessor has some.
  const int64_t multiple = planes_of_whole_packs(problem.spatial, kWhole);
  const int64_t share = divided_up(plan.groups, int64_t{2} * device.multiprocessors);
  int64_t count = smaller(capacity, share) / multiple * multiple;
  if (count < multiple) count = multiple;
  problem.tiles = divided_up(plan.groups, count);
  // As many threads a plane as leave none of a block idle.
  const int64_t most = smaller(larger(kPackedThreads / count, 1), smaller(problem.spatial, kWarp));
  int team_bits = bits_for(most);
  if ((int64_t{1} << team_bits) > most) --team_bits;
  auto* kernel = plan.pack > 1 ? frn_packed<Storage, kWhole> : frn_packed<Storage, 1>;
  return launch(device, problem.tiles, kPackedThreads, stream, kernel, problem, plan.groups, static_cast<int>(count),
                team_bits);
}

template <typename Storage>
cudaError_t run(const deploynorm_frn& call, void* workspace, cudaStream_t stream, const char* wanted) {
  Device device;
  if (const cudaError_t error = device.read()) return error;
  const uintptr_t x = reinterpret_cast<uintptr_t>(call.x), y = reinterpret_cast<uintptr_t>(call.y);
  Plan plan;
  const bool planes = call.lanes == 1;
  // A packed tile and a row of NHWC begin at 16 bytes only if the tensor does; a plane alone may have a head.
  const bool whole = x % kPackBytes == 0 && y % kPackBytes == 0;
  const bool alike = x % kPackBytes == y % kPackBytes;
  (planes ? plan_planes : plan_strips)(call, device, sizeof(Storage), planes ? alike : whole, workspace != nullptr,
                                       wanted, &plan);
  if (plan.variant == nullptr) return cudaErrorInvalidValue;

  using A = Arithmetic<Storage>;
  Problem<Storage> problem = {};
  problem.x = static_cast<const Storage*>(call.x);
  problem.y = static_cast<Storage*>(call.y);
  problem.gamma = static_cast<const A*>(call.gamma);
  problem.beta = static_cast<const A*>(call.beta);
  problem.tau = static_cast<const A*>(call.tau);
  problem.eps = static_cast<const A*>(call.eps);
  problem.partials = static_cast<A*>(workspace);
  problem.channels = call.channels;
  problem.spatial = call.spatial;
  problem.pitch = call.lanes;
  problem.tiles = plan.groups * plan.chunks;
  problem.chunks = plan.chunks;
  problem.strips = static_cast<int>(plan.strips);
  problem.column_bits = plan.column_bits;
  if (plan.variant == kPacked) {
    if (!whole) plan.pack = 1;
    return launch_packed(plan, device, problem, stream);
  }
  constexpr int kWhole = kPackElements<Storage>;
  if (plan.channels_last) {
    return plan.pack > 1 ? launch_groups<Storage, kWhole, true>(plan, device, problem, stream)
                         : launch_groups<Storage, 1, true>(plan, device, problem, stream);
  }
  return plan.pack > 1 ? launch_groups<Storage, kWhole, false>(plan, device, problem, stream)
                       : launch_groups<Storage, 1, false>(plan, device, problem, stream);
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

}  // namespace
}  // namespace deploynorm

const char* const* deploynorm_cuda_variants(void) { return deploynorm::kVariants; }

size_t deploynorm_frn_cuda_workspace(const struct deploynorm_frn* call) {
  using namespace deploynorm;
  const int64_t bytes = bytes_of(call->type);
  if (bytes == 0) return 0;
  const int64_t sum = bytes == 8 ? 8 : 4;
  // A split has at most kBlocksWanted blocks and as many as there are groups, each with a sum for every column.
  if (call->lanes == 1) {
    return call->spatial * bytes <= kSmallPlane ? 0 : static_cast<size_t>(2 * kBlocksWanted * sum);
  }
  const int64_t width = smaller(call->lanes, kWarp * kPackBytes / bytes);
  return static_cast<size_t>((kBlocksWanted * width + call->samples * call->lanes) * sum);
}

int deploynorm_frn_cuda(const struct deploynorm_frn* call, void* workspace, void* stream, const char* variant) {
  using namespace deploynorm;
  const char* wanted = nullptr;
  for (const char* const* name = kVariants; variant != nullptr && *name != nullptr; ++name) {
    if (strcmp(variant, *name) == 0) wanted = *name;
  }
  const bool layout = call->lanes == 1 || call->lanes >= call->channels;
  if ((variant != nullptr && wanted == nullptr) || !layout || call->residual != nullptr || bytes_of(call->type) == 0) {
    return cudaErrorInvalidValue;
  }
  if (call->samples <= 0 || call->channels <= 0 || call->spatial <= 0) return cudaSuccess;
  deploynorm_frn here = *call;
  if (here.spatial == 1 && here.lanes == here.channels) here.lanes = 1;  // one position: the two layouts are one
  if (deploynorm_frn_cuda_workspace(&here) == 0) workspace = nullptr;    // a host may pass a pointer to nothing
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  switch (here.type) {
    case DEPLOYNORM_FLOAT32:
      return run<float>(here, workspace, cuda_stream, wanted);
    case DEPLOYNORM_FLOAT64:
      return run<double>(here, workspace, cuda_stream, wanted);
    case DEPLOYNORM_FLOAT16:
      return run<__half>(here, workspace, cuda_stream, wanted);
    default:
      return run<__nv_bfloat16>(here, workspace, cuda_stream, wanted);
  }
}

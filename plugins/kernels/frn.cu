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

#include "frn.cuh"
#include "frn.h"
#include "launch.cuh"

namespace deploynorm {
namespace {

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
  const bool fits_packed = fit_packed(call.spatial, bytes_of_one);
  plan->groups = call.samples * call.channels;
  // Packs begin at 16 bytes: of two tensors that stand off those differently, elements are read one by one.
  plan->pack = aligned ? whole : 1;
  const int64_t packs = divided_up(call.spatial, whole);
  const bool fits_registers = aligned && hold(packs, kMaxThreads, 8, plan);
  const bool few = plan->groups < device.multiprocessors && plane_bytes >= kWorthSplitting;
  const char* best = fits_packed && (!fits_registers || better_packed(call.spatial, whole)) ? kPacked
                     : fits_registers                                                       ? kRegisters
                     : workspace && few                                                     ? kSplit
                                                                                            : kTwoPasses;
  const char* variant = wanted == nullptr ? best : wanted;
  if (variant == kPacked && !fits_packed) return;
  if (variant == kRegisters && !fits_registers) return;
  if (variant == kSplit && (!workspace || plan->groups > kBlocksWanted)) return;
  plan->variant = variant;
  if (variant == kRegisters) {
    plan->threads = whole_warps(divided_up(packs, plan->held), kMaxThreads);
    plan->teams = find_team(call.spatial, whole, &plan->team_bits);
  } else {
    plan_two_passes_over_planes(call.spatial, plan);
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
  } else {
    plan_two_passes_over_strips(call.spatial, width, plan);
  }
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
  if constexpr (!kChannelsLast && kLanes > 1) {
    if (plan.teams) return launch_teams(plan, device, stream, frn_by_teams<Storage, kLanes>, problem);
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
  const PackedTiles packed(plan.groups, problem.spatial, kPackedBytes / sizeof(Storage), kWhole, device);
  problem.tiles = packed.tiles;
  auto* kernel = plan.pack > 1 ? frn_packed<Storage, kWhole> : frn_packed<Storage, 1>;
  return launch(device, problem.tiles, kPackedThreads, stream, kernel, problem, plan.groups, packed.planes,
                packed.team_bits);
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
  static_cast<Cut&>(problem) = plan.cut(call.channels, call.spatial, call.lanes);
  problem.x = static_cast<const Storage*>(call.x);
  problem.y = static_cast<Storage*>(call.y);
  problem.gamma = static_cast<const A*>(call.gamma);
  problem.beta = static_cast<const A*>(call.beta);
  problem.tau = static_cast<const A*>(call.tau);
  problem.eps = static_cast<const A*>(call.eps);
  problem.rstd = static_cast<A*>(call.rstd);
  problem.partials = static_cast<A*>(workspace);
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
  const bool layout = call->lanes == 1 || call->lanes >= call->channels;
  if (!find_variant(variant, &wanted) || !layout || call->residual != nullptr || bytes_of(call->type) == 0) {
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

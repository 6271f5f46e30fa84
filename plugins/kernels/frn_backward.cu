// Which CUDA kernels of the backward pass run, cut how, and their launch: the C interface of frn.h.
//
// What has to move, S being the bytes of x: dy and x are read and dx is written, 3 S, where a group fits on the chip,
// else dy and x are read twice, 5 S, of which a second-level cache that holds the groups in flight serves the second
// reading. The sums of each group, 12 bytes a sample and channel written and read by the sums over the samples, are
// 1 part in 25 of that for planes of 7x7 in 16 bits, and less for all others. Arithmetic is some 25 instructions an
// element, where a device has time for 30 and more in 16 bits, and for twice that in float32. So the time is 3 S / B at
// a copy's bandwidth B of bytes read and written a second (frn.cu), and one launch of 2 to 3 us for the parameters. On
// an H200 and an H100, for ResNet-50's shapes in float16 at batch 64:
//     64x64x112x112  103 MB   77 us  110 us       64x512x28x28   51 MB   39 us   55 us
//     64x256x56x56   103 MB   77 us  110 us       64x1024x14x14  26 MB   19 us   28 us
// and twice that in float32; split, and thus NHWC of 112x112, takes up to 5 / 3 of it. None of this was measured.
//
// variant     layout  one block has                      runs where
// packed      NCHW    several planes, shared memory      a plane is at most 4 KiB (2 of 16-bit types of odd size)
// registers   both    a group, in registers              a plane is at most 64 KiB; a strip 32 bytes by 1024 rows
// two_passes  both    a group, read twice                it is larger, and the groups in flight fit the cache or are
// many split       both    a part of a group, two launches    it is larger, and there are few
//
// The same source is what every host uses and what the emulation of tests/emulation checks on a machine without a GPU.

#include "frn.h"
#include "frn_backward.cuh"
#include "launch.cuh"

namespace deploynorm {
namespace {

constexpr int kMemoryBits = 2;  // packs that memory gives at once, 64 bytes, are 2^kMemoryBits

// The sums of each group stand before the partial ones of a split, which begin at 16 bytes.
int64_t sums_bytes(const deploynorm_frn_backward& call, int64_t sum) {
  return divided_up(kKinds * call.samples * call.channels * sum, kPackBytes) * kPackBytes;
}

void plan_planes(const deploynorm_frn_backward& call, const Device& device, int64_t bytes_of_one, bool aligned,
                 const char* wanted, Plan* plan) {
  const int whole = static_cast<int>(kPackBytes / bytes_of_one);
  const bool fits_packed = fit_packed(call.spatial, bytes_of_one);
  plan->groups = call.samples * call.channels;
  // Packs begin at 16 bytes: of tensors that stand off those differently, elements are read one by one.
  plan->pack = aligned ? whole : 1;
  const int64_t packs = divided_up(call.spatial, whole);
  const bool fits_registers = aligned && packs <= int64_t{kPacksHeld} * kMaxThreads;
  const bool few = plan->groups < device.multiprocessors && call.spatial * bytes_of_one >= kWorthSplitting;
  const char* best = fits_packed && (!fits_registers || better_packed(call.spatial, whole)) ? kPacked
                     : fits_registers                                                       ? kRegisters
                     : few                                                                  ? kSplit
                                                                                            : kTwoPasses;
  const char* variant = wanted == nullptr ? best : wanted;
  if (variant == kPacked && !fits_packed) return;
  if (variant == kRegisters && !fits_registers) return;
  if (variant == kSplit && plan->groups > kBlocksWanted) return;
  plan->variant = variant;
  if (variant == kRegisters) {
    plan->threads = whole_warps(divided_up(packs, kPacksHeld), kMaxThreads);
    plan->teams = find_team(call.spatial, whole, &plan->team_bits);
  } else {
    plan_two_passes_over_planes(call.spatial, plan);
  }
}

void plan_strips(const deploynorm_frn_backward& call, const Device& device, int64_t bytes_of_one, bool aligned,
                 const char* wanted, Plan* plan) {
  const int whole = static_cast<int>(kPackBytes / bytes_of_one);
  plan->channels_last = true;
  plan->pack = aligned && call.lanes % whole == 0 ? whole : 1;
  const int64_t columns = call.lanes / plan->pack;
  const bool packs = plan->pack > 1;
  const int widest = static_cast<int>(smaller(bits_for(columns), bits_for(packs ? kStripColumns : kWarp)));
  // As wide as leaves room for two blocks on a multiprocessor, of which one reads while the other writes, but not so
  // wide that multiprocessors stand idle. At 64 bytes, what memory gives at once, or at half of it a block may be
  // alone.
  const int narrowest = static_cast<int>(smaller(widest, packs ? 1 : 3));
  int bits = widest;
  bool fits_registers = false;
  for (;; --bits) {
    const int64_t blocks = call.samples * divided_up(columns, int64_t{1} << bits);
    const int64_t held = call.spatial << bits;
    fits_registers = packs && held <= int64_t{kMaxStripThreads} * (bits > kMemoryBits ? kPacksHeld / 2 : kMostHeld);
    if (bits == narrowest || (fits_registers && blocks >= device.multiprocessors)) break;
  }
  const int64_t groups_if_wide = call.samples * divided_up(columns, int64_t{1} << widest);
  const char* best = fits_registers ? kRegisters : groups_if_wide < kBlocksWanted ? kSplit : kTwoPasses;
  const char* variant = wanted == nullptr ? best : wanted;
  if (variant == kPacked) return;
  if (variant == kRegisters && !fits_registers) return;
  if (variant == kSplit && groups_if_wide >= kBlocksWanted) return;
  plan->variant = variant;
  plan->column_bits = variant == kSplit ? widest : bits;
  const int64_t width = int64_t{1} << plan->column_bits;
  plan->strips = divided_up(columns, width);
  plan->groups = call.samples * plan->strips;
  if (variant == kRegisters) {
    plan->held = call.spatial << bits <= int64_t{kPacksHeld} * kMaxStripThreads ? kPacksHeld : kMostHeld;
    plan->threads = whole_warps(divided_up(call.spatial, plan->held) * width, kMaxStripThreads);
  } else {
    plan_two_passes_over_strips(call.spatial, width, plan);
  }
}

template <typename Storage, int kLanes, bool kChannelsLast>
cudaError_t launch_groups(const Plan& plan, const Device& device, const BackwardProblem<Storage>& problem,
                          cudaStream_t stream) {
  if (plan.variant == kSplit) {
    const cudaError_t error = launch(device, problem.tiles, plan.threads, stream,
                                     frn_backward_partial_sums<Storage, kLanes, kChannelsLast>, problem);
    if (error != cudaSuccess) return error;
    return launch(device, problem.tiles, plan.threads, stream,
                  frn_backward_from_partial_sums<Storage, kLanes, kChannelsLast>, problem);
  }
  if constexpr (!kChannelsLast && kLanes > 1) {
    if (plan.teams) return launch_teams(plan, device, stream, frn_backward_by_teams<Storage, kLanes>, problem);
  }
  if constexpr (kLanes > 1) {
    if (plan.variant == kRegisters && plan.held == kMostHeld) {
      if constexpr (kChannelsLast) {
        return launch(device, problem.tiles, plan.threads, stream,
                      frn_backward_in_registers<Storage, kLanes, kChannelsLast, kMostHeld>, problem);
      }
    }
    if (plan.variant == kRegisters) {
      return launch(device, problem.tiles, plan.threads, stream,
                    frn_backward_in_registers<Storage, kLanes, kChannelsLast, kPacksHeld>, problem);
    }
  }
  return launch(device, problem.tiles, plan.threads, stream, frn_backward_in_two_passes<Storage, kLanes, kChannelsLast>,
                problem);
}

template <typename Storage>
cudaError_t launch_packed(const Plan& plan, const Device& device, BackwardProblem<Storage> problem,
                          cudaStream_t stream) {
  constexpr int kWhole = kPackElements<Storage>;
  const PackedTiles packed(plan.groups, problem.spatial, kPackedBytes / sizeof(Storage), kWhole, device);
  problem.tiles = packed.tiles;
  auto* kernel = plan.pack > 1 ? frn_backward_packed<Storage, kWhole> : frn_backward_packed<Storage, 1>;
  return launch(device, problem.tiles, kPackedThreads, stream, kernel, problem, packed.planes, packed.team_bits);
}

template <typename Storage>
cudaError_t run_groups(const Plan& plan, const Device& device, const BackwardProblem<Storage>& problem,
                       cudaStream_t stream) {
  constexpr int kWhole = kPackElements<Storage>;
  if (plan.variant == kPacked) return launch_packed(plan, device, problem, stream);
  if (plan.channels_last) {
    return plan.pack > 1 ? launch_groups<Storage, kWhole, true>(plan, device, problem, stream)
                         : launch_groups<Storage, 1, true>(plan, device, problem, stream);
  }
  return plan.pack > 1 ? launch_groups<Storage, kWhole, false>(plan, device, problem, stream)
                       : launch_groups<Storage, 1, false>(plan, device, problem, stream);
}

template <typename A>
cudaError_t run_parameters(const deploynorm_frn_backward& call, const Device& device, const A* sums,
                           cudaStream_t stream) {
  ParameterProblem<A> problem = {};
  problem.sums = sums;
  problem.rstd = static_cast<const A*>(call.rstd);
  problem.gamma = static_cast<const A*>(call.gamma);
  problem.dgamma = static_cast<A*>(call.dgamma);
  problem.dbeta = static_cast<A*>(call.dbeta);
  problem.dtau = static_cast<A*>(call.dtau);
  problem.deps = static_cast<A*>(call.deps);
  problem.samples = call.samples;
  problem.channels = call.channels;
  problem.means = call.samples * call.channels;
  const int rows = 1 << bits_for(smaller(larger(call.samples, kWarp / kMeanColumns), kMaxMeanThreads / kMeanColumns));
  return launch(device, divided_up(call.channels, kMeanColumns), rows * kMeanColumns, stream,
                frn_parameter_gradients<A>, problem);
}

template <typename Storage>
cudaError_t run(const deploynorm_frn_backward& call, void* workspace, cudaStream_t stream, const char* wanted) {
  using A = Arithmetic<Storage>;
  Device device;
  if (const cudaError_t error = device.read()) return error;
  if (call.samples == 0) return run_parameters<A>(call, device, nullptr, stream);
  const uintptr_t x = reinterpret_cast<uintptr_t>(call.x);
  Plan plan;
  const bool planes = call.lanes == 1;
  // A packed tile and a row of NHWC begin at 16 bytes only if the tensor does; a plane alone may have a head.
  bool whole = true, alike = true;
  for (const void* each : {call.dy, call.x, static_cast<const void*>(call.dx)}) {
    whole = whole && reinterpret_cast<uintptr_t>(each) % kPackBytes == 0;
    alike = alike && reinterpret_cast<uintptr_t>(each) % kPackBytes == x % kPackBytes;
  }
  (planes ? plan_planes : plan_strips)(call, device, sizeof(Storage), planes ? alike : whole, wanted, &plan);
  if (plan.variant == nullptr) return cudaErrorInvalidValue;
  if (plan.variant == kPacked && !whole) plan.pack = 1;

  BackwardProblem<Storage> problem = {};
  static_cast<Cut&>(problem) = plan.cut(call.channels, call.spatial, call.lanes);
  problem.dy = static_cast<const Storage*>(call.dy);
  problem.x = static_cast<const Storage*>(call.x);
  problem.dx = static_cast<Storage*>(call.dx);
  problem.rstd = static_cast<const A*>(call.rstd);
  problem.gamma = static_cast<const A*>(call.gamma);
  problem.beta = static_cast<const A*>(call.beta);
  problem.tau = static_cast<const A*>(call.tau);
  problem.sums = static_cast<A*>(workspace);
  problem.partials = problem.sums + sums_bytes(call, sizeof(A)) / sizeof(A);
  problem.means = call.samples * call.channels;
  problem.statistics = (planes ? problem.means : call.samples * call.lanes) * plan.chunks;
  if (const cudaError_t error = run_groups(plan, device, problem, stream)) return error;
  return run_parameters<A>(call, device, problem.sums, stream);
}

}  // namespace
}  // namespace deploynorm

size_t deploynorm_frn_backward_cuda_workspace(const struct deploynorm_frn_backward* call) {
  using namespace deploynorm;
  const int64_t bytes = bytes_of(call->type), sum = bytes == 8 ? 8 : 4;
  if (bytes == 0) return 0;
  // A split has at most kBlocksWanted blocks and as many as there are groups, each with its sums for every column.
  const int64_t width = call->lanes == 1 ? 1 : smaller(call->lanes, kStripColumns * kPackBytes / bytes);
  const int64_t groups = call->lanes == 1 ? kBlocksWanted : call->samples * call->lanes;
  const int64_t partials = kKinds * (kBlocksWanted * width + groups) * sum;
  return static_cast<size_t>(sums_bytes(*call, sum) + divided_up(partials, kPackBytes) * kPackBytes);
}

int deploynorm_frn_backward_cuda(const struct deploynorm_frn_backward* call, void* workspace, void* stream,
                                 const char* variant) {
  using namespace deploynorm;
  const char* wanted = nullptr;
  const bool layout = call->lanes == 1 || call->lanes == call->channels;
  if (!find_variant(variant, &wanted) || !layout || bytes_of(call->type) == 0) return cudaErrorInvalidValue;
  if (call->channels <= 0) return cudaSuccess;
  deploynorm_frn_backward here = *call;
  if (here.spatial <= 0) here.samples = 0;  // there is nothing to sum
  if (here.spatial == 1) here.lanes = 1;    // one position: the two layouts are one
  if (here.samples > 0 && workspace == nullptr) return cudaErrorInvalidValue;
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

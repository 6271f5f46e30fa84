// The launch of what was planned, for both passes.

#ifndef DEPLOYNORM_KERNELS_LAUNCH_CUH_
#define DEPLOYNORM_KERNELS_LAUNCH_CUH_

#include <string.h>

#include "frn.h"
#include "kernels.cuh"
#include "plan.cuh"

namespace deploynorm {
namespace {

// run(element, variant) for an element of the type and the variant of this name, which is null where none is asked for.
template <typename Run>
int run_with_type(int32_t type, const char* name, Run run) {
  const char* variant = nullptr;
  for (const char* const* each = kVariants; name != nullptr && *each != nullptr; ++each) {
    if (strcmp(name, *each) == 0) variant = *each;
  }
  if (name != nullptr && variant == nullptr) return cudaErrorInvalidValue;
  switch (type) {
    case DEPLOYNORM_FLOAT32:
      return run(float(), variant);
    case DEPLOYNORM_FLOAT64:
      return run(double(), variant);
    case DEPLOYNORM_FLOAT16:
      return run(__half(), variant);
    case DEPLOYNORM_BFLOAT16:
      return run(__nv_bfloat16(), variant);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const Device& device, int64_t blocks, int threads, cudaStream_t stream,
                   void (*kernel)(Parameters...), Arguments&&... arguments) {
  const Grid grid(device, blocks, threads, stream);
  return cudaLaunchKernelEx(&grid.config, kernel, arguments...);
}

template <typename Op, int kVecSize, int kParts, int kHeld>
cudaError_t launch_runs(const Plan& plan, const Device& device, typename Op::Problem problem, cudaStream_t stream) {
  if constexpr (2 * kHeld <= Op::kMaxRunHeld) {
    if (plan.held > kHeld) return launch_runs<Op, kVecSize, kParts, 2 * kHeld>(plan, device, problem, stream);
  }
  problem.tiles = divided_up(plan.groups, int64_t{1} << plan.log2_planes);
  return launch(device, divided_up(problem.tiles, plan.threads / kWarp), plan.threads, stream,
                frn_in_runs<Op, kVecSize, kParts, kHeld>, problem, plan.groups, plan.log2_planes);
}

// By the number of vectors that a thread holds: kHeld, or the double, up to what the pass has kernels for.
template <typename Op, int kVecSize, bool kChannelsLast, int kHeld>
cudaError_t launch_in_registers(const Plan& plan, const Device& device, const typename Op::Problem& problem,
                                cudaStream_t stream) {
  if constexpr (kHeld > Op::max_held(kChannelsLast, kVecSize)) {
    return cudaErrorInvalidValue;
  } else {
    if (plan.held > kHeld) {
      return launch_in_registers<Op, kVecSize, kChannelsLast, 2 * kHeld>(plan, device, problem, stream);
    }
    return launch(device, problem.tiles, plan.threads, stream, frn_in_registers<Op, kVecSize, kChannelsLast, kHeld>,
                  problem);
  }
}

template <typename Op, int kVecSize, bool kChannelsLast>
cudaError_t launch_groups(const Plan& plan, const Device& device, const typename Op::Problem& problem,
                          cudaStream_t stream) {
  if (plan.variant == kTwoPasses) {
    return launch(device, problem.tiles, plan.threads, stream, frn_in_two_passes<Op, kVecSize, kChannelsLast>, problem);
  }
  if (plan.variant == kSplit) {
    const cudaError_t error =
        launch(device, problem.tiles, plan.threads, stream, frn_partial_sums<Op, kVecSize, kChannelsLast>, problem);
    if (error != cudaSuccess) return error;
    return launch(device, problem.tiles, plan.threads, stream, frn_from_partial_sums<Op, kVecSize, kChannelsLast>,
                  problem);
  }
  return launch_in_registers<Op, kVecSize, kChannelsLast, 4>(plan, device, problem, stream);
}

// Plans and launches. fill(plan, problem) adds what of a problem is not in the request.
template <typename Op, typename Fill>
cudaError_t plan_and_launch(const Request& request, const Device& device, cudaStream_t stream, Fill fill) {
  constexpr int kWhole = kWholeVec<typename Op::Storage>;
  const Plan plan = request.channel_block == 1 ? plan_planes<Op>(request, device) : plan_strips<Op>(request, device);
  if (plan.variant == nullptr) return cudaErrorInvalidValue;
  typename Op::Problem problem = {};
  static_cast<Tiling&>(problem) = plan.tiling(request);
  problem.positions = static_cast<Arithmetic<typename Op::Storage>>(request.spatial);
  fill(plan, &problem);
  if (plan.variant == kRuns) {
    if (plan.vec_size == 1) return launch_runs<Op, 1, 1, Op::kMaxRunHeld>(plan, device, problem, stream);
    return request.spatial % kWhole == 0 ? launch_runs<Op, kWhole, 1, kFewestHeld>(plan, device, problem, stream)
                                         : launch_runs<Op, kWhole, 2, kFewestHeld>(plan, device, problem, stream);
  }
  if (plan.variant == kClusters) {
    const int64_t bytes = int64_t{Op::kAdded} * plan.held * kVecBytes;
    const Grid grid(device, problem.tiles, plan.threads, stream, static_cast<int>(plan.chunks), bytes);
    return cudaLaunchKernelEx(&grid.config, frn_in_clusters<Op>, problem, plan.held);
  }
  if (plan.channels_last) {
    return plan.vec_size > 1 ? launch_groups<Op, kWhole, true>(plan, device, problem, stream)
                             : launch_groups<Op, 1, true>(plan, device, problem, stream);
  }
  return plan.vec_size > 1 ? launch_groups<Op, kWhole, false>(plan, device, problem, stream)
                           : launch_groups<Op, 1, false>(plan, device, problem, stream);
}

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_LAUNCH_CUH_

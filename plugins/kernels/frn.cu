// The forward pass on CUDA: y = max(scale * x + beta [+ residual], tau) with scale = gamma / sqrt(mean(x^2) + eps).
//
// Bytes moved, S being those of x: S read and S written where a group fits on the chip, else 2 S read and S written, of
// which a last-level cache that holds the groups in flight serves the second reading. The parameters are nothing beside
// that, nor is arithmetic: some 10 instructions an element, where a device has time for 50 and more. So the bound is
// the time of a copy. Measured on an H100 for ResNet-50's shapes at batch 32, the time of PyTorch's copy was 0.81 to
// 0.95 of ours in float32 NCHW, 0.60 to 0.93 in bfloat16 (benchmarks/README.md, benchmarks/results/gpu_h100.json); that
// was before "runs" and "clusters", and before the first load came early (benchmarks/results/gpu_code.json).
//
// variant     layout  one block has                      runs where
// runs        NCHW    runs of planes, each in a warp     so many planes as are whole vectors are at most 4 KiB
// registers   both    a group, in registers              a plane is at most 128 KiB, of float64 64 KiB; a strip 32
//                                                       bytes by 4096 rows
// clusters    NHWC    a part of a group, in shared       a strip has more than 1024 rows, and 32 bytes by 55,000 at
//                     memory, of a cluster of blocks     most, on devices of compute capability 9.0 and later
// two_passes  both    a group, read twice                it is larger, and there are groups for all multiprocessors
// split       both    a part of a group, two launches    it is larger, there are few, and there is a workspace

#include "frn.h"
#include "launch.cuh"

namespace deploynorm {
namespace {

template <typename Storage_, bool kResidual>
struct Forward {
  using Storage = Storage_;
  using A = Arithmetic<Storage>;
  static constexpr int kInputs = kResidual ? 2 : 1;  // x, residual
  static constexpr int kAdded = 1;                   // x
  static constexpr int kSums = 1;                    // sum of squares
  static constexpr bool kAddsByChannel = false, kPadded = true;
  static constexpr int kPartialSumsBlocks = 3;  // on a multiprocessor
  static constexpr int kClusterThreads = 512;   // of a block

  static constexpr int kMaxRunHeld = 8;  // vectors that a thread of a run holds, of each input
  // Vectors of a strip's row.
  __host__ __device__ static constexpr int max_columns(bool channels_last, int) { return channels_last ? kWarp : 1; }
  // Vectors of each input that a thread holds. Planes are held in whole vectors alone, strips in single elements too.
  __host__ __device__ static constexpr int max_held(bool channels_last, int vec_size) {
    return (channels_last ? 16 : vec_size > 1 ? 8 : 0) / kInputs;
  }
  static int max_held_of_strip(int, int, bool narrowest) { return (narrowest ? 16 : 8) / kInputs; }
  // On a multiprocessor, where the compiler would take registers for one; 0 leaves it to the compiler.
  static constexpr int min_blocks(bool channels_last, int vec_size, int held) {
    return channels_last && vec_size == 4 && held * kInputs == 8 ? 2 : 0;
  }

  struct Problem : ProblemOf<Storage, kInputs> {
    const A* eps;
    A* rstd;  // may be null
  };

  struct Channel {
    A scale, beta, tau, eps;  // scale is gamma before finish

    Channel() = default;
    __device__ Channel(const Problem& problem, int64_t channel, int64_t)
        : scale(problem.gamma[channel]),
          beta(problem.beta[channel]),
          tau(problem.tau[channel]),
          eps(problem.eps[channel]) {}

    template <typename V>
    __device__ __forceinline__ void add(V (&in)[kInputs], int i, A* sums) const {
      const A x = in[0].get(i);
      sums[0] += x * x;
    }

    __device__ __forceinline__ void finish(const Problem& problem, int64_t statistic, const A (&sums)[kSums],
                                           bool writes) {
      const A rstd = A(1) / sqrt(sums[0] / problem.positions + eps);
      if (problem.rstd != nullptr && writes) problem.rstd[statistic] = rstd;
      scale *= rstd;
    }

    template <typename V>
    __device__ __forceinline__ void mask(V (&)[kInputs], int) const {}

    template <typename V>
    __device__ __forceinline__ A apply(const V (&in)[kInputs], int i) const {
      A y = normalised(in[0].get(i), scale, beta);
      if constexpr (kResidual) y += in[kInputs - 1].get(i);
      return y < tau ? tau : y;  // in this order NaN stays NaN
    }
  };
};

template <typename Op>
cudaError_t run(const deploynorm_frn& call, void* workspace, cudaStream_t stream, const char* variant) {
  using A = typename Op::A;
  Device device;
  if (const cudaError_t error = device.read()) return error;
  const void* inputs[] = {call.x, call.residual};
  const Request request(call, workspace != nullptr, variant, {call.x, call.y, inputs[Op::kInputs - 1]});
  return plan_and_launch<Op>(request, device, stream, [&](const Plan&, typename Op::Problem* problem) {
    for (int i = 0; i < Op::kInputs; ++i) problem->inputs[i] = static_cast<const typename Op::Storage*>(inputs[i]);
    problem->output = static_cast<typename Op::Storage*>(call.y);
    problem->gamma = static_cast<const A*>(call.gamma);
    problem->beta = static_cast<const A*>(call.beta);
    problem->tau = static_cast<const A*>(call.tau);
    problem->eps = static_cast<const A*>(call.eps);
    problem->rstd = static_cast<A*>(call.rstd);
    problem->partials = static_cast<A*>(workspace);
  });
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
  if (call->channel_block == 1) {
    return call->spatial * bytes <= kSmallPlane ? 0 : static_cast<size_t>(2 * kBlocksWanted * sum);
  }
  const int64_t width = smaller(call->channel_block, kWarp * kVecBytes / bytes);
  return static_cast<size_t>((kBlocksWanted * width + call->samples * call->channel_block) * sum);
}

int deploynorm_frn_cuda(const struct deploynorm_frn* call, void* workspace, void* stream, const char* variant) {
  using namespace deploynorm;
  const bool layout = call->channel_block == 1 || call->channel_block >= call->channels;
  if (!layout) return cudaErrorInvalidValue;
  deploynorm_frn here = *call;
  // One position: the two layouts are one.
  if (here.spatial == 1 && here.channel_block == here.channels) here.channel_block = 1;
  if (deploynorm_frn_cuda_workspace(&here) == 0) workspace = nullptr;  // a host may pass a pointer to nothing
  return run_with_type(here.type, variant, [&](auto element, const char* wanted) {
    if (here.samples <= 0 || here.channels <= 0 || here.spatial <= 0) return cudaSuccess;
    using Storage = decltype(element);
    auto* with = here.residual == nullptr ? run<Forward<Storage, false>> : run<Forward<Storage, true>>;
    return with(here, workspace, static_cast<cudaStream_t>(stream), wanted);
  });
}

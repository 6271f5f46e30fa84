// The backward pass on CUDA: dx and the gradients of the parameters, as frn.h defines them.
//
// Bytes moved, S being those of x: dy and x are read and dx is written, 3 S, where a group fits on the chip, else dy
// and x are read twice, 5 S, of which a second-level cache that holds the groups in flight serves the second reading.
// The sums of each group, 12 bytes for each sample and channel, written and read by the sums over the samples, are 1
// part in 25 of that for planes of 7x7 in 16 bits, and less for all others. Arithmetic is some 25 instructions an
// element, where a device has time for 30 and more in 16 bits, and for twice that in float32. So the bound is the time
// of an addition of two tensors, and one launch of 2 to 3 us for the parameters. Measured on an H100 for ResNet-50's
// shapes at batch 32, the time of PyTorch's addition was 0.79 to 0.98 of ours in float32 NCHW, 0.48 to 0.93 in bfloat16
// (benchmarks/README.md, benchmarks/results/gpu_h100.json).
//
// variant     layout  one block has                      runs where
// runs        NCHW    runs of planes, each in a warp     so many planes as are whole vectors are at most 2 KiB
// registers   both    a group, in registers              a plane is at most 64 KiB, of float64 32 KiB; a strip 32
//                                                       bytes by 2048 rows
// clusters    NHWC    a part of a group, in shared       a strip has more than 1024 rows, and 32 bytes by 27,000 at
//                     memory, of a cluster of blocks     most, on devices of compute capability 9.0 and later
// two_passes  both    a group, read twice                it is larger, and there are groups for all multiprocessors
// split       both    a part of a group, two launches    it is larger, and there are few

#include "frn.h"
#include "launch.cuh"

namespace deploynorm {
namespace {

// The sums over a group. g is dy where y is not below the threshold, and 0 where it is clamped to it.
enum { kSumG, kSumClamped, kDot, kGradientSums };  // of g, of dy - g, of g * x

constexpr int kStripColumns = 8;  // vectors of a strip's row at most: 128 bytes

template <typename Storage_>
struct Backward {
  using Storage = Storage_;
  using A = Arithmetic<Storage>;
  static constexpr int kInputs = 2, kAdded = 2;  // dy, x
  static constexpr int kSums = kGradientSums;
  static constexpr bool kAddsByChannel = true, kPadded = false;
  static constexpr int kPartialSumsBlocks = 0;  // as many as there are registers for
  static constexpr int kClusterThreads = 256;   // of a block

  static constexpr int kMaxRunHeld = 4;  // vectors that a thread of a run holds, of each input
  // Vectors of a strip's row.
  __host__ __device__ static constexpr int max_columns(bool channels_last, int vec_size) {
    return !channels_last ? 1 : vec_size > 1 ? kStripColumns : kWarp;
  }
  // Vectors of dy, and of x, that a thread holds.
  __host__ __device__ static constexpr int max_held(bool channels_last, int vec_size) {
    return vec_size == 1 ? 0 : channels_last ? 8 : 4;
  }
  // Two blocks have room on a multiprocessor, of which one reads while the other writes; but at 64 bytes of a row,
  // which memory gives at once, or half of it, a block may be alone.
  static int max_held_of_strip(int vec_size, int log2_columns, bool) {
    return vec_size == 1 ? 0 : log2_columns > 2 ? 2 : 8;
  }
  // On a multiprocessor; 0 leaves it to the compiler, which in float64 would rather spill than have one.
  static constexpr int min_blocks(bool, int vec_size, int) { return vec_size == 2 ? 1 : 0; }

  struct Problem : ProblemOf<Storage, kInputs> {
    const A* rstd;
    A* sums;             // [kSums][samples][channels]
    int64_t statistics;  // samples * channels
  };

  struct Channel {
    A scale, beta, tau, rstd;
    A x_coefficient;  // dx = scale * (g - x_coefficient * x)

    Channel() = default;
    __device__ Channel(const Problem& problem, int64_t channel, int64_t statistic)
        : beta(problem.beta[channel]), tau(problem.tau[channel]), rstd(problem.rstd[statistic]), x_coefficient(0) {
      scale = problem.gamma[channel] * rstd;
    }

    // Where the threshold was above y, which then had no part in the output. False for a NaN.
    __device__ __forceinline__ bool clamped(A x) const { return normalised(x, scale, beta) < tau; }

    // Makes dy g, too.
    template <typename V>
    __device__ __forceinline__ void add(V (&in)[kInputs], int i, A* sums) const {
      const A dy = in[0].get(i), x = in[1].get(i);
      const bool is_clamped = clamped(x);
      const A g = is_clamped ? A(0) : dy;
      sums[kSumG] += g;
      sums[kSumClamped] += is_clamped ? dy : A(0);
      sums[kDot] += g * x;
      if (is_clamped) in[0].clear(i);
    }

    template <typename V>
    __device__ __forceinline__ void mask(V (&in)[kInputs], int i) const {
      if (clamped(in[1].get(i))) in[0].clear(i);
    }

    // rstd * x is of the size of 1, and so is what is multiplied here: rstd^3 would be out of float32's range where x
    // is very large or very small.
    __device__ __forceinline__ void finish(const Problem& problem, int64_t statistic, const A (&sums)[kSums],
                                           bool writes) {
      if (writes) {
#pragma unroll
        for (int sum = 0; sum < kSums; ++sum) problem.sums[sum * problem.statistics + statistic] = sums[sum];
      }
      x_coefficient = rstd * (rstd * (sums[kDot] / problem.positions));
    }

    template <typename V>
    __device__ __forceinline__ A apply(const V (&in)[kInputs], int i) const {
      return scale * (in[0].get(i) - x_coefficient * in[1].get(i));
    }
  };
};

// What the sums over the samples work on.
template <typename A>
struct ParameterProblem {
  const A *sums, *rstd, *gamma;
  A *dgamma, *dbeta, *dtau, *deps;
  int64_t samples, channels;
};

constexpr int kParameterBits = 3, kParameterChannels = 1 << kParameterBits;  // channels of a block
constexpr int kMaxParameterThreads = 1024;                                   // of it

// The gradients of the parameters: sums over the samples, kParameterChannels channels a block, always in the same
// order. In float32 a sum of N samples is off by (N / 128 + 37) * 2^-24 of its terms' sizes at most.
template <typename A>
__global__ void __launch_bounds__(kMaxParameterThreads) frn_parameter_gradients(const ParameterProblem<A> problem) {
  enum { kGamma, kBeta, kTau, kEps, kParameters };
  const int column = threadIdx.x % kParameterChannels, row = threadIdx.x / kParameterChannels;
  const int rows = blockDim.x / kParameterChannels;
  const int64_t statistics = problem.samples * problem.channels;
  for (int64_t first = int64_t{blockIdx.x} * kParameterChannels; first < problem.channels;
       first += int64_t{gridDim.x} * kParameterChannels) {
    A sums[kParameters] = {};
    if (first + column < problem.channels) {
#pragma unroll 4
      for (int64_t sample = row; sample < problem.samples; sample += rows) {
        const int64_t at = sample * problem.channels + first + column;
        const A rstd = problem.rstd[at], product = rstd * problem.sums[kDot * statistics + at];
        sums[kGamma] += product;
        sums[kBeta] += problem.sums[kSumG * statistics + at];
        sums[kTau] += problem.sums[kSumClamped * statistics + at];
        sums[kEps] += rstd * product * rstd;
      }
    }
    const BlockSums<A, kParameters, kParameterChannels, kMaxParameterThreads> block(kParameterBits, sums);
    const int index = threadIdx.x;
    const int64_t channel = first + index / kParameters;
    if (index < block.width && channel < problem.channels) {
      const A sum = block.total(index);
      switch (index % kParameters) {
        case kGamma:
          problem.dgamma[channel] = sum;
          break;
        case kBeta:
          problem.dbeta[channel] = sum;
          break;
        case kTau:
          problem.dtau[channel] = sum;
          break;
        default:
          problem.deps[channel] = A(-0.5) * problem.gamma[channel] * sum;
      }
    }
    __syncthreads();  // before the next channels come in
  }
}

template <typename A>
cudaError_t run_parameters(const deploynorm_frn_backward& call, const Device& device, const void* sums,
                           cudaStream_t stream) {
  ParameterProblem<A> problem = {};
  problem.sums = static_cast<const A*>(sums);
  problem.rstd = static_cast<const A*>(call.rstd);
  problem.gamma = static_cast<const A*>(call.gamma);
  problem.dgamma = static_cast<A*>(call.dgamma);
  problem.dbeta = static_cast<A*>(call.dbeta);
  problem.dtau = static_cast<A*>(call.dtau);
  problem.deps = static_cast<A*>(call.deps);
  problem.samples = call.samples;
  problem.channels = call.channels;
  const int64_t most_rows = kMaxParameterThreads / kParameterChannels;
  const int rows = 1 << log2_up(smaller(larger(call.samples, kWarp / kParameterChannels), most_rows));
  return launch(device, divided_up(call.channels, kParameterChannels), rows * kParameterChannels, stream,
                frn_parameter_gradients<A>, problem);
}

// The sums of each group stand before the partial ones of a split, which begin at 16 bytes.
int64_t sums_bytes(const deploynorm_frn_backward& call, int64_t sum) {
  return divided_up(kGradientSums * call.samples * call.channels * sum, kVecBytes) * kVecBytes;
}

template <typename Storage>
cudaError_t run(const deploynorm_frn_backward& call, void* workspace, cudaStream_t stream, const char* variant) {
  using A = Arithmetic<Storage>;
  Device device;
  if (const cudaError_t error = device.read()) return error;
  if (call.samples > 0) {
    const Request request(call, true, variant, {call.dy, call.x, call.dx});
    const cudaError_t error = plan_and_launch<Backward<Storage>>(
        request, device, stream, [&](const Plan& plan, typename Backward<Storage>::Problem* problem) {
          problem->inputs[0] = static_cast<const Storage*>(call.dy);
          problem->inputs[1] = static_cast<const Storage*>(call.x);
          problem->output = static_cast<Storage*>(call.dx);
          problem->rstd = static_cast<const A*>(call.rstd);
          problem->gamma = static_cast<const A*>(call.gamma);
          problem->beta = static_cast<const A*>(call.beta);
          problem->tau = static_cast<const A*>(call.tau);
          problem->sums = static_cast<A*>(workspace);
          problem->statistics = call.samples * call.channels;
          problem->partials = problem->sums + sums_bytes(call, sizeof(A)) / sizeof(A);
          const int64_t width = plan.channels_last ? call.channel_block : call.channels;
          problem->partials_of_one_sum = call.samples * width * plan.chunks;
        });
    if (error != cudaSuccess) return error;
  }
  return run_parameters<A>(call, device, workspace, stream);
}

}  // namespace
}  // namespace deploynorm

size_t deploynorm_frn_backward_cuda_workspace(const struct deploynorm_frn_backward* call) {
  using namespace deploynorm;
  const int64_t bytes = bytes_of(call->type), sum = bytes == 8 ? 8 : 4;
  if (bytes == 0) return 0;
  // A split has at most kBlocksWanted blocks and as many as there are groups, each with its sums for every column.
  const int64_t width = call->channel_block == 1 ? 1 : smaller(call->channel_block, kStripColumns * kVecBytes / bytes);
  const int64_t groups = call->channel_block == 1 ? kBlocksWanted : call->samples * call->channel_block;
  const int64_t partials = kGradientSums * (kBlocksWanted * width + groups) * sum;
  return static_cast<size_t>(sums_bytes(*call, sum) + divided_up(partials, kVecBytes) * kVecBytes);
}

int deploynorm_frn_backward_cuda(const struct deploynorm_frn_backward* call, void* workspace, void* stream,
                                 const char* variant) {
  using namespace deploynorm;
  if (call->channel_block != 1 && call->channel_block != call->channels) return cudaErrorInvalidValue;
  deploynorm_frn_backward here = *call;
  if (here.spatial <= 0) here.samples = 0;        // there is nothing to sum
  if (here.spatial == 1) here.channel_block = 1;  // one position: the two layouts are one
  return run_with_type(here.type, variant, [&](auto element, const char* wanted) {
    if (here.channels <= 0) return cudaSuccess;
    if (here.samples > 0 && workspace == nullptr) return cudaErrorInvalidValue;
    return run<decltype(element)>(here, workspace, static_cast<cudaStream_t>(stream), wanted);
  });
}

// How the work is cut: into columns for the caches, blocks for exactness, tasks and segments for the threads.

#ifndef DEPLOYNORM_KERNELS_SIZES_H_
#define DEPLOYNORM_KERNELS_SIZES_H_

#include <stdint.h>

namespace deploynorm {
namespace {

// Channels of a column at most: as lanes four cache lines of float32, since a processor fetches single lines out of
// long rows slowly. Of planes only so many as stay in the first-level cache, which holds kCachedElements of x and of y.
constexpr int kWidth = 64;
constexpr int64_t kCachedElements = 4096;
// ONNX Runtime's larger block, the width next to the largest that is worth code of its own.
constexpr int kBlockWidth = 16;
// Elements summed in the arithmetic type before going on in float64: of four vectors of float32, each lane adds 256 of
// them, or 512.
constexpr int64_t kBlock = 8192;
// Fewer columns than kManyColumns are shared out among the threads in segments. The sizes alone decide, so that the
// result does not depend on the number of threads.
constexpr int64_t kSegment = 4 * kBlock;
constexpr int kMaxSegments = 64;
constexpr int64_t kManyColumns = 16;
// Elements below which a task is not worth handing to another thread.
constexpr int64_t kTask = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_SIZES_H_

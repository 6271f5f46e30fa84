// How the work is cut: into columns for the caches, blocks for exactness, tasks and segments for the threads.

#ifndef DEPLOYNORM_KERNELS_SIZES_H_
#define DEPLOYNORM_KERNELS_SIZES_H_

#include <stdint.h>

namespace deploynorm {
namespace {

// Channels of a column at most. Of planes only so many as stay in the first-level cache, which holds kCachedElements of
// x and of y. Side by side at least kNarrowest, which are four cache lines of float32, and more as long as the column
// stays in the second-level cache, of which it may take kCachedRows elements: a processor fetches short parts of long
// rows slowly.
constexpr int kWidth = 256;
constexpr int64_t kCachedElements = 4096;
constexpr int kNarrowest = 64;
constexpr int64_t kCachedRows = 65536;
// Channels side by side that are worked on at once, for kTileRows rows where the column has more of them. 16 are ONNX
// Runtime's larger block, and as many as leave registers for the sums.
constexpr int kBlockWidth = 16;
constexpr int64_t kTileRows = 8;
constexpr int64_t kTileElements = 256;
// Elements summed in the arithmetic type before going on in float64, for each vector of partial sums: each lane of a
// vector of float32 adds 256 of them, or 512.
constexpr int64_t kBlock = 2048;
constexpr int64_t kBlockRows = 512;  // for channels side by side, of which each lane adds one row after the other
// Fewer columns than kManyColumns are shared out among the threads in segments. The sizes alone decide, so that the
// result does not depend on the number of threads.
constexpr int64_t kSegment = 32768;
constexpr int kMaxSegments = 16;
constexpr int64_t kManyColumns = 16;
// Elements below which a task is not worth handing to another thread.
constexpr int64_t kTask = 16384;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace deploynorm

#endif  // DEPLOYNORM_KERNELS_SIZES_H_

// The threads of a block, or of a cluster of blocks, on one thread of the CPU: each runs until it waits, then the next.
//
// That makes a run repeatable, and a barrier that not all threads reach an error with a message. What it cannot show
// is a race that needs two threads at the same instant.

#ifndef DEPLOYNORM_EMULATION_FIBERS_H_
#define DEPLOYNORM_EMULATION_FIBERS_H_

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

namespace emulation {

constexpr unsigned kWarp = 32, kMaxCluster = 8, kMaxThreads = 4096;  // threads of a cluster
constexpr size_t kStack = 128 * 1024;

enum class State { kNew, kRunning, kAtBlockBarrier, kAtWarpBarrier, kAtClusterBarrier, kDone };

struct Fiber {
  jmp_buf context;
  uint64_t slot;  // what a thread offers to its warp
  // Whether it has arrived at its cluster's barrier and not yet waited there, and which time this was.
  bool arrived = false;
  uint64_t round;
  char* stack = nullptr;
};

struct Fibers {
  Fiber threads[kMaxThreads];  // of one block after the other
  State states[kMaxThreads];
  jmp_buf scheduler;
  void (*run)(const void* body);
  const void* body;
  void (*call_enter)(const void* enter, unsigned block);
  const void* enter;  // called when another block goes on
  unsigned blocks, block_threads;
  unsigned current, block;  // that run
  unsigned arrivals;        // at the cluster's barrier,
  uint64_t rounds;          // and how often all have arrived

  unsigned count() const { return blocks * block_threads; }
};

inline Fibers& fibers() {
  static Fibers all;
  return all;
}

inline Fiber& fiber() { return fibers().threads[fibers().current]; }
inline unsigned this_block() { return fibers().block; }
inline unsigned this_thread() { return fibers().current - fibers().block * fibers().block_threads; }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s (thread %u)\n", what, fibers().current);
  abort();
}

// Back to the scheduler, until it lets this thread go on.
inline void wait(State state) {
  Fibers& all = fibers();
  all.states[all.current] = state;
  if (_setjmp(all.threads[all.current].context) == 0) _longjmp(all.scheduler, 1);
}

inline void wait_for_block() { wait(State::kAtBlockBarrier); }
inline void wait_for_warp() { wait(State::kAtWarpBarrier); }

inline void arrive_at_cluster() {
  Fibers& all = fibers();
  if (fiber().arrived) fail("a thread arrives at its cluster's barrier again without having waited there");
  fiber().arrived = true;
  fiber().round = all.rounds;
  if (++all.arrivals < all.count()) return;
  all.arrivals = 0;
  ++all.rounds;
}

inline bool cluster_has_come(const Fiber& one) { return fibers().rounds > one.round; }

inline void wait_for_cluster() {
  if (!fiber().arrived) fail("a thread waits at its cluster's barrier without having arrived");
  if (!cluster_has_come(fiber())) wait(State::kAtClusterBarrier);
  fiber().arrived = false;
}

template <typename T>
inline T exchange(unsigned mask, T value, unsigned partner) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 64 bits at most");
  Fibers& all = fibers();
  if (mask != 0xffffffffu) fail("only whole warps shuffle here");
  if (partner >= all.block_threads) fail("a shuffle from a thread that is not there");
  memcpy(&all.threads[all.current].slot, &value, sizeof value);
  wait_for_warp();
  T received;
  memcpy(&received, &all.threads[all.block * all.block_threads + partner].slot, sizeof received);
  wait_for_warp();  // before anyone offers the next value
  return received;
}

inline void start() {
  Fibers& all = fibers();
  all.run(all.body);
  all.states[all.current] = State::kDone;
  _longjmp(all.scheduler, 1);
}

// Runs one thread of this block until it waits or ends.
inline void step(unsigned thread) {
  Fibers& all = fibers();
  all.current = thread;
  const bool fresh = all.states[thread] == State::kNew;
  all.states[thread] = State::kRunning;
  if (_setjmp(all.scheduler) != 0) return;
  if (!fresh) _longjmp(all.threads[thread].context, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = all.threads[thread].stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
  setcontext(&context);
}

// Whether all threads of [begin, end) that are not done wait at this barrier; false if all are done. A thread that has
// returned never arrives, which is undefined on a device: that ends the process.
inline bool all_at(State barrier, unsigned begin, unsigned end, const char* left) {
  const Fibers& all = fibers();
  unsigned waiting = 0;
  for (unsigned thread = begin; thread < end; ++thread) {
    if (all.states[thread] == barrier) {
      ++waiting;
    } else if (all.states[thread] != State::kDone) {
      return false;
    }
  }
  if (waiting > 0 && waiting < end - begin) fail(left);
  return waiting > 0;
}

// Lets the threads of one block go on until all are done or wait for other blocks. Returns whether any could.
inline bool run_on(unsigned block) {
  Fibers& all = fibers();
  const unsigned first = block * all.block_threads, behind = first + all.block_threads;
  bool moved = false;
  if (block != all.block) {
    all.block = block;
    all.call_enter(all.enter, block);
  }
  for (unsigned thread = first; thread < behind; ++thread) {
    const State state = all.states[thread];
    if (state != State::kNew && !(state == State::kAtClusterBarrier && cluster_has_come(all.threads[thread]))) continue;
    moved = true;
    step(thread);
  }
  for (;;) {
    bool warps_moved = false;
    for (unsigned begin = first; begin < behind; begin += kWarp) {
      const unsigned end = begin + kWarp < behind ? begin + kWarp : behind;
      if (!all_at(State::kAtWarpBarrier, begin, end, "a warp shuffles that some of its threads have left")) continue;
      warps_moved = true;
      for (unsigned thread = begin; thread < end; ++thread) step(thread);
    }
    moved = moved || warps_moved;
    if (warps_moved) continue;
    if (!all_at(State::kAtBlockBarrier, first, behind, "a block synchronises that some of its threads have left")) {
      return moved;
    }
    moved = true;
    for (unsigned thread = first; thread < behind; ++thread) step(thread);
  }
}

// Runs blocks that may wait for each other; the first is entered already. Without std::function, whose header would
// take a third of the time to compile a kernel, and without others of that library.
template <typename Body, typename Enter>
void run_cluster(unsigned blocks, unsigned block_threads, const Body& body, const Enter& enter) {
  Fibers& all = fibers();
  all.run = [](const void* body) { (*static_cast<const Body*>(body))(); };
  all.body = &body;
  all.call_enter = [](const void* enter, unsigned block) { (*static_cast<const Enter*>(enter))(block); };
  all.enter = &enter;
  all.blocks = blocks;
  all.block_threads = block_threads;
  all.current = all.block = all.arrivals = 0;
  all.rounds = 0;
  if (all.count() > kMaxThreads) fail("a cluster of more threads than are emulated");
  for (unsigned thread = 0; thread < all.count(); ++thread) {
    Fiber& one = all.threads[thread];
    if (one.stack == nullptr) one.stack = new char[kStack];
    one.arrived = false;
    all.states[thread] = State::kNew;
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned block = 0; block < blocks; ++block) moved = run_on(block) || moved;
  }
  for (unsigned thread = 0; thread < all.count(); ++thread) {
    if (all.states[thread] != State::kDone) fail("threads wait at different barriers for each other");
  }
}

// Whether the threads of a block of the cluster run: some have begun, and some are not done.
inline bool is_there(unsigned block) {
  const Fibers& all = fibers();
  bool begun = false, done = true;
  for (unsigned thread = block * all.block_threads; thread < (block + 1) * all.block_threads; ++thread) {
    begun = begun || all.states[thread] != State::kNew;
    done = done && all.states[thread] == State::kDone;
  }
  return begun && !done;
}

}  // namespace emulation

#endif  // DEPLOYNORM_EMULATION_FIBERS_H_

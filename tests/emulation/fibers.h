// The threads of a block on one thread of the CPU: each runs until it waits, then the next.
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

constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum class State { kNew, kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fibers {
  State states[kMaxThreads];
  jmp_buf contexts[kMaxThreads];
  jmp_buf scheduler;
  uint64_t slots[kMaxThreads];  // what a thread offers to its warp
  char* stacks = new char[kMaxThreads * kStack];
  void (*run)(const void* body);
  const void* body;
  unsigned count;
  unsigned current;
};

inline Fibers& fibers() {
  static Fibers all;
  return all;
}

inline unsigned this_thread() { return fibers().current; }

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "CUDA emulation: %s (thread %u)\n", what, this_thread());
  abort();
}

// Back to the scheduler, until it lets this thread go on.
inline void wait(State state) {
  Fibers& all = fibers();
  all.states[all.current] = state;
  if (_setjmp(all.contexts[all.current]) == 0) _longjmp(all.scheduler, 1);
}

inline void wait_for_block() { wait(State::kAtBlockBarrier); }
inline void wait_for_warp() { wait(State::kAtWarpBarrier); }

template <typename T>
inline T exchange(unsigned mask, T value, unsigned partner) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 64 bits at most");
  Fibers& all = fibers();
  if (mask != 0xffffffffu) fail("only whole warps shuffle here");
  if (partner >= all.count) fail("a shuffle from a thread that is not there");
  memcpy(&all.slots[all.current], &value, sizeof value);
  wait_for_warp();
  T received;
  memcpy(&received, &all.slots[partner], sizeof received);
  wait_for_warp();  // before anyone offers the next value
  return received;
}

inline void start() {
  Fibers& all = fibers();
  all.run(all.body);
  all.states[all.current] = State::kDone;
  _longjmp(all.scheduler, 1);
}

// Runs one thread until it waits or ends.
inline void step(unsigned thread) {
  Fibers& all = fibers();
  all.current = thread;
  const bool fresh = all.states[thread] == State::kNew;
  all.states[thread] = State::kRunning;
  if (_setjmp(all.scheduler) != 0) return;
  if (!fresh) _longjmp(all.contexts[thread], 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = all.stacks + thread * kStack;
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

// Without std::function, whose header would take a third of the time to compile a kernel.
template <typename Body>
void run_block(unsigned threads, const Body& body) {
  Fibers& all = fibers();
  all.run = [](const void* body) { (*static_cast<const Body*>(body))(); };
  all.body = &body;
  all.count = threads;
  for (unsigned thread = 0; thread < threads; ++thread) all.states[thread] = State::kNew;
  for (unsigned thread = 0; thread < threads; ++thread) step(thread);
  for (;;) {
    bool moved = false;
    for (unsigned begin = 0; begin < threads; begin += kWarp) {
      const unsigned end = begin + kWarp < threads ? begin + kWarp : threads;
      if (!all_at(State::kAtWarpBarrier, begin, end, "a warp shuffles that some of its threads have left")) continue;
      moved = true;
      for (unsigned thread = begin; thread < end; ++thread) step(thread);
    }
    if (moved) continue;
    if (!all_at(State::kAtBlockBarrier, 0, threads, "a block synchronises that some of its threads have left")) break;
    for (unsigned thread = 0; thread < threads; ++thread) step(thread);
  }
  for (unsigned thread = 0; thread < threads; ++thread) {
    if (all.states[thread] != State::kDone) fail("threads wait at different barriers for each other");
  }
}

}  // namespace emulation

#endif  // DEPLOYNORM_EMULATION_FIBERS_H_

// PyTorch's threads for the kernels: a deploynorm_parallel_for.

#include "../kernels/frn.h"

namespace {

// The host of the loop, which deploynorm/layers/_native.py fills.
struct OpenMP {
  // GOMP_parallel of the OpenMP library that PyTorch itself has loaded, so that both share one pool of threads. It has
  // the same name and arguments in GNU's, LLVM's and Intel's.
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int32_t threads;
};

struct Tasks {
  deploynorm_task task;
  void* data;
  int64_t count;
  int64_t next;
};

// What each thread does: the next task that nobody has taken.
void work(void* data) {
  Tasks& tasks = *static_cast<Tasks*>(data);
  for (;;) {
    const int64_t index = __atomic_fetch_add(&tasks.next, 1, __ATOMIC_RELAXED);
    if (index >= tasks.count) return;
    tasks.task(tasks.data, index);
  }
}

}  // namespace

extern "C" DEPLOYNORM_API void deploynorm_openmp_parallel_for(void* host, int64_t count, deploynorm_task task,
                                                              void* data) {
  const OpenMP& openmp = *static_cast<const OpenMP*>(host);
  Tasks tasks = {task, data, count, 0};
  const int64_t threads = openmp.threads < count ? openmp.threads : count;
  openmp.parallel(work, &tasks, static_cast<unsigned>(threads), 0);
}

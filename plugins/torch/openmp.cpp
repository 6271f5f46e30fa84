#include "openmp.h"

namespace {

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

void deploynorm_openmp_parallel_for(void* host, int64_t count, deploynorm_task task, void* data) {
  const deploynorm_openmp& openmp = *static_cast<const deploynorm_openmp*>(host);
  Tasks tasks = {task, data, count, 0};
  const int64_t threads = openmp.threads < count ? openmp.threads : count;
  openmp.parallel(work, &tasks, static_cast<unsigned>(threads), 0);
}

// The cluster of blocks that a thread is in. See cuda_runtime_api.h.

#ifndef DEPLOYNORM_EMULATION_COOPERATIVE_GROUPS_H_
#define DEPLOYNORM_EMULATION_COOPERATIVE_GROUPS_H_

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static void barrier_arrive() { emulation::arrive_at_cluster(); }
  static void barrier_wait() { emulation::wait_for_cluster(); }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }
  static unsigned num_blocks() { return emulation::fibers().blocks; }
  static unsigned block_rank() { return emulation::this_block(); }

  template <typename T>
  static T* map_shared_rank(T* address, int rank) {
    return reinterpret_cast<T*>(emulation::shared_memory().of_block(reinterpret_cast<char*>(address), rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

#endif  // DEPLOYNORM_EMULATION_COOPERATIVE_GROUPS_H_

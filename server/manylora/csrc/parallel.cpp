#include "kernels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace manylora {

void run_tasks(int64_t count, int64_t threads, Task task, void* context) {
  threads = std::min({count, threads, num_threads()});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i, i + 1);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    int64_t mine = next.fetch_add(1);
    while (mine < count) {
      int64_t then = next.fetch_add(1);
      task(context, mine, then);
      mine = then;
    }
  });
}

int64_t num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

void* scratch(size_t size_bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (size_bytes > capacity) {
    size_t wanted = (size_bytes + size_bytes / 2 + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, wanted));
    capacity = memory ? wanted : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

}  // namespace manylora

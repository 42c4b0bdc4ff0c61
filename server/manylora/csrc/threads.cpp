// On which CPUs the threads of torch's parallel regions run. See server/manylora/kernels/native.py.

#include "operators.h"

#include <ATen/Parallel.h>

#include <atomic>

#ifdef __linux__
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <cstdio>
#endif

namespace manylora {

#ifdef __linux__

namespace {

struct Times {
  int64_t run_ns, wait_ns;
};

// Linux counts them per thread: Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat.
bool read_times(Times& times) {
  int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char text[96];
  ssize_t size = read(file, text, sizeof(text) - 1);
  close(file);
  if (size <= 0) return false;
  text[size] = '\0';
  long long run, wait;
  if (std::sscanf(text, "%lld %lld", &run, &wait) != 2) return false;
  times = {run, wait};
  return true;
}

}  // namespace

void place_threads(at::IntArrayRef cpus, bool apart) {
  at::parallel_for(0, static_cast<int64_t>(cpus.size()), 1, [&](int64_t, int64_t) {
    cpu_set_t mine;
    CPU_ZERO(&mine);
    for (size_t i = 0; i < cpus.size(); ++i)
      if (!apart || static_cast<int>(i) == at::get_thread_num()) CPU_SET(cpus[i], &mine);
    sched_setaffinity(0, sizeof(mine), &mine);  // refused or not, `thread_times` sees where the threads are
  });
}

std::tuple<int64_t, int64_t> thread_times(at::IntArrayRef cpus) {
  std::atomic<int64_t> run_ns{0}, wait_ns{0}, num_placed{0};
  at::parallel_for(0, static_cast<int64_t>(cpus.size()), 1, [&](int64_t, int64_t) {
    Times times;
    if (sched_getcpu() != cpus[at::get_thread_num()] || !read_times(times)) return;
    run_ns += times.run_ns;
    wait_ns += times.wait_ns;
    ++num_placed;
  });
  if (num_placed != static_cast<int64_t>(cpus.size())) return {-1, -1};
  return {run_ns, wait_ns};
}

#else

void place_threads(at::IntArrayRef, bool) {}
std::tuple<int64_t, int64_t> thread_times(at::IntArrayRef) { return {-1, -1}; }

#endif

}  // namespace manylora

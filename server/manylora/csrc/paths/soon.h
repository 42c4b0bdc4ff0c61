// Memory that the next operator reads, asked for by the tasks of this one while they multiply: many rows leave the
// memory idle, many adapters leave the arithmetic idle. What a task does not ask for is read later as if nothing were.
#pragma once

#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

class Fetcher {
  static constexpr bool kIsUsed = W == 16;  // where a gain was measured

 public:
  // The share of task `index` of `count`, to be asked for in `num_steps` steps or a few more.
  Fetcher(const Soon& soon, int64_t index, int64_t count, int64_t num_steps) {
    if (!kIsUsed || !soon.num_lines) return;
    line_ = soon.num_lines * index / count;
    end_ = soon.num_lines * (index + 1) / count;
    range_ = std::upper_bound(soon.ranges, soon.ranges + soon.count, line_,
                              [](int64_t line, const MemoryRange& range) { return line < range.end_line; });
    lines_per_step_ = (end_ - line_ + num_steps - 1) / std::max<int64_t>(1, num_steps);
  }

  ML_INLINE void step() {
    if (!kIsUsed) return;
    for (int64_t until = std::min(end_, line_ + lines_per_step_); line_ < until;) {
      for (int64_t stop = std::min(until, range_->end_line); line_ < stop; ++line_)
        __builtin_prefetch(range_->end - (range_->end_line - line_) * kLineBytes, 0, 2);
      if (line_ == range_->end_line) ++range_;
    }
  }

 private:
  const MemoryRange* range_ = nullptr;
  int64_t line_ = 0, end_ = 0, lines_per_step_ = 0;
};

}  // namespace
}  // namespace manylora

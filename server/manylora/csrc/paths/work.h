// How work is cut: into tasks for threads, rows into vectors; and what the caches hold.
#pragma once

#include "target.h"
#include "vec.h"

namespace manylora {
namespace {

constexpr int64_t kLineBytes = 64;  // what comes from memory at once
// Which cache the next weights, keys and values are brought to: with 512 bits what is at work fills the first one.
constexpr int kPrefetchInto = W == 16 ? 2 : 3;

// run_tasks for a callable.
template <class F>
void parallel(int64_t count, int64_t threads, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_tasks(
      count, threads, [](void* context, int64_t i, int64_t next) { (*static_cast<Function*>(context))(i, next); }, &f);
}

constexpr int64_t kElementsPerTask = 1 << 15;

// f(row) for every row; a task has enough rows to be worth a thread.
template <class F>
void for_rows(int64_t num_rows, int64_t elements_per_row, F&& f) {
  int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_row));
  int64_t count = (num_rows + rows_per_task - 1) / rows_per_task;
  parallel(count, count / 2, [&](int64_t task, int64_t) {
    int64_t end = std::min(num_rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) f(row);
  });
}

// f(first, count) for each vector of `length` elements; `count` is a constant W but for the last one.
template <class F>
ML_INLINE void for_vectors(int64_t length, F&& f) {
  int64_t i = 0;
  for (; i + W <= length; i += W) f(i, std::integral_constant<int64_t, W>{});
  if (i < length) f(i, length - i);
}

// Rows of a task over one panel of weights. Few panels do not divide well among threads; then the rows are halved too.
ML_INLINE int64_t rows_per_panel_task(int64_t num_rows, int64_t num_panels, int64_t threads) {
  constexpr int64_t kRowsPerPanelTask = 64;
  if (threads > 1 && num_panels < 16 * threads && num_rows >= 16)
    return std::min(kRowsPerPanelTask, (num_rows + 7) / 8 * 4);
  return kRowsPerPanelTask;
}

}  // namespace
}  // namespace manylora

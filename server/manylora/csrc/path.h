// One CPU path: the same sources, compiled once per instruction set into an unnamed namespace. The including file has
// defined ML_PATH_FUNCTION and ML_PATH_NAME and set the target; see avx2.cpp for an example.

namespace manylora {
namespace {

#include "vec.h"

// Calls f with a value of the element type.
template <class F>
ML_INLINE void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) {
    f(float{});
  } else if (dtype == DType::bf16) {
    f(bf16{});
  } else {
    f(f16{});
  }
}

// The same for weights, which may also be int8.
template <class F>
ML_INLINE void with_weight_dtype(DType dtype, F&& f) {
  if (dtype == DType::i8) {
    f(int8_t{});
  } else {
    with_dtype(dtype, f);
  }
}

// run_tasks for a callable.
template <class F>
void parallel(int64_t count, int64_t threads, F&& f) {
  using Function = std::remove_reference_t<F>;
  run_tasks(count, threads, [](void* context, int64_t i, int64_t next) { (*static_cast<Function*>(context))(i, next); }, &f);
}

constexpr int64_t kLineBytes = 64;  // what comes from memory at once
// Which cache the next weights, keys and values are brought to: with 512 bits what is at work fills the first one.
constexpr int kPrefetchInto = W == 16 ? 2 : 3;

#include "cache.h"
#include "soon.h"

#include "attention.h"
#include "elementwise.h"
#include "lora.h"

// Rows of a task over one panel of weights. Few panels do not divide well among threads; then the rows are halved too.
ML_INLINE int64_t rows_per_panel_task(int64_t num_rows, int64_t num_panels, int64_t threads) {
  constexpr int64_t kRowsPerPanelTask = 64;
  if (threads > 1 && num_panels < 16 * threads && num_rows >= 16) return std::min(kRowsPerPanelTask, (num_rows + 7) / 8 * 4);
  return kRowsPerPanelTask;
}

#include "int8.h"
#include "linear.h"

}  // namespace

const Kernels* ML_PATH_FUNCTION() {
  static constexpr Kernels table = {ML_PATH_NAME,     add_lora,      paged_attention, write_kv, rms_norm,
                                    gated_activation, rope_write_kv, linear,          int8_linear};
  return &table;
}

}  // namespace manylora

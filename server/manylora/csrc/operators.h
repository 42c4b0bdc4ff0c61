// The operators as C++ functions of tensors, their arguments checked. See server/manylora/kernels/native.py.
#pragma once

#include "kernels.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace manylora {

// Raises unless each segment is a run of `order` and has one of the slots.
void check_segments(const at::Tensor& order, const at::Tensor& segment_slots, const at::Tensor& segment_starts,
                    int64_t num_slots);
void add_lora_(at::Tensor out, const at::Tensor& x, const at::Tensor& tables, const at::Tensor& out_offsets,
               const at::Tensor& order, const at::Tensor& segment_slots, const at::Tensor& segment_starts);
void change_output_(at::Tensor out, const at::Tensor& outputs, const at::Tensor& out_offsets, const at::Tensor& order,
                    const at::Tensor& segment_slots, const at::Tensor& segment_starts);
// Raises unless each mix is a run of `order` and of its parts, which have slots.
void check_mixes(const at::Tensor& order, const at::Tensor& row_starts, const at::Tensor& part_starts,
                 const at::Tensor& part_slots, const at::Tensor& part_weights, int64_t num_slots);
void add_mixes_(at::Tensor out, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& tables,
                const std::optional<at::Tensor>& inputs, const at::Tensor& changes, const at::Tensor& out_offsets,
                const at::Tensor& order, const at::Tensor& row_starts, const at::Tensor& part_starts,
                const at::Tensor& part_slots, const at::Tensor& part_weights);
void paged_attention(at::Tensor out, const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& block_tables, const at::Tensor& query_starts, const at::Tensor& context_lens,
                     double scale, int64_t sliding_window, double softcap, int64_t chunk = 0,
                     const std::optional<at::Tensor>& sinks = std::nullopt,
                     const std::optional<at::Tensor>& slopes = std::nullopt);
void write_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor k_cache, at::Tensor v_cache,
              const at::Tensor& slots);
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, double weight_offset);
at::Tensor add_rms_norm_(at::Tensor residual, const at::Tensor& x, const at::Tensor& weight, double eps,
                         double weight_offset);
at::Tensor silu_and_mul(const at::Tensor& gate_up);
at::Tensor gelu_tanh_and_mul(const at::Tensor& gate_up);
at::Tensor rope_write_kv(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos,
                         const at::Tensor& sin, at::Tensor k_cache, at::Tensor v_cache, const at::Tensor& slots);
// The linears may ask for memory on the way that is read after them.
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                  const std::optional<at::Tensor>& bias, const Soon& soon);
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                       const at::Tensor& group_sums, const std::optional<at::Tensor>& bias, int64_t group_size,
                       const Soon& soon);
at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales, int64_t out_features,
                       const std::optional<at::Tensor>& bias, int64_t group_size, const Soon& soon);
void place_threads(at::IntArrayRef cpus, bool apart);
std::tuple<int64_t, int64_t> thread_times(at::IntArrayRef cpus);

}  // namespace manylora

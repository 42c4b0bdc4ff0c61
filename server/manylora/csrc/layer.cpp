// A decoder layer of the usual shape as one call: its operators follow each other without going back to Python, which
// for a few rows costs as much as they do. See server/manylora/models/native_layers.py.

#include "operators.h"
#include "weights.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace manylora {
namespace {

using at::Tensor;

// With fewer rows a matmul waits for its own weights and has no time to ask for others.
constexpr int64_t kMinRowsToAsk = 8;
// About what the second caches hold beside what is at work.
constexpr int64_t kLinesToAskPerThread = 768 * 1024 / 64;

// What the layers of one step share.
struct Step : torch::CustomClassHolder {
  Step(Tensor cos, Tensor sin, Tensor kv_slots, Tensor block_tables, Tensor query_starts, Tensor context_lens)
      : cos(std::move(cos)), sin(std::move(sin)), kv_slots(std::move(kv_slots)), block_tables(std::move(block_tables)),
        query_starts(std::move(query_starts)), context_lens(std::move(context_lens)) {}

  void set_lora(Tensor tables, Tensor order, Tensor segment_slots, Tensor segment_starts, const Tensor& touched) {
    TORCH_CHECK_VALUE(touched.scalar_type() == at::kBool && touched.is_contiguous() && touched.dim() == 1 &&
                          tables.dim() == 3 && touched.numel() == tables.size(0),
                      "touched must be a bool for each site of tables");
    TORCH_CHECK_VALUE(
        tables.scalar_type() == at::kLong && tables.is_contiguous() && tables.size(2) == kNumLoraEntryFields,
        "tables must be contiguous int64 [sites, slots, ", kNumLoraEntryFields, "]");
    check_segments(order, segment_slots, segment_starts, tables.size(1));
    read_from(tables, segment_slots);
    lora_tables = std::move(tables);
    lora_order = std::move(order);
    lora_segment_slots = std::move(segment_slots);
    lora_segment_starts = std::move(segment_starts);
    lora_touched = touched;
  }

  // Where adapters of this step change inputs, and outputs after the deltas; not called for a step in which none does.
  void set_changes(Tensor inputs, const Tensor& changed_inputs, Tensor outputs, const Tensor& changed_outputs) {
    check_changes(inputs, changed_inputs);
    check_changes(outputs, changed_outputs);
    lora_inputs = std::move(inputs);
    lora_outputs = std::move(outputs);
    lora_changed_inputs = changed_inputs;
    lora_changed_outputs = changed_outputs;
  }

  // Rows of this step that have several adapters: see `add_mixes_`. `touched` and `changed_inputs` as above, of these
  // rows' adapters; `changed_outputs` of norms, at which nothing else is done.
  void set_mixes(Tensor tables, Tensor inputs, Tensor outputs, Tensor order, Tensor row_starts, Tensor part_starts,
                 Tensor part_slots, Tensor part_weights, const Tensor& touched, const Tensor& changed_inputs,
                 const Tensor& changed_outputs) {
    for (const Tensor* flags : {&touched, &changed_inputs, &changed_outputs})
      TORCH_CHECK_VALUE(flags->scalar_type() == at::kBool && flags->is_contiguous() && flags->dim() == 1 &&
                            tables.dim() == 3 && flags->numel() == tables.size(0),
                        "what mixes touch and change must be a bool for each site of tables");
    check_mixes(order, row_starts, part_starts, part_slots, part_weights, tables.size(1));
    read_from(tables, part_slots);
    mixes = Mixes{std::move(tables),     std::move(inputs),       std::move(outputs),
                  std::move(order),      std::move(row_starts),   std::move(part_starts),
                  std::move(part_slots), std::move(part_weights), touched,
                  changed_inputs,        changed_outputs};
  }

  bool mixes_touch(int64_t first, int64_t count) const { return is_any(mixes.touched, first, count); }
  bool mixes_change_input(int64_t site) const { return is_any(mixes.changed_inputs, site, 1); }
  bool mixes_change_output(int64_t site) const { return is_any(mixes.changed_outputs, site, 1); }

  // What mixes do to `out` at `count` sites from `first` on, whose input is `x`.
  void add_mixes(Tensor out, const Tensor& x, int64_t first, int64_t count, const Tensor& offsets) const {
    ML_PROFILED("add_mixes_");
    add_mixes_(std::move(out), x, mixes.tables.narrow(0, first, count), mixes.inputs.narrow(0, first, count),
               mixes.outputs.narrow(0, first, count), offsets, mixes.order, mixes.row_starts, mixes.part_starts,
               mixes.part_slots, mixes.part_weights);
  }

  // `values` as mixes change them at one site, by `tables`, which are those of inputs or of outputs.
  void change_mixes(Tensor values, const Tensor& tables, int64_t site, const Tensor& offsets) const {
    ML_PROFILED("add_mixes_");
    add_mixes_(std::move(values), std::nullopt, std::nullopt, std::nullopt, tables.narrow(0, site, 1), offsets,
               mixes.order, mixes.row_starts, mixes.part_starts, mixes.part_slots, mixes.part_weights);
  }

  // Whether one of `count` sites has its input, or its output, changed.
  bool changes_input(int64_t first, int64_t count) const { return is_any(lora_changed_inputs, first, count); }
  bool changes_output(int64_t first, int64_t count) const { return is_any(lora_changed_outputs, first, count); }

  // `out` [T, columns] as the step's adapters change it at `count` sites from `first` on.
  void change(Tensor out, const Tensor& tables, int64_t first, int64_t count, const Tensor& offsets) const {
    ML_PROFILED("change_output_");
    change_output_(std::move(out), tables.narrow(0, first, count), offsets, lora_order, lora_segment_slots,
                   lora_segment_starts);
  }

  // Whether an adapter of this step has weights at one of `count` sites, of rows that have one adapter.
  bool touches(int64_t first, int64_t count) const { return is_any(lora_touched, first, count); }

  // What the deltas of `count` sites read first, in their order, up to `most` lines.
  std::vector<MemoryRange> lora_reads(int64_t first, int64_t count, int64_t most) const {
    constexpr int64_t kElementSizes[] = {4, 2, 2, 1};  // by DType
    int64_t num_slots = read_tables.size(1), num_lines = 0, num_units = static_cast<int64_t>(read_slots.size()) * count;
    const LoraEntry* table = static_cast<const LoraEntry*>(read_tables.const_data_ptr()) + first * num_slots;
    std::vector<MemoryRange> ranges;
    for (int64_t unit = 0; unit < num_units && num_lines < most; ++unit) {
      const LoraEntry& entry = table[unit % count * num_slots + read_slots[unit / count]];
      const int64_t addresses[] = {entry.a, entry.b}, columns[] = {entry.in_features, entry.out_features};
      for (int64_t matrix = 0; matrix < 2 && entry.rank; ++matrix) {
        if (!addresses[matrix]) continue;  // the identity
        int64_t begin = addresses[matrix] / 64;
        int64_t end = addresses[matrix] + entry.rank * columns[matrix] * kElementSizes[entry.dtype];
        num_lines += (end + 63) / 64 - begin;
        ranges.push_back({reinterpret_cast<const char*>((end + 63) / 64 * 64), num_lines});
      }
    }
    return ranges;
  }

  Tensor cos, sin, kv_slots, block_tables, query_starts, context_lens;
  Tensor lora_tables, lora_order, lora_segment_slots, lora_segment_starts, lora_touched;
  Tensor lora_inputs, lora_outputs, lora_changed_inputs, lora_changed_outputs;
  struct Mixes {
    Tensor tables, inputs, outputs, order, row_starts, part_starts, part_slots, part_weights;
    Tensor touched, changed_inputs, changed_outputs;
  } mixes;
  Tensor read_tables;               // of the low-rank entries
  std::vector<int32_t> read_slots;  // those that the step's rows have, each once

 private:
  void read_from(const Tensor& tables, const Tensor& slots) {
    read_tables = tables;
    const int32_t* at = slots.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < slots.numel(); ++i)
      if (std::find(read_slots.begin(), read_slots.end(), at[i]) == read_slots.end()) read_slots.push_back(at[i]);
  }

  static bool is_any(const Tensor& flags, int64_t first, int64_t count) {
    if (!flags.defined()) return false;
    TORCH_CHECK_INDEX(first >= 0 && first + count <= flags.numel(), "the step's tables have no site ",
                      first + count - 1);
    const bool* at = flags.const_data_ptr<bool>() + first;
    return std::any_of(at, at + count, [](bool flag) { return flag; });
  }

  void check_changes(const Tensor& tables, const Tensor& changed) const {
    TORCH_CHECK_VALUE(lora_touched.defined() && changed.scalar_type() == at::kBool && changed.is_contiguous() &&
                          changed.sizes() == lora_touched.sizes(),
                      "changes must be a bool for each site, of a step that has adapters");
    TORCH_CHECK_VALUE(tables.dim() == 3 && tables.scalar_type() == at::kLong && tables.is_contiguous() &&
                          tables.size(0) == lora_tables.size(0) && tables.size(1) == lora_tables.size(1) &&
                          tables.size(2) == kNumOutputEntryFields,
                      "tables of changes must be contiguous int64 [sites, slots, ", kNumOutputEntryFields, "]");
  }
};

// A base matmul and the sites of the low-rank deltas that belong to it.
struct AdaptedLinear : torch::CustomClassHolder {
  AdaptedLinear(WeightPtr weight, int64_t first_site, Tensor in_offsets, Tensor out_offsets)
      : weight_(std::move(weight)), first_site_(first_site), in_offsets_(std::move(in_offsets)),
        out_offsets_(std::move(out_offsets)) {
    TORCH_CHECK_VALUE(out_offsets_.dim() == 1 && out_offsets_.numel(),
                      "out_offsets must have one dimension and an entry");
  }

  Tensor forward(const Tensor& input, const Step& step) const {
    int64_t members = out_offsets_.numel() - 1;
    bool is_touched = step.touches(first_site_, members), is_mixed = step.mixes_touch(first_site_, members);
    Tensor x = changed_input(input, step, is_touched, is_mixed);
    std::vector<MemoryRange> reads;
    if ((is_touched || is_mixed) && x.size(0) >= kMinRowsToAsk)
      reads = step.lora_reads(first_site_, members, kLinesToAskPerThread * num_threads());
    Tensor out =
        weight_->multiply(x, reads.empty() ? Soon{} : Soon{reads.data(), int64_t(reads.size()), reads.back().end_line});
    if (is_touched) {
      ML_PROFILED("add_lora_");
      add_lora_(out, x, step.lora_tables.narrow(0, first_site_, members), out_offsets_, step.lora_order,
                step.lora_segment_slots, step.lora_segment_starts);
      if (step.changes_output(first_site_, members))
        step.change(out, step.lora_outputs, first_site_, members, out_offsets_);
    }
    if (is_mixed) step.add_mixes(out, input, first_site_, members, out_offsets_);
    return out;
  }

 private:
  // The input as the base is to have it: a copy where an adapter changes it.
  Tensor changed_input(const Tensor& input, const Step& step, bool is_touched, bool is_mixed) const {
    int64_t members = out_offsets_.numel() - 1;
    bool changes = is_touched && step.changes_input(first_site_, members);
    bool mixes_change = is_mixed && step.mixes_change_input(first_site_);
    if (!changes && !mixes_change) return input;
    TORCH_CHECK_VALUE(members == 1, "an input that several linears share cannot be changed for one of them");
    Tensor x = input.clone();
    if (changes) step.change(x, step.lora_inputs, first_site_, 1, in_offsets_);
    if (mixes_change) step.change_mixes(x, step.mixes.inputs, first_site_, in_offsets_);
    return x;
  }

  WeightPtr weight_;
  int64_t first_site_;
  Tensor in_offsets_, out_offsets_;
};

// A root mean square norm and the site at which adapters change its output.
struct AdaptedNorm : torch::CustomClassHolder {
  AdaptedNorm(Tensor weight, double eps, int64_t site, Tensor offsets)
      : weight(std::move(weight)), eps(eps), site_(site), offsets_(std::move(offsets)) {}

  void change(const Tensor& normed, const Step& step) const {
    if (step.changes_output(site_, 1)) step.change(normed, step.lora_outputs, site_, 1, offsets_);
    if (step.mixes_change_output(site_)) step.change_mixes(normed, step.mixes.outputs, site_, offsets_);
  }

  Tensor weight;
  double eps;

 private:
  int64_t site_;
  Tensor offsets_;
};

using LinearPtr = c10::intrusive_ptr<AdaptedLinear>;
using NormPtr = c10::intrusive_ptr<AdaptedNorm>;

struct FusedDecoderLayer : torch::CustomClassHolder {
  FusedDecoderLayer(NormPtr input_norm, LinearPtr qkv, LinearPtr o, NormPtr mlp_norm, LinearPtr gate_up, LinearPtr down,
                    Tensor keys, Tensor values, double scale, int64_t window, double softcap)
      : input_norm_(std::move(input_norm)), mlp_norm_(std::move(mlp_norm)), qkv_(std::move(qkv)), o_(std::move(o)),
        gate_up_(std::move(gate_up)), down_(std::move(down)), keys_(std::move(keys)), values_(std::move(values)),
        scale_(scale), window_(window), softcap_(softcap) {
    TORCH_CHECK_VALUE(keys_.dim() == 4 && head_dim() > 0, "keys must be [blocks, heads, block_size, head_dim]");
  }

  void forward_(Tensor residual, const c10::intrusive_ptr<Step>& step) const {
    Tensor qkv = qkv_->forward(input_normed(residual, *step), *step);
    Tensor attended = o_->forward(attend(qkv, *step), *step);
    Tensor gate_up = gate_up_->forward(mlp_normed(residual, attended, *step), *step);
    residual.add_(down_->forward(gated(gate_up), *step));
  }

 private:
  int64_t head_dim() const { return keys_.size(3) - (keys_.scalar_type() == at::kChar ? kScaleBytes : 0); }

  Tensor input_normed(const Tensor& residual, const Step& step) const {
    ML_PROFILED("rms_norm");
    Tensor normed = rms_norm(residual, input_norm_->weight, input_norm_->eps, 0);
    input_norm_->change(normed, step);
    return normed;
  }

  Tensor mlp_normed(const Tensor& residual, const Tensor& x, const Step& step) const {
    ML_PROFILED("add_rms_norm_");
    Tensor normed = add_rms_norm_(residual, x, mlp_norm_->weight, mlp_norm_->eps, 0);
    mlp_norm_->change(normed, step);
    return normed;
  }

  Tensor gated(const Tensor& gate_up) const {
    ML_PROFILED("silu_and_mul");
    return silu_and_mul(gate_up);
  }

  Tensor attend(const Tensor& qkv, const Step& step) const {
    int64_t num_kv = keys_.size(1), rows = qkv.size(0);
    Tensor heads = qkv.view({rows, -1, head_dim()});
    int64_t num_heads = heads.size(1) - 2 * num_kv;
    Tensor q = turn_and_write(heads, num_heads, num_kv, step);
    Tensor out = at::empty(q.sizes(), q.options());
    ML_PROFILED("paged_attention");
    paged_attention(out, q, keys_, values_, step.block_tables, step.query_starts, step.context_lens, scale_, window_,
                    softcap_);
    return out.view({rows, num_heads * head_dim()});
  }

  Tensor turn_and_write(const Tensor& heads, int64_t num_heads, int64_t num_kv, const Step& step) const {
    ML_PROFILED("rope_write_kv");
    return rope_write_kv(heads.narrow(1, 0, num_heads), heads.narrow(1, num_heads, num_kv),
                         heads.narrow(1, num_heads + num_kv, num_kv), step.cos, step.sin, keys_, values_,
                         step.kv_slots);
  }

  NormPtr input_norm_, mlp_norm_;
  LinearPtr qkv_, o_, gate_up_, down_;
  Tensor keys_, values_;
  double scale_;
  int64_t window_;
  double softcap_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(manylora, m) {
  m.class_<Step>("Step")
      .def(torch::init<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>())
      .def("set_lora", &Step::set_lora)
      .def("set_changes", &Step::set_changes)
      .def("set_mixes", &Step::set_mixes);
  register_weights(m);
  m.class_<AdaptedLinear>("AdaptedLinear").def(torch::init<WeightPtr, int64_t, Tensor, Tensor>());
  m.class_<AdaptedNorm>("AdaptedNorm").def(torch::init<Tensor, double, int64_t, Tensor>());
  m.class_<FusedDecoderLayer>("FusedDecoderLayer")
      .def(torch::init<NormPtr, LinearPtr, LinearPtr, NormPtr, LinearPtr, LinearPtr, Tensor, Tensor, double, int64_t,
                       double>())
      .def("forward_", &FusedDecoderLayer::forward_);
}

}  // namespace manylora

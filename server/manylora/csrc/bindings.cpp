// The operators' schemas. See server/manylora/kernels/native.py.

#include "kernels.h"
#include "operators.h"

#include <Python.h>
#include <torch/library.h>

namespace manylora {
namespace {

void set_cpu_path(c10::string_view name) {
  std::string wanted(name);
  TORCH_CHECK_VALUE(is_path_available(wanted.c_str()), "this machine cannot run the CPU path '", wanted, "'");
  select_path(wanted.c_str());
}

at::Tensor linear_alone(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                        const std::optional<at::Tensor>& bias) {
  return linear(x, packed, out_features, bias, Soon{});
}

at::Tensor int8_linear_alone(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                             const at::Tensor& group_sums, const std::optional<at::Tensor>& bias, int64_t group_size) {
  return int8_linear(x, packed, scales, group_sums, bias, group_size, Soon{});
}

at::Tensor int4_linear_alone(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scales,
                             int64_t out_features, const std::optional<at::Tensor>& bias, int64_t group_size) {
  return int4_linear(x, packed, scales, out_features, bias, group_size, Soon{});
}

template <size_t N>
std::vector<std::string> names_of(const EntryField (&fields)[N]) {
  std::vector<std::string> names;
  for (const EntryField& field : fields) names.push_back(field.name);
  return names;
}

std::vector<std::string> lora_entry_fields() { return names_of(kLoraEntryFields); }
std::vector<std::string> output_entry_fields() { return names_of(kOutputEntryFields); }

std::string cpu_path() { return kernels().name; }
bool has_cpu_path(c10::string_view name) { return is_path_available(std::string(name).c_str()); }

}  // namespace

TORCH_LIBRARY(manylora, m) {
  m.def("set_cpu_path(str name) -> ()", set_cpu_path);
  m.def("cpu_path() -> str", cpu_path);
  m.def("has_cpu_path(str name) -> bool", has_cpu_path);
  m.def("lora_entry_fields() -> str[]", lora_entry_fields);
  m.def("output_entry_fields() -> str[]", output_entry_fields);
  m.def("place_threads(int[] cpus, bool apart) -> ()", place_threads);
  m.def("thread_times(int[] cpus) -> (int, int)", thread_times);
  m.def(
      "add_lora_(Tensor(a!) out, Tensor x, Tensor tables, Tensor out_offsets, Tensor order, Tensor segment_slots, "
      "Tensor segment_starts) -> ()");
  m.def(
      "change_output_(Tensor(a!) out, Tensor outputs, Tensor out_offsets, Tensor order, Tensor segment_slots, "
      "Tensor segment_starts) -> ()");
  m.def(
      "add_mixes_(Tensor(a!) out, Tensor? x, Tensor? tables, Tensor? inputs, Tensor changes, Tensor out_offsets, "
      "Tensor order, Tensor row_starts, Tensor part_starts, Tensor part_slots, Tensor part_weights) -> ()");
  m.def(
      "paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
      "Tensor query_starts, Tensor context_lens, float scale, int sliding_window, float softcap, int chunk=0, "
      "Tensor? sinks=None, Tensor? slopes=None) -> ()");
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
  m.def("add_rms_norm_(Tensor(a!) residual, Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
  m.def("silu_and_mul(Tensor gate_up) -> Tensor");
  m.def("gelu_tanh_and_mul(Tensor gate_up) -> Tensor");
  m.def(
      "rope_write_kv(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slots) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor packed, Tensor scales, Tensor group_sums, Tensor? bias, int group_size) -> Tensor");
  m.def(
      "int4_linear(Tensor x, Tensor packed, Tensor scales, int out_features, Tensor? bias, int group_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(manylora, CPU, m) {
  m.impl("add_lora_", add_lora_);
  m.impl("change_output_", change_output_);
  m.impl("add_mixes_", add_mixes_);
  m.impl("paged_attention", paged_attention);
  m.impl("write_kv", write_kv);
  m.impl("rms_norm", rms_norm);
  m.impl("add_rms_norm_", add_rms_norm_);
  m.impl("silu_and_mul", silu_and_mul);
  m.impl("gelu_tanh_and_mul", gelu_tanh_and_mul);
  m.impl("rope_write_kv", rope_write_kv);
  m.impl("linear", linear_alone);
  m.impl("int8_linear", int8_linear_alone);
  m.impl("int4_linear", int4_linear_alone);
}

}  // namespace manylora

// Importing the module is what registers the operators above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

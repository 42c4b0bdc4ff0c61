// The operators' schemas and the checks of their arguments. Semantics: server/manylora/models/native.py.

#include "kernels.h"

#include <Python.h>
#include <torch/library.h>

namespace manylora {
namespace {

using at::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: TORCH_CHECK_TYPE(false, "expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

void check(const Tensor& tensor, const char* name, int64_t dim, at::ScalarType type) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, name, " must have ", dim, " dimensions, has ", tensor.dim());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", is ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.size(-1) == 1 || tensor.stride(-1) == 1,
                    name, " must be contiguous in its last dimension");
}

template <class T>
const T* indices(const Tensor& tensor, const char* name, int64_t dim) {
  check(tensor, name, dim, c10::CppTypeToScalarType<T>::value);
  TORCH_CHECK_VALUE(tensor.is_contiguous() || dim == 2, name, " must be contiguous");
  return tensor.const_data_ptr<T>();
}

CacheView cache_view(const Tensor& cache) { return {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)}; }

void add_lora_(Tensor out, const Tensor& x, const Tensor& tables, const Tensor& out_offsets, const Tensor& order,
               const Tensor& segment_slots, const Tensor& segment_starts) {
  check(x, "x", 2, x.scalar_type());
  check(out, "out", 2, x.scalar_type());
  TORCH_CHECK_VALUE(out.size(0) == x.size(0), "out and x must have the same rows");
  TORCH_CHECK_VALUE(tables.dim() == 3 && tables.size(2) == 3 && tables.is_contiguous(),
                    "tables must be a contiguous [members, slots, 3]");
  TORCH_CHECK_VALUE(out_offsets.numel() == tables.size(0) + 1, "out_offsets must have one entry more than members");
  TORCH_CHECK_VALUE(segment_starts.numel() == segment_slots.numel() + 1,
                    "segment_starts must have one entry more than segment_slots");
  LoraArgs args{};
  args.dtype = dtype_of(x);
  args.out = {out.data_ptr(), out.stride(0)};
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.in_features = x.size(1);
  args.tables = indices<int64_t>(tables, "tables", 3);
  args.num_members = tables.size(0);
  args.num_slots = tables.size(1);
  args.out_offsets = indices<int32_t>(out_offsets, "out_offsets", 1);
  args.order = indices<int32_t>(order, "order", 1);
  args.segment_slots = indices<int32_t>(segment_slots, "segment_slots", 1);
  args.segment_starts = indices<int32_t>(segment_starts, "segment_starts", 1);
  args.num_segments = segment_slots.numel();
  TORCH_CHECK_VALUE(args.num_members == 0 || args.out_offsets[args.num_members] <= out.size(1),
                    "out_offsets reach past the columns of out");
  kernels().add_lora(args);
}

void paged_attention(Tensor out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens, double scale,
                     int64_t sliding_window, double softcap) {
  check(q, "q", 3, q.scalar_type());
  check(out, "out", 3, q.scalar_type());
  check(k_cache, "k_cache", 4, q.scalar_type());
  check(v_cache, "v_cache", 4, q.scalar_type());
  TORCH_CHECK_VALUE(out.sizes() == q.sizes(), "out and q must have the same shape");
  TORCH_CHECK_VALUE(k_cache.sizes() == v_cache.sizes() && k_cache.size(3) == q.size(2),
                    "k_cache and v_cache must have the same shape, with q's head_dim");
  TORCH_CHECK_VALUE(q.size(1) % k_cache.size(1) == 0, "the query heads must be a multiple of the key/value heads");
  AttentionArgs args{};
  args.dtype = dtype_of(q);
  args.out = out.data_ptr();
  args.q = q.const_data_ptr();
  args.out_row_stride = out.stride(0);
  args.out_head_stride = out.stride(1);
  args.q_row_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.k_cache = cache_view(k_cache);
  args.v_cache = cache_view(v_cache);
  args.block_tables = indices<int32_t>(block_tables, "block_tables", 2);
  args.block_table_stride = block_tables.stride(0);
  args.query_starts = indices<int32_t>(query_starts, "query_starts", 1);
  args.context_lens = indices<int32_t>(context_lens, "context_lens", 1);
  args.num_sequences = context_lens.numel();
  TORCH_CHECK_VALUE(query_starts.numel() == args.num_sequences + 1 && block_tables.size(0) >= args.num_sequences,
                    "query_starts needs one entry more than context_lens, block_tables one row for each");
  args.num_heads = q.size(1);
  args.num_kv_heads = k_cache.size(1);
  args.head_dim = q.size(2);
  args.block_size = k_cache.size(2);
  args.scale = static_cast<float>(scale);
  args.sliding_window = sliding_window;
  args.softcap = static_cast<float>(softcap);
  kernels().paged_attention(args);
}

WriteKvArgs write_kv_args(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  check(k, "k", 3, k.scalar_type());
  check(v, "v", 3, k.scalar_type());
  check(k_cache, "k_cache", 4, k.scalar_type());
  check(v_cache, "v_cache", 4, k.scalar_type());
  TORCH_CHECK_VALUE(k.sizes() == v.sizes() && k_cache.sizes() == v_cache.sizes() && k_cache.size(1) == k.size(1) &&
                        k_cache.size(3) == k.size(2) && slots.numel() == k.size(0),
                    "k, v, the caches and slots do not fit together");
  WriteKvArgs args{};
  args.dtype = dtype_of(k);
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.k_row_stride = k.stride(0);
  args.k_head_stride = k.stride(1);
  args.v_row_stride = v.stride(0);
  args.v_head_stride = v.stride(1);
  args.k_cache = cache_view(k_cache);
  args.v_cache = cache_view(v_cache);
  args.slots = indices<int64_t>(slots, "slots", 1);
  args.num_tokens = k.size(0);
  args.num_kv_heads = k.size(1);
  args.head_dim = k.size(2);
  args.block_size = k_cache.size(2);
  return args;
}

void write_kv(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slots) {
  kernels().write_kv(write_kv_args(k, v, k_cache, v_cache, slots));
}

void set_cpu_path(c10::string_view name) {
  std::string wanted(name);
  TORCH_CHECK_VALUE(is_path_available(wanted.c_str()), "this machine cannot run the CPU path '", wanted, "'");
  select_path(wanted.c_str());
}

std::string cpu_path() { return kernels().name; }
bool has_cpu_path(c10::string_view name) { return is_path_available(std::string(name).c_str()); }

}  // namespace

TORCH_LIBRARY(manylora, m) {
  m.def("set_cpu_path(str name) -> ()", set_cpu_path);
  m.def("cpu_path() -> str", cpu_path);
  m.def("has_cpu_path(str name) -> bool", has_cpu_path);
  m.def(
      "add_lora_(Tensor(a!) out, Tensor x, Tensor tables, Tensor out_offsets, Tensor order, Tensor segment_slots, "
      "Tensor segment_starts) -> ()");
  m.def(
      "paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
      "Tensor query_starts, Tensor context_lens, float scale, int sliding_window, float softcap) -> ()");
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(manylora, CPU, m) {
  m.impl("add_lora_", add_lora_);
  m.impl("paged_attention", paged_attention);
  m.impl("write_kv", write_kv);
}

}  // namespace manylora

// Importing the module is what registers the operators above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

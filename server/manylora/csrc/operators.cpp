// See operators.h. Every check is here, of shapes and of indices: the kernels trust their arguments.

#include "operators.h"

#include "checks.h"
#include "kernels.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <type_traits>

namespace manylora {

using at::Tensor;

namespace {

template <class T>
const T* indices(const Tensor& tensor, const char* name, int64_t dim) {
  check(tensor, name, dim, c10::CppTypeToScalarType<T>::value);
  TORCH_CHECK_VALUE(tensor.is_contiguous() || dim == 2, name, " must be contiguous");
  return tensor.const_data_ptr<T>();
}

// Whether all of `values` are in [0, end). Without a branch, so that it costs next to nothing: it runs in every layer.
template <class T>
bool are_below(const T* values, int64_t count, int64_t end) {
  using Unsigned = std::make_unsigned_t<T>;
  if (end > static_cast<int64_t>(std::numeric_limits<T>::max())) end = std::numeric_limits<T>::max();
  bool is_outside = false;
  for (int64_t i = 0; i < count; ++i) is_outside |= static_cast<Unsigned>(values[i]) >= static_cast<Unsigned>(end);
  return !is_outside;
}

// Whether `starts` are the borders of `count` runs within [0, end], one after the other.
bool are_runs(const int32_t* starts, int64_t count, int64_t end) {
  bool is_falling = starts[0] < 0;
  for (int64_t i = 0; i < count; ++i) is_falling |= starts[i + 1] < starts[i];
  return !is_falling && starts[count] <= end;
}

CacheView cache_view(const Tensor& cache) {
  return {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

// Whether the caches are rounded; their type else is `type`. `widths`: numbers of an entry of each.
bool check_caches(const Tensor& k_cache, const Tensor& v_cache, at::ScalarType type, int64_t (&widths)[2]) {
  bool is_rounded = k_cache.scalar_type() == at::kChar;
  const Tensor* caches[] = {&k_cache, &v_cache};
  const char* names[] = {"k_cache", "v_cache"};
  for (int i = 0; i < 2; ++i) {
    check(*caches[i], names[i], 4, is_rounded ? at::kChar : type);
    widths[i] = caches[i]->size(3) - (is_rounded ? kScaleBytes : 0);
    TORCH_CHECK_VALUE(widths[i] >= 0, names[i], " must have room for a scale in each entry");
  }
  return is_rounded;
}

WriteKvArgs write_kv_args(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& slots) {
  check(k, "k", 3, k.scalar_type());
  check(v, "v", 3, k.scalar_type());
  int64_t widths[2];
  bool is_rounded = check_caches(k_cache, v_cache, k.scalar_type(), widths);
  TORCH_CHECK_VALUE(k.sizes().slice(0, 2) == v.sizes().slice(0, 2) &&
                        k_cache.sizes().slice(0, 3) == v_cache.sizes().slice(0, 3) && k_cache.size(1) == k.size(1) &&
                        widths[0] == k.size(2) && widths[1] == v.size(2) && slots.numel() == k.size(0),
                    "k, v, the caches and slots do not fit together");
  const int64_t* rows = indices<int64_t>(slots, "slots", 1);
  int64_t num_positions = k_cache.size(0) * k_cache.size(2);
  TORCH_CHECK_INDEX(std::all_of(rows, rows + slots.numel(), [&](int64_t row) { return row < num_positions; }),
                    "slots reach past the cache's ", num_positions, " positions");
  WriteKvArgs args{};
  args.dtype = dtype_of(k);
  args.is_rounded = is_rounded;
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.k_row_stride = k.stride(0);
  args.k_head_stride = k.stride(1);
  args.v_row_stride = v.stride(0);
  args.v_head_stride = v.stride(1);
  args.k_cache = cache_view(k_cache);
  args.v_cache = cache_view(v_cache);
  args.slots = rows;
  args.num_tokens = k.size(0);
  args.num_kv_heads = k.size(1);
  args.head_dim = k.size(2);
  args.value_dim = v.size(2);
  args.block_size = k_cache.size(2);
  return args;
}

Tensor normed(const Tensor& x, Tensor* residual, const Tensor& weight, double eps, double weight_offset) {
  check(x, "x", 2, x.scalar_type());
  check(weight, "weight", 1, x.scalar_type());
  TORCH_CHECK_VALUE(weight.numel() == x.size(1), "weight must have one entry per column of x");
  Tensor out = at::empty(x.sizes(), x.options());
  NormArgs args{};
  args.dtype = dtype_of(x);
  args.out = {out.data_ptr(), out.stride(0)};
  if (residual) {
    check(*residual, "residual", 2, x.scalar_type());
    TORCH_CHECK_VALUE(residual->sizes() == x.sizes(), "residual and x must have the same shape");
    args.residual = {residual->data_ptr(), residual->stride(0)};
  }
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.weight = weight.const_data_ptr();
  args.num_rows = x.size(0);
  args.hidden = x.size(1);
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  kernels().rms_norm(args);
  return out;
}

// The adapter in a slot was packed for an input and an output of these sizes.
void check_entry(const LoraEntry& entry, int32_t slot, int64_t in_features, int64_t width) {
  TORCH_CHECK_VALUE(!entry.rank || (entry.rank > 0 && entry.in_features == in_features && entry.out_features == width),
                    "the adapter in slot ", slot, " is for [", entry.in_features, "] -> [", entry.out_features,
                    "], and this is [", in_features, "] -> [", width, "]");
  TORCH_CHECK_VALUE(!entry.rank || entry.b || entry.rank == width, "the adapter in slot ", slot,
                    " has a dense matrix of ", entry.rank, " rows for ", width, " outputs");
  TORCH_CHECK_VALUE(!entry.rank || are_below(&entry.dtype, 1, kNumDTypes), "an adapter's number format is unknown");
}

void check_change(const OutputEntry& entry, int32_t slot, int64_t width) {
  TORCH_CHECK_VALUE(!entry.out_features || entry.out_features == width, "the adapter in slot ", slot,
                    " changes outputs of ", entry.out_features, ", and this has ", width);
}

void check_entries(const LoraArgs& args) {
  for (int64_t member = 0; member < args.num_members; ++member) {
    int64_t width = args.out_offsets[member + 1] - args.out_offsets[member];
    for (int64_t segment = 0; segment < args.num_segments; ++segment) {
      int32_t slot = args.segment_slots[segment];
      check_entry(args.tables[member * args.num_slots + slot], slot, args.in_features, width);
    }
  }
}

void check_parts(const MixArgs& args) {
  for (int64_t member = 0; member < args.num_members; ++member) {
    int64_t width = args.out_offsets[member + 1] - args.out_offsets[member];
    for (int64_t part = 0; part < args.part_starts[args.num_mixes]; ++part) {
      int32_t slot = args.part_slots[part];
      int64_t at = member * args.num_slots + slot;
      check_change(args.changes[at], slot, width);
      if (!args.tables) continue;
      check_entry(args.tables[at], slot, args.in_features, width);
      check_change(args.inputs[at], slot, args.in_features);
    }
  }
}

// The entries of tables [members, slots, fields].
template <class Entry>
const Entry* entries_of(const Tensor& tables, const char* name, int64_t num_fields) {
  indices<int64_t>(tables, name, 3);
  TORCH_CHECK_VALUE(tables.size(2) == num_fields, name, " must be [members, slots, ", num_fields, "]");
  return static_cast<const Entry*>(tables.const_data_ptr());
}

// Every row and every block that the sequences name is there.
void check_sequences(const AttentionArgs& args, int64_t num_rows, int64_t table_width, int64_t num_blocks) {
  TORCH_CHECK_INDEX(are_runs(args.query_starts, args.num_sequences, num_rows), "query_starts must rise within q's ",
                    num_rows, " rows");
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    int64_t length = args.context_lens[s], num_queries = args.query_starts[s + 1] - args.query_starts[s];
    TORCH_CHECK_INDEX(length >= num_queries, "context_lens must count a sequence's own rows too");
    TORCH_CHECK_INDEX(length <= table_width * args.block_size, "context_lens reach past block_tables");
    const int32_t* table = args.block_tables + s * args.block_table_stride;
    TORCH_CHECK_INDEX(!length || are_below(table, (length + args.block_size - 1) / args.block_size, num_blocks),
                      "block_tables must be in [0, ", num_blocks, ")");
  }
}

Tensor gated(const Tensor& gate_up, Activation activation) {
  check(gate_up, "gate_up", 2, gate_up.scalar_type());
  TORCH_CHECK_VALUE(gate_up.size(1) % 2 == 0, "gate_up must have an even number of columns");
  Tensor out = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  GatedArgs args{};
  args.dtype = dtype_of(gate_up);
  args.activation = activation;
  args.out = {out.data_ptr(), out.stride(0)};
  args.gate_up = {gate_up.const_data_ptr(), gate_up.stride(0)};
  args.num_rows = out.size(0);
  args.width = out.size(1);
  kernels().gated_activation(args);
  return out;
}

}  // namespace

void check_segments(const Tensor& order, const Tensor& segment_slots, const Tensor& segment_starts, int64_t num_slots) {
  indices<int32_t>(order, "order", 1);
  const int32_t* slots = indices<int32_t>(segment_slots, "segment_slots", 1);
  const int32_t* starts = indices<int32_t>(segment_starts, "segment_starts", 1);
  TORCH_CHECK_VALUE(segment_starts.numel() == segment_slots.numel() + 1,
                    "segment_starts must have one entry more than segment_slots");
  TORCH_CHECK_INDEX(are_below(slots, segment_slots.numel(), num_slots), "segment_slots must be in [0, ", num_slots,
                    ")");
  TORCH_CHECK_INDEX(are_runs(starts, segment_slots.numel(), order.numel()), "segment_starts must rise within order's ",
                    order.numel(), " entries");
}

namespace {

// Fills in what the operators on segments share, `num_rows` and `num_columns` being those of the output.
void take_segments(Segments& args, const Tensor& tables, int64_t num_fields, int64_t num_rows, int64_t num_columns,
                   const Tensor& out_offsets, const Tensor& order, const Tensor& segment_slots,
                   const Tensor& segment_starts) {
  indices<int64_t>(tables, "tables", 3);
  TORCH_CHECK_VALUE(tables.size(2) == num_fields, "tables must be [members, slots, ", num_fields, "]");
  TORCH_CHECK_VALUE(out_offsets.numel() == tables.size(0) + 1, "out_offsets must have one entry more than members");
  check_segments(order, segment_slots, segment_starts, tables.size(1));
  args.num_members = tables.size(0);
  args.num_slots = tables.size(1);
  args.out_offsets = indices<int32_t>(out_offsets, "out_offsets", 1);
  args.order = order.const_data_ptr<int32_t>();
  args.segment_slots = segment_slots.const_data_ptr<int32_t>();
  args.segment_starts = segment_starts.const_data_ptr<int32_t>();
  args.num_segments = segment_slots.numel();
  TORCH_CHECK_INDEX(are_runs(args.out_offsets, args.num_members, num_columns),
                    "out_offsets must rise within the columns of out");
  TORCH_CHECK_INDEX(are_below(args.order, order.numel(), num_rows), "order must be rows of x, in [0, ", num_rows, ")");
}

}  // namespace

void add_lora_(Tensor out, const Tensor& x, const Tensor& tables, const Tensor& out_offsets, const Tensor& order,
               const Tensor& segment_slots, const Tensor& segment_starts) {
  check(x, "x", 2, x.scalar_type());
  check(out, "out", 2, x.scalar_type());
  TORCH_CHECK_VALUE(out.size(0) == x.size(0), "out and x must have the same rows");
  LoraArgs args{};
  take_segments(args, tables, kNumLoraEntryFields, out.size(0), out.size(1), out_offsets, order, segment_slots,
                segment_starts);
  args.dtype = dtype_of(x);
  args.out = {out.data_ptr(), out.stride(0)};
  args.x = {x.const_data_ptr(), x.stride(0)};
  args.in_features = x.size(1);
  args.tables = static_cast<const LoraEntry*>(tables.const_data_ptr());
  check_entries(args);
  kernels().add_lora(args);
}

void change_output_(Tensor out, const Tensor& outputs, const Tensor& out_offsets, const Tensor& order,
                    const Tensor& segment_slots, const Tensor& segment_starts) {
  check(out, "out", 2, out.scalar_type());
  OutputArgs args{};
  take_segments(args, outputs, kNumOutputEntryFields, out.size(0), out.size(1), out_offsets, order, segment_slots,
                segment_starts);
  args.dtype = dtype_of(out);
  args.out = {out.data_ptr(), out.stride(0)};
  args.outputs = static_cast<const OutputEntry*>(outputs.const_data_ptr());
  for (int64_t member = 0; member < args.num_members; ++member) {
    int64_t width = args.out_offsets[member + 1] - args.out_offsets[member];
    for (int64_t segment = 0; segment < args.num_segments; ++segment) {
      int32_t slot = args.segment_slots[segment];
      check_change(args.outputs[member * args.num_slots + slot], slot, width);
    }
  }
  kernels().change_output(args);
}

void check_mixes(const Tensor& order, const Tensor& row_starts, const Tensor& part_starts, const Tensor& part_slots,
                 const Tensor& part_weights, int64_t num_slots) {
  indices<int32_t>(order, "order", 1);
  const int32_t* rows = indices<int32_t>(row_starts, "row_starts", 1);
  const int32_t* parts = indices<int32_t>(part_starts, "part_starts", 1);
  const int32_t* slots = indices<int32_t>(part_slots, "part_slots", 1);
  indices<float>(part_weights, "part_weights", 1);
  TORCH_CHECK_VALUE(row_starts.numel() == part_starts.numel() && row_starts.numel(),
                    "row_starts and part_starts must have one entry more than there are mixes");
  TORCH_CHECK_VALUE(part_slots.numel() == part_weights.numel(), "each part must have a slot and a weight");
  TORCH_CHECK_INDEX(are_below(slots, part_slots.numel(), num_slots), "part_slots must be in [0, ", num_slots, ")");
  TORCH_CHECK_INDEX(are_runs(rows, row_starts.numel() - 1, order.numel()), "row_starts must rise within order's ",
                    order.numel(), " entries");
  TORCH_CHECK_INDEX(are_runs(parts, part_starts.numel() - 1, part_slots.numel()), "part_starts must rise within the ",
                    part_slots.numel(), " parts");
}

void add_mixes_(Tensor out, const std::optional<Tensor>& x, const std::optional<Tensor>& tables,
                const std::optional<Tensor>& inputs, const Tensor& changes, const Tensor& out_offsets,
                const Tensor& order, const Tensor& row_starts, const Tensor& part_starts, const Tensor& part_slots,
                const Tensor& part_weights) {
  check(out, "out", 2, out.scalar_type());
  MixArgs args{};
  args.dtype = dtype_of(out);
  args.out = {out.data_ptr(), out.stride(0)};
  args.changes = entries_of<OutputEntry>(changes, "changes", kNumOutputEntryFields);
  args.num_members = changes.size(0);
  args.num_slots = changes.size(1);
  TORCH_CHECK_VALUE(tables.has_value() == x.has_value() && tables.has_value() == inputs.has_value(),
                    "tables, x and inputs come together or not at all");
  if (tables) {
    check(*x, "x", 2, out.scalar_type());
    TORCH_CHECK_VALUE(out.size(0) == x->size(0), "out and x must have the same rows");
    TORCH_CHECK_VALUE(tables->sizes().slice(0, 2) == changes.sizes().slice(0, 2) && inputs->sizes() == changes.sizes(),
                      "tables, inputs and changes must have the same members and slots");
    args.x = {x->const_data_ptr(), x->stride(0)};
    args.in_features = x->size(1);
    args.tables = entries_of<LoraEntry>(*tables, "tables", kNumLoraEntryFields);
    args.inputs = entries_of<OutputEntry>(*inputs, "inputs", kNumOutputEntryFields);
  }
  check_mixes(order, row_starts, part_starts, part_slots, part_weights, args.num_slots);
  args.out_offsets = indices<int32_t>(out_offsets, "out_offsets", 1);
  TORCH_CHECK_VALUE(out_offsets.numel() == args.num_members + 1, "out_offsets must have one entry more than members");
  args.order = order.const_data_ptr<int32_t>();
  args.row_starts = row_starts.const_data_ptr<int32_t>();
  args.part_starts = part_starts.const_data_ptr<int32_t>();
  args.part_slots = part_slots.const_data_ptr<int32_t>();
  args.part_weights = part_weights.const_data_ptr<float>();
  args.num_mixes = row_starts.numel() - 1;
  TORCH_CHECK_INDEX(are_runs(args.out_offsets, args.num_members, out.size(1)),
                    "out_offsets must rise within the columns of out");
  TORCH_CHECK_INDEX(are_below(args.order, order.numel(), out.size(0)), "order must be rows of out, in [0, ",
                    out.size(0), ")");
  check_parts(args);
  kernels().add_mixes(args);
}

// One float32 for each of `num_heads` heads, or null.
const float* of_heads(const std::optional<Tensor>& values, const char* name, int64_t num_heads) {
  if (!values) return nullptr;
  check(*values, name, 1, at::kFloat);
  TORCH_CHECK_VALUE(values->numel() == num_heads, name, " must have one entry per query head");
  return values->const_data_ptr<float>();
}

void paged_attention(Tensor out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_tables, const Tensor& query_starts, const Tensor& context_lens, double scale,
                     int64_t sliding_window, double softcap, int64_t chunk, const std::optional<Tensor>& sinks,
                     const std::optional<Tensor>& slopes) {
  check(q, "q", 3, q.scalar_type());
  check(out, "out", 3, q.scalar_type());
  int64_t widths[2];
  bool is_rounded = check_caches(k_cache, v_cache, q.scalar_type(), widths);
  TORCH_CHECK_VALUE(out.sizes().slice(0, 2) == q.sizes().slice(0, 2) && out.size(2) == widths[1],
                    "out must have q's rows and heads, and the width of v_cache");
  TORCH_CHECK_VALUE(k_cache.sizes().slice(0, 3) == v_cache.sizes().slice(0, 3) && widths[0] == q.size(2),
                    "k_cache and v_cache must have the same shape but for their widths, the former with q's head_dim");
  TORCH_CHECK_VALUE(k_cache.size(1) && q.size(1) % k_cache.size(1) == 0,
                    "the query heads must be a multiple of the key/value heads");
  AttentionArgs args{};
  args.dtype = dtype_of(q);
  args.is_rounded = is_rounded;
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
  args.value_dim = widths[1];
  args.block_size = k_cache.size(2);
  check_sequences(args, q.size(0), block_tables.size(1), k_cache.size(0));
  args.scale = static_cast<float>(scale);
  args.sliding_window = sliding_window;
  args.chunk = chunk;
  args.softcap = static_cast<float>(softcap);
  args.sinks = of_heads(sinks, "sinks", args.num_heads);
  args.slopes = of_heads(slopes, "slopes", args.num_heads);
  kernels().paged_attention(args);
}

void write_kv(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slots) {
  kernels().write_kv(write_kv_args(k, v, k_cache, v_cache, slots));
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  return normed(x, nullptr, weight, eps, weight_offset);
}

Tensor add_rms_norm_(Tensor residual, const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  return normed(x, &residual, weight, eps, weight_offset);
}

Tensor silu_and_mul(const Tensor& gate_up) { return gated(gate_up, Activation::silu); }
Tensor gelu_tanh_and_mul(const Tensor& gate_up) { return gated(gate_up, Activation::gelu_tanh); }

Tensor rope_write_kv(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                     Tensor k_cache, Tensor v_cache, const Tensor& slots) {
  check(q, "q", 3, k.scalar_type());
  check(cos, "cos", 2, at::kFloat);
  check(sin, "sin", 2, at::kFloat);
  TORCH_CHECK_VALUE(q.size(0) == k.size(0) && q.size(2) == k.size(2), "q and k must have the same tokens and head_dim");
  TORCH_CHECK_VALUE(v.size(2) == k.size(2), "k and v must have the same head_dim");
  TORCH_CHECK_VALUE(cos.sizes() == sin.sizes() && cos.size(0) == q.size(0), "cos and sin must have one row per token");
  TORCH_CHECK_VALUE(cos.size(1) % 2 == 0 && cos.size(1) <= q.size(2), "cos must have an even width, at most head_dim");
  Tensor out = at::empty(q.sizes(), q.options());
  RopeArgs args{};
  args.kv = write_kv_args(k, v, k_cache, v_cache, slots);
  args.q = q.const_data_ptr();
  args.q_row_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.num_heads = q.size(1);
  args.out = out.data_ptr();
  args.cos = {cos.const_data_ptr<float>(), cos.stride(0)};
  args.sin = {sin.const_data_ptr<float>(), sin.stride(0)};
  args.rotary_dim = cos.size(1);
  kernels().rope_write_kv(args);
  return out;
}

}  // namespace manylora

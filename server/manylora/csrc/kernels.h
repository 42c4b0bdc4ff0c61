// What every CPU path offers: plain structs in, no torch types, so that each path compiles in seconds and no
// inline function of torch is compiled with instructions that the machine may not have.
#pragma once

#include <cstddef>
#include <cstdint>

namespace manylora {

enum class DType { f32, bf16, f16, i8 };  // i8 is for weights only; the low-rank tables name them by number
constexpr int64_t kNumDTypes = 4;

// Row `t` of a matrix begins at data + t * stride (in elements); within a row the elements are contiguous.
template <class Pointer>
struct Rows {
  Pointer data;
  int64_t stride;
};

// What a slot holds for one module: an entry of the low-rank tables, whose int64 fields are these in this order.
// `TableEntry` of lora/memory/device_memory.py has the same. Where the rank is 0, nothing else is read.
#define ML_LORA_ENTRY(FIELD)                                                      \
  FIELD(a) /* address of A [rank, in_features] */                                 \
  FIELD(b) /* address of B [rank, out_features], or 0: the identity */            \
  FIELD(rank)                                                                     \
  FIELD(scales) /* address of float32 [rank], by which A x is multiplied, or 0 */ \
  FIELD(dtype)  /* DType of A and B */                                            \
  FIELD(in_features)                                                              \
  FIELD(out_features)

struct LoraEntry {
#define ML_FIELD(name) int64_t name;
  ML_LORA_ENTRY(ML_FIELD)
#undef ML_FIELD
};

// What a slot does to a module's output in the end: an entry of the tables of outputs, likewise. `OutputEntry` of
// lora/memory/device_memory.py has the same. Where out_features is 0, nothing else is read.
#define ML_OUTPUT_ENTRY(FIELD)                                                \
  FIELD(scale) /* address of float32 [out_features], or 0: multiply by one */ \
  FIELD(shift) /* address of float32 [out_features], or 0: add nothing */     \
  FIELD(out_features)

struct OutputEntry {
#define ML_FIELD(name) int64_t name;
  ML_OUTPUT_ENTRY(ML_FIELD)
#undef ML_FIELD
};

struct EntryField {
  const char* name;
  size_t offset;
};
constexpr EntryField kLoraEntryFields[] = {
#define ML_FIELD(name) {#name, offsetof(LoraEntry, name)},
    ML_LORA_ENTRY(ML_FIELD)
#undef ML_FIELD
};
constexpr EntryField kOutputEntryFields[] = {
#define ML_FIELD(name) {#name, offsetof(OutputEntry, name)},
    ML_OUTPUT_ENTRY(ML_FIELD)
#undef ML_FIELD
};
constexpr int64_t kNumLoraEntryFields = sizeof kLoraEntryFields / sizeof kLoraEntryFields[0];
constexpr int64_t kNumOutputEntryFields = sizeof kOutputEntryFields / sizeof kOutputEntryFields[0];

constexpr bool lie_side_by_side(const EntryField* fields, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (fields[i].offset != i * sizeof(int64_t)) return false;
  return true;
}
static_assert(sizeof(LoraEntry) == kNumLoraEntryFields * sizeof(int64_t));
static_assert(lie_side_by_side(kLoraEntryFields, kNumLoraEntryFields));
static_assert(sizeof(OutputEntry) == kNumOutputEntryFields * sizeof(int64_t));
static_assert(lie_side_by_side(kOutputEntryFields, kNumOutputEntryFields));

// Which rows have which slot, and which columns are which member's. See `add_lora_` in kernels/native.py.
struct Segments {
  int64_t num_members, num_slots;
  const int32_t* out_offsets;     // [num_members + 1]
  const int32_t* order;           // row indices, sorted by slot
  const int32_t* segment_slots;   // [num_segments]
  const int32_t* segment_starts;  // [num_segments + 1]
  int64_t num_segments;
};

struct LoraArgs : Segments {
  DType dtype;
  Rows<void*> out;
  Rows<const void*> x;
  int64_t in_features;
  const LoraEntry* tables;  // [num_members, num_slots]
};

struct OutputArgs : Segments {
  DType dtype;
  Rows<void*> out;
  const OutputEntry* outputs;  // [num_members, num_slots]
};

// Rows that have several adapters, each with a weight. See `add_mixes_` in kernels/native.py.
struct MixArgs {
  DType dtype;
  Rows<void*> out;
  Rows<const void*> x;
  int64_t in_features, num_members, num_slots, num_mixes;
  const int32_t* out_offsets;  // [num_members + 1]
  const int32_t* order;        // row indices, sorted by mix
  const int32_t* row_starts;   // [num_mixes + 1] into order
  const int32_t* part_starts;  // [num_mixes + 1] into part_slots and part_weights
  const int32_t* part_slots;
  const float* part_weights;
  const LoraEntry* tables;     // [num_members, num_slots], or null: nothing is added
  const OutputEntry* inputs;   // likewise, read where there are tables
  const OutputEntry* changes;  // [num_members, num_slots]
};

constexpr int64_t kScaleBytes = 4;  // behind the 8-bit numbers of an entry of a rounded cache

struct CacheView {
  void* data;  // [num_blocks, num_kv_heads, block_size, head_dim or value_dim, and kScaleBytes where it is rounded]
  int64_t block_stride, head_stride, position_stride;
};

struct AttentionArgs {
  DType dtype;
  bool is_rounded;  // the cache: int8, each entry with a scale; else it is of dtype
  void* out;
  const void* q;
  int64_t out_row_stride, out_head_stride, q_row_stride, q_head_stride;
  CacheView k_cache, v_cache;
  const int32_t* block_tables;
  int64_t block_table_stride;
  const int32_t* query_starts;
  const int32_t* context_lens;
  int64_t num_sequences, num_heads, num_kv_heads, head_dim, value_dim, block_size;
  float scale;
  int64_t sliding_window, chunk;
  float softcap;
  const float* sinks;   // [num_heads] or null: a score of each head's without a key or a value
  const float* slopes;  // [num_heads] or null: added to a score for each position that the key is farther on
};

struct WriteKvArgs {
  DType dtype;
  bool is_rounded;  // as for AttentionArgs
  const void* k;
  const void* v;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  CacheView k_cache, v_cache;
  const int64_t* slots;
  int64_t num_tokens, num_kv_heads, head_dim, value_dim, block_size;
};

struct NormArgs {
  DType dtype;
  Rows<void*> out;
  Rows<void*> residual;  // data is null where there is none; x is added to it before the norm
  Rows<const void*> x;
  const void* weight;
  int64_t num_rows, hidden;
  float eps, weight_offset;
};

struct RopeArgs {
  WriteKvArgs kv;  // k and v are slices of the fused row
  const void* q;
  int64_t q_row_stride, q_head_stride, num_heads;
  void* out;  // [num_tokens, num_heads, head_dim], contiguous
  Rows<const float*> cos, sin;
  int64_t rotary_dim;
};

enum class Activation { silu, gelu_tanh };

struct GatedArgs {
  DType dtype;
  Activation activation;
  Rows<void*> out;
  Rows<const void*> gate_up;
  int64_t num_rows, width;
};

// Layout of a packed weight [N, K]: [ceil(N / 64)][ceil(K / depth)][64][depth], zero where N or K ends.
constexpr int64_t kPanelWidth = 64;
constexpr int64_t kBf16Depth = 2;  // float32 and float16: 1
constexpr int64_t kInt8Depth = 4;
// In 4 bits [ceil(N / 64)][ceil(K / 8)][64][4]: of 8 inputs of an output the first four are the bytes' lower halves.
constexpr int64_t kInt4Depth = 8;
constexpr int64_t kInt4Block = 32;  // inputs that share a scale of x; groups of weights are so many or a multiple

// What is read soon after an operator, to be asked for meanwhile: see paths/soon.h.
struct MemoryRange {
  const char* end;   // on a line's border
  int64_t end_line;  // lines of 64 bytes up to there, those of the ranges before included
};
struct Soon {
  const MemoryRange* ranges;
  int64_t count, num_lines;
};

struct LinearArgs {
  DType dtype;
  Rows<void*> out;
  Rows<const void*> x;
  const void* packed;
  const float* bias;  // [N] or null
  void* inputs;       // scratch [num_rows, K rounded up to depth] floats, for types other than float32
  int64_t num_rows, in_features, out_features;
  Soon soon;
};

struct Int8LinearArgs {
  DType dtype;
  Rows<void*> out;
  Rows<const void*> x;
  const int8_t* packed;
  const float* scales;        // [N]
  const int32_t* group_sums;  // [num_groups, N rounded up to 64]: sum of the group's weights per channel
  const float* bias;          // [N] or null
  void* quantised;            // scratch [num_rows, K rounded up to 4] of 2 bytes: x in steps of its group's scale
  float* row_scales;          // scratch [num_rows, num_groups]
  int64_t num_rows, in_features, out_features, group_size;
  Soon soon;
};

struct Int4LinearArgs {
  DType dtype;
  Rows<void*> out;
  Rows<const void*> x;
  const uint8_t* packed;
  const uint16_t* scales;  // float16 [ceil(N / 64)][num_groups][1 or 2][64]: scales and, if there are, offsets
  bool has_offsets;        // else they are -8 scales
  const float* bias;       // [N] or null
  int8_t* quantised;       // scratch [num_rows, K rounded up to 8]: x in steps of its block's scale
  float* row_scales;       // scratch [num_rows, num_blocks, 2]: scales of x, and these times the sums of its steps
  int64_t num_rows, in_features, out_features, group_size;
  Soon soon;
};

struct Kernels {
  const char* name;
  void (*add_lora)(const LoraArgs&);
  void (*change_output)(const OutputArgs&);
  void (*add_mixes)(const MixArgs&);
  void (*paged_attention)(const AttentionArgs&);
  void (*write_kv)(const WriteKvArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*gated_activation)(const GatedArgs&);
  void (*rope_write_kv)(const RopeArgs&);
  void (*linear)(const LinearArgs&);
  void (*int8_linear)(const Int8LinearArgs&);
  void (*int4_linear)(const Int4LinearArgs&);
};

// Null where the compiler or the architecture cannot build the path; whether the CPU has it is dispatch.cpp's matter.
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_vnni_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The path in use. `select_path` throws std::invalid_argument for a path this machine cannot run; "auto" is the best.
const Kernels& kernels();
void select_path(const char* name);
bool is_path_available(const char* name);

// Runs task(context, i, next) for every i in [0, count), on at most `threads` threads of torch's pool, each taking one
// when it is free: a worker that wakes late or shares its core costs no more than its own share. `next` is what the
// same thread will do after i, count or more if nothing.
using Task = void (*)(void* context, int64_t index, int64_t next);
void run_tasks(int64_t count, int64_t threads, Task task, void* context);
int64_t num_threads();
// Memory of the calling thread, 64-byte aligned, kept between calls; valid until its next call on the same thread.
void* scratch(size_t size_bytes);

}  // namespace manylora

// change_output_: out[t, columns of member m] = scale * out + shift for every row t of every segment, in float32 and
// rounded once.
#pragma once

#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

template <class T>
void change_row(T* out, const OutputEntry& entry) {
  const float* scale = reinterpret_cast<const float*>(entry.scale);
  const float* shift = reinterpret_cast<const float*>(entry.shift);
  for_vectors(entry.out_features, [&](int64_t i, auto count) {
    vf value = load(out + i, count);
    if (scale) value = value * load(scale + i, count);
    if (shift) value = value + load(shift + i, count);
    store(out + i, value, count);
  });
}

void change_output(const OutputArgs& args) {
  int64_t num_rows = args.segment_starts[args.num_segments], width = args.out_offsets[args.num_members];
  std::vector<int32_t> slots(num_rows);
  for (int64_t s = 0; s < args.num_segments; ++s)
    for (int64_t i = args.segment_starts[s]; i < args.segment_starts[s + 1]; ++i) slots[i] = args.segment_slots[s];
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(num_rows, width, [&](int64_t i) {
      T* row = static_cast<T*>(args.out.data) + args.order[i] * args.out.stride;
      for (int64_t m = 0; m < args.num_members; ++m) {
        const OutputEntry& entry = args.outputs[m * args.num_slots + slots[i]];
        if (entry.out_features) change_row(row + args.out_offsets[m], entry);
      }
    });
  });
}

}  // namespace
}  // namespace manylora

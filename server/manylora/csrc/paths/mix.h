// add_mixes_: what several adapters do together to a row, each times its weight:
//
//   out = out + sum over parts p of w_p (scale_p (out + B_p^T (A_p (in_p x))) + shift_p - out)
//
// A unit is (mix, up to kRowsPerUnit of its rows, member). Its deltas are summed in float32 and rounded once, in the
// sum with out. The order of additions for one row does not depend on the rows beside it, nor on how units are split.
#pragma once

#include "lora.h"
#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

// What one adapter does at one member. `low_rank.rank` is 0 where it adds nothing; vectors are null for 1 and for 0.
struct MixPart {
  LoraUnit low_rank;
  float weight;
  const float* input;
  const float* scale;
  const float* shift;
};

struct MixUnit {
  const int32_t* rows;
  int64_t num_rows, first_column, width;
  const MixPart* parts;
  int64_t num_parts;
  float* low;  // of each part, one after the other
};

// Rows of what a unit makes for itself.
constexpr int32_t kOwnRows[kRowsPerUnit] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
constexpr int64_t kStripElements = 16 * 1024;  // of sums that stay in the second cache
constexpr int64_t kMaxStrip = 2048;            // columns
constexpr int64_t kMaxPlainParts = 16;

int64_t low_size(const MixUnit& unit) {
  int64_t size = 0;
  for (int64_t p = 0; p < unit.num_parts; ++p) size += unit.num_rows * unit.parts[p].low_rank.low_stride;
  return size;
}

// f(part, its low-rank product for the unit's rows) for each part that adds something.
template <class F>
void for_parts(const MixUnit& unit, F&& f) {
  float* low = unit.low;
  for (int64_t p = 0; p < unit.num_parts; ++p) {
    const MixPart& part = unit.parts[p];
    if (!part.low_rank.rank) continue;
    LoraUnit product = part.low_rank;
    product.rows = unit.rows;
    product.num_rows = unit.num_rows;
    product.low = low;
    low += unit.num_rows * product.low_stride;
    f(part, product);
  }
}

// low = weight * A x for the ranks [begin, end), both multiples of W or the end of all.
template <class T>
void shrink_part(const MixArgs& args, const MixPart& part, const LoraUnit& unit, int64_t begin, int64_t end,
                 Ahead ahead) {
  with_weight_dtype(unit.dtype, [&](auto type) {
    using Weight = decltype(type);
    if (!part.input) {
      shrink<T, Weight>(unit, args.x, args.in_features, begin, end, ahead);
      return;
    }
    std::vector<T> changed(unit.num_rows * args.in_features);
    for (int64_t row = 0; row < unit.num_rows; ++row) {
      const T* x = static_cast<const T*>(args.x.data) + unit.rows[row] * args.x.stride;
      T* own = changed.data() + row * args.in_features;
      for_vectors(args.in_features, [&](int64_t i, auto count) {
        store(own + i, load(x + i, count) * load(part.input + i, count), count);
      });
    }
    LoraUnit own = unit;
    own.rows = kOwnRows;
    shrink<T, Weight>(own, Rows<const void*>{changed.data(), args.in_features}, args.in_features, begin, end, ahead);
  });
  for (int64_t row = 0; row < unit.num_rows; ++row)
    for (int64_t rank = begin; rank < end; ++rank) unit.low[row * unit.low_stride + rank] *= part.weight;
}

// delta += scale * B^T low for the columns [begin, begin + count) of every part.
void sum_parts(const MixUnit& unit, float* delta, float* own, int64_t begin, int64_t count) {
  std::fill_n(delta, unit.num_rows * count, 0.0f);
  for_parts(unit, [&](const MixPart& part, LoraUnit product) {
    float* target = delta;
    if (part.scale) {
      target = own;
      std::fill_n(own, unit.num_rows * count, 0.0f);
    }
    product.rows = kOwnRows;
    product.first_column = 0;
    if (product.b)
      product.b = static_cast<const char*>(product.b) + begin * element_size(product);
    else
      product.low += begin;
    with_weight_dtype(product.dtype, [&](auto type) {
      expand<float, decltype(type)>(product, Rows<void*>{target, count}, 0, count, Ahead{});
    });
    if (!part.scale) return;
    for (int64_t row = 0; row < unit.num_rows; ++row)
      for_vectors(count, [&](int64_t i, auto n) {
        float* sum = delta + row * count + i;
        store(sum, fused_multiply_add(load(own + row * count + i, n), load(part.scale + begin + i, n), load(sum, n)),
              n);
      });
  });
}

// Whether all that the parts do is to add low ranks in one number format: then their sum is made in registers.
bool is_plain_sum(const MixUnit& unit) {
  for (int64_t p = 0; p < unit.num_parts; ++p) {
    const MixPart& part = unit.parts[p];
    if (!part.low_rank.rank || !part.low_rank.b || part.low_rank.dtype != unit.parts->low_rank.dtype) return false;
    if (part.scale || part.shift) return false;
  }
  return unit.num_parts <= kMaxPlainParts;
}

template <class T>
void finish_plain(const MixArgs& args, const MixUnit& unit, int64_t begin, int64_t end) {
  LoraUnit products[kMaxPlainParts];
  int64_t count = 0;
  for_parts(unit, [&](const MixPart&, const LoraUnit& product) {
    products[count] = product;
    products[count++].first_column = unit.first_column;
  });
  with_weight_dtype(products->dtype,
                    [&](auto type) { expand_all<T, decltype(type)>(products, count, args.out, begin, end, Ahead{}); });
}

// The columns [begin, end) of the unit's rows of out.
template <class T>
void finish(const MixArgs& args, const MixUnit& unit, int64_t begin, int64_t end) {
  if (is_plain_sum(unit)) {
    finish_plain<T>(args, unit, begin, end);
    return;
  }
  alignas(64) float delta[kStripElements], own[kStripElements];
  int64_t strip = std::min(kMaxStrip, kStripElements / unit.num_rows / kSplitColumns * kSplitColumns);
  for (; begin < end; begin += strip) {
    int64_t count = std::min(strip, end - begin);
    sum_parts(unit, delta, own, begin, count);
    for (int64_t row = 0; row < unit.num_rows; ++row) {
      T* target = static_cast<T*>(args.out.data) + unit.rows[row] * args.out.stride + unit.first_column + begin;
      for_vectors(count, [&](int64_t i, auto n) {
        vf factor = splat(1), sum = load(delta + row * count + i, n);
        for (int64_t p = 0; p < unit.num_parts; ++p) {
          const MixPart& part = unit.parts[p];
          vf weight = splat(part.weight);
          if (part.scale) factor = fused_multiply_add(weight, load(part.scale + begin + i, n) - splat(1), factor);
          if (part.shift) sum = fused_multiply_add(weight, load(part.shift + begin + i, n), sum);
        }
        store(target + i, fused_multiply_add(load(target + i, n), factor, sum), n);
      });
    }
  }
}

MixPart mix_part(const MixArgs& args, int64_t member, int64_t p) {
  int64_t at = member * args.num_slots + args.part_slots[p];
  MixPart part{};
  part.weight = args.part_weights[p];
  const OutputEntry& change = args.changes[at];
  if (change.out_features) {
    part.scale = reinterpret_cast<const float*>(change.scale);
    part.shift = reinterpret_cast<const float*>(change.shift);
  }
  if (!args.tables || !args.tables[at].rank) return part;
  const LoraEntry& entry = args.tables[at];
  LoraUnit& unit = part.low_rank;
  unit.a = reinterpret_cast<const void*>(entry.a);
  unit.b = reinterpret_cast<const void*>(entry.b);
  unit.scales = reinterpret_cast<const float*>(entry.scales);
  unit.dtype = static_cast<DType>(entry.dtype);
  unit.rank = entry.rank;
  unit.width = args.out_offsets[member + 1] - args.out_offsets[member];
  unit.low_stride = (unit.rank + W - 1) / W * W;
  if (args.inputs[at].out_features) part.input = reinterpret_cast<const float*>(args.inputs[at].scale);
  return part;
}

// `parts` has room for all, so that units may point into it.
void mix_units(const MixArgs& args, std::vector<MixPart>& parts, std::vector<MixUnit>& units) {
  parts.reserve(args.num_members * args.part_starts[args.num_mixes]);
  for (int64_t mix = 0; mix < args.num_mixes; ++mix) {
    for (int64_t member = 0; member < args.num_members; ++member) {
      size_t first = parts.size();
      for (int64_t p = args.part_starts[mix]; p < args.part_starts[mix + 1]; ++p) {
        MixPart part = mix_part(args, member, p);
        if (part.low_rank.rank || part.scale || part.shift) parts.push_back(part);
      }
      if (parts.size() == first) continue;
      MixUnit unit{};
      unit.first_column = args.out_offsets[member];
      unit.width = args.out_offsets[member + 1] - args.out_offsets[member];
      unit.parts = parts.data() + first;
      unit.num_parts = static_cast<int64_t>(parts.size() - first);
      int64_t end = args.row_starts[mix + 1];
      for (int64_t i = args.row_starts[mix]; i < end; i += kRowsPerUnit) {
        unit.rows = args.order + i;
        unit.num_rows = std::min<int64_t>(kRowsPerUnit, end - i);
        units.push_back(unit);
      }
    }
  }
}

// Few units: every product is itself split, with a barrier between the two of a part.
template <class T>
void add_mixes_split(const MixArgs& args, std::vector<MixUnit>& units, int64_t threads) {
  int64_t total = 0, count = static_cast<int64_t>(units.size()), pieces = 2 * threads;
  for (const MixUnit& unit : units) total += low_size(unit);
  float* low = static_cast<float*>(scratch(total * sizeof(float)));
  struct Product {
    const MixPart* part;
    LoraUnit unit;
  };
  std::vector<Product> products;
  for (MixUnit& unit : units) {
    unit.low = low;
    low += low_size(unit);
    for_parts(unit, [&](const MixPart& part, const LoraUnit& product) { products.push_back({&part, product}); });
  }
  auto split = [&](int64_t piece, int64_t size, int64_t step) {
    return std::min(size, (size * piece / pieces + step - 1) / step * step);
  };
  parallel(static_cast<int64_t>(products.size()) * pieces, threads, [&](int64_t i, int64_t) {
    const Product& product = products[i / pieces];
    int64_t begin = split(i % pieces, product.unit.rank, W), end = split(i % pieces + 1, product.unit.rank, W);
    if (begin < end) shrink_part<T>(args, *product.part, product.unit, begin, end, Ahead{});
  });
  parallel(count * pieces, threads, [&](int64_t i, int64_t) {
    const MixUnit& unit = units[i / pieces];
    finish<T>(args, unit, split(i % pieces, unit.width, kSplitColumns),
              split(i % pieces + 1, unit.width, kSplitColumns));
  });
}

void add_mixes(const MixArgs& args) {
  std::vector<MixPart> parts;
  std::vector<MixUnit> units;
  mix_units(args, parts, units);
  int64_t cost = 0, count = static_cast<int64_t>(units.size());
  for (const MixUnit& unit : units)
    for_parts(unit, [&](const MixPart&, const LoraUnit& product) {
      cost += (args.in_features + (product.b ? unit.width : 1)) * product.rank * element_size(product) *
              std::max<int64_t>(1, unit.num_rows / 4);
    });
  int64_t threads = std::min(num_threads(), std::max<int64_t>(1, cost / kBytesPerThread));
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (threads > 1 && count < 2 * threads) {
      add_mixes_split<T>(args, units, threads);
      return;
    }
    parallel(count, threads, [&](int64_t i, int64_t) {
      MixUnit unit = units[i];
      unit.low = static_cast<float*>(scratch(low_size(unit) * sizeof(float)));
      for_parts(unit, [&](const MixPart& part, const LoraUnit& product) {
        int64_t per_line = kLineBytes / element_size(product);
        int64_t steps = (product.rank + W - 1) / W * (args.in_features / per_line);
        Ahead b(product.b, product.b ? product.rank * unit.width * element_size(product) : 0, steps);
        shrink_part<T>(args, part, product, 0, product.rank, b);
      });
      finish<T>(args, unit, 0, unit.width);
    });
  });
}

}  // namespace
}  // namespace manylora

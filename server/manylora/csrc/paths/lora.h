// add_lora_: out[t, columns of member m] += B_m^T (A_m x[t]) for every row t of every segment.
//
// A unit is (segment, up to kRowsPerUnit of its rows, member). One thread does both products of a unit, so that its
// weights come from memory once; only where there are fewer units than threads are the products split further. The
// order of additions for one row does not depend on the rows beside it, nor on the split. A dense matrix is an A whose
// B is the identity: it is cut into units by its own rows, each of which makes some of the columns.
#pragma once

#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

constexpr int64_t kRowsPerUnit = 32;
constexpr int64_t kDenseRowsPerUnit = 256;
constexpr int64_t kBytesPerThread = 256 * 1024;  // what is read in the time that waking another thread takes

// What a thread reads after what it multiplies now: B after A, and then the next unit's A. It is asked for meanwhile, a
// few lines with every step, since an adapter's matrices are too short for the CPU to foresee them.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  int64_t lines_per_step = 0;

  // To be done by the time that `num_steps` steps are.
  Ahead(const void* data, int64_t size_bytes, int64_t num_steps)
      : at(static_cast<const char*>(data)), end(at + size_bytes),
        lines_per_step((size_bytes / kLineBytes + num_steps) / std::max<int64_t>(1, num_steps)) {}
  Ahead() = default;

  ML_INLINE void step() {
    const char* until = std::min(end, at + lines_per_step * kLineBytes);
    for (; at < until; at += kLineBytes) __builtin_prefetch(at, 0, 2);  // into the second cache: it may be 100 kB
  }
};

struct LoraUnit {
  const int32_t* rows;
  int64_t num_rows;
  const void* a;        // [rank, in_features]
  const void* b;        // [rank, width], or null: the identity
  const float* scales;  // [rank], by which the low dimension is multiplied; or null
  DType dtype;          // of a and b
  int64_t rank, first_column, width;
  float* low;  // [num_rows, low_stride]: the rows in the adapter's low dimension
  int64_t low_stride;
};

ML_INLINE int64_t element_size(const LoraUnit& unit) {
  return unit.dtype == DType::f32 ? 4 : unit.dtype == DType::i8 ? 1 : 2;
}

// Weights and rows of one type are multiplied as Lanes<T> says, of two types as floats.
template <class T, class Weight>
using LanesOf = Lanes<std::conditional_t<std::is_same_v<T, Weight>, T, float>>;

template <class L, class T, class... Count>
ML_INLINE vu load_lanes(const T* p, Count... count) {
  if constexpr (std::is_same_v<L, Lanes<T>>) {
    return L::load_lanes(p, count...);
  } else {
    return bitcast<vu>(load(p, count...));
  }
}

// Lane j * NA + i of the result is a[i] . x[j].
template <int NA, int NX, class T, class Weight>
ML_INLINE vf dot_products(const Weight* const (&a)[NA], const T* const (&x)[NX], int64_t length, Ahead& ahead) {
  static_assert(NA * NX == W);
  using L = LanesOf<T, Weight>;
  constexpr int64_t step = W * L::per_lane, line = std::max<int64_t>(step, kLineBytes / sizeof(Weight));
  vf sums[W] = {};
  auto add = [&](int64_t k) ML_INLINE_LAMBDA {
    vu x_lanes[NX];
    for (int j = 0; j < NX; ++j) x_lanes[j] = load_lanes<L>(x[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < NA; ++i) {
      vu a_lanes = load_lanes<L>(a[i] + k);
#pragma GCC unroll 16
      for (int j = 0; j < NX; ++j) sums[j * NA + i] = L::multiply_add(sums[j * NA + i], a_lanes, x_lanes[j]);
    }
  };
  int64_t k = 0;
  for (; k + line <= length; k += line) {
    ahead.step();
    for (int64_t at = 0; at < line; at += step) add(k + at);
  }
  for (; k + step <= length; k += step) add(k);
  if (k < length) {
    vu x_lanes[NX];
    for (int j = 0; j < NX; ++j) x_lanes[j] = load_lanes<L>(x[j] + k, length - k);
#pragma GCC unroll 16
    for (int i = 0; i < NA; ++i) {
      vu a_lanes = load_lanes<L>(a[i] + k, length - k);
#pragma GCC unroll 16
      for (int j = 0; j < NX; ++j) sums[j * NA + i] = L::multiply_add(sums[j * NA + i], a_lanes, x_lanes[j]);
    }
  }
  return sum_each(sums);
}

// Ranks [first, first + NA) for NX rows. Past the last rank the last one stands in: its lanes fall into the padding.
template <int NA, int NX, class T, class Weight>
ML_INLINE void shrink_tile(const LoraUnit& unit, const Rows<const void*>& x, int64_t in, int64_t row, int64_t first,
                           Ahead& ahead) {
  const Weight* a_rows[NA];
  const T* x_rows[NX];
  for (int i = 0; i < NA; ++i) a_rows[i] = static_cast<const Weight*>(unit.a) + std::min(first + i, unit.rank - 1) * in;
  for (int j = 0; j < NX; ++j) x_rows[j] = static_cast<const T*>(x.data) + unit.rows[row + j] * x.stride;
  vf dots = dot_products<NA, NX>(a_rows, x_rows, in, ahead);
  for (int j = 0; j < NX; ++j)
    __builtin_memcpy(unit.low + (row + j) * unit.low_stride + first, reinterpret_cast<float*>(&dots) + j * NA,
                     NA * sizeof(float));
}

// low = A x, times the scales if there are any, for the ranks [begin, end), both multiples of W or the end of all.
template <class T, class Weight>
void shrink(const LoraUnit& unit, const Rows<const void*>& x, int64_t in, int64_t begin, int64_t end, Ahead ahead) {
  constexpr int NX = W / 4;
  int64_t tiled_rows = unit.num_rows / NX * NX;
  if (tiled_rows)
    for (int64_t first = begin; first < end; first += 4)
      for (int64_t row = 0; row < tiled_rows; row += NX) shrink_tile<4, NX, T, Weight>(unit, x, in, row, first, ahead);
  for (int64_t first = begin; first < end; first += W)
    for (int64_t row = tiled_rows; row < unit.num_rows; ++row)
      shrink_tile<W, 1, T, Weight>(unit, x, in, row, first, ahead);
  if (unit.scales)
    for (int64_t row = 0; row < unit.num_rows; ++row)
      for (int64_t rank = begin; rank < end; ++rank) unit.low[row * unit.low_stride + rank] *= unit.scales[rank];
}

using One = std::integral_constant<int64_t, 1>;

// out += the sum of B^T low over units of the same rows and columns, for R rows and NV vectors of columns, the last
// vector with `count` of its columns. `num_units` is One but for mixes.
template <int R, int NV, class T, class Weight, class Count>
ML_INLINE void expand_tile(const LoraUnit* units, Count num_units, const Rows<void*>& out, int64_t row, int64_t column,
                           int64_t count) {
  vf sums[R][NV] = {};
  for (int64_t u = 0; u < num_units; ++u) {
    const LoraUnit& unit = units[u];
    const Weight* b = static_cast<const Weight*>(unit.b) + column;
    const float* low = unit.low + row * unit.low_stride;
    for (int64_t rank = 0; rank < unit.rank; ++rank, b += unit.width) {
      vf b_values[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) b_values[v] = count == W ? load(b + v * W) : load(b + v * W, count);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        vf factor = splat(low[r * unit.low_stride + rank]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) sums[r][v] = fused_multiply_add(factor, b_values[v], sums[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    T* target = static_cast<T*>(out.data) + units->rows[row + r] * out.stride + units->first_column + column;
    for (int v = 0; v < NV; ++v) {
      if (count == W)
        store(target + v * W, load(target + v * W) + sums[r][v]);
      else
        store(target + v * W, load(target + v * W, count) + sums[r][v], count);
    }
  }
}

// sums[0, count) += N rows of B, `width` apart, each times its factor; the sums begin at zero if `is_first`.
template <int N, class Weight>
ML_INLINE void add_ranks(float* sums, const Weight* b, int64_t width, const float* factors, int64_t count,
                         bool is_first, Ahead& ahead) {
  constexpr int NV = kLineBytes / sizeof(Weight) / W;
  vf factor[N];
  for (int i = 0; i < N; ++i) factor[i] = splat(factors[i]);
  int64_t column = 0;
  for (; column + NV * W <= count; column += NV * W) {
    ahead.step();
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      vf sum = is_first ? vf{} : load(sums + column + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) sum = fused_multiply_add(factor[i], load(b + i * width + column + v * W), sum);
      store(sums + column + v * W, sum);
    }
  }
  for (; column < count; column += W) {
    int64_t rest = std::min<int64_t>(W, count - column);
    vf sum = is_first ? vf{} : load(sums + column, rest);
    for (int i = 0; i < N; ++i) sum = fused_multiply_add(factor[i], load(b + i * width + column, rest), sum);
    store(sums + column, sum, rest);
  }
}

// The same for one row: B's rows are read to their end one after the other, a few at a time, as the memory likes it.
template <class T, class Weight, class Count>
void expand_row(const LoraUnit* units, Count num_units, const Rows<void*>& out, int64_t row, int64_t begin, int64_t end,
                Ahead& ahead) {
  constexpr int64_t kColumns = 2048;  // their sums stay in the nearest cache
  constexpr int N = 4;
  alignas(64) float sums[kColumns];
  for (; begin < end; begin += kColumns) {
    int64_t count = std::min(kColumns, end - begin);
    for (int64_t u = 0; u < num_units; ++u) {
      const LoraUnit& unit = units[u];
      const float* low = unit.low + row * unit.low_stride;
      const Weight* b = static_cast<const Weight*>(unit.b) + begin;
      int64_t rank = 0;
      for (; rank + N <= unit.rank; rank += N)
        add_ranks<N>(sums, b + rank * unit.width, unit.width, low + rank, count, u + rank == 0, ahead);
      for (; rank < unit.rank; ++rank)
        add_ranks<1>(sums, b + rank * unit.width, unit.width, low + rank, count, u + rank == 0, ahead);
    }
    T* target = static_cast<T*>(out.data) + units->rows[row] * out.stride + units->first_column + begin;
    int64_t column = 0;
    for (; column + W <= count; column += W) store(target + column, load(target + column) + load(sums + column));
    if (int64_t rest = count - column; rest > 0)
      store(target + column, load(target + column, rest) + load(sums + column, rest), rest);
  }
}

// The same where B is the identity, for the columns [begin, end).
template <class T>
void add_low(const LoraUnit& unit, const Rows<void*>& out, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < unit.num_rows; ++row) {
    T* target = static_cast<T*>(out.data) + unit.rows[row] * out.stride + unit.first_column + begin;
    const float* low = unit.low + row * unit.low_stride + begin;
    for_vectors(end - begin, [&](int64_t i, auto count) {
      store(target + i, load(target + i, count) + load(low + i, count), count);
    });
  }
}

constexpr int64_t kExpandStrip = W == 16 ? 64 : 16;  // columns that several rows take at a time

// Units of the same rows and columns, each with a B.
template <class T, class Weight, class Count>
void expand_all(const LoraUnit* units, Count num_units, const Rows<void*>& out, int64_t begin, int64_t end,
                Ahead ahead) {
  constexpr int R = 4, NV = kExpandStrip / W;
  int64_t tiled_rows = units->num_rows / R * R, column = begin;
  for (; tiled_rows && column + kExpandStrip <= end; column += kExpandStrip)
    for (int64_t row = 0; row < tiled_rows; row += R)
      expand_tile<R, NV, T, Weight>(units, num_units, out, row, column, W);
  for (; tiled_rows && column < end; column += W)
    for (int64_t row = 0; row < tiled_rows; row += R)
      expand_tile<R, 1, T, Weight>(units, num_units, out, row, column, std::min<int64_t>(W, end - column));
  for (int64_t row = tiled_rows; row < units->num_rows; ++row)
    expand_row<T, Weight>(units, num_units, out, row, begin, end, ahead);
}

template <class T, class Weight>
void expand(const LoraUnit& unit, const Rows<void*>& out, int64_t begin, int64_t end, Ahead ahead) {
  if (unit.b)
    expand_all<T, Weight>(&unit, One{}, out, begin, end, ahead);
  else
    add_low<T>(unit, out, begin, end);
}

// A unit for each kRowsPerUnit of a segment's rows.
void add_units(const LoraArgs& args, int64_t segment, LoraUnit unit, std::vector<LoraUnit>& units) {
  unit.low_stride = (unit.rank + W - 1) / W * W;
  int64_t end = args.segment_starts[segment + 1];
  for (int64_t i = args.segment_starts[segment]; i < end; i += kRowsPerUnit) {
    unit.rows = args.order + i;
    unit.num_rows = std::min<int64_t>(kRowsPerUnit, end - i);
    units.push_back(unit);
  }
}

std::vector<LoraUnit> lora_units(const LoraArgs& args) {
  std::vector<LoraUnit> units;
  for (int64_t s = 0; s < args.num_segments; ++s) {
    for (int64_t m = 0; m < args.num_members; ++m) {
      const LoraEntry& entry = args.tables[m * args.num_slots + args.segment_slots[s]];
      LoraUnit unit{};
      unit.a = reinterpret_cast<const void*>(entry.a);
      unit.b = reinterpret_cast<const void*>(entry.b);
      unit.rank = entry.rank;
      unit.scales = reinterpret_cast<const float*>(entry.scales);
      unit.dtype = static_cast<DType>(entry.dtype);
      if (!unit.rank) continue;
      unit.first_column = args.out_offsets[m];
      unit.width = args.out_offsets[m + 1] - args.out_offsets[m];
      if (unit.b) {
        add_units(args, s, unit, units);
        continue;
      }
      const char* matrix = static_cast<const char*>(unit.a);
      for (int64_t first = 0; first < entry.rank; first += kDenseRowsPerUnit) {
        unit.a = matrix + first * args.in_features * element_size(unit);
        unit.scales = entry.scales ? reinterpret_cast<const float*>(entry.scales) + first : nullptr;
        unit.first_column = args.out_offsets[m] + first;
        unit.rank = unit.width = std::min(kDenseRowsPerUnit, entry.rank - first);
        add_units(args, s, unit, units);
      }
    }
  }
  return units;
}

constexpr int64_t kSplitColumns = 128;

// Few units and much to read: every product of every unit is itself split, with a barrier between the two.
template <class T>
void add_lora_split(const LoraArgs& args, std::vector<LoraUnit>& units, int64_t threads) {
  size_t total = 0;
  for (LoraUnit& unit : units) total += unit.num_rows * unit.low_stride;
  float* low = static_cast<float*>(scratch(total * sizeof(float)));
  for (LoraUnit& unit : units) {
    unit.low = low;
    low += unit.num_rows * unit.low_stride;
  }
  int64_t count = static_cast<int64_t>(units.size()), pieces = 2 * threads;
  auto split = [&](int64_t piece, int64_t size, int64_t step) {
    return std::min(size, (size * piece / pieces + step - 1) / step * step);
  };
  parallel(count * pieces, threads, [&](int64_t i, int64_t) {
    const LoraUnit& unit = units[i / pieces];
    int64_t begin = split(i % pieces, unit.rank, W), end = split(i % pieces + 1, unit.rank, W);
    with_weight_dtype(unit.dtype, [&](auto weight) {
      shrink<T, decltype(weight)>(unit, args.x, args.in_features, begin, end, Ahead{});
    });
  });
  parallel(count * pieces, threads, [&](int64_t i, int64_t) {
    const LoraUnit& unit = units[i / pieces];
    int64_t begin = split(i % pieces, unit.width, kSplitColumns),
            end = split(i % pieces + 1, unit.width, kSplitColumns);
    with_weight_dtype(unit.dtype,
                      [&](auto weight) { expand<T, decltype(weight)>(unit, args.out, begin, end, Ahead{}); });
  });
}

void add_lora(const LoraArgs& args) {
  std::vector<LoraUnit> units = lora_units(args);
  int64_t cost = 0;
  for (const LoraUnit& unit : units)  // arithmetic on more than a few rows outweighs reading the weights
    cost += (args.in_features + (unit.b ? unit.width : 1)) * unit.rank * element_size(unit) *
            std::max<int64_t>(1, unit.num_rows / 4);
  int64_t count = static_cast<int64_t>(units.size());
  int64_t threads = std::min(num_threads(), std::max<int64_t>(1, cost / kBytesPerThread));
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (threads > 1 && count < 2 * threads) {
      add_lora_split<T>(args, units, threads);
      return;
    }
    parallel(count, threads, [&](int64_t i, int64_t next) {
      LoraUnit unit = units[i];
      unit.low = static_cast<float*>(scratch(unit.num_rows * unit.low_stride * sizeof(float)));
      with_weight_dtype(unit.dtype, [&](auto weight) {
        using Weight = decltype(weight);
        // The steps that one row takes: over W ranks at a time of A, over four of B. More rows take them again.
        constexpr int64_t per_line = kLineBytes / int64_t(sizeof(Weight));
        int64_t a_steps = (unit.rank + W - 1) / W * (args.in_features / per_line);
        int64_t b_steps = unit.rank / 4 * (unit.width / per_line);
        Ahead b(unit.b, unit.b ? unit.rank * unit.width * element_size(unit) : 0, a_steps), a;
        if (next < count) {
          const LoraUnit& then = units[next];
          a = Ahead(then.a, then.rank * args.in_features * element_size(then), b_steps);
        }
        shrink<T, Weight>(unit, args.x, args.in_features, 0, unit.rank, b);
        expand<T, Weight>(unit, args.out, 0, unit.width, a);
      });
    });
  });
}

}  // namespace
}  // namespace manylora

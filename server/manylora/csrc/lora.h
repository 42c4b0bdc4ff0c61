// add_lora_: out[t, columns of member m] += B_m^T (A_m x[t]) for every row t of every segment.
//
// A unit is (segment, up to kRowsPerUnit of its rows, member). One thread does both products of a unit, so that its
// weights come from memory once; only where there are fewer units than threads are the products split further. The
// order of additions for one row does not depend on the rows beside it, nor on the split.

constexpr int64_t kRowsPerUnit = 32;
constexpr int64_t kBytesPerThread = 256 * 1024;  // what is read in the time that waking another thread takes
constexpr int64_t kPrefetchBytes = 1024;

struct LoraUnit {
  const int32_t* rows;
  int64_t num_rows;
  const void* a;  // [rank, in_features]
  const void* b;  // [rank, width]
  int64_t rank, first_column, width;
  float* low;  // [num_rows, low_stride]: the rows in the adapter's low dimension
  int64_t low_stride;
};

// Lane j * NA + i of the result is a[i] . x[j].
template <int NA, int NX, class T>
ML_INLINE vf dot_products(const T* const (&a)[NA], const T* const (&x)[NX], int64_t length) {
  static_assert(NA * NX == W);
  using L = Lanes<T>;
  constexpr int step = W * L::per_lane;
  vf sums[W] = {};
  int64_t k = 0;
  for (; k + step <= length; k += step) {
    vu x_lanes[NX];
    for (int j = 0; j < NX; ++j) x_lanes[j] = L::load_lanes(x[j] + k);
#pragma GCC unroll 16
    for (int i = 0; i < NA; ++i) {
      vu a_lanes = L::load_lanes(a[i] + k);
      if constexpr (NX == 1) __builtin_prefetch(reinterpret_cast<const char*>(a[i] + k) + kPrefetchBytes);
#pragma GCC unroll 16
      for (int j = 0; j < NX; ++j) sums[j * NA + i] = L::multiply_add(sums[j * NA + i], a_lanes, x_lanes[j]);
    }
  }
  if (k < length) {
    vu x_lanes[NX];
    for (int j = 0; j < NX; ++j) x_lanes[j] = L::load_lanes(x[j] + k, length - k);
#pragma GCC unroll 16
    for (int i = 0; i < NA; ++i) {
      vu a_lanes = L::load_lanes(a[i] + k, length - k);
#pragma GCC unroll 16
      for (int j = 0; j < NX; ++j) sums[j * NA + i] = L::multiply_add(sums[j * NA + i], a_lanes, x_lanes[j]);
    }
  }
  return sum_each(sums);
}

// Ranks [first, first + NA) for NX rows. Past the last rank the last one stands in: its lanes fall into the padding.
template <int NA, int NX, class T>
ML_INLINE void shrink_tile(const LoraUnit& unit, const Rows<const void*>& x, int64_t in, int64_t row, int64_t first) {
  const T* a_rows[NA];
  const T* x_rows[NX];
  for (int i = 0; i < NA; ++i) a_rows[i] = static_cast<const T*>(unit.a) + std::min(first + i, unit.rank - 1) * in;
  for (int j = 0; j < NX; ++j) x_rows[j] = static_cast<const T*>(x.data) + unit.rows[row + j] * x.stride;
  vf dots = dot_products<NA, NX>(a_rows, x_rows, in);
  for (int j = 0; j < NX; ++j)
    __builtin_memcpy(unit.low + (row + j) * unit.low_stride + first, reinterpret_cast<float*>(&dots) + j * NA,
                     NA * sizeof(float));
}

// low = A x for the ranks [begin, end), both multiples of W or the end of all.
template <class T>
void shrink(const LoraUnit& unit, const Rows<const void*>& x, int64_t in, int64_t begin, int64_t end) {
  constexpr int NX = W / 4;
  int64_t tiled_rows = unit.num_rows / NX * NX;
  if (tiled_rows)
    for (int64_t first = begin; first < end; first += 4)
      for (int64_t row = 0; row < tiled_rows; row += NX) shrink_tile<4, NX, T>(unit, x, in, row, first);
  for (int64_t first = begin; first < end; first += W)
    for (int64_t row = tiled_rows; row < unit.num_rows; ++row) shrink_tile<W, 1, T>(unit, x, in, row, first);
}

// out += B^T low for R rows and NV vectors of columns, the last vector with `count` of its columns.
template <int R, int NV, class T>
ML_INLINE void expand_tile(const LoraUnit& unit, const Rows<void*>& out, int64_t row, int64_t column, int64_t count) {
  const T* b = static_cast<const T*>(unit.b) + column;
  const float* low = unit.low + row * unit.low_stride;
  vf sums[R][NV] = {};
  for (int64_t rank = 0; rank < unit.rank; ++rank, b += unit.width) {
    vf b_values[NV];
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) b_values[v] = count == W ? load(b + v * W) : load(b + v * W, count);
    if constexpr (R == 1)
      for (size_t ahead = 0; ahead < NV * W * sizeof(T); ahead += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(b + NV * W) + ahead);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      vf factor = splat(low[r * unit.low_stride + rank]);
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) sums[r][v] = factor * b_values[v] + sums[r][v];
    }
  }
  for (int r = 0; r < R; ++r) {
    T* target = static_cast<T*>(out.data) + unit.rows[row + r] * out.stride + unit.first_column + column;
    for (int v = 0; v < NV; ++v) {
      if (count == W)
        store(target + v * W, load(target + v * W) + sums[r][v]);
      else
        store(target + v * W, load(target + v * W, count) + sums[r][v], count);
    }
  }
}

constexpr int64_t kExpandColumns = W == 16 ? 128 : 32;  // one row's strip; several rows take half of it

template <class T>
void expand(const LoraUnit& unit, const Rows<void*>& out, int64_t begin, int64_t end) {
  constexpr int R = 4, narrow_strip = kExpandColumns / 2, NV = narrow_strip / W;
  int64_t tiled_rows = unit.num_rows / R * R;
  int64_t column = begin;
  for (; tiled_rows && column + narrow_strip <= end; column += narrow_strip)
    for (int64_t row = 0; row < tiled_rows; row += R) expand_tile<R, NV, T>(unit, out, row, column, W);
  for (; tiled_rows && column < end; column += W)
    for (int64_t row = 0; row < tiled_rows; row += R)
      expand_tile<R, 1, T>(unit, out, row, column, std::min<int64_t>(W, end - column));
  for (int64_t row = tiled_rows; row < unit.num_rows; ++row) {
    for (column = begin; column + kExpandColumns <= end; column += kExpandColumns)
      expand_tile<1, 2 * NV, T>(unit, out, row, column, W);
    for (; column < end; column += W) expand_tile<1, 1, T>(unit, out, row, column, std::min<int64_t>(W, end - column));
  }
}

std::vector<LoraUnit> lora_units(const LoraArgs& args) {
  std::vector<LoraUnit> units;
  for (int64_t s = 0; s < args.num_segments; ++s) {
    for (int64_t m = 0; m < args.num_members; ++m) {
      const int64_t* entry = args.tables + (m * args.num_slots + args.segment_slots[s]) * 3;
      LoraUnit unit{};
      unit.a = reinterpret_cast<const void*>(entry[0]);
      unit.b = reinterpret_cast<const void*>(entry[1]);
      unit.rank = entry[2];
      if (!unit.rank) continue;
      unit.first_column = args.out_offsets[m];
      unit.width = args.out_offsets[m + 1] - args.out_offsets[m];
      unit.low_stride = (unit.rank + W - 1) / W * W;
      for (int64_t i = args.segment_starts[s]; i < args.segment_starts[s + 1]; i += kRowsPerUnit) {
        unit.rows = args.order + i;
        unit.num_rows = std::min<int64_t>(kRowsPerUnit, args.segment_starts[s + 1] - i);
        units.push_back(unit);
      }
    }
  }
  return units;
}

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
    int64_t piece = i % pieces;
    shrink<T>(unit, args.x, args.in_features, split(piece, unit.rank, W), split(piece + 1, unit.rank, W));
  });
  parallel(count * pieces, threads, [&](int64_t i, int64_t) {
    const LoraUnit& unit = units[i / pieces];
    int64_t piece = i % pieces, step = kExpandColumns;
    expand<T>(unit, args.out, split(piece, unit.width, step), split(piece + 1, unit.width, step));
  });
}

void add_lora(const LoraArgs& args) {
  std::vector<LoraUnit> units = lora_units(args);
  int64_t element_size = args.dtype == DType::f32 ? 4 : 2, cost = 0;
  for (const LoraUnit& unit : units)  // arithmetic on more than a few rows outweighs reading the weights
    cost += (args.in_features + unit.width) * unit.rank * element_size * std::max<int64_t>(1, unit.num_rows / 4);
  int64_t count = static_cast<int64_t>(units.size());
  int64_t threads = std::min(num_threads(), std::max<int64_t>(1, cost / kBytesPerThread));
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (threads > 1 && count < 2 * threads) {
      add_lora_split<T>(args, units, threads);
      return;
    }
    parallel(count, threads, [&](int64_t i, int64_t) {
      LoraUnit unit = units[i];
      unit.low = static_cast<float*>(scratch(unit.num_rows * unit.low_stride * sizeof(float)));
      shrink<T>(unit, args.x, args.in_features, 0, unit.rank);
      expand<T>(unit, args.out, 0, unit.width);
    });
  });
}

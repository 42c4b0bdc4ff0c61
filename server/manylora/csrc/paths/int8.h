// int8_linear: x is quantised to 8 bits, one scale per row and group of inputs, and multiplied with weights of one
// scale per output; a group's products are summed as integers and then scaled. How a tile of rows and outputs is
// multiplied is in int8_bytes.h or in int8_pairs.h.
#pragma once

#include "int8_bytes.h"
#include "int8_pairs.h"
#include "int8_tile.h"
#include "soon.h"
#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

struct Int8Shape {
  int64_t num_groups, padded_in, padded_out;
  explicit Int8Shape(const Int8LinearArgs& args)
      : num_groups((args.in_features + args.group_size - 1) / args.group_size),
        padded_in((args.in_features + kInt8Depth - 1) / kInt8Depth * kInt8Depth),
        padded_out((args.out_features + kPanelWidth - 1) / kPanelWidth * kPanelWidth) {}
};

ML_INLINE void store_quantised(Quantised* to, vi lanes, int64_t count) {
#if ML_HAS_AVX512
  auto narrow = _mm512_cvtepi32_epi8((__m512i)lanes);
#else
  typedef Quantised Narrow __attribute__((vector_size(W * sizeof(Quantised))));
  auto narrow = __builtin_convertvector(lanes, Narrow);
#endif
  __builtin_memcpy(to, &narrow, count * sizeof(Quantised));
}

template <class T>
void quantise_row(const Int8LinearArgs& args, const Int8Shape& shape, int64_t row) {
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  Quantised* quantised = static_cast<Quantised*>(args.quantised) + row * shape.padded_in;
  for (int64_t group = 0; group < shape.num_groups; ++group) {
    int64_t first = group * args.group_size, size = std::min(args.group_size, args.in_features - first);
    vf largest = {}, spoiled = {};  // NaN and infinity would be lost in the bytes, so they spoil the scale
    for_vectors(size, [&](int64_t i, auto count) {
      vf value = load(x + first + i, count);
      largest = vmax(vmax(largest, value), -value);
      spoiled += value * 0.f;
    });
    float range = max_lanes(largest);
    args.row_scales[row * shape.num_groups + group] = range / 127 + sum_lanes(spoiled);
    float steps = range > 0 ? 127 / range : 0;
    for_vectors(size, [&](int64_t i, auto count) {
      vf rounded = (load(x + first + i, count) * steps + 12582912.f) - 12582912.f;
      store_quantised(quantised + first + i, __builtin_convertvector(rounded, vi) + kQuantisedZero, count);
    });
  }
  std::fill_n(quantised + args.in_features, shape.padded_in - args.in_features, Quantised(kQuantisedZero));
}

// The products of rows [begin, end) with one group of the panel, a strip of `Width` outputs at a time.
template <int Width>
void int8_group(const Int8LinearArgs& args, const Int8Shape& shape, int64_t panel, int64_t group, int64_t begin,
                int64_t end, const int8_t* ahead, float* sums, Fetcher& fetcher) {
  int64_t tiles = (end - begin + kInt8TileRows - 1) / kInt8TileRows, input = group * args.group_size;
  int64_t width = std::min(kPanelWidth, args.out_features - panel * kPanelWidth);
  Int8Tile tile{};
  tile.fetcher = &fetcher;
  tile.x_stride = shape.padded_in;
  tile.num_steps = (std::min(args.group_size, shape.padded_in - input) + kInt8Depth - 1) / kInt8Depth;
  tile.scale_stride = shape.num_groups;
  for (int64_t column = 0; column < width; column += Width) {
    tile.weights = args.packed + panel * kPanelWidth * shape.padded_in + input * kPanelWidth + column * kInt8Depth;
    tile.group_sums = args.group_sums + group * shape.padded_out + panel * kPanelWidth + column;
    for (int64_t i = 0, row = begin; i < tiles; ++i) {
      int64_t rows = (end - row) / (tiles - i);  // as even as can be: a tile of one row is slow
      tile.x = static_cast<const Quantised*>(args.quantised) + row * shape.padded_in + input;
      tile.row_scales = args.row_scales + row * shape.num_groups + group;
      tile.sums = sums + (row - begin) * kPanelWidth + column;
      tile.ahead = i == 0 && ahead ? ahead + column * kInt8Depth : nullptr;
      if (rows == 1) int8_tile<1, Width>(tile);
      if (rows == 2) int8_tile<2, Width>(tile);
      if (rows == 3) int8_tile<3, Width>(tile);
      if (rows == 4) int8_tile<4, Width>(tile);
      if constexpr (kInt8TileRows > 4) {
        if (rows == 5) int8_tile<5, Width>(tile);
        if (rows == 6) int8_tile<6, Width>(tile);
      }
      row += rows;
    }
  }
}

// One panel of 64 outputs for rows [begin, end); `next` is the panel that the thread takes after it.
template <class T>
void int8_panel(const Int8LinearArgs& args, const Int8Shape& shape, int64_t panel, int64_t next, int64_t begin,
                int64_t end, int64_t index, int64_t num_tasks) {
  int64_t first = panel * kPanelWidth, width = std::min(kPanelWidth, args.out_features - first);
  int64_t tiles = (end - begin + kInt8TileRows - 1) / kInt8TileRows, tallest = (end - begin + tiles - 1) / tiles;
  int64_t strips = W == 16 ? 1 : 2;
  int64_t num_fetches = strips * tiles * (shape.padded_in / kInt8Depth / kStepsPerFetch);
  Fetcher fetcher(args.soon, index, num_tasks, num_fetches);
  float* sums = static_cast<float*>(scratch((end - begin) * kPanelWidth * sizeof(float)));
  std::fill_n(sums, (end - begin) * kPanelWidth, 0.f);
  for (int64_t group = 0; group < shape.num_groups; ++group) {
    const int8_t* ahead = nullptr;
    if (group + 1 < shape.num_groups)
      ahead = args.packed + panel * kPanelWidth * shape.padded_in + (group + 1) * args.group_size * kPanelWidth;
    else if (next * kPanelWidth < shape.padded_out)
      ahead = args.packed + next * kPanelWidth * shape.padded_in;
    auto run = [&](auto width) { int8_group<width>(args, shape, panel, group, begin, end, ahead, sums, fetcher); };
    with_int8_strip_width(tallest, run);
  }
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(args.out.data) + row * args.out.stride + first;
    const float* from = sums + (row - begin) * kPanelWidth;
    for_vectors(width, [&](int64_t i, auto count) {
      vf value = load(from + i) * load(args.scales + first + i, count);
      if (args.bias) value += load(args.bias + first + i, count);
      store(out + i, value, count);
    });
  }
}

void int8_linear(const Int8LinearArgs& args) {
  constexpr int64_t kBytesPerThread = 256 * 1024;
  Int8Shape shape(args);
  int64_t num_panels = shape.padded_out / kPanelWidth;
  int64_t bytes = shape.padded_out * shape.padded_in * std::max<int64_t>(1, args.num_rows / 8);
  int64_t threads = std::min(num_threads(), std::max<int64_t>(1, bytes / kBytesPerThread));
  int64_t rows_per_task = rows_per_panel_task(args.num_rows, num_panels, threads);
  int64_t num_chunks = (args.num_rows + rows_per_task - 1) / rows_per_task;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(args.num_rows, args.in_features, [&](int64_t row) { quantise_row<T>(args, shape, row); });
    parallel(num_panels * num_chunks, threads, [&](int64_t task, int64_t next) {
      int64_t begin = task % num_chunks * rows_per_task, end = std::min(args.num_rows, begin + rows_per_task);
      int8_panel<T>(args, shape, task / num_chunks, next / num_chunks, begin, end, task, num_panels * num_chunks);
    });
  });
}

}  // namespace
}  // namespace manylora

// Int8 tiles where the CPU has no instructions for bytes: x is kept as 16-bit integers, weights are widened to them on
// the way, and pairs are multiplied and added. Four weights of an output fill two lanes, whose sums meet at the end.
#pragma once

#include "int8_tile.h"
#include "target.h"
#include "vec.h"
#include "work.h"

#if !ML_HAS_VNNI

namespace manylora {
namespace {

typedef int16_t vs __attribute__((vector_size(W * 4)));

constexpr int kInt8TileRows = 6;

// Few rows leave registers for wider strips, which are read more evenly.
template <class F>
ML_INLINE void with_int8_strip_width(int64_t rows, F&& run) {
  if (rows > 3)
    run(std::integral_constant<int, W>{});
  else if (rows > 1)
    run(std::integral_constant<int, 2 * W>{});
  else
    run(std::integral_constant<int, 4 * W>{});
}

// Each 32-bit lane is the sum of its two products.
ML_INLINE vi pair_products(vs a, vs b) {
#if ML_HAS_AVX2
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  vi x = (vi)a, y = (vi)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

ML_INLINE vs widen_bytes(const int8_t* bytes) {
  typedef int8_t Bytes __attribute__((vector_size(W * 2)));
#if ML_HAS_AVX2
  return (vs)_mm256_cvtepi8_epi16((__m128i)load_bits<Bytes>(bytes));
#else
  return __builtin_convertvector(load_bits<Bytes>(bytes), vs);
#endif
}

template <size_t... I>
ML_INLINE vi add_neighbours(vi low, vi high, std::index_sequence<I...>) {
  return __builtin_shuffle(low, high, vi{int(2 * I)...}) + __builtin_shuffle(low, high, vi{int(2 * I + 1)...});
}

template <int R, int Width>
ML_INLINE void int8_tile(const Int8Tile& tile) {
  constexpr int NV = 2 * Width / W;
  vi products[R][NV] = {};
  for (int64_t step = 0; step < tile.num_steps; ++step) {
    const int8_t* at = tile.weights + step * kPanelWidth * kInt8Depth;
    if (tile.ahead) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < Width * kInt8Depth; i += kLineBytes)
        __builtin_prefetch(tile.ahead + step * kPanelWidth * kInt8Depth + i);
    }
    vs weights[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) weights[v] = widen_bytes(at + v * 2 * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      typedef int64_t vl __attribute__((vector_size(W * 4)));
      vs four = (vs)(load_bits<int64_t>(tile.x + r * tile.x_stride + step * kInt8Depth) - vl{});
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) products[r][v] += pair_products(four, weights[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    vf scale = splat(tile.row_scales[r * tile.scale_stride]);
#pragma GCC unroll 8
    for (int v = 0; v < NV; v += 2) {
      float* at = tile.sums + r * kPanelWidth + v / 2 * W;
      vi sums = add_neighbours(products[r][v], products[r][v + 1], LaneIndices{});
      store(at, __builtin_convertvector(sums, vf) * scale + load(at));
    }
  }
}

}  // namespace
}  // namespace manylora

#endif

// Int8 tiles where the CPU multiplies bytes, four to a lane. One side has to be unsigned, so x is kept with 128 added;
// the group's sum of weights, times 128, is taken off again.
#pragma once

#include "int8_tile.h"
#include "target.h"
#include "vec.h"
#include "work.h"

#if ML_HAS_VNNI

namespace manylora {
namespace {

constexpr int kInt8TileRows = W == 16 ? 6 : 4;

template <class F>
ML_INLINE void with_int8_strip_width(int64_t, F&& run) {
  run(std::integral_constant<int, W == 16 ? 4 * W : 2 * W>{});
}

// Adds to each 32-bit lane the products of its four unsigned bytes with the four signed ones.
ML_INLINE vi byte_products(vi sums, vi unsigned_bytes, vi signed_bytes) {
#if ML_HAS_AVX512
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#else
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
#endif
}

template <int R, int Width>
ML_INLINE void int8_tile(const Int8Tile& tile) {
  constexpr int NV = Width / W;
  vi products[R][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    vi offset = load_bits<vi>(tile.group_sums + v * W) * -kQuantisedZero;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) products[r][v] = offset;
  }
  for (int64_t step = 0; step < tile.num_steps; ++step) {
    const int8_t* at = tile.weights + step * kPanelWidth * kInt8Depth;
    if (tile.ahead) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < Width * kInt8Depth; i += kLineBytes)
        __builtin_prefetch(tile.ahead + step * kPanelWidth * kInt8Depth + i, 0, kPrefetchInto);
    }
    if (step % kStepsPerFetch == 0) tile.fetcher->step();
    vi weights[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weights[v] = load_bits<vi>(at + v * W * kInt8Depth);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      vi bytes = load_bits<int32_t>(tile.x + r * tile.x_stride + step * kInt8Depth) - vi{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) products[r][v] = byte_products(products[r][v], bytes, weights[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    vf scale = splat(tile.row_scales[r * tile.scale_stride]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* at = tile.sums + r * kPanelWidth + v * W;
      store(at, __builtin_convertvector(products[r][v], vf) * scale + load(at));
    }
  }
}

}  // namespace
}  // namespace manylora

#endif

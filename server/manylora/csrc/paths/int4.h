// int4_linear: x is quantised to 8 bits, one scale per row and block of 32 inputs, and multiplied with weights of 4
// bits that have a scale and an offset per output and group of inputs: w = scale * q + offset, 0 <= q < 16. A block's
// products are summed as integers; the offset meets the sum of the block's inputs.
//
// Weights are the unsigned side of the products, so x stays signed. They are taken apart on the way, in whatever number
// of rows: the shifts run beside the multiplications.
#pragma once

#include "soon.h"
#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

constexpr int kInt4TileRows = W == 16 ? 6 : 4;
constexpr int64_t kStepsPerInt4Block = kInt4Block / kInt4Depth;
constexpr int64_t kInt4StepBytes = kPanelWidth * kInt4Depth / 2;
constexpr int64_t kInt4BlockBytes = kInt4StepBytes * kStepsPerInt4Block;
constexpr int64_t kBlocksPerChunk = 16;  // of a panel, so many stay in the first cache while all rows pass over them
constexpr int64_t kBlocksAhead = 4;

// Sums of a block's products: as 32 bits, or where the CPU adds pairs of products of bytes, as 16. These hold a block:
// 16 products of up to 15 * 127 to an element.
#if ML_HAS_VNNI || !ML_HAS_AVX2
using BlockSums = vi;
ML_INLINE vi whole_sums(vi sums) { return sums; }
#else
typedef int16_t BlockSums __attribute__((vector_size(W * 4)));
ML_INLINE vi whole_sums(BlockSums sums) { return (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
#endif

// sums += the products of each lane's four nibbles, a byte each, with four signed bytes.
ML_INLINE BlockSums nibble_products(BlockSums sums, vi nibbles, vi bytes) {
#if ML_HAS_AVX512
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)nibbles, (__m512i)bytes);
#elif ML_HAS_VNNI
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)nibbles, (__m256i)bytes);
#elif ML_HAS_AVX2
  return sums + (BlockSums)_mm256_maddubs_epi16((__m256i)nibbles, (__m256i)bytes);
#else
  for (int i = 0; i < 32; i += 8) sums += (nibbles >> i & 15) * ((vi)((vu)bytes << (24 - i)) >> 24);
  return sums;
#endif
}

struct Int4Shape {
  int64_t num_blocks, num_steps, num_panels, parts, blocks_per_group, scales_per_panel;
  explicit Int4Shape(const Int4LinearArgs& args)
      : num_blocks((args.in_features + kInt4Block - 1) / kInt4Block),
        num_steps((args.in_features + kInt4Depth - 1) / kInt4Depth),
        num_panels((args.out_features + kPanelWidth - 1) / kPanelWidth), parts(args.has_offsets ? 2 : 1),
        blocks_per_group(args.group_size / kInt4Block),
        scales_per_panel((num_blocks + blocks_per_group - 1) / blocks_per_group * parts * kPanelWidth) {}
};

template <class T>
void quantise_row_to_bytes(const Int4LinearArgs& args, const Int4Shape& shape, int64_t row) {
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  int8_t* bytes = args.quantised + row * shape.num_steps * kInt4Depth;
  for (int64_t block = 0; block < shape.num_blocks; ++block) {
    int64_t first = block * kInt4Block, size = std::min(kInt4Block, args.in_features - first);
    vf largest = {}, spoiled = {}, total = {};  // NaN and infinity would be lost in the bytes, so they spoil the scale
    for_vectors(size, [&](int64_t i, auto count) {
      vf value = load(x + first + i, count);
      largest = vmax(vmax(largest, value), -value);
      spoiled += value * 0.f;
    });
    float range = max_lanes(largest), steps = range > 1e-36f ? 127 / range : 0;  // which is finite
    for_vectors(size, [&](int64_t i, auto count) {
      vf rounded = (load(x + first + i, count) * steps + 12582912.f) - 12582912.f;
      total += rounded;
      store_bytes(bytes + first + i, __builtin_convertvector(rounded, vi), count);
    });
    float* scales = args.row_scales + (row * shape.num_blocks + block) * 2;
    scales[0] = range / 127 + sum_lanes(spoiled);
    scales[1] = scales[0] * sum_lanes(total);
  }
  std::fill_n(bytes + args.in_features, shape.num_steps * kInt4Depth - args.in_features, int8_t(0));
}

// R rows times a strip of the panel, for some blocks of inputs.
struct Int4Tile {
  const int8_t* x;  // the first block's first input of the first row
  int64_t x_stride;
  const uint8_t* weights;  // of the strip
  const f16* scales;       // of the panel, at the strip
  const float* row_scales;
  int64_t row_stride;
  float* sums;  // [R, kPanelWidth], at the strip
  int64_t first_block, end_block, num_steps, blocks_per_group, parts;
  const uint8_t* ahead;  // what is read kBlocksAhead later, to be asked for on the way; null for all but one tile
  Fetcher* fetcher;
};

template <int R, int NV>
void int4_tile(const Int4Tile& tile) {
  vf sums[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[r][v] = load(tile.sums + r * kPanelWidth + v * W);
  for (int64_t block = tile.first_block; block < tile.end_block; ++block) {
    int64_t nth = block - tile.first_block;
    const uint8_t* at = tile.weights + nth * kInt4BlockBytes;
    const int8_t* x = tile.x + nth * kInt4Block;
    BlockSums products[R][NV] = {};
    tile.fetcher->step();
    auto multiply = [&](auto num_steps) ML_INLINE_LAMBDA {
      for (int64_t step = 0; step < num_steps; ++step) {
        if (tile.ahead) {
#pragma GCC unroll 4
          for (int64_t i = 0; i < NV * W * 4; i += kLineBytes)
            __builtin_prefetch(tile.ahead + nth * kInt4BlockBytes + step * kInt4StepBytes + i, 0, kPrefetchInto);
        }
        vi low[NV], high[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
          vi both = load_bits<vi>(at + step * kInt4StepBytes + v * W * 4);
          low[v] = both & 0x0f0f0f0f;
          high[v] = both >> 4 & 0x0f0f0f0f;
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const int8_t* from = x + r * tile.x_stride + step * kInt4Depth;
          vi first = load_bits<int32_t>(from) - vi{}, second = load_bits<int32_t>(from + kInt4Depth / 2) - vi{};
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v)
            products[r][v] = nibble_products(nibble_products(products[r][v], low[v], first), high[v], second);
        }
      }
    };
    int64_t left = tile.num_steps - block * kStepsPerInt4Block;
    if (left >= kStepsPerInt4Block)
      multiply(std::integral_constant<int64_t, kStepsPerInt4Block>{});
    else
      multiply(left);
    const f16* scales = tile.scales + block / tile.blocks_per_group * tile.parts * kPanelWidth;
    vf scale[NV], offset[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      scale[v] = load(scales + v * W);
      offset[v] = tile.parts == 2 ? load(scales + kPanelWidth + v * W) : scale[v] * -8.f;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float* row = tile.row_scales + r * tile.row_stride + 2 * nth;
      vf own = splat(row[0]), total = splat(row[1]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        vf product = __builtin_convertvector(whole_sums(products[r][v]), vf);
        sums[r][v] = fused_multiply_add(total, offset[v], fused_multiply_add(product, own * scale[v], sums[r][v]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(tile.sums + r * kPanelWidth + v * W, sums[r][v]);
}

template <class T>
struct Int4Panel {
  const Int4LinearArgs& args;
  const Int4Shape& shape;
  int64_t panel, next, begin, end;  // rows [begin, end); `next` is the panel that the thread takes after this one

  const uint8_t* weights_of(int64_t which) const { return args.packed + which * shape.num_steps * kInt4StepBytes; }

  // All rows times blocks [first, last) of the panel, a strip of NV vectors at a time.
  template <int NV>
  void chunk(int64_t first, int64_t last, float* sums, Fetcher& fetcher) const {
    int64_t tiles = (end - begin + kInt4TileRows - 1) / kInt4TileRows, num_blocks = shape.num_blocks;
    Int4Tile tile{};
    tile.fetcher = &fetcher;
    tile.x_stride = shape.num_steps * kInt4Depth;
    tile.row_stride = num_blocks * 2;
    tile.first_block = first;
    tile.end_block = last;
    tile.num_steps = shape.num_steps;
    tile.blocks_per_group = shape.blocks_per_group;
    tile.parts = shape.parts;
    const uint8_t* ahead = nullptr;  // of the panel's last blocks, those that the next one begins with
    if (first + kBlocksAhead < num_blocks)
      ahead = weights_of(panel) + (first + kBlocksAhead) * kInt4BlockBytes;
    else if (next < shape.num_panels)
      ahead = weights_of(next);
    for (int64_t column = 0; column < kPanelWidth; column += NV * W) {
      tile.weights = weights_of(panel) + first * kInt4BlockBytes + column * 4;
      tile.scales = reinterpret_cast<const f16*>(args.scales) + panel * shape.scales_per_panel + column;
      for (int64_t i = 0, row = begin; i < tiles; ++i) {
        int64_t rows = (end - row) / (tiles - i);  // as even as can be: a tile of one row is slow
        tile.x = args.quantised + row * tile.x_stride + first * kInt4Block;
        tile.row_scales = args.row_scales + (row * num_blocks + first) * 2;
        tile.sums = sums + (row - begin) * kPanelWidth + column;
        tile.ahead = i == 0 && ahead ? ahead + column * 4 : nullptr;
        if (rows == 1) int4_tile<1, NV>(tile);
        if (rows == 2) int4_tile<2, NV>(tile);
        if (rows == 3) int4_tile<3, NV>(tile);
        if (rows == 4) int4_tile<4, NV>(tile);
        if constexpr (kInt4TileRows > 4) {
          if (rows == 5) int4_tile<5, NV>(tile);
          if (rows == 6) int4_tile<6, NV>(tile);
        }
        row += rows;
      }
    }
  }

  void run(int64_t index, int64_t num_tasks) const {
    int64_t column = panel * kPanelWidth, width = std::min(kPanelWidth, args.out_features - column);
    int64_t tiles = (end - begin + kInt4TileRows - 1) / kInt4TileRows;
    constexpr int NV = W == 16 ? 4 : 2;
    Fetcher fetcher(args.soon, index, num_tasks, kPanelWidth / (NV * W) * tiles * shape.num_blocks);
    float* sums = static_cast<float*>(scratch((end - begin) * kPanelWidth * sizeof(float)));
    std::fill_n(sums, (end - begin) * kPanelWidth, 0.f);
    for (int64_t first = 0; first < shape.num_blocks; first += kBlocksPerChunk)
      chunk<NV>(first, std::min(shape.num_blocks, first + kBlocksPerChunk), sums, fetcher);
    for (int64_t row = begin; row < end; ++row) {
      T* out = static_cast<T*>(args.out.data) + row * args.out.stride + column;
      const float* from = sums + (row - begin) * kPanelWidth;
      for_vectors(width, [&](int64_t i, auto count) {
        vf value = load(from + i);
        if (args.bias) value += load(args.bias + column + i, count);
        store(out + i, value, count);
      });
    }
  }
};

void int4_linear(const Int4LinearArgs& args) {
  constexpr int64_t kBytesPerThread = 128 * 1024;
  Int4Shape shape(args);
  int64_t bytes = shape.num_panels * shape.num_steps * kInt4StepBytes * std::max<int64_t>(1, args.num_rows / 8);
  int64_t threads = std::min(num_threads(), std::max<int64_t>(1, bytes / kBytesPerThread));
  int64_t rows_per_task = rows_per_panel_task(args.num_rows, shape.num_panels, threads);
  int64_t num_chunks = (args.num_rows + rows_per_task - 1) / rows_per_task, count = shape.num_panels * num_chunks;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(args.num_rows, args.in_features, [&](int64_t row) { quantise_row_to_bytes<T>(args, shape, row); });
    parallel(count, threads, [&](int64_t task, int64_t next) {
      int64_t begin = task % num_chunks * rows_per_task, end = std::min(args.num_rows, begin + rows_per_task);
      Int4Panel<T>{args, shape, task / num_chunks, next / num_chunks, begin, end}.run(task, count);
    });
  });
}

}  // namespace
}  // namespace manylora

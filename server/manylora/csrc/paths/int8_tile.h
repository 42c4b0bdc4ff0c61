// One tile of int8_linear: rows times outputs, for one group of inputs. How it is multiplied is in int8_bytes.h or,
// where the CPU cannot multiply bytes, in int8_pairs.h; each has
//   kInt8TileRows                      the most rows of a tile
//   with_int8_strip_width(rows, f)     calls f with the outputs of a tile, `rows` being those of the tallest one
//   int8_tile<R, Width>(tile)          adds the tile's products, scaled, to its sums
#pragma once

#include "soon.h"
#include "target.h"
#include "vec.h"

namespace manylora {
namespace {

// What an input is kept as, and what stands for 0.
#if ML_HAS_VNNI
using Quantised = uint8_t;
constexpr int32_t kQuantisedZero = 128;
#else
using Quantised = int16_t;
constexpr int32_t kQuantisedZero = 0;
#endif

constexpr int64_t kStepsPerFetch = 8;

// R rows times a strip of the panel, for one group of inputs.
struct Int8Tile {
  const Quantised* x;     // the group's first input of the first row
  int64_t x_stride;       // elements from row to row
  const int8_t* weights;  // of the strip; a step of 4 inputs lies kPanelWidth * 4 bytes behind the one before
  int64_t num_steps;
  const int32_t* group_sums;  // of the strip
  const float* row_scales;
  int64_t scale_stride;
  float* sums;          // [R, kPanelWidth], at the strip
  const int8_t* ahead;  // what is read after this group, to be asked for on the way; null for all but one tile
  Fetcher* fetcher;     // takes a step with every kStepsPerFetch of the tile
};

}  // namespace
}  // namespace manylora

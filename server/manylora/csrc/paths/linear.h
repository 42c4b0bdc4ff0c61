// linear: out = x W^T + b for a weight packed in panels of 64 outputs, which are read one after the other.
//
// A task is (panel, some rows). Its inputs are taken in blocks that keep a strip of the panel in the first cache while
// all rows pass over it. The order of additions for one row does not depend on the rows beside it.
#pragma once

#include "soon.h"
#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

constexpr int kMaxTileRows = 6;
// A strip's steps lie 256 bytes apart, so they share a part of the first cache's sets: this many stay in it.
constexpr int64_t kStepsPerBlock = 96;
constexpr int64_t kStepsPerPrefetch = 8;

// How weights of a type lie (`depth` inputs of one output side by side) and what a row is read as: `Input`s, of which
// a step takes `per_step`. Where the CPU multiplies pairs of bfloat16, an input is such a pair; else it is a float.
template <class T>
struct LinearType {
  static constexpr int64_t depth = std::is_same_v<T, bf16> ? kBf16Depth : 1;
  static constexpr bool has_pairs = Lanes<T>::per_lane == 2;
  using Input = std::conditional_t<has_pairs, uint32_t, float>;
  static constexpr int64_t per_step = has_pairs ? 1 : depth;
};

ML_INLINE vf low_halves(const bf16* pairs) { return bitcast<vf>(load_bits<vu>(pairs) << 16); }
ML_INLINE vf high_halves(const bf16* pairs) { return bitcast<vf>(load_bits<vu>(pairs) & 0xffff0000u); }

// sums += one step of R rows times NV vectors of outputs.
template <class T, int R, int NV>
ML_INLINE void linear_step(vf (&sums)[R][NV], const typename LinearType<T>::Input* x, int64_t stride,
                           const T* weights) {
  constexpr int64_t vector = W * LinearType<T>::depth;
  auto multiply = [&](auto&& load_weights, auto&& load_input) ML_INLINE_LAMBDA {
    decltype(load_weights(0)) values[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) values[v] = load_weights(v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      auto input = load_input(r);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        if constexpr (LinearType<T>::has_pairs)
          sums[r][v] = Lanes<T>::multiply_add(sums[r][v], input, values[v]);
        else
          sums[r][v] = fused_multiply_add(input, values[v], sums[r][v]);
      }
    }
  };
  if constexpr (LinearType<T>::has_pairs) {
    multiply([&](int v) { return load_bits<vu>(weights + v * vector); }, [&](int r) { return x[r * stride] - vu{}; });
  } else if constexpr (LinearType<T>::depth == 2) {
    multiply([&](int v) { return low_halves(weights + v * vector); }, [&](int r) { return splat(x[r * stride]); });
    multiply([&](int v) { return high_halves(weights + v * vector); }, [&](int r) { return splat(x[r * stride + 1]); });
  } else {
    multiply([&](int v) { return load(weights + v * vector); }, [&](int r) { return splat(x[r * stride]); });
  }
}

template <class T>
struct Linear {
  using Type = LinearType<T>;
  using Input = typename Type::Input;

  const LinearArgs& args;
  int64_t num_steps = (args.in_features + Type::depth - 1) / Type::depth;
  int64_t num_inputs = num_steps * Type::per_step;  // of a row
  int64_t num_panels = (args.out_features + kPanelWidth - 1) / kPanelWidth;
  const Input* inputs = nullptr;
  int64_t input_stride = 0;

  const T* panel_at(int64_t index) const {
    return static_cast<const T*>(args.packed) + index * kPanelWidth * num_steps * Type::depth;
  }

  // Rows as inputs: as they are where that is what they are, else converted into the scratch memory.
  void prepare() {
    bool is_direct =
        std::is_same_v<T, float> || (Type::has_pairs && args.in_features % 2 == 0 && args.x.stride % 2 == 0);
    if (is_direct) {
      inputs = static_cast<const Input*>(args.x.data);
      input_stride = args.x.stride / (Type::has_pairs ? 2 : 1);
      return;
    }
    inputs = static_cast<const Input*>(args.inputs);
    input_stride = num_inputs;
    for_rows(args.num_rows, args.in_features, [&](int64_t row) {
      const T* from = static_cast<const T*>(args.x.data) + row * args.x.stride;
      Input* to = static_cast<Input*>(args.inputs) + row * num_inputs;
      to[num_inputs - 1] = 0;
      if constexpr (Type::has_pairs)
        std::memcpy(to, from, args.in_features * sizeof(T));
      else
        for_vectors(args.in_features, [&](int64_t i, auto count) { store(to + i, load(from + i, count), count); });
    });
  }

  // The strip that comes after this one: a part of it is asked for while each tile is at work.
  struct Ahead {
    const T* weights;
    int64_t step, end, per_chunk;

    ML_INLINE void prefetch(int64_t strip) {
      for (int64_t until = std::min(end, step + per_chunk); step < until; ++step)
        for (int64_t at = 0; at < strip * Type::depth; at += kLineBytes / int64_t(sizeof(T)))
          __builtin_prefetch(weights + step * kPanelWidth * Type::depth + at, 0, kPrefetchInto);
    }
  };

  // sums += R rows times one strip of the panel, `count` steps of it.
  template <int R, int NV>
  void tile(const Input* x, const T* weights, int64_t count, float* sums, Ahead ahead, Fetcher& fetcher) const {
    constexpr int64_t stride = kPanelWidth * Type::depth;
    vf tile[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) tile[r][v] = load(sums + r * kPanelWidth + v * W);
    for (int64_t step = 0; step < count;) {
      int64_t until = std::min(count, step + kStepsPerPrefetch);
      ahead.prefetch(NV * W);
      fetcher.step();
      for (; step < until; ++step, x += Type::per_step, weights += stride)
        linear_step<T, R, NV>(tile, x, input_stride, weights);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(sums + r * kPanelWidth + v * W, tile[r][v]);
  }

  // All rows [first, last) times the panel, inputs [begin, end), a strip of NV vectors at a time; `after` comes then.
  template <int NV>
  void block(int64_t first, int64_t last, const T* panel, int64_t begin, int64_t end, float* sums, const T* after,
             Fetcher& fetcher) const {
    constexpr int64_t strip = NV * W;
    int64_t tiles = (last - first + kMaxTileRows - 1) / kMaxTileRows, count = end - begin;
    int64_t per_chunk = (kStepsPerPrefetch + tiles - 1) / tiles;
    for (int64_t column = 0; column < kPanelWidth; column += strip) {
      const T* weights = panel + (begin * kPanelWidth + column) * Type::depth;
      const T* next = column + strip < kPanelWidth ? weights + strip * Type::depth : after;
      for (int64_t i = 0, row = first; i < tiles; ++i) {
        int64_t rows = (last - row) / (tiles - i);  // as even as can be: a tile of one row is slow
        const Input* x = inputs + row * input_stride + begin * Type::per_step;
        float* to = sums + (row - first) * kPanelWidth + column;
        Ahead ahead{next, count * i / tiles, tiles > 1 ? count * (i + 1) / tiles : 0, per_chunk};
        auto run = [&](auto height) { tile<height, NV>(x, weights, count, to, ahead, fetcher); };
        if constexpr (NV * W == kPanelWidth) {
          if (rows == 1) run(std::integral_constant<int, 1>{});
          if (rows == 2) run(std::integral_constant<int, 2>{});
        } else if constexpr (NV == 4) {
          if (rows == 2) run(std::integral_constant<int, 2>{});
        }
        if constexpr (NV <= 4) {
          if (rows == 3) run(std::integral_constant<int, 3>{});
        }
        if constexpr (NV <= 2 || W == 16) {
          if (rows == 4) run(std::integral_constant<int, 4>{});
          if (rows == 5) run(std::integral_constant<int, 5>{});
          if (rows == 6) run(std::integral_constant<int, 6>{});
        }
        row += rows;
      }
    }
  }

  // Task `index` of all. `next_panel`: that of this thread's next one.
  void task(int64_t panel_index, int64_t next_panel, int64_t first, int64_t last, int64_t index,
            int64_t num_tasks) const {
    float* sums = static_cast<float*>(scratch((last - first) * kPanelWidth * sizeof(float)));
    std::fill_n(sums, (last - first) * kPanelWidth, 0.f);
    const T* panel = panel_at(panel_index);
    int64_t tiles = (last - first + kMaxTileRows - 1) / kMaxTileRows, tallest = (last - first + tiles - 1) / tiles;
    int64_t strips = kPanelWidth / (W == 16 ? 4 * W : 2 * W);
    Fetcher fetcher(args.soon, index, num_tasks, strips * tiles * (num_steps / kStepsPerPrefetch));
    for (int64_t begin = 0; begin < num_steps; begin += kStepsPerBlock) {
      int64_t end = std::min(num_steps, begin + kStepsPerBlock);
      const T* after = end < num_steps ? panel + end * kPanelWidth * Type::depth : panel_at(next_panel);
      // Few rows leave registers for wider strips, which are read more evenly.
      if (W == 16 || tallest > 3)
        block<W == 16 ? 4 : 2>(first, last, panel, begin, end, sums, after, fetcher);
      else if (tallest > 1)
        block<4>(first, last, panel, begin, end, sums, after, fetcher);
      else
        block<kPanelWidth / W>(first, last, panel, begin, end, sums, after, fetcher);
    }
    int64_t column = panel_index * kPanelWidth, width = std::min(kPanelWidth, args.out_features - column);
    for (int64_t row = first; row < last; ++row) {
      T* out = static_cast<T*>(args.out.data) + row * args.out.stride + column;
      const float* from = sums + (row - first) * kPanelWidth;
      for_vectors(width, [&](int64_t i, auto count) {
        vf value = load(from + i, count);
        if (args.bias) value += load(args.bias + column + i, count);
        store(out + i, value, count);
      });
    }
  }

  void run() {
    constexpr int64_t kBytesPerThread = 256 * 1024;
    int64_t bytes = num_panels * kPanelWidth * num_steps * Type::depth * int64_t(sizeof(T));
    int64_t cost = bytes * std::max<int64_t>(1, args.num_rows / 8);
    int64_t threads = std::min(num_threads(), std::max<int64_t>(1, cost / kBytesPerThread));
    int64_t rows_per_task = rows_per_panel_task(args.num_rows, num_panels, threads);
    int64_t num_chunks = (args.num_rows + rows_per_task - 1) / rows_per_task;
    int64_t count = num_panels * num_chunks;
    prepare();
    parallel(count, threads, [&](int64_t index, int64_t next) {
      int64_t first = index % num_chunks * rows_per_task, last = std::min(args.num_rows, first + rows_per_task);
      task(index / num_chunks, std::min(next, count - 1) / num_chunks, first, last, index, count);
    });
  }
};

void linear(const LinearArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    Linear<T>{args}.run();
  });
}

}  // namespace
}  // namespace manylora

// paged_attention: causal attention over the paged cache, softmax computed online over blocks of keys.
//
// A task is (sequence, key/value head, some queries, a range of keys); its rows are those queries' heads of the group,
// so that a key is read once for all of them. Keys are laid side by side ("packed": one vector holds the same element
// of W keys) once per block and task, after which scores need no sums across lanes.
#pragma once

#include "cache.h"
#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

constexpr int64_t kKeysPerBlock = 64;
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kKeysPerSplit = 1024;  // decode: longer contexts are read by several tasks, whose results are merged
constexpr int64_t kMaxSplitRows = 64;    // more rows than this are enough work without splitting
// Vectors of keys, or of a value, beside R rows: as many as there are registers for.
template <int R>
constexpr int kTileVectors = W == 16 || R <= 3 ? 4 : 2;

struct AttentionTask {
  int64_t sequence, kv_head, first_query, num_queries, first_key, last_key;
  int64_t partial;  // index of the first row's partial result, or -1: the task sees all keys of its rows
};

template <class C>
struct KeyBlock {
  const C *keys[kKeysPerBlock], *values[kKeysPerBlock];
  int64_t count;
};

struct AttentionBuffers {
  vu* packed_keys;    // [lanes of a head, kKeysPerBlock] as single lanes
  uint32_t* queries;  // [rows, lanes of a head]
  float* weights;     // [rows, kKeysPerBlock]: scores, then their exponentials
  float* sums;        // [rows, padded_dim]: weighted values, not yet normalised
  float* maxima;      // [rows]
  float* totals;      // [rows]
  float* key_scales;  // [kKeysPerBlock]: of a rounded cache, what the block's keys are multiplied by
  float* value_scales;
};

// Lanes of T from a cache of C. The integers of a rounded one are exact in every T; their scale meets the scores.
template <class T, class C>
struct CacheLanes {
  static ML_INLINE vu load_lanes(const C* p) { return Lanes<T>::load_lanes(p); }
  static ML_INLINE vu load_lanes(const C* p, int64_t count) { return Lanes<T>::load_lanes(p, count); }
};
template <class T>
struct CacheLanes<T, int8_t> {
  static ML_INLINE vu load_lanes(const int8_t* p) {
    if constexpr (Lanes<T>::per_lane == 1)
      return bitcast<vu>(load(p));
    else
      return joined(load(p), load(p + W));
  }
  static ML_INLINE vu load_lanes(const int8_t* p, int64_t count) {
    if constexpr (Lanes<T>::per_lane == 1)
      return bitcast<vu>(load(p, count));
    else
      return joined(load(p, std::min<int64_t>(count, W)), load(p + W, std::max<int64_t>(count - W, 0)));
  }

 private:
  static ML_INLINE vu joined(vf first, vf second) {
    vh halves[2] = {narrow(first, bf16{}), narrow(second, bf16{})};
    return load_bits<vu>(halves);
  }
};

// In T, over a cache of C: T itself, or int8_t with a scale at the end of each entry.
template <class T, class C>
struct Attention {
  using L = Lanes<T>;
  static constexpr bool kIsRounded = !std::is_same_v<T, C>;
  const AttentionArgs& args;
  int64_t group = args.num_heads / args.num_kv_heads;
  int64_t head_lanes = (args.head_dim + L::per_lane - 1) / L::per_lane;
  int64_t padded_lanes = (head_lanes + W - 1) / W * W;
  int64_t padded_dim = (args.value_dim + W - 1) / W * W;
  int64_t partial_size = padded_dim + 2;  // weighted values, maximum, total

  int64_t num_queries(int64_t s) const { return args.query_starts[s + 1] - args.query_starts[s]; }
  // The first and one past the last key that query `i` of sequence `s` sees.
  int64_t last_key(int64_t s, int64_t i) const { return args.context_lens[s] - num_queries(s) + i + 1; }
  int64_t first_key(int64_t s, int64_t i) const {
    int64_t begin = args.chunk > 0 ? (last_key(s, i) - 1) / args.chunk * args.chunk : 0;
    return args.sliding_window > 0 ? std::max(begin, last_key(s, i) - args.sliding_window) : begin;
  }
  int64_t head_of(const AttentionTask& task, int64_t row) const { return task.kv_head * group + row % group; }

  AttentionBuffers buffers(int64_t rows) const {
    auto padded = [](int64_t count) { return (count + 15) / 16 * 16; };
    int64_t sizes[] = {padded_lanes * kKeysPerBlock,
                       padded(rows * padded_lanes),
                       rows * kKeysPerBlock,
                       padded(rows * padded_dim),
                       padded(rows),
                       padded(rows),
                       kKeysPerBlock,
                       kKeysPerBlock};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    float* memory = static_cast<float*>(scratch(total * sizeof(float)));
    float* parts[8];
    for (int i = 0; i < 8; memory += sizes[i++]) parts[i] = memory;
    return {reinterpret_cast<vu*>(parts[0]),
            reinterpret_cast<uint32_t*>(parts[1]),
            parts[2],
            parts[3],
            parts[4],
            parts[5],
            parts[6],
            parts[7]};
  }

  // Where the task's keys and values from `begin` on lie.
  void find_entries(const AttentionTask& task, int64_t begin, KeyBlock<C>& block) const {
    const int32_t* table = args.block_tables + task.sequence * args.block_table_stride;
    block.count = std::min(kKeysPerBlock, task.last_key - begin);
    int64_t page = begin / args.block_size, offset = begin % args.block_size;
    for (int64_t i = 0; i < block.count; ++i) {
      block.keys[i] = cache_entry<const C>(args.k_cache, table[page], task.kv_head, offset);
      block.values[i] = cache_entry<const C>(args.v_cache, table[page], task.kv_head, offset);
      if (++offset == args.block_size) {
        offset = 0;
        ++page;
      }
    }
  }
  // Asks the memory for entries [begin, end), as the CPU cannot foresee the block table. A few at a time, between what
  // is computed: the CPU waits when it is asked for more than it can have under way.
  ML_INLINE void ask_for(const C* const* entries, int64_t width, int64_t begin, int64_t end) const {
    if (kIsRounded) width += kScaleBytes;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t at = 0; at < width; at += kLineBytes / int64_t(sizeof(C)))
        __builtin_prefetch(entries[i] + at, 0, kPrefetchInto);
  }
  // Blocks begin at multiples of their size, so that a row's sums do not depend on how queries are cut into tasks.
  static int64_t first_block(const AttentionTask& task) { return task.first_key / kKeysPerBlock * kKeysPerBlock; }

  void pack_queries(const AttentionTask& task, const AttentionBuffers& to) const {
    for (int64_t row = 0; row < task.num_queries * group; ++row) {
      const T* q = static_cast<const T*>(args.q) +
                   (args.query_starts[task.sequence] + task.first_query + row / group) * args.q_row_stride +
                   head_of(task, row) * args.q_head_stride;
      for (int64_t d = 0; d < args.head_dim; d += W * L::per_lane) {
        vu lanes = L::load_lanes(q + d, std::min<int64_t>(W * L::per_lane, args.head_dim - d));
        __builtin_memcpy(to.queries + row * padded_lanes + d / L::per_lane, &lanes, sizeof lanes);
      }
    }
  }

  void pack_keys(const KeyBlock<C>& block, const KeyBlock<C>& next, vu* packed) const {
    const C* const* keys = block.keys;
    int64_t count = block.count;
    for (int64_t first = 0; first < count; first += W) {
      ask_for(next.keys, args.head_dim, std::min(first, next.count), std::min(first + W, next.count));
      for (int64_t lane = 0; lane < padded_lanes; lane += W) {
        int64_t offset = lane * L::per_lane, width = std::min<int64_t>(W * L::per_lane, args.head_dim - offset);
        vu square[W];
        for (int i = 0; i < W; ++i) {
          bool present = first + i < count;
          square[i] = !present                   ? vu{}
                      : width == W * L::per_lane ? CacheLanes<T, C>::load_lanes(keys[first + i] + offset)
                                                 : CacheLanes<T, C>::load_lanes(keys[first + i] + offset, width);
        }
        transpose(square);
        for (int i = 0; i < W; ++i) packed[((lane + i) * kKeysPerBlock + first) / W] = square[i];
      }
    }
    ask_for(next.keys, args.head_dim, std::min(count, next.count), next.count);
  }

  template <int R>
  void score_tile(const AttentionBuffers& at, int64_t row, int64_t count) const {
    constexpr int NV = kTileVectors<R>;
    for (int64_t first = 0; first < count; first += W * NV) {
      vf scores[R][NV] = {};
      const uint32_t* q = at.queries + row * padded_lanes;
      for (int64_t lane = 0; lane < head_lanes; ++lane) {
        const vu* keys = at.packed_keys + (lane * kKeysPerBlock + first) / W;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          vu query = q[r * padded_lanes + lane] - vu{};
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) scores[r][v] = L::multiply_add(scores[r][v], query, keys[v]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) store(at.weights + (row + r) * kKeysPerBlock + first + v * W, scores[r][v]);
    }
  }

  // Scores to weights for the row's keys [begin, end) of the block, zero elsewhere; the sums so far are rescaled. The
  // block's first key lies `ahead` positions after the query, and each position on adds `slope` to a score.
  void soften(const AttentionBuffers& at, int64_t row, int64_t begin, int64_t end, int64_t ahead, float slope) const {
    float* weights = at.weights + row * kKeysPerBlock;
    if (begin >= end) {
      std::fill_n(weights, kKeysPerBlock, 0.f);
      return;
    }
    vf best = splat(-INFINITY);
    for (int64_t i = 0; i < kKeysPerBlock; i += W) {
      vi key = lane_numbers(LaneIndices{}) + int32_t(i);
      vf score = load(weights + i) * args.scale;
      if constexpr (kIsRounded) score *= load(at.key_scales + i);
      if (args.softcap > 0) score = vtanh(score / args.softcap) * args.softcap;
      if (slope != 0) score += __builtin_convertvector(key + int32_t(ahead), vf) * slope;
      score = ((key >= int32_t(begin)) & (key < int32_t(end))) ? score : splat(-INFINITY);
      store(weights + i, score);
      best = vmax(best, score);
    }
    float maximum = std::max(at.maxima[row], max_lanes(best));
    vf total = {};
    for (int64_t i = 0; i < kKeysPerBlock; i += W) {
      vf weight = vexp(load(weights + i) - maximum);
      total += weight;
      if constexpr (kIsRounded) weight *= load(at.value_scales + i);
      store(weights + i, weight);
    }
    float correction = vexp(splat(at.maxima[row] - maximum))[0];
    at.totals[row] = at.totals[row] * correction + sum_lanes(total);
    at.maxima[row] = maximum;
    if (correction != 1)
      for (int64_t d = 0; d < padded_dim; d += W)
        store(at.sums + row * padded_dim + d, load(at.sums + row * padded_dim + d) * correction);
  }

  // sums += weights * values for R rows and NV vectors of the head, the last one with `width` elements.
  template <int R, int NV>
  ML_INLINE void value_tile(const AttentionBuffers& at, const C* const* values, int64_t row, int64_t begin, int64_t end,
                            int64_t d, int64_t width, const KeyBlock<C>* next) const {
    const float* weights = at.weights + row * kKeysPerBlock;
    vf sums[R][NV];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) sums[r][v] = load(at.sums + (row + r) * padded_dim + d + v * W);
    for (int64_t key = begin; key < end; ++key) {
      if (next) ask_for(next->values, args.value_dim, key, std::min(key + 1, next->count));
      const C* at_key = values[key] + d;
      vf value[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) value[v] = width == W ? load(at_key + v * W) : load(at_key + v * W, width);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vf weight = splat(weights[r * kKeysPerBlock + key]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sums[r][v] = fused_multiply_add(weight, value[v], sums[r][v]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v) store(at.sums + (row + r) * padded_dim + d + v * W, sums[r][v]);
  }

  template <int R>
  void add_values(const AttentionBuffers& at, const C* const* values, int64_t row, int64_t begin, int64_t end,
                  const KeyBlock<C>* next) const {
    constexpr int NV = kTileVectors<R>;
    int64_t d = 0;
    for (; d + NV * W <= args.value_dim; d += NV * W, next = nullptr)
      value_tile<R, NV>(at, values, row, begin, end, d, W, next);
    for (; d < args.value_dim; d += W, next = nullptr)
      value_tile<R, 1>(at, values, row, begin, end, d, std::min<int64_t>(W, args.value_dim - d), next);
  }

  // Rows [row, row + R) against the block, whose first key is `first`; asks for the values of `next`, if it is not
  // null.
  template <int R>
  void attend_tile(const AttentionTask& task, const AttentionBuffers& at, int64_t row, int64_t first,
                   const KeyBlock<C>& block, const KeyBlock<C>* next) const {
    int64_t count = block.count;
    score_tile<R>(at, row, count);
    int64_t begin = count, end = 0;
    for (int r = 0; r < R; ++r) {
      int64_t query = task.first_query + (row + r) / group;
      int64_t row_begin = std::clamp<int64_t>(first_key(task.sequence, query) - first, 0, count);
      int64_t row_end = std::clamp<int64_t>(last_key(task.sequence, query) - first, 0, count);
      float slope = args.slopes ? args.slopes[head_of(task, row + r)] : 0;
      soften(at, row + r, row_begin, row_end, first + 1 - last_key(task.sequence, query), slope);
      if (row_begin >= row_end) continue;
      begin = std::min(begin, row_begin);
      end = std::max(end, row_end);
    }
    if (begin < end) add_values<R>(at, block.values, row, begin, end, next);
  }

  void attend_block(const AttentionTask& task, const AttentionBuffers& at, const KeyBlock<C>& block, int64_t first,
                    int64_t rows, const KeyBlock<C>& next) const {
    pack_keys(block, next, at.packed_keys);
    if constexpr (kIsRounded) {
      for (int64_t i = 0; i < kKeysPerBlock; ++i) {
        at.key_scales[i] = i < block.count ? scale_of(block.keys[i], args.head_dim) : 0;
        at.value_scales[i] = i < block.count ? scale_of(block.values[i], args.value_dim) : 0;
      }
    }
    const KeyBlock<C>* wanted = &next;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4, wanted = nullptr) attend_tile<4>(task, at, row, first, block, wanted);
    if (rows - row == 3) attend_tile<3>(task, at, row, first, block, wanted);
    if (rows - row == 2) attend_tile<2>(task, at, row, first, block, wanted);
    if (rows - row == 1) attend_tile<1>(task, at, row, first, block, wanted);
    ask_for(next.values, args.value_dim, std::min(block.count, next.count), next.count);
  }

  void run(const AttentionTask& task, const AttentionTask* next_task, float* partials) const {
    int64_t rows = task.num_queries * group;
    AttentionBuffers at = buffers(rows);
    pack_queries(task, at);
    std::fill_n(at.sums, rows * padded_dim, 0.f);
    std::fill_n(at.totals, rows, 0.f);
    std::fill_n(at.maxima, rows, -INFINITY);
    KeyBlock<C> blocks[2];
    find_entries(task, first_block(task), blocks[0]);
    for (int64_t first = first_block(task), i = 0; first < task.last_key; first += kKeysPerBlock, i ^= 1) {
      blocks[i ^ 1].count = 0;
      if (first + kKeysPerBlock < task.last_key)
        find_entries(task, first + kKeysPerBlock, blocks[i ^ 1]);
      else if (next_task)
        find_entries(*next_task, first_block(*next_task), blocks[i ^ 1]);
      attend_block(task, at, blocks[i], first, rows, blocks[i ^ 1]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* sums = at.sums + row * padded_dim;
      if (task.partial < 0) {
        write_row(task, row, sums, at.maxima[row], at.totals[row]);
        continue;
      }
      float* partial = partials + (task.partial + row) * partial_size;
      std::copy_n(sums, padded_dim, partial);
      partial[padded_dim] = at.maxima[row];
      partial[padded_dim + 1] = at.totals[row];
    }
  }

  void write_row(const AttentionTask& task, int64_t row, const float* sums, float maximum, float total) const {
    T* out = static_cast<T*>(args.out) +
             (args.query_starts[task.sequence] + task.first_query + row / group) * args.out_row_stride +
             head_of(task, row) * args.out_head_stride;
    float factor = total == 0 ? 0 : 1 / total;
    if (args.sinks) {
      float sink = args.sinks[head_of(task, row)], best = std::max(maximum, sink);
      float share = std::exp(maximum - best);
      factor = share / (total * share + std::exp(sink - best));
    }
    for (int64_t d = 0; d < args.value_dim; d += W)
      store(out + d, load(sums + d) * factor, std::min<int64_t>(W, args.value_dim - d));
  }

  // Joins the results that `num_splits` tasks, the first of which is `task`, left for the same rows.
  void merge(const AttentionTask& task, int64_t num_splits, float* partials) const {
    int64_t rows = task.num_queries * group;
    for (int64_t row = 0; row < rows; ++row) {
      float* first = partials + (task.partial + row) * partial_size;
      float maximum = -INFINITY, total = 0;
      for (int64_t s = 0; s < num_splits; ++s) maximum = std::max(maximum, first[s * rows * partial_size + padded_dim]);
      for (int64_t s = 0; s < num_splits; ++s) {
        const float* part = first + s * rows * partial_size;
        float factor = std::exp(part[padded_dim] - maximum);
        total += factor * part[padded_dim + 1];
        for (int64_t d = 0; d < padded_dim; d += W)
          store(first + d, s ? load(first + d) + load(part + d) * factor : load(part + d) * factor);
      }
      write_row(task, row, first, maximum, total);
    }
  }

  struct Plan {
    std::vector<AttentionTask> tasks;
    int64_t num_partials = 0, cost = 0;
  };

  Plan plan() const {
    Plan plan;
    int64_t queries_per_task = std::max<int64_t>(1, kRowsPerTask / group);
    for (int64_t s = 0; s < args.num_sequences; ++s) {
      int64_t n = num_queries(s);
      for (int64_t head = 0; head < args.num_kv_heads; ++head) {
        for (int64_t first = 0; first < n; first += queries_per_task) {
          int64_t count = std::min(queries_per_task, n - first);
          int64_t begin = first_key(s, first), end = last_key(s, first + count - 1);
          bool is_split = n * group <= kMaxSplitRows && end - begin > kKeysPerSplit;
          plan.cost += (end - begin) * args.head_dim * std::max<int64_t>(8, count * group);
          int64_t step = is_split ? kKeysPerSplit : std::max<int64_t>(1, end - begin);
          for (int64_t key = is_split ? begin / step * step : begin; key < end; key += step) {
            int64_t partial = is_split ? plan.num_partials : -1;
            plan.tasks.push_back({s, head, first, count, std::max(begin, key), std::min(end, key + step), partial});
            plan.num_partials += is_split ? count * group : 0;
          }
        }
      }
    }
    return plan;
  }
};

template <class T, class C>
void attend(const AttentionArgs& args) {
  constexpr int64_t kCostPerThread = 1 << 20;  // multiply-adds done in the time that waking another thread takes
  Attention<T, C> attention{args};
  auto plan = attention.plan();
  const AttentionTask* tasks = plan.tasks.data();
  std::unique_ptr<float[]> partials(new float[plan.num_partials * attention.partial_size]);
  int64_t count = static_cast<int64_t>(plan.tasks.size());
  parallel(count, 1 + plan.cost / kCostPerThread, [&](int64_t i, int64_t next) {
    attention.run(tasks[i], next < count ? &tasks[next] : nullptr, partials.get());
  });
  for (int64_t i = 0; i < count;) {
    const AttentionTask& task = tasks[i];
    int64_t splits = 1;
    while (i + splits < count && tasks[i + splits].sequence == task.sequence &&
           tasks[i + splits].kv_head == task.kv_head && tasks[i + splits].first_query == task.first_query)
      ++splits;
    if (task.partial >= 0) attention.merge(task, splits, partials.get());
    i += splits;
  }
}

void paged_attention(const AttentionArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.is_rounded ? attend<T, int8_t>(args) : attend<T, T>(args);
  });
}

}  // namespace
}  // namespace manylora

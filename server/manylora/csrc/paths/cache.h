// The paged cache: where a position lies, and writing to it. An entry of a rounded cache is a key or value in 8 bits
// and, behind it, the float32 that its integers are multiplied by; it depends on nothing but that key or value.
#pragma once

#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

// C: what the cache is kept in, the inputs' own type or int8_t.
template <class C>
ML_INLINE C* cache_entry(const CacheView& cache, int64_t block, int64_t head, int64_t position) {
  return static_cast<C*>(cache.data) + block * cache.block_stride + head * cache.head_stride +
         position * cache.position_stride;
}

ML_INLINE float scale_of(const int8_t* entry, int64_t width) {
  float scale;
  std::memcpy(&scale, entry + width, kScaleBytes);
  return scale;
}

template <class T>
ML_INLINE void write_entry(T* entry, const T* from, int64_t width) {
  std::memcpy(entry, from, width * sizeof(T));
}

// The scale is rounded to bfloat16, so that what is read back, whose products float32 holds, is written as it was.
template <class T>
ML_INLINE void write_entry(int8_t* entry, const T* from, int64_t width) {
  vf largest = {}, spoiled = {};  // NaN and infinity would be lost in the bytes, so they spoil the scale
  for_vectors(width, [&](int64_t i, auto count) {
    vf value = load(from + i, count);
    largest = vmax(vmax(largest, value), -value);
    spoiled += value * 0.f;
  });
  float exact = max_lanes(largest) / 127;
  float scale = exact > 1e-36f ? round_to(splat(exact), bf16{})[0] : 0, steps = scale > 0 ? 1 / scale : 0;
  for_vectors(width, [&](int64_t i, auto count) {
    vf rounded = (load(from + i, count) * steps + 12582912.f) - 12582912.f;
    store_bytes(entry + i, __builtin_convertvector(rounded, vi), count);
  });
  scale += sum_lanes(spoiled);
  std::memcpy(entry + width, &scale, kScaleBytes);
}

template <class T, class C>
void write_kv_token(const WriteKvArgs& args, int64_t token) {
  int64_t slot = args.slots[token];
  if (slot < 0) return;
  int64_t block = slot / args.block_size, position = slot % args.block_size;
  const T* k = static_cast<const T*>(args.k) + token * args.k_row_stride;
  const T* v = static_cast<const T*>(args.v) + token * args.v_row_stride;
  for (int64_t head = 0; head < args.num_kv_heads; ++head) {
    write_entry(cache_entry<C>(args.k_cache, block, head, position), k + head * args.k_head_stride, args.head_dim);
    write_entry(cache_entry<C>(args.v_cache, block, head, position), v + head * args.v_head_stride, args.value_dim);
  }
}

void write_kv(const WriteKvArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = 0; token < args.num_tokens; ++token)
      args.is_rounded ? write_kv_token<T, int8_t>(args, token) : write_kv_token<T, T>(args, token);
  });
}

}  // namespace
}  // namespace manylora

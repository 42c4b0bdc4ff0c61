// The paged cache: where a position lies, and writing to it.
#pragma once

#include "target.h"
#include "vec.h"

namespace manylora {
namespace {

template <class T>
ML_INLINE T* cache_entry(const CacheView& cache, int64_t block, int64_t head, int64_t position) {
  return static_cast<T*>(cache.data) + block * cache.block_stride + head * cache.head_stride +
         position * cache.position_stride;
}

template <class T>
void write_kv_token(const WriteKvArgs& args, int64_t token) {
  int64_t slot = args.slots[token];
  if (slot < 0) return;
  int64_t block = slot / args.block_size, position = slot % args.block_size;
  const T* k = static_cast<const T*>(args.k) + token * args.k_row_stride;
  const T* v = static_cast<const T*>(args.v) + token * args.v_row_stride;
  for (int64_t head = 0; head < args.num_kv_heads; ++head) {
    std::memcpy(cache_entry<T>(args.k_cache, block, head, position), k + head * args.k_head_stride,
                args.head_dim * sizeof(T));
    std::memcpy(cache_entry<T>(args.v_cache, block, head, position), v + head * args.v_head_stride,
                args.value_dim * sizeof(T));
  }
}

void write_kv(const WriteKvArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    for (int64_t token = 0; token < args.num_tokens; ++token) write_kv_token<decltype(type)>(args, token);
  });
}

}  // namespace
}  // namespace manylora

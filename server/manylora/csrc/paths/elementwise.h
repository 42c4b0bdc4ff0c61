// Norm, activation and rotary embedding: one pass over the rows, on several threads only where there is much to do.
#pragma once

#include "cache.h"
#include "target.h"
#include "vec.h"
#include "work.h"

namespace manylora {
namespace {

template <class T>
void norm_row(const NormArgs& args, int64_t row) {
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  T* residual = args.residual.data ? static_cast<T*>(args.residual.data) + row * args.residual.stride : nullptr;
  T* out = static_cast<T*>(args.out.data) + row * args.out.stride;
  const T* weight = static_cast<const T*>(args.weight);
  vf squares = {};
  for_vectors(args.hidden, [&](int64_t i, auto count) {
    vf value = load(x + i, count);
    if (residual) {
      value = round_to(value + load(residual + i, count), T{});
      store(residual + i, value, count);
    }
    squares += value * value;
  });
  const T* source = residual ? residual : x;
  float factor = 1 / std::sqrt(sum_lanes(squares) / args.hidden + args.eps);
  for_vectors(args.hidden, [&](int64_t i, auto count) {
    vf value = load(source + i, count) * factor;
    vf scale = load(weight + i, count);
    value = args.weight_offset == 0 ? round_to(value, T{}) * scale : value * (scale + args.weight_offset);
    store(out + i, value, count);
  });
}

void rms_norm(const NormArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    for_rows(args.num_rows, args.hidden, [&](int64_t row) { norm_row<decltype(type)>(args, row); });
  });
}

ML_INLINE vf silu(vf x) { return x / (1.f + vexp(-x)); }
ML_INLINE vf gelu_tanh(vf x) { return .5f * x * (1.f + vtanh(0.7978845608f * (x + 0.044715f * x * x * x))); }

template <class T>
void gated_row(const GatedArgs& args, int64_t row) {
  const T* gate = static_cast<const T*>(args.gate_up.data) + row * args.gate_up.stride;
  T* out = static_cast<T*>(args.out.data) + row * args.out.stride;
  for_vectors(args.width, [&](int64_t i, auto count) {
    vf value = load(gate + i, count);
    value = args.activation == Activation::silu ? silu(value) : gelu_tanh(value);
    store(out + i, value * load(gate + args.width + i, count), count);
  });
}

void gated_activation(const GatedArgs& args) {
  with_dtype(args.dtype, [&](auto type) {
    for_rows(args.num_rows, 4 * args.width, [&](int64_t row) { gated_row<decltype(type)>(args, row); });
  });
}

// The first `rotary_dim` elements of a head are turned, in pairs (d, d + rotary_dim / 2); the others are copied.
template <class T>
ML_INLINE void rotate_head(T* to, const T* from, const float* cos, const float* sin, int64_t rotary_dim,
                           int64_t head_dim) {
  int64_t half = rotary_dim / 2;
  for_vectors(half, [&](int64_t d, auto count) {
    vf a = load(from + d, count), b = load(from + half + d, count);
    store(to + d, a * load(cos + d, count) - b * load(sin + d, count), count);
    store(to + half + d, b * load(cos + half + d, count) + a * load(sin + half + d, count), count);
  });
  std::memcpy(to + rotary_dim, from + rotary_dim, (head_dim - rotary_dim) * sizeof(T));
}

template <class T, class C>
void rope_token(const RopeArgs& args, int64_t token) {
  const WriteKvArgs& kv = args.kv;
  const float* cos = args.cos.data + token * args.cos.stride;
  const float* sin = args.sin.data + token * args.sin.stride;
  const T* q = static_cast<const T*>(args.q) + token * args.q_row_stride;
  T* out = static_cast<T*>(args.out) + token * args.num_heads * kv.head_dim;
  for (int64_t head = 0; head < args.num_heads; ++head)
    rotate_head(out + head * kv.head_dim, q + head * args.q_head_stride, cos, sin, args.rotary_dim, kv.head_dim);
  int64_t slot = kv.slots[token];
  if (slot < 0) return;
  const T* k = static_cast<const T*>(kv.k) + token * kv.k_row_stride;
  const T* v = static_cast<const T*>(kv.v) + token * kv.v_row_stride;
  int64_t block = slot / kv.block_size, position = slot % kv.block_size;
  for (int64_t head = 0; head < kv.num_kv_heads; ++head) {
    C* key = cache_entry<C>(kv.k_cache, block, head, position);
    T* turned = nullptr;
    if constexpr (std::is_same_v<T, C>)
      turned = key;
    else
      turned = static_cast<T*>(scratch(kv.head_dim * sizeof(T)));
    rotate_head(turned, k + head * kv.k_head_stride, cos, sin, args.rotary_dim, kv.head_dim);
    if constexpr (!std::is_same_v<T, C>) write_entry(key, turned, kv.head_dim);
    write_entry(cache_entry<C>(kv.v_cache, block, head, position), v + head * kv.v_head_stride, kv.head_dim);
  }
}

void rope_write_kv(const RopeArgs& args) {
  int64_t elements = (args.num_heads + 2 * args.kv.num_kv_heads) * args.kv.head_dim;
  with_dtype(args.kv.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(args.kv.num_tokens, elements, [&](int64_t token) {
      args.kv.is_rounded ? rope_token<T, int8_t>(args, token) : rope_token<T, T>(args, token);
    });
  });
}

}  // namespace
}  // namespace manylora

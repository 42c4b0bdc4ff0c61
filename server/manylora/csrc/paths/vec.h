// Vectors of 32-bit lanes in GCC's vector extension: the same arithmetic for every CPU path; only what the extension
// cannot say is written per instruction set.
#pragma once

#include "target.h"

namespace manylora {
namespace {

#if ML_HAS_AVX512
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vq __attribute__((vector_size(W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define ML_INLINE inline __attribute__((always_inline))
#define ML_INLINE_LAMBDA __attribute__((always_inline))

template <class To, class From>
ML_INLINE To bitcast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class Vector>
ML_INLINE Vector load_bits(const void* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector>
ML_INLINE Vector load_bits(const void* p, size_t size_bytes) {
  Vector v = {};
  __builtin_memcpy(&v, p, size_bytes);
  return v;
}

ML_INLINE vf splat(float value) { return value - vf{}; }
ML_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN

// a * b + c, rounded once where the CPU can: said outright, as the compiler fuses the two in some places and not in
// others.
#if ML_HAS_AVX512
ML_INLINE vf fused_multiply_add(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif ML_HAS_AVX2
ML_INLINE vf fused_multiply_add(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
ML_INLINE vf fused_multiply_add(vf a, vf b, vf c) { return a * b + c; }
#endif

// --- conversions; `load` and `store` with a count touch only the first `count` elements, the rest is zero ---

#if ML_HAS_AVX512
ML_INLINE vu widen_bits(vh bits) { return (vu)_mm512_cvtepu16_epi32((__m256i)bits); }
ML_INLINE vh narrow_bits(vu lanes) { return (vh)_mm512_cvtepi32_epi16((__m512i)lanes); }
ML_INLINE vf widen(vh bits, f16) { return (vf)_mm512_cvtph_ps((__m256i)bits); }
ML_INLINE vh narrow(vf v, f16) { return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif ML_HAS_AVX2
ML_INLINE vu widen_bits(vh bits) { return (vu)_mm256_cvtepu16_epi32((__m128i)bits); }
ML_INLINE vh narrow_bits(vu lanes) {
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)lanes, (__m256i)lanes), 0x88);
  return (vh)_mm256_castsi256_si128(packed);
}
ML_INLINE vf widen(vh bits, f16) { return (vf)_mm256_cvtph_ps((__m128i)bits); }
ML_INLINE vh narrow(vf v, f16) { return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
ML_INLINE vu widen_bits(vh bits) { return __builtin_convertvector(bits, vu); }
ML_INLINE vh narrow_bits(vu lanes) { return __builtin_convertvector(lanes, vh); }
// The exponent is rebiased by multiplying with a power of two, which also makes subnormals right.
ML_INLINE vf widen(vh bits, f16) {
  vu u = widen_bits(bits);
  vu magnitude = (u & 0x7fff) << 13;
  vf scaled = bitcast<vf>(magnitude) * 0x1p112f;
  vu value = ((u & 0x7c00) == 0x7c00) ? (magnitude | 0x7f800000) : bitcast<vu>(scaled);
  return bitcast<vf>(value | ((u & 0x8000) << 16));
}
ML_INLINE vh narrow(vf v, f16) {
  vu u = bitcast<vu>(v);
  vu magnitude = u & 0x7fffffff;
  // Adding a number whose last place is the wanted one makes the adder round, to nearest and ties to even.
  vu exponent = magnitude & 0x7f800000;
  exponent = (exponent < 0x38800000u) ? (vu{} + 0x38800000u) : exponent;
  vf anchor = bitcast<vf>(exponent + (13u << 23));
  vf rounded = (bitcast<vf>(magnitude) + anchor) - anchor;
  vu half = bitcast<vu>(rounded * 0x1p-112f) >> 13;
  half = (half > 0x7c00u) ? (vu{} + 0x7c00u) : half;
  half = (magnitude > 0x7f800000u) ? (vu{} + 0x7e00u) : half;
  half = (magnitude == 0x7f800000u) ? (vu{} + 0x7c00u) : half;
  return narrow_bits(half | ((u >> 16) & 0x8000));
}
#endif

ML_INLINE vf widen(vh bits, bf16) { return bitcast<vf>(widen_bits(bits) << 16); }
#if ML_HAS_AVX512_BF16
ML_INLINE vh narrow(vf v, bf16) { return (vh)_mm512_cvtneps_pbh((__m512)v); }
#else
ML_INLINE vh narrow(vf v, bf16) {
  vu u = bitcast<vu>(v);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  vu quiet = (u >> 16) | 0x40;
  return narrow_bits((v == v) ? rounded : quiet);
}
#endif

#if ML_HAS_AVX512
ML_INLINE vf widen(vq bytes) { return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes)); }
#elif ML_HAS_AVX2
ML_INLINE vf widen(vq bytes) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bitcast<int64_t>(bytes))));
}
#else
ML_INLINE vf widen(vq bytes) { return __builtin_convertvector(bytes, vf); }
#endif

ML_INLINE vf load(const int8_t* p) { return widen(load_bits<vq>(p)); }
ML_INLINE vf load(const int8_t* p, int64_t count) { return widen(load_bits<vq>(p, count)); }
ML_INLINE vf load(const float* p) { return load_bits<vf>(p); }
ML_INLINE vf load(const float* p, int64_t count) { return load_bits<vf>(p, count * sizeof(float)); }
template <class T>
ML_INLINE vf load(const T* p) {
  return widen(load_bits<vh>(p), T{});
}
template <class T>
ML_INLINE vf load(const T* p, int64_t count) {
  return widen(load_bits<vh>(p, count * sizeof(T)), T{});
}
ML_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
ML_INLINE void store(float* p, vf v, int64_t count) { __builtin_memcpy(p, &v, count * sizeof(float)); }
template <class T>
ML_INLINE void store(T* p, vf v) {
  vh bits = narrow(v, T{});
  __builtin_memcpy(p, &bits, sizeof bits);
}
template <class T>
ML_INLINE void store(T* p, vf v, int64_t count) {
  vh bits = narrow(v, T{});
  __builtin_memcpy(p, &bits, count * sizeof(T));
}
// The lanes' lowest bytes.
ML_INLINE void store_bytes(int8_t* to, vi lanes, int64_t count) {
#if ML_HAS_AVX512
  auto narrow = _mm512_cvtepi32_epi8((__m512i)lanes);
#else
  auto narrow = __builtin_convertvector(lanes, vq);
#endif
  __builtin_memcpy(to, &narrow, count);
}
// Rounds to T and back, for results that are defined as rounded on the way.
ML_INLINE vf round_to(vf v, float) { return v; }
template <class T>
ML_INLINE vf round_to(vf v, T type) {
  return widen(narrow(v, type), type);
}

// --- sums of products: a 32-bit lane holds one float, or two bfloat16 where the CPU multiplies pairs ---

template <class T>
struct Lanes {
  static constexpr int per_lane = 1;
  static ML_INLINE vu load_lanes(const T* p) { return bitcast<vu>(load(p)); }
  static ML_INLINE vu load_lanes(const T* p, int64_t count) { return bitcast<vu>(load(p, count)); }
  static ML_INLINE vf multiply_add(vf sum, vu a, vu b) {
    return fused_multiply_add(bitcast<vf>(a), bitcast<vf>(b), sum);
  }
};
#if ML_HAS_AVX512_BF16
template <>
struct Lanes<bf16> {
  static constexpr int per_lane = 2;
  static ML_INLINE vu load_lanes(const bf16* p) { return load_bits<vu>(p); }
  static ML_INLINE vu load_lanes(const bf16* p, int64_t count) { return load_bits<vu>(p, count * sizeof(bf16)); }
  static ML_INLINE vf multiply_add(vf sum, vu a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// --- across lanes ---

// With lane blocks of width S: `low` takes a's even blocks and, between them, b's; `high` the odd ones.
template <int S, class Vector, size_t... I>
ML_INLINE Vector low_blocks(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shuffle(a, b, vi{(int(I) & S ? W + int(I) - S : int(I))...});
}
template <int S, class Vector, size_t... I>
ML_INLINE Vector high_blocks(Vector a, Vector b, std::index_sequence<I...>) {
  return __builtin_shuffle(a, b, vi{(int(I) & S ? W + int(I) : int(I) + S)...});
}
using LaneIndices = std::make_index_sequence<W>;

template <int S = 1>
ML_INLINE void transpose(vu (&rows)[W]) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      vu a = rows[i], b = rows[i + S];
      rows[i] = low_blocks<S>(a, b, LaneIndices{});
      rows[i + S] = high_blocks<S>(a, b, LaneIndices{});
    }
    transpose<2 * S>(rows);
  }
}

// Lane i of the result is the sum of v[i]'s lanes, added in the same order for every i.
template <int Count = W>
ML_INLINE vf sum_each(vf (&v)[W]) {
  if constexpr (Count > 1) {
    constexpr int S = W / Count;
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i)
      v[i] =
          low_blocks<S>(v[2 * i], v[2 * i + 1], LaneIndices{}) + high_blocks<S>(v[2 * i], v[2 * i + 1], LaneIndices{});
    return sum_each<Count / 2>(v);
  } else {
    return v[0];
  }
}
// Lane i of the result is lane i ^ S.
template <int S, size_t... I>
ML_INLINE vf swap_blocks(vf v, std::index_sequence<I...>) {
  return __builtin_shuffle(v, vi{(int(I) ^ S)...});
}
template <int S = W / 2>
ML_INLINE float sum_lanes(vf v) {
  v += swap_blocks<S>(v, LaneIndices{});
  if constexpr (S > 1) return sum_lanes<S / 2>(v);
  return v[0];
}
template <int S = W / 2>
ML_INLINE float max_lanes(vf v) {
  v = vmax(v, swap_blocks<S>(v, LaneIndices{}));
  if constexpr (S > 1) return max_lanes<S / 2>(v);
  return v[0];
}
template <size_t... I>
ML_INLINE vi lane_numbers(std::index_sequence<I...>) {
  return vi{int(I)...};
}

// --- elementary functions ---

// e^x to 2 units in the last place; 0 below the smallest normal result, NaN stays NaN.
ML_INLINE vf vexp(vf x) {
  vf capped = x > 88.37f ? splat(88.37f) : x;
  vf n = (capped * 1.44269504f + 12582912.f) - 12582912.f;  // to the nearest integer
  vf r = capped - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  vf value = p * (r * r) + r + 1.f;
  vf power = bitcast<vf>((__builtin_convertvector(n, vi) + 127) << 23);
  return x < -87.33f ? splat(0.f) : value * power;
}
ML_INLINE vf vtanh(vf x) { return 1.f - 2.f / (vexp(x + x) + 1.f); }

// --- element types ---

// Calls f with a value of the element type.
template <class F>
ML_INLINE void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) {
    f(float{});
  } else if (dtype == DType::bf16) {
    f(bf16{});
  } else {
    f(f16{});
  }
}

// The same for weights, which may also be int8.
template <class F>
ML_INLINE void with_weight_dtype(DType dtype, F&& f) {
  if (dtype == DType::i8) {
    f(int8_t{});
  } else {
    with_dtype(dtype, f);
  }
}

}  // namespace
}  // namespace manylora

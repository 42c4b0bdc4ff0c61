// For tests on a CPU without AVX512 or VNNI (MANYLORA_SANITIZE=1 when the extension is built): the few instructions
// that those paths name, each as a loop that does what its manual says. GCC lowers the vectors themselves by its own
// means, so that all else in the paths is the code that such a CPU runs. Never chosen by "auto".
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace manylora::emulated {

template <class To, class From, class Element, int Count, class F>
inline __attribute__((always_inline)) To each(From from, F&& f) {
  Element in[Count];
  static_assert(sizeof in == sizeof from);
  __builtin_memcpy(in, &from, sizeof in);
  decltype(f(in[0])) out[Count];
  static_assert(sizeof out == sizeof(To));
  for (int i = 0; i < Count; ++i) out[i] = f(in[i]);
  To to;
  __builtin_memcpy(&to, out, sizeof to);
  return to;
}

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Products of four unsigned with four signed bytes are added to each 32-bit lane.
template <class Vector>
inline Vector dpbusd(Vector sums, Vector unsigned_bytes, Vector signed_bytes) {
  int32_t sum[sizeof(Vector) / 4];
  uint8_t u[sizeof(Vector)];
  int8_t s[sizeof(Vector)];
  __builtin_memcpy(sum, &sums, sizeof sum);
  __builtin_memcpy(u, &unsigned_bytes, sizeof u);
  __builtin_memcpy(s, &signed_bytes, sizeof s);
  for (size_t i = 0; i < sizeof(Vector); ++i) sum[i / 4] += int32_t(u[i]) * int32_t(s[i]);
  __builtin_memcpy(&sums, sum, sizeof sum);
  return sums;
}

// Two products of bfloat16 are added to each lane, the odd one first.
inline __m512 dpbf16(__m512 sums, __m512bh a, __m512bh b) {
  float sum[16];
  uint16_t x[32], y[32];
  __builtin_memcpy(sum, &sums, sizeof sum);
  __builtin_memcpy(x, &a, sizeof x);
  __builtin_memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i) {
    sum[i] += as_float(uint32_t(x[2 * i + 1]) << 16) * as_float(uint32_t(y[2 * i + 1]) << 16);
    sum[i] += as_float(uint32_t(x[2 * i]) << 16) * as_float(uint32_t(y[2 * i]) << 16);
  }
  __builtin_memcpy(&sums, sum, sizeof sums);
  return sums;
}

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  float x[16], y[16], sum[16];
  __builtin_memcpy(x, &a, sizeof x);
  __builtin_memcpy(y, &b, sizeof y);
  __builtin_memcpy(sum, &c, sizeof sum);
  for (int i = 0; i < 16; ++i) sum[i] = __builtin_fmaf(x[i], y[i], sum[i]);
  __builtin_memcpy(&c, sum, sizeof c);
  return c;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits = as_bits(value);
  if (value != value) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __m128i epi8(__m512i v) {
  return each<__m128i, __m512i, int32_t, 16>(v, [](int32_t i) { return int8_t(i); });
}
inline __m256i epi16(__m512i v) {
  return each<__m256i, __m512i, int32_t, 16>(v, [](int32_t i) { return int16_t(i); });
}
inline __m512i from_epu16(__m256i v) {
  return each<__m512i, __m256i, uint16_t, 16>(v, [](uint16_t i) { return int32_t(i); });
}
inline __m512i from_epi8(__m128i v) {
  return each<__m512i, __m128i, int8_t, 16>(v, [](int8_t i) { return int32_t(i); });
}
inline __m512 to_ps(__m512i v) {
  return each<__m512, __m512i, int32_t, 16>(v, [](int32_t i) { return float(i); });
}
inline __m512 from_ph(__m256i v) {
  return each<__m512, __m256i, _Float16, 16>(v, [](_Float16 i) { return float(i); });
}
inline __m256i to_ph(__m512 v, int) {
  return each<__m256i, __m512, float, 16>(v, [](float i) { return _Float16(i); });
}
inline __m256bh from_ps(__m512 v) { return each<__m256bh, __m512, float, 16>(v, to_bf16); }

}  // namespace manylora::emulated

#define _mm512_dpbusd_epi32 manylora::emulated::dpbusd<__m512i>
#define _mm256_dpbusd_avx_epi32 manylora::emulated::dpbusd<__m256i>
#define _mm512_fmadd_ps manylora::emulated::fmadd
#define _mm512_dpbf16_ps manylora::emulated::dpbf16
#define _mm512_cvtneps_pbh manylora::emulated::from_ps
#define _mm512_cvtepi32_epi8 manylora::emulated::epi8
#define _mm512_cvtepi32_epi16 manylora::emulated::epi16
#define _mm512_cvtepu16_epi32 manylora::emulated::from_epu16
#define _mm512_cvtepi8_epi32 manylora::emulated::from_epi8
#define _mm512_cvtepi32_ps manylora::emulated::to_ps
#define _mm512_cvtph_ps manylora::emulated::from_ph
#define _mm512_cvtps_ph manylora::emulated::to_ph

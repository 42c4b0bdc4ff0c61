// int8_linear: x is quantised to 8 bits, one scale per row and group of inputs, and multiplied with weights of one scale
// per output. The bytes of x are stored with 128 added, as the instructions want one side unsigned; the group's sum of
// weights, times 128, is taken off again before the group's products are scaled.

typedef uint8_t vb __attribute__((vector_size(W)));

// Adds to each 32-bit lane the products of its four unsigned bytes with the four signed ones.
ML_INLINE vi byte_products(vi sums, vi unsigned_bytes, vi signed_bytes) {
#if ML_HAS_AVX512
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif ML_HAS_VNNI
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)unsigned_bytes, (__m256i)signed_bytes);
#elif ML_HAS_AVX2
  __m256i u = (__m256i)unsigned_bytes, s = (__m256i)signed_bytes;
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(0xff)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return sums + (vi)even + (vi)odd;
#else
  for (int byte = 0; byte < 4; ++byte)
    sums += ((unsigned_bytes >> (8 * byte)) & 255) * ((signed_bytes << (24 - 8 * byte)) >> 24);
  return sums;
#endif
}

ML_INLINE void store_bytes(uint8_t* to, vi lanes, int64_t count) {
#if ML_HAS_AVX512
  vb bytes = (vb)_mm512_cvtepi32_epi8((__m512i)lanes);
#else
  vb bytes = __builtin_convertvector(lanes, vb);
#endif
  __builtin_memcpy(to, &bytes, count);
}

struct Int8Shape {
  int64_t num_groups, padded_in, padded_out;
  explicit Int8Shape(const Int8LinearArgs& args)
      : num_groups((args.in_features + args.group_size - 1) / args.group_size),
        padded_in((args.in_features + kInt8Depth - 1) / kInt8Depth * kInt8Depth),
        padded_out((args.out_features + kPanelWidth - 1) / kPanelWidth * kPanelWidth) {}
};

template <class T>
void quantise_row(const Int8LinearArgs& args, const Int8Shape& shape, int64_t row) {
  const T* x = static_cast<const T*>(args.x.data) + row * args.x.stride;
  uint8_t* quantised = args.quantised + row * shape.padded_in;
  for (int64_t group = 0; group < shape.num_groups; ++group) {
    int64_t first = group * args.group_size, size = std::min(args.group_size, args.in_features - first);
    vf largest = {}, spoiled = {};  // NaN and infinity would be lost in the bytes, so they spoil the scale
    for_vectors(size, [&](int64_t i, auto count) {
      vf value = load(x + first + i, count);
      largest = vmax(vmax(largest, value), -value);
      spoiled += value * 0.f;
    });
    float range = max_lanes(largest);
    args.row_scales[row * shape.num_groups + group] = range / 127 + sum_lanes(spoiled);
    float steps = range > 0 ? 127 / range : 0;
    for_vectors(size, [&](int64_t i, auto count) {
      vf rounded = (load(x + first + i, count) * steps + 12582912.f) - 12582912.f;
      store_bytes(quantised + first + i, __builtin_convertvector(rounded, vi) + 128, count);
    });
  }
  std::memset(quantised + args.in_features, 128, shape.padded_in - args.in_features);
}

// sums += scale * (products of the group) for R rows and NV vectors of the panel.
template <int R, int NV>
ML_INLINE void int8_tile(const Int8LinearArgs& args, const Int8Shape& shape, const int8_t* panel, int64_t group,
                         const int32_t* group_sums, int64_t row, float* sums) {
  int64_t begin = group * args.group_size;
  int64_t end = std::min(begin + args.group_size, shape.padded_in);
  const uint8_t* x = args.quantised + row * shape.padded_in;
  vi products[R][NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    vi offset = load_bits<vi>(group_sums + v * W) * -128;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) products[r][v] = offset;
  }
  for (int64_t k = begin; k < end; k += kInt8Depth) {
    vi weights[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weights[v] = load_bits<vi>(panel + k * kPanelWidth + v * W * kInt8Depth);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, x + r * shape.padded_in + k, sizeof four);
      vi bytes = four - vi{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) products[r][v] = byte_products(products[r][v], bytes, weights[v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    vf scale = splat(args.row_scales[(row + r) * shape.num_groups + group]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* at = sums + r * kPanelWidth + v * W;
      store(at, __builtin_convertvector(products[r][v], vf) * scale + load(at));
    }
  }
}

// One panel of 64 outputs for rows [begin, end).
template <class T>
void int8_panel(const Int8LinearArgs& args, const Int8Shape& shape, int64_t panel, int64_t begin, int64_t end) {
  constexpr int NV = W == 16 ? 4 : 2;
  constexpr int64_t strip = NV * W;
  int64_t first = panel * kPanelWidth, width = std::min(kPanelWidth, args.out_features - first);
  float* sums = static_cast<float*>(scratch((end - begin) * kPanelWidth * sizeof(float)));
  std::fill_n(sums, (end - begin) * kPanelWidth, 0.f);
  const int8_t* weights = args.packed + first * shape.padded_in;
  for (int64_t group = 0; group < shape.num_groups; ++group) {
    for (int64_t column = 0; column < width; column += strip) {
      const int8_t* at = weights + column * kInt8Depth;
      const int32_t* group_sums = args.group_sums + group * shape.padded_out + first + column;
      float* to = sums + column;
      int64_t row = begin;
      for (; row + 4 <= end; row += 4, to += 4 * kPanelWidth) int8_tile<4, NV>(args, shape, at, group, group_sums, row, to);
      if (end - row == 3) int8_tile<3, NV>(args, shape, at, group, group_sums, row, to);
      if (end - row == 2) int8_tile<2, NV>(args, shape, at, group, group_sums, row, to);
      if (end - row == 1) int8_tile<1, NV>(args, shape, at, group, group_sums, row, to);
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(args.out.data) + row * args.out.stride + first;
    const float* from = sums + (row - begin) * kPanelWidth;
    for_vectors(width, [&](int64_t i, auto count) {
      vf value = load(from + i) * load(args.scales + first + i, count);
      if (args.bias) value += load(args.bias + first + i, count);
      store(out + i, value, count);
    });
  }
}

void int8_linear(const Int8LinearArgs& args) {
  constexpr int64_t kBytesPerThread = 256 * 1024;
  Int8Shape shape(args);
  int64_t num_panels = shape.padded_out / kPanelWidth;
  int64_t bytes = shape.padded_out * shape.padded_in * std::max<int64_t>(1, args.num_rows / 8);
  int64_t threads = std::min(num_threads(), std::max<int64_t>(1, bytes / kBytesPerThread));
  int64_t rows_per_task = rows_per_panel_task(args.num_rows, num_panels, threads);
  int64_t num_chunks = (args.num_rows + rows_per_task - 1) / rows_per_task;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    for_rows(args.num_rows, args.in_features, [&](int64_t row) { quantise_row<T>(args, shape, row); });
    parallel(num_panels * num_chunks, threads, [&](int64_t task, int64_t) {
      int64_t begin = task % num_chunks * rows_per_task;
      int8_panel<T>(args, shape, task / num_chunks, begin, std::min(args.num_rows, begin + rows_per_task));
    });
  });
}

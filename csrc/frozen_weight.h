// Frozen weights as they lie in memory, a line of neighbours at a time as floats: plain ones, and those of 8 bits.
#pragma once
#include <algorithm>

#include "vec.h"

namespace PCS_ISA {

constexpr int64_t SCALED = 64;  // codes of 8 bits that share a scale

PCS_INLINE vf load_codes(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t vb __attribute__((vector_size(W)));
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vf);
#endif
}
PCS_INLINE vf load_codes(const int8_t* p, Whole) { return load_codes(p); }
PCS_INLINE vf load_codes(const int8_t* p, int n) {
  int8_t buffer[W] = {};
  std::memcpy(buffer, p, size_t(n));
  return load_codes(buffer);
}

// Rows of float or bfloat16.
template <class E>
struct PlainRows {
  static constexpr bool PLAIN = true;
  const E* weight;
  int64_t width;

  // out[0 .. n) = the elements of a row from `first` on.
  PCS_INLINE void line(float* out, int64_t row, int64_t first, int64_t n) const {
    const E* from = weight + row * width + first;
    over(n, [&](int64_t i, auto lanes) { store_n(out + i, load_n(from + i, lanes), lanes); });
  }
};

// Rows of 8-bit codes with a bfloat16 scale for every 64 of them.
struct ScaledRows {
  static constexpr bool PLAIN = false;
  const int8_t* codes;
  const uint16_t* scales;
  int64_t width, blocks = (width + SCALED - 1) / SCALED;

  PCS_INLINE void line(float* out, int64_t row, int64_t first, int64_t n) const {
    const int8_t* from = codes + row * width;
    for (int64_t k = first; k < first + n;) {
      const int64_t end = std::min(first + n, (k / SCALED + 1) * SCALED);
      const vf scale = splat(to_float(bf16{scales[row * blocks + k / SCALED]}));
      over(end - k, [&](int64_t i, auto lanes) {
        store_n(out + k - first + i, load_codes(from + k + i, lanes) * scale, lanes);
      });
      k = end;
    }
  }
};

// The rows of a W x W matrix become its columns.
PCS_INLINE void transpose(vf (&r)[W]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#elif defined(__AVX512F__)
  __m512 t[16];
  __m512d u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_pd((__m512d)t[i], (__m512d)t[i + 2]);
    u[i + 1] = _mm512_unpackhi_pd((__m512d)t[i], (__m512d)t[i + 2]);
    u[i + 2] = _mm512_unpacklo_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
    u[i + 3] = _mm512_unpackhi_pd((__m512d)t[i + 1], (__m512d)t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // a quarter of u[4 g + i] is column i, 4 + i, 8 + i or 12 + i of rows 4 g to 4 g + 3
    const __m512d even = _mm512_shuffle_f64x2(u[i], u[4 + i], 0x88), odd = _mm512_shuffle_f64x2(u[i], u[4 + i], 0xDD);
    const __m512d even2 = _mm512_shuffle_f64x2(u[8 + i], u[12 + i], 0x88);
    const __m512d odd2 = _mm512_shuffle_f64x2(u[8 + i], u[12 + i], 0xDD);
    r[i] = (vf)_mm512_shuffle_f64x2(even, even2, 0x88);
    r[4 + i] = (vf)_mm512_shuffle_f64x2(odd, odd2, 0x88);
    r[8 + i] = (vf)_mm512_shuffle_f64x2(even, even2, 0xDD);
    r[12 + i] = (vf)_mm512_shuffle_f64x2(odd, odd2, 0xDD);
  }
#else
  float rows[W][W];
  for (int i = 0; i < W; i++) store(rows[i], r[i]);
  for (int i = 0; i < W; i++)
    for (int lane = 0; lane < W; lane++) r[i][lane] = rows[lane][i];
#endif
}

}  // namespace PCS_ISA

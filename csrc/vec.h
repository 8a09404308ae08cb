// Vectors of W floats in the compiler's own vector types: one source for SSE2, AVX2, AVX-512 and other architectures.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define PCS_INLINE inline __attribute__((always_inline))

namespace PCS_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

PCS_INLINE vf splat(float x) { return x - vf{}; }
PCS_INLINE vi splat_i(int32_t x) { return x - vi{}; }

PCS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
PCS_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

PCS_INLINE float to_float(float x) { return x; }
PCS_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PCS_INLINE uint16_t round_bf16(float f) {  // to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return uint16_t((u >> 16) | 0x40);
  return uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
template <class T>
PCS_INLINE T from_float(float f);
template <>
PCS_INLINE float from_float<float>(float f) {
  return f;
}
template <>
PCS_INLINE bf16 from_float<bf16>(float f) {
  return bf16{round_bf16(f)};
}

PCS_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PCS_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
PCS_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
PCS_INLINE vu bf16_bits(vf v) {  // in the low halves
  vu u = (vu)v;
  vu rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return (vu)(v == v ? (vi)rounded : (vi)((u >> 16) | 0x40));
}
PCS_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  vh h = __builtin_convertvector(bf16_bits(v), vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

// The first n < W elements; the rest of the vector is zero, and memory behind them is not touched.
template <class T>
PCS_INLINE vf load_n(const T* p, int n) {
  T buffer[W] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
PCS_INLINE void store_n(T* p, vf v, int n) {
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

PCS_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}
PCS_INLINE float reduce_max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lanes[W];
  store(lanes, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
#endif
}

PCS_INLINE vf vsqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf r;
  for (int i = 0; i < W; i++) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// A count of lanes known to be all of them; converts to W.
using Whole = std::integral_constant<int, W>;
template <class T>
PCS_INLINE vf load_n(const T* p, Whole) {
  return load(p);
}
template <class T>
PCS_INLINE void store_n(T* p, vf v, Whole) {
  store(p, v);
}
// body(first, lanes) for n elements in vectors: whole ones, then what is left.
template <class Body>
PCS_INLINE void over(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, Whole{});
  if (i < n) body(i, int(n - i));
}

// Results that will be rounded to T need no more than T's precision.
template <class T>
constexpr bool IS_SHORT = sizeof(T) == 2;

// The polynomial in x with these coefficients, the highest power's first.
template <class... Lower>
PCS_INLINE vf horner(vf x, float highest, Lower... lower) {
  vf p = splat(highest);
  ((p = p * x + lower), ...);
  return p;
}

// 2^x for x <= 127, within 1e-7 (8e-5 for short T) of its value; far below -126 it is next to nothing; NaN stays NaN.
template <class T>
PCS_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 1);  // x less the whole number below it; 0 for -inf
  vf p;
  if constexpr (IS_SHORT<T>) {
    p = horner(f, 7.802451946e-02f, 2.260671785e-01f, 6.958335221e-01f, 9.999252214e-01f);
  } else {
    p = horner(f, 1.877576639e-03f, 8.989340472e-03f, 5.582631742e-02f, 2.401536174e-01f, 6.931530731e-01f,
               9.999999251e-01f);
  }
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);  // p 2^floor(x)
#else
  x = x < -126.0f ? splat(-126.0f) : x;
  const vf shifted = x + 12582912.0f;  // the rounded integer lands in the low mantissa bits
  const vf f = x - (shifted - 12582912.0f);
  vf p;
  if constexpr (IS_SHORT<T>) {
    p = horner(f, 5.517166493e-02f, 2.426111219e-01f, 6.932609862e-01f, 9.999280736e-01f);
  } else {
    p = horner(f, 1.327647152e-03f, 9.675541331e-03f, 5.550713275e-02f, 2.402211972e-01f, 6.931469671e-01f,
               1.000000072f);
  }
  return (vf)((vi)p + ((vi)shifted << 23));
#endif
}
constexpr float LOG2E = 1.4426950408889634f;

// 1 / x for finite x.
template <class T>
PCS_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return IS_SHORT<T> ? r : r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

template <class T>
PCS_INLINE vf sigmoid(vf x) {
  vf e = x * -LOG2E;
  e = e > 126.0f ? splat(126.0f) : e;
  return reciprocal<T>(1.0f + exp2<T>(e));
}

// erf by a rational approximation on [-4, 4]; |error| < 2e-7.
template <class T>
PCS_INLINE vf erf(vf x) {
  x = x > 4.0f ? splat(4.0f) : x;
  x = x < -4.0f ? splat(-4.0f) : x;
  const vf s = x * x;
  const vf p = horner(s, -2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                      -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f);
  const vf q = horner(s, -1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                      -1.42647390514189e-02f);
  return x * p * reciprocal<T>(q);
}

}  // namespace PCS_ISA

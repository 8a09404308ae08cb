// The 8-bit codes of the optimizer's states. The map is analytic: seven decades of evenly spaced values, so decoding is
// an exponent, a mantissa and one multiply-add, and encoding a threshold and a truncation; no table of 256 is searched.
#pragma once
#include <algorithm>
#include <cmath>

#include "vec.h"

namespace PCS_ISA {

constexpr int OCTAVES = 32;          // binary exponents from 2^-24 on; each holds at most one decade's edge
constexpr int FIRST_EXPONENT = 103;  // the biased exponent of 2^-24

// Magnitudes count k = 1, 2, ...: signed code = 127 +- k with k = 0 for zero; unsigned code = k - 1, k = 1 for zero.
// Decade e holds k in [2^e, 2^(e+1)).
template <bool SIGNED>
struct Codec {
  alignas(64) float offset[16], slope[16];            // decode, by the low bits of k's exponent
  alignas(64) float scale[16], shift[16], start[16];  // encode, by decade + 1 (0: zero)
  alignas(64) float edge[OCTAVES];
  alignas(64) int32_t below[OCTAVES];  // decade + 1 under the octave's edge
  float values[256];

  Codec() {
    const int first = SIGNED ? 0 : 1, top = first + 7;  // decades by k's exponent; `top` is the single code 1.0
    double firsts[9], lasts[9];
    for (int i = 0; i < 16; i++) offset[i] = slope[i] = scale[i] = shift[i] = start[i] = 0;
    start[0] = shift[0] = SIGNED ? 0.0f : 1.0f;
    for (int e = first; e <= top; e++) {
      const double unit = std::pow(10.0, e - first - 6), count = std::ldexp(1.0, e);
      const bool one = e == top;
      offset[(e + 127) & 15] = one ? 1.0f : float(unit * (0.1 - 0.9 + 0.45 / count));
      slope[(e + 127) & 15] = one ? 0.0f : float(unit * 0.9);
      const int d = e - first + 1;
      scale[d] = one ? 0.0f : float(count / (0.9 * unit));
      shift[d] = one ? float(count) : float(count - count / 9.0);
      start[d] = float(count);
      firsts[d] = one ? 1.0 : unit * (0.1 + 0.45 / count);
      lasts[d] = one ? 1.0 : unit * (1.0 - 0.45 / count);
    }
    lasts[0] = 0.0;
    int d = 0;
    for (int o = 0; o < OCTAVES; o++) {
      const double upper = std::ldexp(1.0, o - 24 + 1);
      below[o] = d;
      edge[o] = INFINITY;
      if (d < 8 && (lasts[d] + firsts[d + 1]) / 2 < upper) {
        edge[o] = float((lasts[d] + firsts[d + 1]) / 2);
        d++;
      }
    }
    below[24] = 8;  // exactly 1.0 and beyond
    for (int code = 0; code < 256; code++) values[code] = decode_one(code);
  }

  float decode_one(int code) const {
    const int k = SIGNED ? std::abs(code - 127) : code + 1;
    if (k == 0 || (!SIGNED && k == 1)) return 0.0f;
    const int e = std::ilogb(double(k));
    const float magnitude = slope[(e + 127) & 15] * float(k / std::ldexp(1.0, e)) + offset[(e + 127) & 15];
    return SIGNED && code < 127 ? -magnitude : magnitude;
  }

  uint8_t encode_one(float x) const {
    const float magnitude = std::fabs(x);
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    const int octave = std::min(std::max(int(bits >> 23) - FIRST_EXPONENT, 0), 24);
    const int d = below[octave] + (magnitude > edge[octave]);
    const int k = int(std::max(std::min(magnitude * scale[d] + shift[d], 2 * start[d] - 0.5f), start[d]));
    return uint8_t(SIGNED ? (x < 0 ? 127 - std::min(k, 127) : 127 + k) : k - 1);
  }

  // Whether the caller's map is this one (to the rounding of its sums).
  bool matches(const float* map) const {
    for (int i = 0; i < 256; i++)
      if (std::fabs(map[i] - values[i]) > 1e-6f * std::fabs(values[i]) + 1e-12f) return false;
    return true;
  }
};

template <bool SIGNED>
const Codec<SIGNED>& codec() {
  static const Codec<SIGNED> one;
  return one;
}

// The codec's tables in registers, for the inner loops.
#if defined(__AVX512F__)
template <bool SIGNED>
struct Decoder {
  __m512 slope, offset;
  explicit Decoder(const Codec<SIGNED>& c) : slope(_mm512_load_ps(c.slope)), offset(_mm512_load_ps(c.offset)) {}

  PCS_INLINE vf operator()(const uint8_t* codes) const {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i from_zero = _mm512_sub_epi32(code, _mm512_set1_epi32(127));
    const __m512i k = SIGNED ? _mm512_abs_epi32(from_zero) : _mm512_add_epi32(code, _mm512_set1_epi32(1));
    const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(k));
    const __m512i e = _mm512_srli_epi32(bits, 23);  // permutes look at the low four bits
    const __m512 mantissa = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        bits, _mm512_set1_epi32(0x7FFFFF), _mm512_set1_epi32(0x3F800000), 0xEA));  // (bits & low) | one
    const __m512 value =
        _mm512_maskz_fmadd_ps(_mm512_cmpgt_epi32_mask(k, _mm512_set1_epi32(SIGNED ? 0 : 1)),
                              _mm512_permutexvar_ps(e, slope), mantissa, _mm512_permutexvar_ps(e, offset));
    if constexpr (!SIGNED) return (vf)value;
    const __m512i sign = _mm512_and_epi32(from_zero, _mm512_set1_epi32(int(0x80000000u)));
    return (vf)_mm512_or_ps(value, _mm512_castsi512_ps(sign));
  }
};

template <bool SIGNED>
struct Encoder {
  __m512 edge_low, edge_high, start, scale, shift;
  __m512i below_low, below_high;
  explicit Encoder(const Codec<SIGNED>& c)
      : edge_low(_mm512_load_ps(c.edge)), edge_high(_mm512_load_ps(c.edge + 16)), start(_mm512_load_ps(c.start)),
        scale(_mm512_load_ps(c.scale)), shift(_mm512_load_ps(c.shift)), below_low(_mm512_load_si512(c.below)),
        below_high(_mm512_load_si512(c.below + 16)) {}

  PCS_INLINE void operator()(uint8_t* codes, vf value) const {
    const __m512 x = (__m512)value, magnitude = _mm512_abs_ps(x);
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(magnitude), 23);
    const __m512i octave = _mm512_subs_epu16(exponent, _mm512_set1_epi32(FIRST_EXPONENT));  // stops at zero
    const __m512 edge = _mm512_permutex2var_ps(edge_low, octave, edge_high);
    __m512i d = _mm512_permutex2var_epi32(below_low, octave, below_high);
    d = _mm512_mask_add_epi32(d, _mm512_cmp_ps_mask(magnitude, edge, _CMP_GT_OQ), d, _mm512_set1_epi32(1));
    const __m512 first = _mm512_permutexvar_ps(d, start);
    const __m512 place = _mm512_fmadd_ps(magnitude, _mm512_permutexvar_ps(d, scale), _mm512_permutexvar_ps(d, shift));
    const __m512 end = _mm512_fmadd_ps(first, _mm512_set1_ps(2.0f), _mm512_set1_ps(-0.5f));
    const __m512i k = _mm512_cvttps_epi32(_mm512_max_ps(_mm512_min_ps(place, end), first));
    __m512i code;
    if constexpr (SIGNED) {
      const __m512i zero = _mm512_set1_epi32(127);
      code = _mm512_mask_mov_epi32(_mm512_add_epi32(zero, k), _mm512_movepi32_mask(_mm512_castps_si512(x)),
                                   _mm512_subs_epu16(zero, k));
    } else {
      code = _mm512_sub_epi32(k, _mm512_set1_epi32(1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(code));
  }
};
#else
template <bool SIGNED>
struct Decoder {
  const float* values;
  explicit Decoder(const Codec<SIGNED>& c) : values(c.values) {}
  PCS_INLINE vf operator()(const uint8_t* codes) const {
    float x[W];
    for (int i = 0; i < W; i++) x[i] = values[codes[i]];
    return load(x);
  }
};
template <bool SIGNED>
struct Encoder {
  const Codec<SIGNED>& codec;
  explicit Encoder(const Codec<SIGNED>& c) : codec(c) {}
  PCS_INLINE void operator()(uint8_t* codes, vf value) const {
    for (int i = 0; i < W; i++) codes[i] = codec.encode_one(value[i]);
  }
};
#endif

template <class D>
PCS_INLINE vf decode(const D& decoder, const uint8_t* codes, Whole) {
  return decoder(codes);
}
template <class D>
PCS_INLINE vf decode(const D& decoder, const uint8_t* codes, int lanes) {
  uint8_t buffer[W] = {};
  std::memcpy(buffer, codes, lanes);
  return decoder(buffer);
}
template <class D>
PCS_INLINE void encode(const D& encoder, uint8_t* codes, vf value, Whole) {
  encoder(codes, value);
}
template <class D>
PCS_INLINE void encode(const D& encoder, uint8_t* codes, vf value, int lanes) {
  uint8_t buffer[W];
  encoder(buffer, value);
  std::memcpy(codes, buffer, lanes);
}

}  // namespace PCS_ISA

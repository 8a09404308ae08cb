// AdamW with 8-bit states. The code map is analytic: seven decades of evenly spaced values, so decoding is an exponent,
// a mantissa and one multiply-add, and encoding a threshold and a floor; no table of 256 is searched.
#include <cmath>

#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace PCS_ISA {
namespace {

constexpr int64_t MAX_BLOCK = 4096;
constexpr int OCTAVES = 32;          // binary exponents from 2^-24 on; each holds at most one decade's edge
constexpr int FIRST_EXPONENT = 103;  // the biased exponent of 2^-24

// Magnitudes count k = 1, 2, ...: signed code = 127 +- k with k = 0 for zero; unsigned code = k - 1 with k = 1 for zero.
// Decade e holds k in [2^e, 2^(e+1)).
template <bool SIGNED>
struct Codec {
  alignas(64) float offset[16], slope[16];                     // decode, by the low bits of k's exponent
  alignas(64) float scale[16], shift[16], start[16];            // encode, by decade + 1 (0: zero)
  alignas(64) float edge[OCTAVES];
  alignas(64) int32_t below[OCTAVES];                          // decade + 1 under the octave's edge
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
    const __m512 value = _mm512_maskz_fmadd_ps(_mm512_cmpgt_epi32_mask(k, _mm512_set1_epi32(SIGNED ? 0 : 1)),
                                               _mm512_permutexvar_ps(e, slope), mantissa,
                                               _mm512_permutexvar_ps(e, offset));
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

PCS_INLINE vu hash32(vu x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
inline uint32_t hash32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

template <class P>
PCS_INLINE vf rounded(vf value, bool, uint32_t, uint32_t) {
  return value;
}
// bfloat16 drawn up with the probability of the remainder; the same bits as the reference for (seed, step, element).
template <>
PCS_INLINE vf rounded<bf16>(vf value, bool stochastically, uint32_t key, uint32_t element) {
  if (!stochastically) return value;
  vu lane;
  for (int i = 0; i < W; i++) lane[i] = uint32_t(i);
  const vu random = hash32((lane + element) ^ key) & 0xFFFFu;
  const vf drawn = (vf)(((vu)value + random) & 0xFFFF0000u);
  const vi finite = ((vi)value & 0x7F800000) != 0x7F800000;
  return finite ? drawn : value;
}

// The square root by the reciprocal estimate and one Newton step.
PCS_INLINE vf root(vf v) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rsqrt14_ps((__m512)v), s = v * r;
  const vf refined = s * (1.5f - 0.5f * s * r);
  return v > 1e-37f ? refined : v;  // below, the root is nothing beside eps
#else
  return vsqrt(v);
#endif
}

struct Update {
  float beta1, beta2, fresh1, fresh2, scale, keep_before, keep_after, size, eps;
  bool stochastic;
  uint32_t key;
  explicit Update(const AdamW& s) {
    const double correction2 = std::sqrt(1.0 - std::pow(double(s.beta2), double(s.step)));
    beta1 = float(s.beta1), fresh1 = float(1.0 - s.beta1);  // 1 - 0.999f would be off by 1e-5
    beta2 = float(s.beta2), fresh2 = float(1.0 - s.beta2);
    scale = float(s.grad_scale);
    const float keep = float(1.0 - double(s.lr) * s.weight_decay);
    keep_before = s.decay_first ? keep : 1.0f;
    keep_after = s.decay_first ? 1.0f : keep;
    size = float(s.lr * correction2 / (1.0 - std::pow(double(s.beta1), double(s.step))));
    eps = float(s.eps * correction2);
    stochastic = s.stochastic;
    key = hash32(hash32(uint32_t(s.seed)) ^ uint32_t(s.step));
  }
  PCS_INLINE void moments(vf g, vf& m, vf& v) const {
    g = g * scale;
    m = m * beta1 + g * fresh1;
    v = v * beta2 + g * g * fresh2;
  }
  PCS_INLINE vf parameter(vf p, vf m, vf v) const {
    return (p * keep_before - size * m * reciprocal<float>(root(v) + eps)) * keep_after;
  }
};

// One block. Pointers and coefficients come by value: what is stored as bytes could otherwise be any of them, and the
// compiler would read them anew for every vector.
template <class P, class G>
void step_block(P* p, const G* g, uint8_t* m_codes, uint8_t* v_codes, float* m_scale, float* v_scale, int64_t count,
                const Update update, const Codec<true>& m_codec, const Codec<false>& v_codec, uint32_t key,
                uint32_t element) {
  alignas(64) float m_new[MAX_BLOCK], v_new[MAX_BLOCK];
  const float m_before = *m_scale, v_before = *v_scale;
  vf m_top = {}, v_top = {};
  const Decoder<true> decode_m(m_codec);
  const Decoder<false> decode_v(v_codec);
  over(count, [&](int64_t i, auto lanes) {
    vf m = decode(decode_m, m_codes + i, lanes) * m_before, v = decode(decode_v, v_codes + i, lanes) * v_before;
    update.moments(load_n(g + i, lanes), m, v);
    const vf next = update.parameter(load_n(p + i, lanes), m, v);
    store_n(p + i, rounded<P>(next, update.stochastic, key, element + uint32_t(i)), lanes);
    if constexpr (!std::is_same_v<decltype(lanes), Whole>)
      m = load_n(reinterpret_cast<const float*>(&m), lanes), v = load_n(reinterpret_cast<const float*>(&v), lanes);
    m_top = vmax((vf)((vi)m & 0x7FFFFFFF), m_top);
    v_top = vmax(v, v_top);
    store(m_new + i, m);
    store(v_new + i, v);
  });
  const float m_after = reduce_max(m_top), v_after = reduce_max(v_top);
  *m_scale = m_after;
  *v_scale = v_after;
  // Under 5e-38 the reciprocal overflows; such states are zero for every purpose.
  const float m_inverse = m_after > 5e-38f ? 1.0f / m_after : 0.0f, v_inverse = v_after > 5e-38f ? 1.0f / v_after : 0.0f;
  const Encoder<true> encode_m(m_codec);
  const Encoder<false> encode_v(v_codec);
  over(count, [&](int64_t i, auto lanes) {
    encode(encode_m, m_codes + i, load(m_new + i) * m_inverse, lanes);
    encode(encode_v, v_codes + i, load(v_new + i) * v_inverse, lanes);
  });
}

template <class P, class G>
void step_8bit(P* p, const G* g, uint8_t* m_codes, uint8_t* v_codes, float* m_scales, float* v_scales, int64_t n,
               const AdamW& s, int threads) {
  const Update update(s);
  const Codec<true>& m_codec = codec<true>();
  const Codec<false>& v_codec = codec<false>();
  const int64_t size = s.block_size, blocks = (n + size - 1) / size, run = std::max<int64_t>(1, 8192 / size);
  parallel_for((blocks + run - 1) / run, threads, [&](int64_t task) {
    for (int64_t block = task * run; block < std::min(blocks, (task + 1) * run); block++) {
      const int64_t at = block * size;
      step_block(p + at, g + at, m_codes + at, v_codes + at, m_scales + block, v_scales + block,
                 std::min(size, n - at), update, m_codec, v_codec, hash32(uint32_t(uint64_t(at) >> 32) ^ update.key),
                 uint32_t(at));
    }
  });
}

template <class P, class G>
void step_floats(P* p, const G* g, float* ms, float* vs, int64_t count, const Update update, uint32_t key,
                 uint32_t element) {
  over(count, [&](int64_t i, auto lanes) {
    vf m = load_n(ms + i, lanes), v = load_n(vs + i, lanes);
    update.moments(load_n(g + i, lanes), m, v);
    const vf next = update.parameter(load_n(p + i, lanes), m, v);
    store_n(p + i, rounded<P>(next, update.stochastic, key, element + uint32_t(i)), lanes);
    store_n(ms + i, m, lanes);
    store_n(vs + i, v, lanes);
  });
}

template <class P, class G>
void step_32bit(P* p, const G* g, float* ms, float* vs, int64_t n, const AdamW& s, int threads) {
  const Update update(s);
  constexpr int64_t run = 8192;
  parallel_for((n + run - 1) / run, threads, [&](int64_t task) {
    const int64_t at = task * run;
    step_floats(p + at, g + at, ms + at, vs + at, std::min(run, n - at), update,
                hash32(uint32_t(uint64_t(at) >> 32) ^ update.key), uint32_t(at));
  });
}

template <class Run>
void with_types(DType param, DType grad, const Run& run) {
  if (param == BFLOAT16 && grad == BFLOAT16)
    run(bf16{}, bf16{});
  else if (param == BFLOAT16)
    run(bf16{}, 0.0f);
  else
    run(0.0f, 0.0f);
}

}  // namespace

bool adamw8bit_knows(intptr_t qmap, bool is_signed) {
  const float* map = pointer<const float>(qmap);
  return is_signed ? codec<true>().matches(map) : codec<false>().matches(map);
}

void adamw8bit_step(DType param_type, DType grad_type, intptr_t param, intptr_t grad, intptr_t state1, intptr_t state2,
                    intptr_t absmax1, intptr_t absmax2, int64_t n, const AdamW& settings, int threads) {
  with_types(param_type, grad_type, [&](auto p, auto g) {
    step_8bit(pointer<decltype(p)>(param), pointer<const decltype(g)>(grad), pointer<uint8_t>(state1),
              pointer<uint8_t>(state2), pointer<float>(absmax1), pointer<float>(absmax2), n, settings, threads);
  });
}

void adamw32bit_step(DType param_type, DType grad_type, intptr_t param, intptr_t grad, intptr_t exp_avg,
                     intptr_t exp_avg_sq, int64_t n, const AdamW& settings, int threads) {
  with_types(param_type, grad_type, [&](auto p, auto g) {
    step_32bit(pointer<decltype(p)>(param), pointer<const decltype(g)>(grad), pointer<float>(exp_avg),
               pointer<float>(exp_avg_sq), n, settings, threads);
  });
}

}  // namespace PCS_ISA

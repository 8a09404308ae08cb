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
  alignas(64) float scale[16], shift[16], last[16], start[16]; // encode, by decade + 1 (0: zero)
  alignas(64) float edge[OCTAVES];
  alignas(64) float below[OCTAVES];                            // decade + 1 under the octave's edge
  float values[256];

  Codec() {
    const int first = SIGNED ? 0 : 1, top = first + 7;  // decades by k's exponent; `top` is the single code 1.0
    double firsts[9], lasts[9];
    for (int i = 0; i < 16; i++) offset[i] = slope[i] = scale[i] = shift[i] = last[i] = start[i] = 0;
    start[0] = SIGNED ? 0.0f : 1.0f;
    for (int e = first; e <= top; e++) {
      const double unit = std::pow(10.0, e - first - 6), count = std::ldexp(1.0, e);
      const bool one = e == top;
      offset[(e + 127) & 15] = one ? 1.0f : float(unit * (0.1 - 0.9 + 0.45 / count));
      slope[(e + 127) & 15] = one ? 0.0f : float(unit * 0.9);
      const int d = e - first + 1;
      scale[d] = one ? 0.0f : float(count / (0.9 * unit));
      shift[d] = one ? 0.0f : float(-count / 9.0);
      last[d] = one ? 0.0f : float(count - 1);
      start[d] = float(count);
      firsts[d] = one ? 1.0 : unit * (0.1 + 0.45 / count);
      lasts[d] = one ? 1.0 : unit * (1.0 - 0.45 / count);
    }
    lasts[0] = 0.0;
    int d = 0;
    for (int o = 0; o < OCTAVES; o++) {
      const double upper = std::ldexp(1.0, o - 24 + 1);
      below[o] = float(d);
      edge[o] = INFINITY;
      if (d < 8 && (lasts[d] + firsts[d + 1]) / 2 < upper) {
        edge[o] = float((lasts[d] + firsts[d + 1]) / 2);
        d++;
      }
    }
    below[24] = 8.0f;  // exactly 1.0 and beyond
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
    const int d = int(below[octave]) + (magnitude > edge[octave]);
    float f = std::floor(magnitude * scale[d] + shift[d]);
    f = f < last[d] ? f : last[d];
    f = f > 0 ? f : 0;
    const int k = int(start[d] + f);
    return uint8_t(SIGNED ? (x < 0 ? 127 - std::min(k, 127) : 127 + k) : k - 1);
  }

  // Whether the caller's map is this one (to the rounding of its sums).
  bool matches(const float* map) const {
    for (int i = 0; i < 256; i++)
      if (std::fabs(map[i] - values[i]) > 1e-6f * std::fabs(values[i]) + 1e-12f) return false;
    return true;
  }

#if defined(__AVX512F__)
  PCS_INLINE vf decode(const uint8_t* codes) const {
    const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m512i from_zero = _mm512_sub_epi32(code, _mm512_set1_epi32(127));
    const __m512i k = SIGNED ? _mm512_abs_epi32(from_zero) : _mm512_add_epi32(code, _mm512_set1_epi32(1));
    const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(k));
    const __m512i e = _mm512_srli_epi32(bits, 23);  // permutes look at the low four bits
    const __m512 mantissa = _mm512_castsi512_ps(_mm512_or_epi32(
        _mm512_and_epi32(bits, _mm512_set1_epi32(0x7FFFFF)), _mm512_set1_epi32(0x3F800000)));
    __m512 value = _mm512_fmadd_ps(_mm512_permutexvar_ps(e, _mm512_load_ps(slope)), mantissa,
                                   _mm512_permutexvar_ps(e, _mm512_load_ps(offset)));
    if (!SIGNED) return (vf)_mm512_mask_mov_ps(value, _mm512_cmpeq_epi32_mask(code, _mm512_setzero_si512()), _mm512_setzero_ps());
    value = _mm512_maskz_mov_ps(_mm512_cmpneq_epi32_mask(k, _mm512_setzero_si512()), value);
    return (vf)_mm512_or_ps(value, _mm512_castsi512_ps(_mm512_and_epi32(from_zero, _mm512_set1_epi32(int(0x80000000u)))));
  }

  PCS_INLINE void encode(uint8_t* codes, vf value) const {
    const __m512 x = (__m512)value, magnitude = _mm512_abs_ps(x);
    __m512i octave = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(magnitude), 23), _mm512_set1_epi32(FIRST_EXPONENT));
    octave = _mm512_min_epi32(_mm512_max_epi32(octave, _mm512_setzero_si512()), _mm512_set1_epi32(24));
    const __m512 at = _mm512_permutex2var_ps(_mm512_load_ps(edge), octave, _mm512_load_ps(edge + 16));
    __m512 decade = _mm512_permutex2var_ps(_mm512_load_ps(below), octave, _mm512_load_ps(below + 16));
    decade = _mm512_mask_add_ps(decade, _mm512_cmp_ps_mask(magnitude, at, _CMP_GT_OQ), decade, _mm512_set1_ps(1.0f));
    const __m512i d = _mm512_cvttps_epi32(decade);
    __m512 f = _mm512_fmadd_ps(magnitude, _mm512_permutexvar_ps(d, _mm512_load_ps(scale)),
                               _mm512_permutexvar_ps(d, _mm512_load_ps(shift)));
    f = _mm512_roundscale_ps(f, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    f = _mm512_max_ps(_mm512_min_ps(f, _mm512_permutexvar_ps(d, _mm512_load_ps(last))), _mm512_setzero_ps());
    __m512i k = _mm512_cvttps_epi32(_mm512_add_ps(f, _mm512_permutexvar_ps(d, _mm512_load_ps(start))));
    if constexpr (SIGNED) {
      const __m512i bias = _mm512_set1_epi32(127);
      const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
      k = _mm512_mask_sub_epi32(_mm512_add_epi32(bias, k), negative, bias, _mm512_min_epi32(k, bias));
    } else {
      k = _mm512_sub_epi32(k, _mm512_set1_epi32(1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(k));
  }
#else
  PCS_INLINE vf decode(const uint8_t* codes) const {
    float x[W];
    for (int i = 0; i < W; i++) x[i] = values[codes[i]];
    return load(x);
  }
  PCS_INLINE void encode(uint8_t* codes, vf value) const {
    for (int i = 0; i < W; i++) codes[i] = encode_one(value[i]);
  }
#endif
};

// The codec over `lanes` codes.
template <class C>
PCS_INLINE vf decoded(const C& codec, const uint8_t* codes, Whole) {
  return codec.decode(codes);
}
template <class C>
PCS_INLINE vf decoded(const C& codec, const uint8_t* codes, int lanes) {
  uint8_t buffer[W] = {};
  std::memcpy(buffer, codes, lanes);
  return codec.decode(buffer);
}
template <class C>
PCS_INLINE void encoded(const C& codec, uint8_t* codes, vf value, Whole) {
  codec.encode(codes, value);
}
template <class C>
PCS_INLINE void encoded(const C& codec, uint8_t* codes, vf value, int lanes) {
  uint8_t buffer[W];
  codec.encode(buffer, value);
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

struct Update {
  float beta1, beta2, scale, keep_before, keep_after, size, eps;
  uint32_t key;
  explicit Update(const AdamW& s) {
    const double correction2 = std::sqrt(1.0 - std::pow(double(s.beta2), double(s.step)));
    beta1 = s.beta1, beta2 = s.beta2, scale = s.grad_scale;
    const float keep = float(1.0 - double(s.lr) * s.weight_decay);
    keep_before = s.decay_first ? keep : 1.0f;
    keep_after = s.decay_first ? 1.0f : keep;
    size = float(s.lr * correction2 / (1.0 - std::pow(double(s.beta1), double(s.step))));
    eps = float(s.eps * correction2);
    key = hash32(hash32(uint32_t(s.seed)) ^ uint32_t(s.step));
  }
  PCS_INLINE void moments(vf g, vf& m, vf& v) const {
    g = g * scale;
    m = m * beta1 + g * (1.0f - beta1);
    v = v * beta2 + g * g * (1.0f - beta2);
  }
  PCS_INLINE vf parameter(vf p, vf m, vf v) const {
    return (p * keep_before - size * m * reciprocal<float>(vsqrt(v) + eps)) * keep_after;
  }
};

template <class P, class G>
void step_8bit(P* p, const G* g, uint8_t* m_codes, uint8_t* v_codes, float* m_scales, float* v_scales,
               const Codec<true>& m_codec, const Codec<false>& v_codec, int64_t n, const AdamW& s, int threads) {
  const Update update(s);
  const int64_t blocks = (n + s.block_size - 1) / s.block_size, run = std::max<int64_t>(1, 8192 / s.block_size);
  parallel_for((blocks + run - 1) / run, threads, [&](int64_t task) {
    alignas(64) float m_new[MAX_BLOCK], v_new[MAX_BLOCK];
    for (int64_t block = task * run; block < std::min(blocks, (task + 1) * run); block++) {
      const int64_t start = block * s.block_size, count = std::min<int64_t>(s.block_size, n - start);
      const uint32_t key = hash32(uint32_t(uint64_t(start) >> 32) ^ update.key);
      vf m_top = {}, v_top = {};
      const float m_scale = m_scales[block], v_scale = v_scales[block];
      over(count, [&](int64_t i, auto lanes) {
        const int64_t at = start + i;
        vf m = decoded(m_codec, m_codes + at, lanes) * m_scale, v = decoded(v_codec, v_codes + at, lanes) * v_scale;
        update.moments(load_n(g + at, lanes), m, v);
        const vf next = update.parameter(load_n(p + at, lanes), m, v);
        store_n(p + at, rounded<P>(next, s.stochastic, key, uint32_t(at)), lanes);
        if constexpr (!std::is_same_v<decltype(lanes), Whole>)
          m = load_n(reinterpret_cast<const float*>(&m), lanes), v = load_n(reinterpret_cast<const float*>(&v), lanes);
        m_top = vmax(m < 0.0f ? -m : m, m_top);
        v_top = vmax(v, v_top);
        store(m_new + i, m);
        store(v_new + i, v);
      });
      m_scales[block] = reduce_max(m_top);
      v_scales[block] = reduce_max(v_top);
      // Under 5e-38 the reciprocal overflows; such states are zero for every purpose.
      const float m_inverse = m_scales[block] > 5e-38f ? 1.0f / m_scales[block] : 0.0f;
      const float v_inverse = v_scales[block] > 5e-38f ? 1.0f / v_scales[block] : 0.0f;
      over(count, [&](int64_t i, auto lanes) {
        encoded(m_codec, m_codes + start + i, load(m_new + i) * m_inverse, lanes);
        encoded(v_codec, v_codes + start + i, load(v_new + i) * v_inverse, lanes);
      });
    }
  });
}

template <class P, class G>
void step_32bit(P* p, const G* g, float* ms, float* vs, int64_t n, const AdamW& s, int threads) {
  const Update update(s);
  constexpr int64_t run = 8192;
  parallel_for((n + run - 1) / run, threads, [&](int64_t task) {
    const uint32_t key = hash32(uint32_t(uint64_t(task * run) >> 32) ^ update.key);
    over(std::min(run, n - task * run), [&](int64_t i, auto lanes) {
      const int64_t at = task * run + i;
      vf m = load_n(ms + at, lanes), v = load_n(vs + at, lanes);
      update.moments(load_n(g + at, lanes), m, v);
      const vf next = update.parameter(load_n(p + at, lanes), m, v);
      store_n(p + at, rounded<P>(next, s.stochastic, key, uint32_t(at)), lanes);
      store_n(ms + at, m, lanes);
      store_n(vs + at, v, lanes);
    });
  });
}

template <bool SIGNED>
const Codec<SIGNED>& codec() {
  static const Codec<SIGNED> one;
  return one;
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
              pointer<uint8_t>(state2), pointer<float>(absmax1), pointer<float>(absmax2), codec<true>(), codec<false>(), n,
              settings, threads);
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

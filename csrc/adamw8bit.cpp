// AdamW with 8-bit states, one pass over memory; bfloat16 parameters may be rounded stochastically.
#include <cstring>

#include "codec.h"
#include "ops.h"
#include "parallel.h"

namespace PCS_ISA {
namespace {

constexpr int64_t MAX_BLOCK = 4096;

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
  float beta1, beta2, fresh1, fresh2, size, eps, keep_before, keep_after, scale;
  bool stochastic;
  uint32_t key;
  explicit Update(const AdamW& s) : stochastic(s.stochastic) {
    const float* row = pointer<const float>(s.row);
    float* const fields[] = {&beta1, &beta2, &fresh1, &fresh2, &size, &eps, &keep_before, &keep_after, &scale};
    for (int i = 0; i < 9; i++) *fields[i] = row[i];
    std::memcpy(&key, row + 10, 4);
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
  const float m_inverse = m_after > 5e-38f ? 1.0f / m_after : 0.0f,
              v_inverse = v_after > 5e-38f ? 1.0f / v_after : 0.0f;
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
      step_block(p + at, g + at, m_codes + at, v_codes + at, m_scales + block, v_scales + block, std::min(size, n - at),
                 update, m_codec, v_codec, hash32(uint32_t(uint64_t(at) >> 32) ^ update.key), uint32_t(at));
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

// Whether the step is taken; it is counted then.
bool counted(const AdamW& s) {
  const float* row = pointer<const float>(s.row);
  if (row[9] == 0.0f || (s.finite && !*pointer<const bool>(s.finite))) return false;
  ++*(pointer<int32_t>(s.row) + 11);
  return true;
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
  if (!counted(settings)) return;
  with_types(param_type, grad_type, [&](auto p, auto g) {
    step_8bit(pointer<decltype(p)>(param), pointer<const decltype(g)>(grad), pointer<uint8_t>(state1),
              pointer<uint8_t>(state2), pointer<float>(absmax1), pointer<float>(absmax2), n, settings, threads);
  });
}

void adamw32bit_step(DType param_type, DType grad_type, intptr_t param, intptr_t grad, intptr_t exp_avg,
                     intptr_t exp_avg_sq, int64_t n, const AdamW& settings, int threads) {
  if (!counted(settings)) return;
  with_types(param_type, grad_type, [&](auto p, auto g) {
    step_32bit(pointer<decltype(p)>(param), pointer<const decltype(g)>(grad), pointer<float>(exp_avg),
               pointer<float>(exp_avg_sq), n, settings, threads);
  });
}

}  // namespace PCS_ISA

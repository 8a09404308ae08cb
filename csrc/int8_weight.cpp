// Weights of 8 bits: rows [O, K] of codes with a bfloat16 scale for every 64 of them; one read and one write each way.
#include "frozen_weight.h"
#include "ops.h"
#include "parallel.h"

namespace PCS_ISA {
namespace {

constexpr int64_t CHUNK = 1 << 15;  // elements a task

typedef int8_t vb __attribute__((vector_size(W)));

PCS_INLINE void store_codes(int8_t* p, vi v) {
  const vb b = __builtin_convertvector(v, vb);
  std::memcpy(p, &b, sizeof b);
}

// body(row, first column, columns) for every block, several rows a task where they are short.
template <class Body>
void for_blocks(int64_t rows, int64_t K, int threads, const Body& body) {
  const int64_t rows_a_task = std::max<int64_t>(1, CHUNK / K), tasks = (rows + rows_a_task - 1) / rows_a_task;
  parallel_for(tasks, threads, [&](int64_t t) {
    for (int64_t r = t * rows_a_task; r < std::min(rows, (t + 1) * rows_a_task); r++)
      for (int64_t k = 0; k < K; k += SCALED) body(r, k, std::min(SCALED, K - k));
  });
}

// The bits of the smallest bfloat16 that is no smaller than x >= 0: no code is beyond 127 then.
PCS_INLINE uint16_t rounded_up(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return uint16_t((u + 0xFFFF) >> 16);
}

PCS_INLINE vi nearest(vf x) {  // to nearest even, for |x| < 2^22
  const vf shifted = x + 12582912.0f;
  return __builtin_convertvector(shifted - 12582912.0f, vi);
}

template <class T>
void quantize(const T* weight, int8_t* codes, uint16_t* scales, int64_t rows, int64_t K, int threads) {
  const int64_t blocks = (K + SCALED - 1) / SCALED;
  for_blocks(rows, K, threads, [=](int64_t r, int64_t k, int64_t n) {
    const T* from = weight + r * K + k;
    int8_t* to = codes + r * K + k;
    vf most = splat(0.0f), zero = splat(0.0f);
    over(n, [&](int64_t i, auto lanes) {
      const vf x = load_n(from + i, lanes);
      most = vmax(most, vmax(x, -x));
      zero += x * 0.0f;  // NaN where a value is NaN or infinite: the scale must say so
    });
    const uint16_t bits = sum(zero) == 0.0f ? rounded_up(reduce_max(most) / 127.0f) : 0x7FC0;
    scales[r * blocks + k / SCALED] = bits;
    const float scale = to_float(bf16{bits});
    const vf divisor = splat(scale == 0.0f ? 1.0f : scale);
    over(n, [&](int64_t i, auto lanes) {
      int8_t buffer[W];
      store_codes(buffer, nearest(load_n(from + i, lanes) / divisor));
      std::memcpy(to + i, buffer, size_t(int(lanes)));
    });
  });
}

template <class T>
void expand(const int8_t* codes, const uint16_t* scales, T* weight, int64_t rows, int64_t K, int threads) {
  const int64_t blocks = (K + SCALED - 1) / SCALED;
  for_blocks(rows, K, threads, [=](int64_t r, int64_t k, int64_t n) {
    const int8_t* from = codes + r * K + k;
    T* to = weight + r * K + k;
    const vf scale = splat(to_float(bf16{scales[r * blocks + k / SCALED]}));
    over(n, [&](int64_t i, auto lanes) { store_n(to + i, load_codes(from + i, lanes) * scale, lanes); });
  });
}

}  // namespace

void int8_quantize(DType dtype, intptr_t weight, intptr_t codes, intptr_t scales, int64_t rows, int64_t K,
                   int threads) {
  if (dtype == BFLOAT16)
    quantize(pointer<const bf16>(weight), pointer<int8_t>(codes), pointer<uint16_t>(scales), rows, K, threads);
  else
    quantize(pointer<const float>(weight), pointer<int8_t>(codes), pointer<uint16_t>(scales), rows, K, threads);
}

void int8_expand(DType dtype, intptr_t codes, intptr_t scales, intptr_t weight, int64_t rows, int64_t K, int threads) {
  if (dtype == BFLOAT16)
    expand(pointer<const int8_t>(codes), pointer<const uint16_t>(scales), pointer<bf16>(weight), rows, K, threads);
  else
    expand(pointer<const int8_t>(codes), pointer<const uint16_t>(scales), pointer<float>(weight), rows, K, threads);
}

}  // namespace PCS_ISA

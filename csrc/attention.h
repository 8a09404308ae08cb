// What self- and cross-attention share: views of [B, H, N, D] tensors and the shuffles between tile layouts.
#pragma once
#include <cmath>

#include "gemm.h"
#include "ops.h"
#include "parallel.h"

namespace PCS_ISA {

// dst[0..n) = src * factor, converted.
template <class T>
PCS_INLINE void write_row(T* dst, const float* src, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(dst + i, load(src + i) * factor);
  if (i < n) store_n(dst + i, load(src + i) * factor, int(n - i));
}

// One row of scores in units of log2, m of them: whole vectors where they lie, then a last part that ends at a whole
// step of the products and holds nothing there.
template <class E>
struct ScoreRow {
  const float* scores;
  float to_log2;
  int64_t whole, rest;
  float last[PADDED<E>];

  PCS_INLINE ScoreRow(const float* row, int64_t m, float factor)
      : scores(row), to_log2(factor), whole(m / W * W), rest(round_up(m, PADDED<E>) - whole) {
    for (int64_t c = 0; c < rest; c++) last[c] = whole + c < m ? row[whole + c] * factor : -INFINITY;
  }
  template <class Take>
  PCS_INLINE void each(const Take& take) const {
    for (int64_t c = 0; c < whole; c += W) take(c, load(scores + c) * to_log2);
    for (int64_t c = 0; c < rest; c += W) take(whole + c, load(last + c));
  }
  PCS_INLINE float top() const {
    vf best = splat(-INFINITY);
    each([&](int64_t, vf x) { best = vmax(x, best); });
    return reduce_max(best);
  }
};

// dst rows (n of them, D wide) = the transpose of src [D, ld].
template <class T>
void write_transposed(T* dst, int64_t stride, const float* src, int64_t ld, int64_t n, int64_t D) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < D; d++) dst[i * stride + d] = from_float<T>(src[d * ld + i]);
}

template <class E, class T>
void copy_transposed(E* dst, int64_t ld, const T* src, int64_t stride, int64_t n, int64_t D) {
  for (int64_t d = 0; d < D; d++) {
    for (int64_t i = 0; i < n; i++) dst[d * ld + i] = convert<E, T>(src[i * stride + d]);
    for (int64_t i = n; i < ld; i++) dst[d * ld + i] = E{};
  }
}

// The query side of one backward block in the layouts its products want. `lanes` queries, padded with zeros.
template <class T>
struct QueryBlock {
  using E = typename Packed<T>::type;
  Buffer<E> as_columns, as_rows;
  QueryBlock(int64_t D, int64_t block) : as_columns(packed_size<E>(block, D)), as_rows(packed_size<E>(D, block)) {}
  void pack(const T* source, int64_t stride, int64_t lanes, int64_t D) {
    pack_rows_as_columns<E, T>(as_columns.get(), source, stride, lanes, D);
    pack_rows<E, T>(as_rows.get(), source, stride, D, lanes);
  }
};

// The key side of one head: k and v as rows of A, k transposed for dq.
template <class T>
struct KeySide {
  using E = typename Packed<T>::type;
  int64_t depth, ld;  // D and M padded to whole steps
  Buffer<E> k, v, k_transposed;
  KeySide(int64_t M, int64_t D)
      : depth(round_up(D, KS<E>)), ld(round_up(M, KS<E>)), k(M * depth), v(M * depth), k_transposed(D * ld) {}
  void load(const T* ks, int64_t k_stride, const T* vs, int64_t v_stride, int64_t M, int64_t D) {
    copy_rows<E, T>(k.get(), depth, ks, k_stride, M, D);
    copy_rows<E, T>(v.get(), depth, vs, v_stride, M, D);
    copy_transposed<E, T>(k_transposed.get(), ld, ks, k_stride, M, D);
  }
};

}  // namespace PCS_ISA

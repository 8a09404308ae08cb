// Small matrix products in registers: C[M, N] = A[M, K] B[K, N] with B packed into panels of NV vectors (pack.h).
#pragma once
#include <algorithm>
#include <type_traits>

#include "pack.h"
#include "tiles.h"

namespace PCS_ISA {

template <class E>
PCS_INLINE vf fma_step(vf acc, const E* a, vf b);
template <>
PCS_INLINE vf fma_step<float>(vf acc, const float* a, vf b) {
  return acc + *a * b;
}
#if defined(__AVX512BF16__)
template <>
PCS_INLINE vf fma_step<bf16>(vf acc, const bf16* a, vf b) {
  int32_t pair;
  std::memcpy(&pair, a, 4);
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
#endif

// acc[ROWS][VECS] += A B over `steps` steps; b advances VECS vectors.
template <int ROWS, int VECS, class E>
PCS_INLINE void micro(vf (&acc)[ROWS][VECS], int64_t steps, const E* a, int64_t lda, const E* b) {
  const float* panel = reinterpret_cast<const float*>(b);
  for (int64_t k = 0; k < steps; k++) {
    vf column[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; v++) column[v] = load(panel + v * W);
    panel += VECS * W;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
#pragma GCC unroll 16
      for (int v = 0; v < VECS; v++) acc[r][v] = fma_step<E>(acc[r][v], a + r * lda + k * KS<E>, column[v]);
    }
  }
}

// One product of a tile: `steps` steps over the rows of `a` and one packed panel `b`.
template <class E>
struct Product {
  const E* a;
  int64_t lda;
  const E* b;
  int64_t steps;
};

// One tile of the sum of two products (the second may have no steps): starts from what `init(row, column)` gives and
// hands each finished vector to `done(row, column, vector)`.
template <int ROWS, int VECS, class E, class Init, class Done>
PCS_INLINE void tile(int64_t row, const Product<E>& p, const Product<E>& p2, const Init& init, const Done& done) {
  vf acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; v++) acc[r][v] = init(row + r, v * W);
  micro<ROWS, VECS, E>(acc, p.steps, p.a + row * p.lda, p.lda, p.b);
  if (p2.steps) micro<ROWS, VECS, E>(acc, p2.steps, p2.a + row * p2.lda, p2.lda, p2.b);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; v++) done(row + r, v * W, acc[r][v]);
}

// Narrow panels take more rows a tile, so that as many sums are in flight.
template <int VECS, class E, class Init, class Done>
void vector_strip(int64_t rows, const Product<E>& p, const Product<E>& p2, const Init& init, const Done& done) {
  constexpr int ROWS = std::min(16, MR * NV / VECS);
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) tile<ROWS, VECS, E>(i, p, p2, init, done);
  if constexpr (ROWS > 8)
    for (; i + 8 <= rows; i += 8) tile<8, VECS, E>(i, p, p2, init, done);
  if constexpr (ROWS > 4)
    for (; i + 4 <= rows; i += 4) tile<4, VECS, E>(i, p, p2, init, done);
  for (; i + 2 <= rows; i += 2) tile<2, VECS, E>(i, p, p2, init, done);
  if (i < rows) tile<1, VECS, E>(i, p, p2, init, done);
}

#if defined(__AMX_BF16__)
// Tiles 0 to 3 += rows of A times two vectors' columns of a panel of VECS.
template <int VECS, bool TWO_ROWS, bool TWO_COLUMNS>
PCS_INLINE void multiply_tiles(const Product<bf16>& p, int64_t row, int v) {
  const bf16* a = p.a + row * p.lda;
  const float* b = reinterpret_cast<const float*>(p.b) + v * W;
  for (int64_t k = 0; k < p.steps; k++, a += 32, b += 16 * VECS * W) {
    _tile_loadd(4, a, p.lda * 2);
    _tile_loadd(6, b, VECS * W * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_COLUMNS) {
      _tile_loadd(7, b + W, VECS * W * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      _tile_loadd(5, a + 16 * p.lda, p.lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Tiles 0 to 3 = zero, or what stands in c; and back into c.
template <bool TWO_ROWS, bool TWO_COLUMNS>
PCS_INLINE void load_tiles(const float* c, int64_t ldc, bool add) {
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (TWO_COLUMNS) _tile_loadd(1, c + W, ldc * 4);
    if constexpr (TWO_ROWS) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, c + 16 * ldc + W, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (TWO_COLUMNS) _tile_zero(1);
    if constexpr (TWO_ROWS) _tile_zero(2);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_zero(3);
  }
}
template <bool TWO_ROWS, bool TWO_COLUMNS>
PCS_INLINE void store_tiles(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  if constexpr (TWO_COLUMNS) _tile_stored(1, c + W, ldc * 4);
  if constexpr (TWO_ROWS) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, c + 16 * ldc + W, ldc * 4);
}

// block(first row, rows, vector, whether above 16 rows, whether two vectors) for all of a panel, with the tiles shaped.
template <int VECS, class Block>
PCS_INLINE void over_tiles(int64_t rows, const Block& block) {
  for (int64_t i = 0; i < rows; i += 32) {
    const int height = int(std::min<int64_t>(32, rows - i)), first = std::min(height, 16);
    shape_tiles(first, height - first);
    auto columns = [&](auto two_rows) {
#pragma GCC unroll 2
      for (int v = 0; v + 2 <= VECS; v += 2) block(i, height, v, two_rows, std::true_type{});
      if constexpr (VECS % 2) block(i, height, VECS - 1, two_rows, std::false_type{});
    };
    if (height > 16)
      columns(std::true_type{});
    else
      columns(std::false_type{});
  }
}
#endif

// One panel of A B + A2 B2; see gemm2.
template <int VECS, class E, class Init, class Done>
void strip(int64_t rows, const Product<E>& p, const Product<E>& p2, const Init& init, const Done& done) {
#if defined(__AMX_BF16__)
  if constexpr (IN_TILES<E>) {
    alignas(64) float sums[32][2 * W];
    written(p.a);
    over_tiles<VECS>(rows, [&](int64_t row, int height, int v, auto two_rows, auto two_columns) {
      load_tiles<two_rows, two_columns>(nullptr, 0, false);
      multiply_tiles<VECS, two_rows, two_columns>(p, row, v);
      if (p2.steps) multiply_tiles<VECS, two_rows, two_columns>(p2, row, v);
      store_tiles<two_rows, two_columns>(sums[0], 2 * W);
      for (int r = 0; r < height; r++) {
        done(row + r, v * W, init(row + r, v * W) + load(sums[r]));
        if constexpr (two_columns) done(row + r, (v + 1) * W, init(row + r, (v + 1) * W) + load(sums[r] + W));
      }
    });
    return;
  }
#endif
  vector_strip<VECS, E>(rows, p, p2, init, done);
}

// panel(its vectors, its first column) for all panels of `columns`.
template <class Panel>
PCS_INLINE void over_panels(int64_t columns, const Panel& panel) {
  for (int64_t j = 0; j < columns; j += NR) {
    switch (int((std::min<int64_t>(NR, columns - j) + W - 1) / W)) {
      case 1: panel(std::integral_constant<int, 1>{}, j); break;
      case 2: panel(std::integral_constant<int, 2>{}, j); break;
      case 3: panel(std::integral_constant<int, (NV > 2 ? 3 : 2)>{}, j); break;
      default: panel(std::integral_constant<int, NV>{}, j); break;
    }
  }
}

// All panels of A B + A2 B2; init(row, column) and done(row, column, vector) see whole-matrix coordinates. Columns
// come in whole vectors, as they were packed: those past the end hold zeros plus `init`.
template <class E, class Init, class Done>
void gemm2(int64_t rows, int64_t columns, const Product<E>& p, const Product<E>& p2, const Init& init,
           const Done& done) {
  over_panels(columns, [&](auto vectors, int64_t j) {
    auto init_at = [&](int64_t r, int64_t c) { return init(r, j + c); };
    auto done_at = [&](int64_t r, int64_t c, vf x) { done(r, j + c, x); };
    const Product<E> at{p.a, p.lda, p.b + j * p.steps * KS<E>, p.steps};
    const Product<E> at2{p2.a, p2.lda, p2.b + j * p2.steps * KS<E>, p2.steps};
    strip<vectors, E>(rows, at, at2, init_at, done_at);
  });
}

template <class E, class Init, class Done>
void gemm(int64_t rows, int64_t columns, int64_t depth, const E* a, int64_t lda, const E* b, const Init& init,
          const Done& done) {
  gemm2<E>(rows, columns, Product<E>{a, lda, b, steps_of<E>(depth)}, Product<E>{nullptr, 0, nullptr, 0}, init, done);
}

PCS_INLINE vf zero_init(int64_t, int64_t) { return vf{}; }

// C (in whole vectors, row stride ldc) = A B, or C += A B.
template <class E>
void gemm_into(float* c, int64_t ldc, bool add, int64_t rows, int64_t columns, int64_t depth, const E* a, int64_t lda,
               const E* b) {
#if defined(__AMX_BF16__)
  if constexpr (IN_TILES<E>) {
    written(a);
    over_panels(columns, [&](auto vectors, int64_t j) {
      const int64_t steps = steps_of<E>(depth);
      const Product<E> p{a, lda, b + j * steps * KS<E>, steps};
      over_tiles<vectors>(rows, [&](int64_t row, int, int v, auto two_rows, auto two_columns) {
        float* to = c + row * ldc + j + v * W;
        load_tiles<two_rows, two_columns>(to, ldc, add);
        multiply_tiles<vectors, two_rows, two_columns>(p, row, v);
        store_tiles<two_rows, two_columns>(to, ldc);
      });
    });
    return;
  }
#endif
  auto done = [=](int64_t r, int64_t x, vf sum) { store(c + r * ldc + x, sum); };
  if (add)
    gemm<E>(rows, columns, depth, a, lda, b, [=](int64_t r, int64_t x) { return load(c + r * ldc + x); }, done);
  else
    gemm<E>(rows, columns, depth, a, lda, b, zero_init, done);
}

// done(row, column, vector of A B, vector of A2 B2): two products of one shape, element by element. `scratch` (row
// stride ld) holds the first one where there are no tiles.
template <class E, class Done>
void gemm_pair(float* scratch, int64_t ld, int64_t rows, int64_t columns, const Product<E>& p, const Product<E>& p2,
               const Done& done) {
#if defined(__AMX_BF16__)
  if constexpr (IN_TILES<E>) {
    written(p.a);
    alignas(64) float sums[2][32][2 * W];
    over_panels(columns, [&](auto vectors, int64_t j) {
      const int64_t skip = j * p.steps * KS<E>;
      const Product<E> at{p.a, p.lda, p.b + skip, p.steps}, at2{p2.a, p2.lda, p2.b + skip, p2.steps};
      over_tiles<vectors>(rows, [&](int64_t row, int height, int v, auto two_rows, auto two_columns) {
        load_tiles<two_rows, two_columns>(nullptr, 0, false);
        multiply_tiles<vectors, two_rows, two_columns>(at, row, v);
        store_tiles<two_rows, two_columns>(sums[0][0], 2 * W);
        load_tiles<two_rows, two_columns>(nullptr, 0, false);
        multiply_tiles<vectors, two_rows, two_columns>(at2, row, v);
        store_tiles<two_rows, two_columns>(sums[1][0], 2 * W);
        for (int r = 0; r < height; r++) {
          done(row + r, j + v * W, load(sums[0][r]), load(sums[1][r]));
          if constexpr (two_columns) done(row + r, j + (v + 1) * W, load(sums[0][r] + W), load(sums[1][r] + W));
        }
      });
    });
    return;
  }
#endif
  const Product<E> none{nullptr, 0, nullptr, 0};
  gemm2<E>(rows, columns, p, none, zero_init, [=](int64_t r, int64_t c, vf x) { store(scratch + r * ld + c, x); });
  gemm2<E>(rows, columns, p2, none, zero_init,
           [=, &done](int64_t r, int64_t c, vf x) { done(r, c, load(scratch + r * ld + c), x); });
}

}  // namespace PCS_ISA

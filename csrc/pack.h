// How the operands of a product lie in memory, and how they get there.
//
// E is the element of the packed operands. float: one multiply-add a step. bf16 (AVX512-BF16 and AMX only): a step
// takes pairs of neighbours in k (one of them, or a tile's 16), so A rows hold pairs and a panel of B holds
// [k / 2][columns][2].
#pragma once
#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace PCS_ISA {

constexpr int NV = W == 16 ? 4 : 2;  // vectors of a register tile
constexpr int MR = 6;                // its rows: MR * NV accumulators, NV columns and a broadcast fit the registers
constexpr int NR = NV * W;           // columns of a full panel

#if defined(__AVX512BF16__)
template <class T>
struct Packed {
  using type = T;  // bf16 stays bf16
};
#else
template <class T>
struct Packed {
  using type = float;
};
#endif

template <class E>
constexpr int PAIR = sizeof(E) == 2 ? 2 : 1;  // neighbours in k that lie side by side
#if defined(__AMX_BF16__)
template <class E>
constexpr bool IN_TILES = sizeof(E) == 2;
#else
template <class E>
constexpr bool IN_TILES = false;
#endif
template <class E>
constexpr int KS = IN_TILES<E> ? 32 : PAIR<E>;  // k per step; operands are padded with zeros to whole steps
template <class E>
constexpr int BLOCK = IN_TILES<E> ? 32 : 4 * MR;  // rows of A that suit the products: callers' blocks are multiples
template <class E>
constexpr int PADDED = KS<E> > W ? KS<E> : W;  // rows of A that vectors write and steps read are a multiple of this

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class E>
constexpr int64_t steps_of(int64_t depth) {
  return (depth + KS<E> - 1) / KS<E>;
}

template <class E>
int64_t packed_size(int64_t columns, int64_t depth) {
  return round_up(depth, KS<E>) * round_up(columns, W);
}

template <class E, class T>
PCS_INLINE E convert(T x);
template <>
PCS_INLINE float convert<float, float>(float x) {
  return x;
}
template <>
PCS_INLINE float convert<float, bf16>(bf16 x) {
  return to_float(x);
}
template <>
PCS_INLINE bf16 convert<bf16, bf16>(bf16 x) {
  return x;
}

// B[k][n] = source[n * ld + k]: the rows of the source become the columns of B.
template <class E, class T>
void pack_rows_as_columns(E* out, const T* source, int64_t ld, int64_t columns, int64_t depth) {
  const int64_t pairs = round_up(depth, KS<E>) / PAIR<E>, whole = depth / PAIR<E>;
  for (int64_t j = 0; j < columns; j += NR) {
    const int64_t filled = std::min<int64_t>(NR, columns - j), width = round_up(filled, W);
    const T* rows = source + j * ld;
    for (int64_t s = 0; s < pairs; s++, out += width * PAIR<E>) {
      if (s < whole) {
        for (int64_t n = 0; n < filled; n++) {
          if constexpr (PAIR<E> == 2)
            std::memcpy(out + 2 * n, rows + n * ld + 2 * s, 4);
          else
            out[n] = convert<E, T>(rows[n * ld + s]);
        }
        for (int64_t n = filled * PAIR<E>; n < width * PAIR<E>; n++) out[n] = E{};
      } else {
        std::fill(out, out + width * PAIR<E>, E{});
        if (s * PAIR<E> < depth)
          for (int64_t n = 0; n < filled; n++) out[n * PAIR<E>] = convert<E, T>(rows[n * ld + s * PAIR<E>]);
      }
    }
  }
}

// `width` pairs (a multiple of W) of two rows' neighbours; without a second row its places are zero.
PCS_INLINE void interleave(bf16* out, const bf16* first, const bf16* second, int64_t width) {
  for (int64_t c = 0; c < width; c += W) {
    vh a, b = {};
    std::memcpy(&a, first + c, sizeof a);
    if (second) std::memcpy(&b, second + c, sizeof b);
    const vu pairs = __builtin_convertvector(a, vu) | (__builtin_convertvector(b, vu) << 16);
    std::memcpy(out + c * 2, &pairs, sizeof pairs);
  }
}

// B[k][n] = source[k * ld + n].
template <class E, class T>
void pack_rows(E* out, const T* source, int64_t ld, int64_t columns, int64_t depth) {
  const int64_t pairs = round_up(depth, KS<E>) / PAIR<E>;
  for (int64_t j = 0; j < columns; j += NR) {
    const int64_t width = round_up(std::min<int64_t>(NR, columns - j), W);
    const int64_t filled = std::min(width, columns - j);
    for (int64_t s = 0; s < pairs; s++) {
      E* to = out + s * width * PAIR<E>;
      if constexpr (std::is_same_v<E, T> && PAIR<E> == 2) {
        const T* row = source + s * 2 * ld + j;
        if (filled == width && s * 2 < depth) {
          interleave(to, row, s * 2 + 1 < depth ? row + ld : nullptr, width);
          continue;
        }
      }
      for (int p = 0; p < PAIR<E>; p++) {
        const int64_t k = s * PAIR<E> + p;
        const T* row = source + k * ld + j;
        for (int64_t n = 0; n < filled; n++) to[n * PAIR<E> + p] = k < depth ? convert<E, T>(row[n]) : E{};
        for (int64_t n = filled; n < width; n++) to[n * PAIR<E> + p] = E{};
      }
    }
    out += pairs * width * PAIR<E>;
  }
}

// Rows of A, padded with zeros to a whole number of steps.
template <class E, class T>
void copy_rows(E* out, int64_t ldo, const T* source, int64_t ld, int64_t rows, int64_t depth) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t k = 0; k < depth; k++) out[i * ldo + k] = convert<E, T>(source[i * ld + k]);
    for (int64_t k = depth; k < ldo; k++) out[i * ldo + k] = E{};
  }
}

}  // namespace PCS_ISA

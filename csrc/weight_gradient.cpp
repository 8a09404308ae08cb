// The gradient of a convolution's or a linear product's weight, as the weight lies in memory. All sums are float32.
//
//   dw[o, tap, c] = sum over m of dy[m, o] x[pixel(m, tap), c]
//
// A product with the pixels as its depth: dy, transposed a block at a time, is A, and the pixels that a tap reads are B,
// whose rows lie as x has them.
#include "frozen_weight.h"
#include "gemm.h"
#include "parallel.h"
#include "pixels.h"

namespace PCS_ISA {
namespace {

constexpr int64_t DEPTH = 256;               // pixels of a block
constexpr int64_t COLUMNS = 256;             // channels of x in a task
constexpr int64_t ROWS = W == 16 ? 48 : 24;  // channels of dy that are transposed together
constexpr int64_t MOST_ROWS = 16 * ROWS;     // and in a task

template <class T>
struct Gradient {
  const T *x, *dy;
  T* dw;
  FrozenShape s;
  bool taps_last;  // dw lies as [O, C, taps], else as [O, taps, C]
  int64_t taps = s.kernel_h * s.kernel_w, pixels = s.B * s.out_h * s.out_w;

  // B: `count` pixels' channels [first, first + n).
  void picture(float* b, const int64_t* sources, int64_t count, int64_t first, int64_t n) const {
    for (int64_t c = 0; c < n; c += W) {
      const int64_t panel = c / NR * NR, filled = round_up(std::min<int64_t>(NR, n - panel), W);
      const int left = int(std::min<int64_t>(W, n - c));
      float* column = b + panel * count + c - panel;
      for (int64_t m = 0; m < count; m++) {
        const T* p = x + sources[m] * s.C + first + c;
        store(column + m * filled, sources[m] < 0 ? vf{} : left == W ? load(p) : load_n(p, left));
      }
    }
  }

  // A: channels [first, first + n) of dy at `count` pixels.
  void seeds(float* a, int64_t pixel, int64_t count, int64_t first, int64_t n) const {
    for (int64_t m = 0; m < count; m += W)
      for (int64_t r = 0; r < n; r += W) {
        const int left = int(std::min<int64_t>(W, n - r));
        vf square[W];
        for (int i = 0; i < W; i++) {
          const T* p = dy + (pixel + m + i) * s.O + first + r;
          square[i] = m + i >= count ? vf{} : left == W ? load(p) : load_n(p, left);
        }
        transpose(square);
        for (int i = 0; i < W; i++) store(a + (r + i) * DEPTH + m, square[i]);
      }
  }

  void run(int64_t tap, int64_t row, int64_t rows, int64_t first, int64_t n) const {
    float* a = scratch(ROWS * DEPTH + DEPTH * COLUMNS + rows * COLUMNS + 2 * DEPTH);
    float *b = a + ROWS * DEPTH, *sums = b + DEPTH * COLUMNS;
    auto sources = reinterpret_cast<int64_t*>(sums + rows * COLUMNS);
    for (int64_t pixel = 0; pixel < pixels; pixel += DEPTH) {
      const int64_t count = std::min(DEPTH, pixels - pixel);
      for (int64_t m = 0; m < count; m++) sources[m] = source(s, false, pixel + m, tap);
      picture(b, sources, count, first, n);
      for (int64_t r = 0; r < rows; r += ROWS) {
        const int64_t high = std::min(ROWS, rows - r);
        seeds(a, pixel, count, row + r, high);
        gemm_into<float>(sums + r * COLUMNS, COLUMNS, pixel > 0, high, n, count, a, DEPTH, b);
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      const float* sum = sums + r * COLUMNS;
      if (taps_last && taps > 1) {
        T* to = dw + ((row + r) * s.C + first) * taps + tap;
        for (int64_t c = 0; c < n; c++) to[c * taps] = from_float<T>(sum[c]);
      } else {
        T* to = dw + ((row + r) * taps + tap) * s.C + first;
        over(n, [&](int64_t c, auto lanes) { store_n(to + c, load_n(sum + c, lanes), lanes); });
      }
    }
  }

  void run_all(int threads) const {
    const int64_t wide = (s.C + COLUMNS - 1) / COLUMNS, tall = (s.O + MOST_ROWS - 1) / MOST_ROWS;
    parallel_for(taps * wide * tall, threads, [&](int64_t task) {
      const int64_t first = task % wide * COLUMNS, row = task / wide % tall * MOST_ROWS;
      run(task / wide / tall, row, std::min(MOST_ROWS, s.O - row), first, std::min(COLUMNS, s.C - first));
    });
  }
};

}  // namespace

void weight_gradient(DType dtype, intptr_t x, intptr_t dy, intptr_t dw, const FrozenShape& s, bool taps_last,
                     int threads) {
  if (dtype == BFLOAT16)
    Gradient<bf16>{pointer<const bf16>(x), pointer<const bf16>(dy), pointer<bf16>(dw), s, taps_last}.run_all(threads);
  else
    Gradient<float>{pointer<const float>(x), pointer<const float>(dy), pointer<float>(dw), s, taps_last}.run_all(
        threads);
}

}  // namespace PCS_ISA

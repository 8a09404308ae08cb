// Convolution and linear product with a frozen weight that is read as it lies in memory, in bfloat16, float32 or 8 bits:
// no packed copy, one form for both directions. All sums are float32.
//
//   forward:  y[m, o]  = sum over tap, c of w[o, tap, c] x[pixel(m, tap), c] + bias[o]
//   backward: dx[m, c] = sum over tap, o of w[o, tap, c] dy[pixel(m, tap), o]
//
// Both are A B with the weight as A, of which a block at a time becomes floats, and the picture as B, of which a block
// at a time is laid out with pixels in the lanes. A block of A serves all the pixels of a task, a block of B all its
// rows, so what converting costs is a few hundredths of the product.
#include "frozen_weight.h"
#include "gemm.h"
#include "parallel.h"
#include "pixels.h"

namespace PCS_ISA {
namespace {

constexpr int64_t PIXELS = 128;              // of a task
constexpr int64_t ROWS = W == 16 ? 48 : 24;  // of A that are converted together
constexpr int64_t MOST_ROWS = 1280;          // of a task
constexpr int64_t DEPTH = 256;               // of a block of A and of B, about
constexpr int64_t LEAST_ROWS = 96;           // of a task that was divided so that every thread has one

// T: elements of the pictures. Rows: how the weight is read.
template <class T, class Rows>
struct Job {
  Rows weight;
  const T *from, *bias;
  T* to;
  FrozenShape s;
  bool backward, taps_last;  // taps_last: w lies as [O, C, taps], else as [O, taps, C]
  int64_t taps = s.kernel_h * s.kernel_w;
  int64_t rows = backward ? s.C : s.O, channels = backward ? s.O : s.C;  // of A; of `from`
  int64_t height = backward ? s.H : s.out_h, width = backward ? s.W : s.out_w,
          pixels = s.B * height * width;  // of `to`
  // A step of the depth: so many channels at one tap, or at all of them. A plain weight has one order of its sums
  // whether its taps are neighbours in memory or not: the same network must predict the same bits in both.
  int64_t together = Rows::PLAIN ? taps : 1;
  int64_t steps = std::max<int64_t>(1, (channels * together + DEPTH - 1) / DEPTH);
  int64_t step = std::min(channels, round_up((channels + steps - 1) / steps, W));
  int64_t lda = round_up(step * together, W);

  // Channels [first, first + n) of `count` pixels as B, the row of channel i at `tap` being i * together + tap.
  void picture(float* b, const int64_t* sources, int64_t count, int64_t first, int64_t n, int64_t tap) const {
    const int64_t depth = n * together;
    for (int64_t m = 0; m < count; m += W) {
      const int64_t panel = m / NR * NR, filled = round_up(std::min<int64_t>(NR, count - panel), W);
      float* column = b + panel * depth + m - panel;
      for (int64_t c = 0; c < n; c += W) {
        const int left = int(std::min<int64_t>(W, n - c));
        vf block[W];
        for (int i = 0; i < W; i++) {
          const int64_t at = m + i < count ? sources[m + i] : -1;
          const T* p = from + at * channels + first + c;
          block[i] = at < 0 ? vf{} : left == W ? load(p) : load_n(p, left);
        }
        transpose(block);
        for (int i = 0; i < left; i++) store(column + ((c + i) * together + tap) * filled, block[i]);
      }
    }
  }

  // `count` rows of the weight from `row` on at these channels, as A; `tap` counts where taps lie apart.
  void block(float* a, float* lines, int64_t row, int64_t count, int64_t first, int64_t n, int64_t tap) const {
    const int64_t inner = s.C;
    const bool spread = together > 1 && !taps_last;  // lines of one tap, whose elements go `taps` apart
    if (!backward && !spread) {
      const int64_t at = together > 1 ? first * taps : tap * inner + first;
      for (int64_t r = 0; r < count; r++) weight.line(a + r * lda, row + r, at, n * together);
    } else if (!backward) {
      for (int64_t r = 0; r < count; r++)
        for (int64_t t = 0; t < taps; t++) {
          weight.line(lines, row + r, t * inner + first, n);
          for (int64_t c = 0; c < n; c++) a[r * lda + c * taps + t] = lines[c];
        }
    } else if (spread) {
      for (int64_t o = 0; o < n; o++)
        for (int64_t t = 0; t < taps; t++) {
          weight.line(lines, first + o, t * inner + row, count);
          for (int64_t r = 0; r < count; r++) a[r * lda + o * taps + t] = lines[r];
        }
    } else if (together == 1) {
      for (int64_t o = 0; o < n; o += W) {
        const int64_t left = std::min<int64_t>(W, n - o);
        for (int64_t i = 0; i < left; i++) weight.line(lines + i * ROWS, first + o + i, tap * inner + row, count);
        for (int64_t r = 0; r < count; r += W) {
          vf square[W];
          for (int i = 0; i < W; i++) square[i] = load(lines + i * ROWS + r);
          transpose(square);
          for (int i = 0; i < W; i++) store(a + (r + i) * lda + o, square[i]);
        }
      }
    } else {
      for (int64_t o = 0; o < n; o++) {
        weight.line(lines, first + o, row * taps, count * taps);
        for (int64_t r = 0; r < count; r++) std::memcpy(a + r * lda + o * taps, lines + r * taps, size_t(taps) * 4);
      }
    }
  }

  // What the rows' sums became, pixel by pixel.
  void write(const float* sums, int64_t pixel, int64_t count, int64_t row, int64_t n) const {
    for (int64_t m = 0; m < count; m += W)
      for (int64_t r = 0; r < n; r += W) {
        const int left = int(std::min<int64_t>(W, n - r));
        vf square[W];
        for (int i = 0; i < W; i++) square[i] = i < left ? load(sums + (r + i) * PIXELS + m) : vf{};
        transpose(square);
        const vf shift = bias ? load_n(bias + row + r, left) : vf{};
        for (int64_t i = 0; i < std::min<int64_t>(W, count - m); i++) {
          T* at = to + (pixel + m + i) * rows + row + r;
          left == W ? store(at, square[i] + shift) : store_n(at, square[i] + shift, left);
        }
      }
  }

  void run(int64_t pixel, int64_t row, int64_t n) const {
    const int64_t count = std::min(PIXELS, pixels - pixel);
    const int64_t longest = std::max(std::max<int64_t>(W, taps) * ROWS, lda);
    float* lines = scratch(longest + ROWS * lda + lda * PIXELS + n * PIXELS + 2 * taps * PIXELS);
    float *a = lines + longest, *b = a + ROWS * lda, *sums = b + lda * PIXELS;
    auto sources = reinterpret_cast<int64_t*>(sums + n * PIXELS);
    for (int64_t t = 0; t < taps; t++)
      for (int64_t m = 0; m < count; m++) sources[t * count + m] = source(s, backward, pixel + m, t);
    bool add = false;
    for (int64_t apart = 0; apart < taps; apart += together)
      for (int64_t first = 0; first < channels; first += step) {
        const int64_t wide = std::min(step, channels - first);
        for (int64_t t = 0; t < together; t++) picture(b, sources + (apart + t) * count, count, first, wide, t);
        for (int64_t r = 0; r < n; r += ROWS) {
          const int64_t high = std::min(ROWS, n - r);
          block(a, lines, row + r, high, first, wide, apart);
          gemm_into<float>(sums + r * PIXELS, PIXELS, add, high, count, wide * together, a, lda, b);
        }
        add = true;
      }
    write(sums, pixel, count, row, n);
  }

  void run_all(int threads) const {
    const int64_t blocks = (pixels + PIXELS - 1) / PIXELS;
    int64_t n = std::min(rows, MOST_ROWS);
    while (n >= 2 * LEAST_ROWS && blocks * ((rows + n - 1) / n) < 2 * threads) n = round_up((n + 1) / 2, ROWS);
    const int64_t parts = (rows + n - 1) / n;
    parallel_for(blocks * parts, threads, [&](int64_t task) {
      const int64_t row = task % parts * n;
      run(task / parts * PIXELS, row, std::min(n, rows - row));
    });
  }
};

template <class T>
void product(WeightKind kind, const FrozenArguments& a, const FrozenShape& s, bool backward, bool taps_last,
             int threads) {
  const int64_t inputs = s.C * s.kernel_h * s.kernel_w;
  auto run = [&](auto rows) {
    Job<T, decltype(rows)>{rows,     pointer<const T>(a.from), pointer<const T>(a.bias), pointer<T>(a.to), s, backward,
                           taps_last}
        .run_all(threads);
  };
  if (kind == CODES)
    run(ScaledRows{pointer<const int8_t>(a.weight), pointer<const uint16_t>(a.scales), inputs});
  else
    run(PlainRows<T>{pointer<const T>(a.weight), inputs});
}

}  // namespace

void frozen_product(DType dtype, WeightKind kind, const FrozenArguments& arguments, const FrozenShape& shape,
                    bool backward, bool taps_last, int threads) {
  (dtype == BFLOAT16 ? product<bf16> : product<float>)(kind, arguments, shape, backward, taps_last, threads);
}

}  // namespace PCS_ISA

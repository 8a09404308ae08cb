// GroupNorm and SiLU. Moments are taken around a value of the data itself and merged run by run in a fixed order, so
// memory is read once and nothing cancels.
#include <cmath>

#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace PCS_ISA {
namespace {

constexpr int64_t CHUNK = 8192;  // neighbours whose moments are summed in floats; doubles from there on
constexpr int64_t MOST_RUNS = 64;

template <class T>
PCS_INLINE vf silu(vf z) {
  return z * sigmoid<T>(z);
}
template <class T>
PCS_INLINE vf silu_slope(vf z) {
  const vf s = sigmoid<T>(z);
  return s * (1.0f + z * (1.0f - s));
}

// A coefficient that is one number for the whole row (contiguous layout: a row is a channel), or one a channel
// (channels-last layout: a row is a position).
struct Fixed {
  float value;
  template <class N>
  PCS_INLINE vf at(int64_t, N) const {
    return splat(value);
  }
};
struct Along {
  const float* values;
  template <class N>
  PCS_INLINE vf at(int64_t c, N lanes) const {
    return load_n(values + c, lanes);
  }
};

// The inner loops take plain pointers by value, so that stores of bytes cannot make the compiler read them again.

// y = act(x gain + shift)
template <class T, bool SILU, class P>
void affine_row(const T* x, T* y, int64_t n, P gain, P shift) {
  over(n, [=](int64_t i, auto lanes) {
    const vf z = load_n(x + i, lanes) * gain.at(i, lanes) + shift.at(i, lanes);
    store_n(y + i, SILU ? silu<T>(z) : z, lanes);
  });
}

template <class T, bool SILU>
PCS_INLINE vf dz_of(vf dy, vf z) {
  return SILU ? dy * silu_slope<T>(z) : dy;
}

// dx = gain dz - (x - mean) slope - offset
template <class T, bool SILU, class P>
void gradient_row(const T* x, const T* dy, T* dx, int64_t n, P gain, P shift, P mean, P slope, P offset) {
  over(n, [=](int64_t i, auto lanes) {
    const vf v = load_n(x + i, lanes), g = gain.at(i, lanes);
    const vf dz = dz_of<T, SILU>(load_n(dy + i, lanes), v * g + shift.at(i, lanes));
    store_n(dx + i, g * dz - (v - mean.at(i, lanes)) * slope.at(i, lanes) - offset.at(i, lanes), lanes);
  });
}

// Adds ROWS positions to the sums of x - pivot and its square, per channel.
template <int ROWS, class T>
void moments_rows(const T* x, const T* pivots, int64_t C, float* sums, float* squares) {
  over(C, [=](int64_t c, auto lanes) {
    const vf pivot = load_n(pivots + c, lanes);
    vf s = load_n(sums + c, lanes), q = load_n(squares + c, lanes);
    for (int k = 0; k < ROWS; k++) {
      const vf d = load_n(x + k * C + c, lanes) - pivot;
      s += d;
      q += d * d;
    }
    store_n(sums + c, s, lanes);
    store_n(squares + c, q, lanes);
  });
}

// Adds ROWS positions to the sums of dz and dz (x - mean), per channel.
template <int ROWS, class T, bool SILU>
void gradient_sums_rows(const T* x, const T* dy, int64_t C, Along gain, Along shift, Along mean, float* plain,
                        float* weighted) {
  over(C, [=](int64_t c, auto lanes) {
    vf s = load_n(plain + c, lanes), q = load_n(weighted + c, lanes);
    for (int k = 0; k < ROWS; k++) {
      const vf v = load_n(x + k * C + c, lanes);
      const vf z = v * gain.at(c, lanes) + shift.at(c, lanes);
      const vf dz = dz_of<T, SILU>(load_n(dy + k * C + c, lanes), z);
      s += dz;
      q += dz * (v - mean.at(c, lanes));
    }
    store_n(plain + c, s, lanes);
    store_n(weighted + c, q, lanes);
  });
}

struct Moments {  // mean and sum of squares around it, of n values
  double n, mean, m2;
  void merge(double count, double other_mean, double other_m2) {
    const double total = n + count, delta = other_mean - mean;
    mean += delta * count / total;
    m2 += other_m2 + delta * delta * n * count / total;
    n = total;
  }
};

// Merges n neighbours, summed around one of them.
template <class T>
void merge_run(Moments& all, const T* from, int64_t n) {
  const float pivot = to_float(from[0]);
  vf sums[2] = {}, squares[2] = {};
  int64_t i = 0;
  auto add = [&](int k, vf d) {
    sums[k] += d;
    squares[k] += d * d;
  };
  for (; i + 2 * W <= n; i += 2 * W) add(0, load(from + i) - pivot), add(1, load(from + i + W) - pivot);
  double s1 = sum(sums[0] + sums[1]), s2 = sum(squares[0] + squares[1]);
  for (; i < n; i++) {
    const double d = to_float(from[i]) - pivot;
    s1 += d;
    s2 += d * d;
  }
  all.merge(double(n), pivot + s1 / double(n), s2 - s1 * s1 / double(n));
}

template <class T, bool SILU>
struct GroupNorm {
  const T* x;
  int64_t B, C, S, G;  // S spatial positions
  bool channels_last;
  Values weight, bias;       // [C] or null
  const float *mean, *rstd;  // [B, G]
  int threads;
  int64_t per_group = C / G;
  // Channels-last tasks are runs of positions of one sample, cut by the shape alone.
  int64_t run = (S + MOST_RUNS - 1) / MOST_RUNS, runs = (S + run - 1) / run;
  Buffer<float> gains{B * C}, shifts{B * C}, means{B * C};

  float gain_of(int64_t c) const { return weight.address ? weight[c] : 1.0f; }

  void statistics(float* mean, float* rstd, float eps) const {
    auto finish = [=](int64_t bg, const Moments& all) {
      mean[bg] = float(all.mean);
      rstd[bg] = float(1.0 / std::sqrt(all.m2 / all.n + double(eps)));
    };
    if (channels_last) {
      statistics_last(finish);
      return;
    }
    parallel_for(B * G, threads, [&](int64_t bg) {
      const int64_t n = per_group * S;
      Moments all{0, 0, 0};
      for (int64_t i = 0; i < n; i += CHUNK) merge_run(all, x + bg * n + i, std::min(CHUNK, n - i));
      finish(bg, all);
    });
  }

  // Float sums of a run around its first position, then doubles: the mean square less the squared mean loses nothing
  // that counts.
  template <class Finish>
  void statistics_last(const Finish& finish) const {
    Buffer<float> parts(B * runs * 2 * C);
    parallel_for(B * runs, threads, [&](int64_t t) {
      const int64_t first = t % runs * run, n = std::min(run, S - first);
      const T* from = x + (t / runs * S + first) * C;
      float *s = parts.get() + t * 2 * C, *q = s + C;
      std::fill(s, s + 2 * C, 0.0f);
      int64_t i = 0;
      for (; i + 4 <= n; i += 4) moments_rows<4>(from + i * C, from, C, s, q);
      for (; i < n; i++) moments_rows<1>(from + i * C, from, C, s, q);
    });
    const double count = double(S) * double(per_group);
    std::vector<double> totals(2 * C);
    for (int64_t b = 0; b < B; b++) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t r = 0; r < runs; r++)
        add_run(x + (b * S + r * run) * C, parts.get() + (b * runs + r) * 2 * C, double(std::min(run, S - r * run)), C,
                totals.data());
      for (int64_t g = 0; g < G; g++) {
        double total = 0, squares = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) total += totals[c], squares += totals[C + c];
        finish(b * G + g, Moments{count, total / count, std::max(0.0, squares - total * total / count)});
      }
    }
  }

  // A run's sums around its pivots, as sums around zero.
  static void add_run(const T* pivots, const float* part, double n, int64_t C, double* totals) {
    for (int64_t c = 0; c < C; c++) {
      const double pivot = to_float(pivots[c]), s = part[c], q = part[C + c];
      totals[c] += n * pivot + s;
      totals[C + c] += q + pivot * (2.0 * s + n * pivot);
    }
  }

  // z = x gain + shift for every channel of every sample.
  void spread() {
    for (int64_t bg = 0, bc = 0; bg < B * G; bg++)
      for (int64_t c = bg % G * per_group, end = c + per_group; c < end; c++, bc++) {
        means.get()[bc] = mean[bg];
        gains.get()[bc] = rstd[bg] * gain_of(c);
        shifts.get()[bc] = (bias.address ? bias[c] : 0.0f) - mean[bg] * gains.get()[bc];
      }
  }

  void apply(T* y) const {
    if (!channels_last) {
      parallel_for(
          B * C, threads,
          [&](int64_t bc) {
            affine_row<T, SILU>(x + bc * S, y + bc * S, S, Fixed{gains.get()[bc]}, Fixed{shifts.get()[bc]});
          },
          true);
      return;
    }
    parallel_for(
        B * runs, threads,
        [&](int64_t t) {
          const int64_t b = t / runs, first = t % runs * run, last = std::min(S, first + run);
          for (int64_t at = (b * S + first) * C; at < (b * S + last) * C; at += C)
            affine_row<T, SILU>(x + at, y + at, C, Along{gains.get() + b * C}, Along{shifts.get() + b * C});
        },
        true);
  }

  // sums[b][0][c] = sum of dz, sums[b][1][c] = sum of dz x_hat, over the positions of sample b.
  void gradient_sums(const T* dy, float* sums) const {
    if (!channels_last) {
      parallel_for(B * C, threads, [&](int64_t bc) {
        const int64_t b = bc / C, c = bc % C;
        const auto [plain, weighted] =
            channel_sums(x + bc * S, dy + bc * S, S, gains.get()[bc], shifts.get()[bc], means.get()[bc]);
        sums[b * 2 * C + c] = float(plain);
        sums[b * 2 * C + C + c] = float(weighted * rstd[b * G + c / per_group]);
      });
      return;
    }
    Buffer<float> parts(B * runs * 2 * C);
    parallel_for(B * runs, threads, [&](int64_t t) {
      const int64_t first = t % runs * run, n = std::min(run, S - first), base = t / runs * C;
      const int64_t start = (t / runs * S + first) * C;
      float *plain = parts.get() + t * 2 * C, *weighted = plain + C;
      std::fill(plain, plain + 2 * C, 0.0f);
      const Along gain{gains.get() + base}, shift{shifts.get() + base}, m{means.get() + base};
      int64_t i = 0;
      for (; i + 2 <= n; i += 2)
        gradient_sums_rows<2, T, SILU>(x + start + i * C, dy + start + i * C, C, gain, shift, m, plain, weighted);
      if (i < n)
        gradient_sums_rows<1, T, SILU>(x + start + i * C, dy + start + i * C, C, gain, shift, m, plain, weighted);
    });
    std::vector<double> totals(2 * C);
    for (int64_t b = 0; b < B; b++) {
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t r = 0; r < runs; r++)
        for (int64_t c = 0; c < 2 * C; c++) totals[c] += parts.get()[(b * runs + r) * 2 * C + c];
      for (int64_t c = 0; c < 2 * C; c++)
        sums[b * 2 * C + c] = float(totals[c] * (c < C ? 1.0 : rstd[b * G + (c - C) / per_group]));
    }
  }

  static std::pair<double, double> channel_sums(const T* x, const T* dy, int64_t S, float gain, float shift, float m) {
    double plain = 0, weighted = 0;
    for (int64_t start = 0; start < S; start += CHUNK) {
      vf s = {}, q = {};
      over(std::min(S - start, CHUNK), [&](int64_t i, auto lanes) {
        const vf v = load_n(x + start + i, lanes);
        const vf dz = dz_of<T, SILU>(load_n(dy + start + i, lanes), v * gain + shift);
        s += dz;
        q += dz * (v - m);
      });
      plain += sum(s), weighted += sum(q);
    }
    return {plain, weighted};
  }

  // dx = rstd (w dz - <w dz> - x_hat <w dz x_hat>), <> the mean over the group.
  void input_gradient(const T* dy, const float* sums, T* dx) const {
    Buffer<float> slopes(B * C), offsets(B * C);
    const double count = double(per_group) * double(S);
    for (int64_t bg = 0; bg < B * G; bg++) {
      const int64_t b = bg / G, from = bg % G * per_group;
      double plain = 0, weighted = 0;
      for (int64_t c = from; c < from + per_group; c++) {
        plain += double(gain_of(c)) * sums[b * 2 * C + c];
        weighted += double(gain_of(c)) * sums[b * 2 * C + C + c];
      }
      float *slope = slopes.get() + b * C + from, *offset = offsets.get() + b * C + from;
      std::fill(slope, slope + per_group, float(double(rstd[bg]) * rstd[bg] * weighted / count));
      std::fill(offset, offset + per_group, float(rstd[bg] * plain / count));
    }
    auto row = [&](int64_t at, int64_t n, auto at_channel) {
      gradient_row<T, SILU>(x + at, dy + at, dx + at, n, at_channel(gains), at_channel(shifts), at_channel(means),
                            at_channel(slopes), at_channel(offsets));
    };
    if (!channels_last) {
      parallel_for(
          B * C, threads,
          [&](int64_t bc) { row(bc * S, S, [bc](const Buffer<float>& values) { return Fixed{values.get()[bc]}; }); },
          true);
      return;
    }
    parallel_for(
        B * runs, threads,
        [&](int64_t t) {
          const int64_t b = t / runs, first = t % runs * run, last = std::min(S, first + run), base = b * C;
          for (int64_t i = first; i < last; i++)
            row((b * S + i) * C, C, [base](const Buffer<float>& values) { return Along{values.get() + base}; });
        },
        true);
  }
};

template <class T, bool SILU>
GroupNorm<T, SILU> make(intptr_t x, const NormShape& s, Values weight, Values bias, const float* mean,
                        const float* rstd, int threads) {
  return {pointer<const T>(x), s.B, s.C, s.S, s.G, s.channels_last, weight, bias, mean, rstd, threads};
}

template <class T, bool SILU>
void forward(intptr_t x, intptr_t y, const NormShape& s, Values weight, Values bias, float* mean, float* rstd,
             float eps, int threads) {
  auto norm = make<T, SILU>(x, s, weight, bias, mean, rstd, threads);
  norm.statistics(mean, rstd, eps);
  norm.spread();
  norm.apply(pointer<T>(y));
}

template <class T, bool SILU>
void backward(intptr_t dy, intptr_t x, const NormShape& s, const float* mean, const float* rstd, Values weight,
              Values bias, intptr_t dx, float* dweight, float* dbias, int threads) {
  auto norm = make<T, SILU>(x, s, weight, bias, mean, rstd, threads);
  norm.spread();
  Buffer<float> sums(s.B * 2 * s.C);
  norm.gradient_sums(pointer<const T>(dy), sums.get());
  for (auto [to, offset] : {std::pair{dbias, int64_t(0)}, std::pair{dweight, s.C}})
    for (int64_t c = 0; to && c < s.C; c++) {
      double total = 0;
      for (int64_t b = 0; b < s.B; b++) total += sums.get()[b * 2 * s.C + offset + c];
      to[c] = float(total);
    }
  if (dx) norm.input_gradient(pointer<const T>(dy), sums.get(), pointer<T>(dx));
}

}  // namespace

void group_norm_silu_forward(DType dtype, intptr_t x, intptr_t y, const NormShape& s, Values weight, Values bias,
                             intptr_t mean, intptr_t rstd, float eps, bool silu, int threads) {
  auto run = dtype == BFLOAT16 ? (silu ? forward<bf16, true> : forward<bf16, false>)
                               : (silu ? forward<float, true> : forward<float, false>);
  run(x, y, s, weight, bias, pointer<float>(mean), pointer<float>(rstd), eps, threads);
}

void group_norm_silu_backward(DType dtype, intptr_t dy, intptr_t x, const NormShape& s, intptr_t mean, intptr_t rstd,
                              Values weight, Values bias, bool silu, intptr_t dx, intptr_t dweight, intptr_t dbias,
                              int threads) {
  auto run = dtype == BFLOAT16 ? (silu ? backward<bf16, true> : backward<bf16, false>)
                               : (silu ? backward<float, true> : backward<float, false>);
  run(dy, x, s, pointer<float>(mean), pointer<float>(rstd), weight, bias, dx, pointer<float>(dweight),
      pointer<float>(dbias), threads);
}

}  // namespace PCS_ISA

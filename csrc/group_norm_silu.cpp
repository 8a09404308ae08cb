// GroupNorm and SiLU. Statistics of a chunk are taken in two sweeps while it lies in the cache (mean, then squares
// around it) and chunks are merged in order, so memory is read once and nothing cancels.
#include <cmath>

#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace PCS_ISA {
namespace {

constexpr int64_t CHUNK = 16384;  // elements of x a task holds in the cache

struct Moments {  // mean and sum of squares around it, of n values
  double n = 0, mean = 0, m2 = 0;
  void merge(double count, double other_mean, double other_m2) {
    const double total = n + count, delta = other_mean - mean;
    mean += delta * count / total;
    m2 += other_m2 + delta * delta * n * count / total;
    n = total;
  }
};

template <class T>
PCS_INLINE vf load_some(const T* p, int n) {
  return n == W ? load(p) : load_n(p, n);
}
template <class T>
PCS_INLINE void store_some(T* p, vf v, int n) {
  if (n == W)
    store(p, v);
  else
    store_n(p, v, n);
}
PCS_INLINE vf silu(vf z) { return z * sigmoid(z); }
PCS_INLINE vf silu_slope(vf z) {
  const vf s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

template <class T>
struct GroupNorm {
  const T* x;
  int64_t B, C, S, G;  // S spatial positions
  bool channels_last, use_silu;
  const float *weight, *bias;  // [C] or null
  int threads;
  int64_t per_group = C / G;
  // Channels-last tasks are runs of positions of one sample; contiguous tasks are whole channels.
  int64_t run = std::max<int64_t>(1, CHUNK / C), runs = (S + run - 1) / run;

  float gain_of(int64_t c) const { return weight ? weight[c] : 1.0f; }
  float shift_of(int64_t c) const { return bias ? bias[c] : 0.0f; }

  void statistics(float* mean, float* rstd, float eps) const {
    if (channels_last)
      statistics_last(mean, rstd, eps);
    else
      parallel_for(B * G, threads, [&](int64_t bg) {
        const T* from = x + bg * per_group * S;
        const int64_t n = per_group * S;
        Moments all;
        for (int64_t i = 0; i < n; i += CHUNK) {
          const int64_t count = std::min(CHUNK, n - i);
          const float middle = total(from + i, count, 0.0f, false) / float(count);
          all.merge(double(count), middle, total(from + i, count, middle, true));
        }
        finish(all, eps, mean[bg], rstd[bg]);
      });
  }

  static void finish(const Moments& all, float eps, float& mean, float& rstd) {
    mean = float(all.mean);
    rstd = float(1.0 / std::sqrt(all.m2 / all.n + double(eps)));
  }

  static float total(const T* from, int64_t n, float middle, bool squares) {
    vf sums[4] = {};
    for (int64_t i = 0, lane = 0; i < n; i += W, lane++) {
      const int count = int(std::min<int64_t>(W, n - i));
      vf d = load_some(from + i, count);
      if (squares) {
        d = d - middle;
        if (count < W) d = load_n(reinterpret_cast<const float*>(&d), count);
        d = d * d;
      }
      sums[lane % 4] += d;
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  void statistics_last(float* mean, float* rstd, float eps) const {
    Buffer<float> parts(B * runs * G * 2);
    parallel_for(B * runs, threads, [&](int64_t t) {
      const int64_t first = t % runs * run, n = std::min(run, S - first);
      const T* from = x + (t / runs * S + first) * C;
      Buffer<float> sums(C), middles(C);
      channel_sums(from, n, nullptr, sums.get());
      float* part = parts.get() + t * G * 2;
      for (int64_t g = 0; g < G; g++) {
        float s = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) s += sums.get()[c];
        part[2 * g] = s / float(n * per_group);
        std::fill(middles.get() + g * per_group, middles.get() + (g + 1) * per_group, part[2 * g]);
      }
      channel_sums(from, n, middles.get(), sums.get());
      for (int64_t g = 0; g < G; g++) {
        float s = 0;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) s += sums.get()[c];
        part[2 * g + 1] = s;
      }
    });
    for (int64_t b = 0; b < B; b++)
      for (int64_t g = 0; g < G; g++) {
        Moments all;
        for (int64_t r = 0; r < runs; r++) {
          const float* part = parts.get() + ((b * runs + r) * G + g) * 2;
          all.merge(double(std::min(run, S - r * run) * per_group), part[0], part[1]);
        }
        finish(all, eps, mean[b * G + g], rstd[b * G + g]);
      }
  }

  // Per channel over n positions: the sum, or the sum of squares around `middle`.
  void channel_sums(const T* from, int64_t n, const float* middle, float* to) const {
    for (int64_t c = 0; c < C; c += W) {
      const int lanes = int(std::min<int64_t>(W, C - c));
      const vf m = middle ? load_some(middle + c, lanes) : vf{};
      vf even = {}, odd = {};
      for (int64_t i = 0; i < n; i++) {
        vf d = load_some(from + i * C + c, lanes) - m;
        if (middle) d = d * d;
        (i % 2 ? odd : even) += d;
      }
      store_some(to + c, even + odd, lanes);
    }
  }

  // z = x gain + shift, per channel.
  void apply(const float* mean, const float* rstd, T* y) const {
    if (!channels_last) {
      parallel_for(B * C, threads, [&](int64_t bc) {
        const int64_t g = bc / C * G + bc % C / per_group, c = bc % C;
        const float gain = rstd[g] * gain_of(c), shift = shift_of(c) - mean[g] * gain;
        for (int64_t i = 0; i < S; i += W) {
          const int n = int(std::min<int64_t>(W, S - i));
          const vf z = load_some(x + bc * S + i, n) * gain + shift;
          store_some(y + bc * S + i, use_silu ? silu(z) : z, n);
        }
      });
      return;
    }
    Buffer<float> gains(B * C), shifts(B * C);
    spread(mean, rstd, gains.get(), shifts.get());
    parallel_for(B * runs, threads, [&](int64_t t) {
      const int64_t b = t / runs, first = t % runs * run, n = std::min(run, S - first);
      for (int64_t i = first; i < first + n; i++) {
        const int64_t at = (b * S + i) * C;
        for (int64_t c = 0; c < C; c += W) {
          const int lanes = int(std::min<int64_t>(W, C - c));
          const vf z = load_some(x + at + c, lanes) * load_some(gains.get() + b * C + c, lanes) +
                       load_some(shifts.get() + b * C + c, lanes);
          store_some(y + at + c, use_silu ? silu(z) : z, lanes);
        }
      }
    });
  }

  void spread(const float* mean, const float* rstd, float* gains, float* shifts) const {
    for (int64_t b = 0; b < B; b++)
      for (int64_t c = 0; c < C; c++) {
        const int64_t g = b * G + c / per_group;
        gains[b * C + c] = rstd[g] * gain_of(c);
        shifts[b * C + c] = shift_of(c) - mean[g] * gains[b * C + c];
      }
  }

  PCS_INLINE vf dz_of(vf dy, vf z) const { return use_silu ? dy * silu_slope(z) : dy; }

  // sums[b][0][c] = sum of dz, sums[b][1][c] = sum of dz x_hat, over the positions of sample b.
  void gradient_sums(const T* dy, const float* mean, const float* rstd, float* sums) const {
    if (!channels_last) {
      parallel_for(B * C, threads, [&](int64_t bc) {
        const int64_t b = bc / C, c = bc % C, g = b * G + c / per_group;
        const float gain = rstd[g] * gain_of(c), shift = shift_of(c) - mean[g] * gain;
        double plain = 0, weighted = 0;
        for (int64_t start = 0; start < S; start += CHUNK) {
          vf s0 = {}, s1 = {};
          for (int64_t i = start; i < std::min(S, start + CHUNK); i += W) {
            const int n = int(std::min<int64_t>(W, S - i));
            const vf v = load_some(x + bc * S + i, n), dz = dz_of(load_some(dy + bc * S + i, n), v * gain + shift);
            s0 += dz;
            s1 += dz * (v - mean[g]);
          }
          plain += sum(s0), weighted += sum(s1);
        }
        sums[b * 2 * C + c] = float(plain);
        sums[b * 2 * C + C + c] = float(weighted) * rstd[g];
      });
      return;
    }
    Buffer<float> gains(B * C), shifts(B * C), parts(B * runs * 2 * C);
    spread(mean, rstd, gains.get(), shifts.get());
    parallel_for(B * runs, threads, [&](int64_t t) {
      const int64_t b = t / runs, first = t % runs * run, n = std::min(run, S - first);
      for (int64_t c = 0; c < C; c += W) {
        const int lanes = int(std::min<int64_t>(W, C - c));
        const vf gain = load_some(gains.get() + b * C + c, lanes), shift = load_some(shifts.get() + b * C + c, lanes);
        const vf m = middle_of(mean, b, c, lanes);
        vf s0 = {}, s1 = {};
        for (int64_t i = first; i < first + n; i++) {
          const int64_t at = (b * S + i) * C + c;
          const vf v = load_some(x + at, lanes), dz = dz_of(load_some(dy + at, lanes), v * gain + shift);
          s0 += dz;
          s1 += dz * (v - m);
        }
        store_some(parts.get() + t * 2 * C + c, s0, lanes);
        store_some(parts.get() + t * 2 * C + C + c, s1, lanes);
      }
    });
    for (int64_t b = 0; b < B; b++)
      for (int64_t c = 0; c < 2 * C; c++) {
        double total = 0;
        for (int64_t r = 0; r < runs; r++) total += parts.get()[(b * runs + r) * 2 * C + c];
        sums[b * 2 * C + c] = float(total) * (c < C ? 1.0f : rstd[b * G + (c - C) / per_group]);
      }
  }

  PCS_INLINE vf middle_of(const float* mean, int64_t b, int64_t c, int lanes) const {
    float m[W] = {};
    for (int l = 0; l < lanes; l++) m[l] = mean[b * G + (c + l) / per_group];
    return load(m);
  }

  // dx = rstd (w dz - <w dz> - x_hat <w dz x_hat>) = gain dz - x slope - offset, with per-group slope and offset.
  void input_gradient(const T* dy, const float* mean, const float* rstd, const float* sums, T* dx) const {
    Buffer<float> gains(B * C), shifts(B * C), slopes(B * C), offsets(B * C);
    spread(mean, rstd, gains.get(), shifts.get());
    const double count = double(per_group) * double(S);
    for (int64_t bg = 0; bg < B * G; bg++) {
      const int64_t b = bg / G, from = bg % G * per_group;
      double plain = 0, weighted = 0;
      for (int64_t c = from; c < from + per_group; c++) {
        plain += double(gain_of(c)) * sums[b * 2 * C + c];
        weighted += double(gain_of(c)) * sums[b * 2 * C + C + c];
      }
      const double slope = double(rstd[bg]) * rstd[bg] * weighted / count;
      const double offset = rstd[bg] * plain / count;  // x enters as x - mean, so that nothing cancels
      std::fill(slopes.get() + b * C + from, slopes.get() + b * C + from + per_group, float(slope));
      std::fill(offsets.get() + b * C + from, offsets.get() + b * C + from + per_group, float(offset));
    }
    auto one = [&](int64_t at, int n, vf gain, vf shift, vf m, vf slope, vf offset) {
      const vf v = load_some(x + at, n), dz = dz_of(load_some(dy + at, n), v * gain + shift);
      store_some(dx + at, gain * dz - (v - m) * slope - offset, n);
    };
    if (!channels_last) {
      parallel_for(B * C, threads, [&](int64_t bc) {
        const vf m = splat(mean[bc / C * G + bc % C / per_group]), gain = splat(gains.get()[bc]),
                 shift = splat(shifts.get()[bc]), slope = splat(slopes.get()[bc]), offset = splat(offsets.get()[bc]);
        for (int64_t i = 0; i < S; i += W)
          one(bc * S + i, int(std::min<int64_t>(W, S - i)), gain, shift, m, slope, offset);
      });
      return;
    }
    parallel_for(B * runs, threads, [&](int64_t t) {
      const int64_t b = t / runs, first = t % runs * run, n = std::min(run, S - first);
      for (int64_t c = 0; c < C; c += W) {
        const int lanes = int(std::min<int64_t>(W, C - c));
        const vf m = middle_of(mean, b, c, lanes), gain = load_some(gains.get() + b * C + c, lanes),
                 shift = load_some(shifts.get() + b * C + c, lanes),
                 slope = load_some(slopes.get() + b * C + c, lanes),
                 offset = load_some(offsets.get() + b * C + c, lanes);
        for (int64_t i = first; i < first + n; i++) one((b * S + i) * C + c, lanes, gain, shift, m, slope, offset);
      }
    });
  }
};

template <class T>
GroupNorm<T> make(intptr_t x, const NormShape& s, intptr_t weight, intptr_t bias, bool silu, int threads) {
  return {pointer<const T>(x), s.B, s.C, s.S, s.G, s.channels_last, silu, pointer<const float>(weight),
          pointer<const float>(bias), threads};
}

template <class T>
void forward(intptr_t x, intptr_t y, const NormShape& s, intptr_t weight, intptr_t bias, float* mean, float* rstd,
             float eps, bool silu, int threads) {
  auto norm = make<T>(x, s, weight, bias, silu, threads);
  norm.statistics(mean, rstd, eps);
  norm.apply(mean, rstd, pointer<T>(y));
}

template <class T>
void backward(intptr_t dy, intptr_t x, const NormShape& s, const float* mean, const float* rstd, intptr_t weight,
              intptr_t bias, bool silu, intptr_t dx, float* dweight, float* dbias, int threads) {
  auto norm = make<T>(x, s, weight, bias, silu, threads);
  Buffer<float> sums(s.B * 2 * s.C);
  norm.gradient_sums(pointer<const T>(dy), mean, rstd, sums.get());
  for (auto [to, offset] : {std::pair{dbias, int64_t(0)}, std::pair{dweight, s.C}})
    for (int64_t c = 0; to && c < s.C; c++) {
      double total = 0;
      for (int64_t b = 0; b < s.B; b++) total += sums.get()[b * 2 * s.C + offset + c];
      to[c] = float(total);
    }
  if (dx) norm.input_gradient(pointer<const T>(dy), mean, rstd, sums.get(), pointer<T>(dx));
}

}  // namespace

void group_norm_silu_forward(DType dtype, intptr_t x, intptr_t y, const NormShape& s, intptr_t weight, intptr_t bias,
                             intptr_t mean, intptr_t rstd, float eps, bool silu, int threads) {
  auto run = dtype == BFLOAT16 ? forward<bf16> : forward<float>;
  run(x, y, s, weight, bias, pointer<float>(mean), pointer<float>(rstd), eps, silu, threads);
}

void group_norm_silu_backward(DType dtype, intptr_t dy, intptr_t x, const NormShape& s, intptr_t mean, intptr_t rstd,
                              intptr_t weight, intptr_t bias, bool silu, intptr_t dx, intptr_t dweight,
                              intptr_t dbias, int threads) {
  auto run = dtype == BFLOAT16 ? backward<bf16> : backward<float>;
  run(dy, x, s, pointer<float>(mean), pointer<float>(rstd), weight, bias, silu, dx, pointer<float>(dweight),
      pointer<float>(dbias), threads);
}

}  // namespace PCS_ISA

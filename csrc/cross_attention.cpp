// Cross-attention over at most a few hundred text tokens: all scores of a query fit in the cache, so the softmax is a
// single pass. The maps of chosen tokens are summed over the heads on the way; the backward recomputes P.
#include "attention.h"
#include "ops.h"

namespace PCS_ISA {
namespace {

constexpr int64_t LANES = NR;   // queries of a backward block
constexpr int64_t SPLIT = 512;  // queries that share one partial sum of dk and dv

template <class T>
struct Forward {
  using E = typename Packed<T>::type;
  static constexpr int64_t BQ = BLOCK<E>;   // queries of a tile
  static constexpr int FEW = 4, MANY = -1;  // maps that are summed on the way; more are read off the mean of P
  const Heads &q, &k, &v, &out;
  const float* capture;  // [B, G, M]
  float* maps;           // [B, G, N]
  int64_t G;
  AttentionShape s;
  float scale;
  int64_t depth = round_up(s.D, KS<E>), width = round_up(s.D, W), tokens = round_up(s.M, PADDED<E>);
  int64_t k_size = packed_size<E>(s.M, s.D), v_size = packed_size<E>(s.D, s.M);
  Buffer<E> packed_k{s.B * s.H * k_size}, packed_v{s.B * s.H * v_size};
  Buffer<float> weights{s.B * G * tokens};  // capture, padded with zeros to whole vectors

  void pad_capture() {
    for (int64_t bg = 0; bg < s.B * G; bg++) {
      std::copy(capture + bg * s.M, capture + (bg + 1) * s.M, weights.get() + bg * tokens);
      std::fill(weights.get() + bg * tokens + s.M, weights.get() + (bg + 1) * tokens, 0.0f);
    }
  }

  void pack(int64_t bh) {
    const int64_t b = bh / s.H, h = bh % s.H;
    pack_rows_as_columns<E, T>(packed_k.get() + bh * k_size, k.at<T>(b, h, 0), k.row, s.M, s.D);
    pack_rows<E, T>(packed_v.get() + bh * v_size, v.at<T>(b, h, 0), v.row, s.D, s.M);
  }

  void rows(int64_t b, int64_t i) {
    const int64_t n = std::min(BQ, s.N - i);
    Buffer<E> query(BQ * depth), p(BQ * tokens);
    Buffer<float> scores(BQ * tokens), mean(G > FEW ? BQ * tokens : BQ * FEW * W);
    std::fill(mean.get(), mean.get() + (G > FEW ? BQ * tokens : BQ * FEW * W), 0.0f);
    float share[BQ];
    const float* row_weights = weights.get() + b * G * tokens;
    for (int64_t h = 0; h < s.H; h++) {
      const int64_t bh = b * s.H + h;
      const T* source = q.at<T>(b, h, i);
      const E* a = query.get();
      int64_t lda = depth;
      if constexpr (std::is_same_v<E, T>) {  // whole steps are read where they lie
        if (s.D % KS<E> == 0) a = source, lda = q.row;
      }
      if (a == query.get()) copy_rows<E, T>(query.get(), depth, source, q.row, n, s.D);
      gemm_into<E>(scores.get(), tokens, false, n, s.M, depth, a, lda, packed_k.get() + bh * k_size);
      for (int64_t r = 0; r < n; r++) {
        float* row = scores.get() + r * tokens;
        if (G > FEW) {
          share[r] = softmax_row<MANY>(row, p.get() + r * tokens, nullptr, nullptr);
          add_row(mean.get() + r * tokens, row, share[r] / float(s.H), tokens);
        } else {
          share[r] = with_few(row, p.get() + r * tokens, row_weights, mean.get() + r * FEW * W);
        }
      }
      T* to = out.at<T>(b, h, i);
      const int64_t stride = out.row, D = s.D;
      gemm<E>(n, D, s.M, p.get(), tokens, packed_v.get() + bh * v_size, zero_init,
              [=, &share](int64_t r, int64_t c, vf x) {
                if (c + W <= D)
                  store(to + r * stride + c, x * share[r]);
                else
                  store_n(to + r * stride + c, x * share[r], int(D - c));
              });
    }
    for (int64_t g = 0; g < G; g++)
      for (int64_t r = 0; r < n; r++)
        maps[(b * G + g) * s.N + i + r] = G > FEW ? dot(mean.get() + r * tokens, row_weights + g * tokens, tokens)
                                                  : sum(load(mean.get() + (r * FEW + g) * W)) / float(s.H);
  }

  static void add_row(float* sums, const float* row, float factor, int64_t n) {
    for (int64_t c = 0; c < n; c += W) store(sums + c, load(sums + c) + load(row + c) * factor);
  }

  float with_few(float* row, E* p, const float* row_weights, float* parts) const {
    switch (G) {
      case 0: return softmax_row<0>(row, p, nullptr, nullptr);
      case 1: return softmax_row<1>(row, p, row_weights, parts);
      case 2: return softmax_row<2>(row, p, row_weights, parts);
      case 3: return softmax_row<3>(row, p, row_weights, parts);
      default: return softmax_row<4>(row, p, row_weights, parts);
    }
  }

  // p becomes 2^(row - max), rounded, padding zero; returns one over its sum. What GROUPS weights see of P is added to
  // their parts on the way; MANY leaves 2^(row - max) in the row instead.
  template <int GROUPS>
  float softmax_row(float* scores, E* p, const float* row_weights, float* parts) const {
    const ScoreRow<E> row(scores, s.M, scale * LOG2E);
    const float top = row.top();
    vf sums = {}, seen[GROUPS > 0 ? GROUPS : 1] = {};
    row.each([&](int64_t c, vf x) {
      const vf e = exp2<T>(x - top);
      sums += e;
      store(p + c, e);
      if constexpr (GROUPS == MANY) store(scores + c, e);
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) seen[g] += e * load(row_weights + g * tokens + c);
    });
    const float share = 1.0f / sum(sums);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) store(parts + g * W, load(parts + g * W) + seen[g] * share);
    return share;
  }

  static float dot(const float* a, const float* b, int64_t n) {
    vf even = {}, odd = {};
    int64_t c = 0;
    for (; c + 2 * W <= n; c += 2 * W) {
      even += load(a + c) * load(b + c);
      odd += load(a + c + W) * load(b + c + W);
    }
    if (c < n) even += load(a + c) * load(b + c);
    return sum(even + odd);
  }
};

template <class T>
struct Backward {
  using E = typename Packed<T>::type;
  const Heads *dout, &q, &k, &v, *dq, *dk, *dv;  // null where not given or not needed
  const float *dmaps, *capture;
  int64_t G;
  AttentionShape s;
  float scale;
  int64_t splits = (s.N + SPLIT - 1) / SPLIT, width = round_up(s.D, W), part = s.M * width;
  Buffer<float> dk_parts{dk ? s.B * s.H * splits * part : 1}, dv_parts{dv ? s.B * s.H * splits * part : 1};

  float* part_of(const Buffer<float>& parts, int64_t b, int64_t h, int64_t split) const {
    return parts.get() + ((b * s.H + h) * splits + split) * part;
  }

  void run(int64_t b, int64_t h, int64_t split) {
    KeySide<T> keys(s.M, s.D);
    QueryBlock<T> queries(s.D, LANES), douts(s.D, LANES);
    keys.load(k.at<T>(b, h, 0), k.row, v.at<T>(b, h, 0), v.row, s.M, s.D);
    for (const Buffer<float>* parts : {dk ? &dk_parts : nullptr, dv ? &dv_parts : nullptr})
      if (parts) std::fill(part_of(*parts, b, h, split), part_of(*parts, b, h, split) + part, 0.0f);
    const int64_t end = std::min(s.N, (split + 1) * SPLIT);
    for (int64_t i = split * SPLIT; i < end; i += LANES)
      queries_block(b, h, i, std::min(LANES, end - i), split, keys, queries, douts);
  }

  void queries_block(int64_t b, int64_t h, int64_t i, int64_t n, int64_t split, KeySide<T>& keys,
                     QueryBlock<T>& queries, QueryBlock<T>& douts) {
    queries.pack(q.at<T>(b, h, i), q.row, n, s.D);
    if (dout) douts.pack(dout->at<T>(b, h, i), dout->row, n, s.D);
    Buffer<float> p(s.M * LANES), dp(s.M * LANES);
    Buffer<E> rows(s.M * LANES);
    const float to_log2 = scale * LOG2E;
    gemm<E>(s.M, n, keys.depth, keys.k.get(), keys.depth, queries.as_columns.get(), zero_init,
            [&](int64_t r, int64_t c, vf x) { store(p.get() + r * LANES + c, x * to_log2); });
    softmax_lanes(p.get(), n);
    if (dv && dout) {
      for (int64_t x = 0; x < s.M * LANES; x += W) store(rows.get() + x, load(p.get() + x));
      accumulate(n, rows.get(), douts.as_rows.get(), part_of(dv_parts, b, h, split));
    }
    if (!dq && !dk) return;
    maps_gradient(b, i, n, dp.get());
    if (dout) gemm_into<E>(dp.get(), LANES, true, s.M, n, keys.depth, keys.v.get(), keys.depth, douts.as_columns.get());
    softmax_gradient(p.get(), dp.get(), rows.get(), n);
    if (dk) accumulate(n, rows.get(), queries.as_rows.get(), part_of(dk_parts, b, h, split));
    if (dq) {
      Buffer<E> packed(round_up(s.M, KS<E>) * LANES);
      Buffer<float> transposed(s.D * LANES);
      pack_rows<E, E>(packed.get(), rows.get(), LANES, round_up(n, W), s.M);
      gemm_into<E>(transposed.get(), LANES, false, s.D, n, s.M, keys.k_transposed.get(), keys.ld, packed.get());
      write_transposed(dq->at<T>(b, h, i), dq->row, transposed.get(), LANES, n, s.D);
    }
  }

  void softmax_lanes(float* p, int64_t n) const {
    for (int64_t c = 0; c < n; c += W) {
      vf top = load(p + c), total = {};
      for (int64_t r = 1; r < s.M; r++) top = vmax(load(p + r * LANES + c), top);
      for (int64_t r = 0; r < s.M; r++) {
        const vf e = exp2<T>(load(p + r * LANES + c) - top);
        store(p + r * LANES + c, e);
        total += e;
      }
      const vf share = 1.0f / total;
      for (int64_t r = 0; r < s.M; r++) store(p + r * LANES + c, load(p + r * LANES + c) * share);
    }
    for (int64_t c = n; c < LANES; c++)  // unused lanes must not feed the products
      for (int64_t r = 0; r < s.M; r++) p[r * LANES + c] = 0.0f;
  }

  // dp = what the maps' gradient asks of P: sum over g of capture[g, r] dmaps[g, n] / H.
  void maps_gradient(int64_t b, int64_t i, int64_t n, float* dp) const {
    std::fill(dp, dp + s.M * LANES, 0.0f);
    if (!dmaps) return;
    for (int64_t g = 0; g < G; g++) {
      const float *row = dmaps + (b * G + g) * s.N + i, *weights = capture + (b * G + g) * s.M;
      for (int64_t r = 0; r < s.M; r++) {
        const float w = weights[r] / float(s.H);
        if (w != 0.0f)
          for (int64_t c = 0; c < n; c++) dp[r * LANES + c] += w * row[c];
      }
    }
  }

  void softmax_gradient(const float* p, const float* dp, E* ds, int64_t n) const {
    for (int64_t c = 0; c < LANES; c += W) {
      vf delta = {};
      if (c < n)
        for (int64_t r = 0; r < s.M; r++) delta += load(p + r * LANES + c) * load(dp + r * LANES + c);
      for (int64_t r = 0; r < s.M; r++) {
        const int64_t x = r * LANES + c;
        store(ds + x, c < n ? load(p + x) * (load(dp + x) - delta) * scale : vf{});
      }
    }
  }

  void accumulate(int64_t n, const E* a, const E* b, float* into) {
    gemm_into<E>(into, width, true, s.M, s.D, n, a, LANES, b);
  }

  void reduce(int64_t b, int64_t h) {
    for (auto [parts, to] : {std::pair{&dk_parts, dk}, std::pair{&dv_parts, dv}}) {
      if (!to) continue;
      float* first = part_of(*parts, b, h, 0);
      for (int64_t split = 1; split < splits; split++)
        for (int64_t x = 0; x < part; x += W) store(first + x, load(first + x) + load(first + split * part + x));
      for (int64_t j = 0; j < s.M; j++) write_row(to->template at<T>(b, h, j), first + j * width, s.D, 1.0f);
    }
  }
};

template <class T>
void forward(const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* capture, float* maps,
             int64_t G, AttentionShape s, float scale, int threads) {
  Forward<T> job{q, k, v, out, capture, maps, G, s, scale};
  const int64_t tiles = (s.N + job.BQ - 1) / job.BQ;
  job.pad_capture();
  parallel_for(s.B * s.H, threads, [&](int64_t bh) { job.pack(bh); });
  parallel_for(s.B * tiles, threads, [&](int64_t t) { job.rows(t / tiles, t % tiles * job.BQ); });
}

template <class T>
void backward(const Heads* dout, const float* dmaps, const Heads& q, const Heads& k, const Heads& v,
              const float* capture, int64_t G, const Heads* dq, const Heads* dk, const Heads* dv, AttentionShape s,
              float scale, int threads) {
  Backward<T> job{dout, q, k, v, dq, dk, dv, dmaps, capture, G, s, scale};
  parallel_for(s.B * s.H * job.splits, threads,
               [&](int64_t t) { job.run(t / job.splits / s.H, t / job.splits % s.H, t % job.splits); });
  parallel_for(s.B * s.H, threads, [&](int64_t bh) { job.reduce(bh / s.H, bh % s.H); });
}

}  // namespace

void cross_attention_forward(DType dtype, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                             intptr_t capture, intptr_t maps, int64_t G, AttentionShape s, float scale, int threads) {
  auto run = dtype == BFLOAT16 ? forward<bf16> : forward<float>;
  run(q, k, v, out, pointer<float>(capture), pointer<float>(maps), G, s, scale, threads);
}

void cross_attention_backward(DType dtype, const Heads& dout, intptr_t dmaps, const Heads& q, const Heads& k,
                              const Heads& v, intptr_t capture, int64_t G, const Heads& dq, const Heads& dk,
                              const Heads& dv, AttentionShape s, float scale, int threads) {
  auto given = [](const Heads& x) { return x.address ? &x : nullptr; };
  auto run = dtype == BFLOAT16 ? backward<bf16> : backward<float>;
  run(given(dout), pointer<float>(dmaps), q, k, v, pointer<float>(capture), G, given(dq), given(dk), given(dv), s,
      scale, threads);
}

}  // namespace PCS_ISA

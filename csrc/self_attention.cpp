// Self-attention over image positions: tiles of queries against tiles of keys with a running softmax (forward), and
// P recomputed from the log-sum-exp (backward). Scores are kept in units of log2, so that P = 2^(S - lse).
#include "attention.h"
#include "ops.h"

namespace PCS_ISA {
namespace {

constexpr int64_t BK = 256;  // keys of a forward tile

template <class T>
struct Forward {
  using E = typename Packed<T>::type;
  static constexpr int64_t BQ = BLOCK<E>;  // queries of a tile: S and P stay in the first-level cache
  const Heads &q, &k, &v, &out;
  float* lse;
  AttentionShape s;
  float scale;
  int64_t depth = round_up(s.D, KS<E>), width = round_up(s.D, W), keys = round_up(s.M, NR);
  Buffer<E> packed_k{s.B * s.H * keys * depth}, packed_v{s.B * s.H * keys * width};

  void pack(int64_t bh, int64_t j) {  // one key tile
    const int64_t b = bh / s.H, h = bh % s.H, n = std::min(BK, s.M - j);
    pack_rows_as_columns<E, T>(packed_k.get() + (bh * keys + j) * depth, k.at<T>(b, h, j), k.row, n, s.D);
    pack_rows<E, T>(packed_v.get() + (bh * keys + j) * width, v.at<T>(b, h, j), v.row, s.D, n);
  }

  void rows(int64_t bh, int64_t i) {  // one query tile
    const int64_t b = bh / s.H, h = bh % s.H, n = std::min(BQ, s.N - i);
    Buffer<E> query(BQ * depth), p(BQ * BK);
    Buffer<float> scores(BQ * BK), o(BQ * width);
    float top[BQ], total[BQ];
    copy_rows<E, T>(query.get(), depth, q.at<T>(b, h, i), q.row, n, s.D);
    std::fill(o.get(), o.get() + BQ * width, 0.0f);
    std::fill(top, top + BQ, -INFINITY);
    std::fill(total, total + BQ, 0.0f);
    const float to_log2 = scale * LOG2E;
    for (int64_t j = 0; j < s.M; j += BK) {
      const int64_t m = std::min(BK, s.M - j);
      gemm_into<E>(scores.get(), BK, false, n, m, depth, query.get(), depth, packed_k.get() + (bh * keys + j) * depth);
      for (int64_t r = 0; r < n; r++)
        softmax_row(scores.get() + r * BK, p.get() + r * BK, o.get() + r * width, m, to_log2, top[r], total[r]);
      gemm_into<E>(o.get(), width, true, n, s.D, m, p.get(), BK, packed_v.get() + (bh * keys + j) * width);
    }
    for (int64_t r = 0; r < n; r++) {
      write_row(out.at<T>(b, h, i + r), o.get() + r * width, s.D, 1.0f / total[r]);
      lse[bh * s.N + i + r] = top[r] / LOG2E + std::log(total[r]);
    }
  }

  // P = 2^(to_log2 S - top) of one row and tile; what was summed before is scaled down where the maximum rose.
  void softmax_row(const float* scores, E* p, float* o, int64_t m, float to_log2, float& top, float& total) {
    const ScoreRow<E> row(scores, m, to_log2);
    const float before = top;
    top = std::max(before, row.top());
    vf sums = {};
    row.each([&](int64_t c, vf x) {
      const vf e = exp2<T>(x - top);
      sums += e;
      store(p + c, e);
    });
    if (top != before) {
      const float shrink = std::exp2(before - top);
      total *= shrink;
      for (int64_t d = 0; d < width; d += W) store(o + d, load(o + d) * shrink);
    }
    total += sum(sums);
  }
};

template <class T>
void forward(const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse, AttentionShape s,
             float scale, int threads) {
  Forward<T> job{q, k, v, out, lse, s, scale};
  const int64_t key_tiles = (s.M + BK - 1) / BK, query_tiles = (s.N + job.BQ - 1) / job.BQ;
  parallel_for(s.B * s.H * key_tiles, threads, [&](int64_t t) { job.pack(t / key_tiles, t % key_tiles * BK); });
  parallel_for(s.B * s.H * query_tiles, threads,
               [&](int64_t t) { job.rows(t / query_tiles, t % query_tiles * job.BQ); });
}

template <class T>
struct Backward {
  using E = typename Packed<T>::type;
  static constexpr int64_t LANES = (IN_TILES<E> ? 4 : 2) * NR;  // queries of a block: they lie along the vectors
  static constexpr int64_t KEYS = 2 * BLOCK<E>;  // keys of a block: whole steps, so that none straddles blocks
  const Heads &dout, &q, &k, &v, &out, &dq, &dk, &dv;
  const float* lse;
  AttentionShape s;
  float scale;
  int64_t splits;  // of the queries; each has its own partial sums of dk and dv
  int64_t width = round_up(s.D, W);
  Buffer<float> dk_parts{s.B * s.H * splits * s.M * width}, dv_parts{s.B * s.H * splits * s.M * width};

  void run(int64_t bh, int64_t split) {
    const int64_t b = bh / s.H, h = bh % s.H;
    float* dk_part = dk_parts.get() + (bh * splits + split) * s.M * width;
    float* dv_part = dv_parts.get() + (bh * splits + split) * s.M * width;
    std::fill(dk_part, dk_part + s.M * width, 0.0f);
    std::fill(dv_part, dv_part + s.M * width, 0.0f);
    KeySide<T> keys(s.M, s.D);
    keys.load(k.at<T>(b, h, 0), k.row, v.at<T>(b, h, 0), v.row, s.M, s.D);
    QueryBlock<T> queries(s.D, LANES), douts(s.D, LANES);
    const int64_t blocks = (s.N + LANES - 1) / LANES;
    for (int64_t block = blocks * split / splits; block < blocks * (split + 1) / splits; block++)
      queries_block(b, h, block * LANES, keys, queries, douts, dk_part, dv_part);
  }

  void queries_block(int64_t b, int64_t h, int64_t i, KeySide<T>& keys, QueryBlock<T>& queries, QueryBlock<T>& douts,
                     float* dk_part, float* dv_part) {
    const int64_t n = std::min(LANES, s.N - i), padded = round_up(n, W);
    queries.pack(q.at<T>(b, h, i), q.row, n, s.D);
    douts.pack(dout.at<T>(b, h, i), dout.row, n, s.D);
    float lse2[LANES], delta[LANES];
    for (int64_t r = 0; r < padded; r++) {
      lse2[r] = r < n ? lse[(b * s.H + h) * s.N + i + r] * LOG2E : 0.0f;
      delta[r] = r < n ? dot(dout.at<T>(b, h, i + r), out.at<T>(b, h, i + r)) : 0.0f;
    }
    Buffer<float> scores(IN_TILES<E> ? 1 : KEYS * LANES), dq_transposed(s.D * LANES);
    Buffer<E> p_rows(KEYS * LANES), ds_rows(KEYS * LANES), ds_packed(KEYS * LANES);
    std::fill(dq_transposed.get(), dq_transposed.get() + s.D * LANES, 0.0f);
    for (E* rows : {p_rows.get(), ds_rows.get()})  // what no vector writes is read by the last step
      if (padded % KS<E>) std::fill(rows, rows + KEYS * LANES, E{});
    const float to_log2 = scale * LOG2E;
    for (int64_t j = 0; j < s.M; j += KEYS) {
      const int64_t m = std::min(KEYS, s.M - j);
      const int64_t steps = steps_of<E>(s.D);
      const Product<E> score{keys.k.get() + j * keys.depth, keys.depth, queries.as_columns.get(), steps};
      const Product<E> slope{keys.v.get() + j * keys.depth, keys.depth, douts.as_columns.get(), steps};
      gemm_pair<E>(scores.get(), LANES, m, n, score, slope, [&](int64_t r, int64_t c, vf x, vf dp) {
        const vf e = exp2<T>(x * to_log2 - load(lse2 + c));
        store(p_rows.get() + r * LANES + c, e);
        store(ds_rows.get() + r * LANES + c, e * (dp - load(delta + c)) * scale);
      });
      pack_rows<E, E>(ds_packed.get(), ds_rows.get(), LANES, padded, m);
      accumulate(m, n, p_rows.get(), douts.as_rows.get(), dv_part + j * width);
      accumulate(m, n, ds_rows.get(), queries.as_rows.get(), dk_part + j * width);
      gemm_into<E>(dq_transposed.get(), LANES, true, s.D, n, m, keys.k_transposed.get() + j, keys.ld, ds_packed.get());
    }
    write_transposed(dq.at<T>(b, h, i), dq.row, dq_transposed.get(), LANES, n, s.D);
  }

  void accumulate(int64_t m, int64_t n, const E* a, const E* b, float* into) {
    gemm_into<E>(into, width, true, m, s.D, n, a, LANES, b);
  }

  float dot(const T* a, const T* b) const {
    vf sums = {};
    int64_t d = 0;
    for (; d + W <= s.D; d += W) sums += load(a + d) * load(b + d);
    if (d < s.D) sums += load_n(a + d, int(s.D - d)) * load_n(b + d, int(s.D - d));
    return sum(sums);
  }

  void reduce(int64_t bh) {  // the splits in their order
    const int64_t b = bh / s.H, h = bh % s.H, size = s.M * width;
    for (auto [parts, to] : {std::pair{dk_parts.get(), &dk}, std::pair{dv_parts.get(), &dv}}) {
      float* first = parts + bh * splits * size;
      for (int64_t split = 1; split < splits; split++)
        for (int64_t i = 0; i < size; i += W) store(first + i, load(first + i) + load(first + split * size + i));
      for (int64_t j = 0; j < s.M; j++) write_row(to->template at<T>(b, h, j), first + j * width, s.D, 1.0f);
    }
  }
};

template <class T>
void backward(const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const Heads& dq,
              const Heads& dk, const Heads& dv, const float* lse, AttentionShape s, float scale, int threads) {
  // Few heads are split further, by the shape alone, so that the sums never depend on the number of threads.
  constexpr int64_t LANES = Backward<T>::LANES;
  const int64_t blocks = (s.N + LANES - 1) / LANES, heads = s.B * s.H;
  const int64_t splits = std::min<int64_t>(blocks, std::max<int64_t>(1, 16 / heads));
  Backward<T> job{dout, q, k, v, out, dq, dk, dv, lse, s, scale, splits};
  parallel_for(heads * splits, threads, [&](int64_t t) { job.run(t / splits, t % splits); });
  parallel_for(heads, threads, [&](int64_t bh) { job.reduce(bh); });
}

}  // namespace

void self_attention_forward(DType dtype, const Heads& q, const Heads& k, const Heads& v, const Heads& out, intptr_t lse,
                            AttentionShape s, float scale, int threads) {
  if (dtype == BFLOAT16)
    forward<bf16>(q, k, v, out, pointer<float>(lse), s, scale, threads);
  else
    forward<float>(q, k, v, out, pointer<float>(lse), s, scale, threads);
}

void self_attention_backward(DType dtype, const Heads& dout, const Heads& q, const Heads& k, const Heads& v,
                             const Heads& out, intptr_t lse, const Heads& dq, const Heads& dk, const Heads& dv,
                             AttentionShape s, float scale, int threads) {
  const float* l = pointer<float>(lse);
  if (dtype == BFLOAT16)
    backward<bf16>(dout, q, k, v, out, dq, dk, dv, l, s, scale, threads);
  else
    backward<float>(dout, q, k, v, out, dq, dk, dv, l, s, scale, threads);
}

}  // namespace PCS_ISA

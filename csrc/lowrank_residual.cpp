// y = x W + b + (mask scale (x A)) B for many rows: the low-rank part rides in the same registers as the projection,
// as `rank` further steps of the sum. W, A and B come packed (pack_operand), W once for all calls.
#include "gemm.h"
#include "ops.h"
#include "parallel.h"

namespace PCS_ISA {
namespace {

constexpr int64_t COLUMNS = 8 * NR;

template <class T>
struct Job {
  using E = typename Packed<T>::type;
  static constexpr int64_t ROWS = 2 * BLOCK<E>;  // rows of a task
  const T* x;
  const E *w, *down, *up;  // down, up: one packed pair a concept
  const T* bias;
  const float* mask;
  const int64_t* concepts;  // [samples] or null
  T *low, *y;               // low [rows, low_width]: mask scale x A
  LowrankShape s;
  float scale;
  bool direct = std::is_same_v<E, T> && s.inputs % KS<E> == 0;  // rows of x can be read where they lie
  int64_t depth = round_up(s.inputs, KS<E>), low_width = round_up(s.rank, PADDED<E>);
  int64_t down_size = packed_size<E>(s.rank, s.inputs), up_size = packed_size<E>(s.outputs, s.rank);
  int64_t tasks_a_sample = (s.rows_a_sample + ROWS - 1) / ROWS;
  Buffer<E> x_padded{direct ? 1 : s.samples * s.rows_a_sample * depth};
  Buffer<E> low_converted{std::is_same_v<E, T> ? 1 : s.samples * s.rows_a_sample * low_width};

  const E* rows_of_x(int64_t row) const {
    if constexpr (std::is_same_v<E, T>)
      if (direct) return x + row * s.inputs;
    return x_padded.get() + row * depth;
  }

  void low_rank(int64_t task) {
    const int64_t sample = task / tasks_a_sample, first = task % tasks_a_sample * ROWS;
    const int64_t n = std::min(ROWS, s.rows_a_sample - first), row = sample * s.rows_a_sample + first;
    if (!direct) copy_rows<E, T>(x_padded.get() + row * depth, depth, x + row * s.inputs, s.inputs, n, s.inputs);
    const E* a = down + (concepts ? concepts[sample] : 0) * down_size;
    gemm<E>(n, s.rank, s.inputs, rows_of_x(row), depth, a, zero_init, [&](int64_t r, int64_t c, vf v) {
      store(low + (row + r) * low_width + c, v * (mask ? scale * mask[row + r] : scale));
    });
    for (int64_t c = round_up(s.rank, W); c < low_width; c += W)
      for (int64_t r = 0; r < n; r++) store(low + (row + r) * low_width + c, vf{});
    if constexpr (!std::is_same_v<E, T>)
      copy_rows<E, T>(low_converted.get() + row * low_width, low_width, low + row * low_width, low_width, n, low_width);
  }

  void project(int64_t task, int64_t column_tasks) {
    const int64_t j = task % column_tasks * COLUMNS, row_task = task / column_tasks;
    const int64_t sample = row_task / tasks_a_sample, first = row_task % tasks_a_sample * ROWS;
    const int64_t n = std::min(ROWS, s.rows_a_sample - first), row = sample * s.rows_a_sample + first;
    const int64_t columns = std::min(COLUMNS, s.outputs - j), steps = steps_of<E>(s.inputs),
                  extra = steps_of<E>(s.rank);
    const E* low_rows;
    if constexpr (std::is_same_v<E, T>)
      low_rows = low + row * low_width;
    else
      low_rows = low_converted.get() + row * low_width;
    const Product<E> main{rows_of_x(row), depth, w + j * steps * KS<E>, steps};
    const E* b = up + (concepts ? concepts[sample] : 0) * up_size + j * extra * KS<E>;
    const Product<E> residual{low_rows, low_width, b, extra};
    auto init = [&](int64_t, int64_t c) {
      if (!bias) return vf{};
      return c + W <= columns ? load(bias + j + c) : load_n(bias + j + c, int(std::max<int64_t>(0, columns - c)));
    };
    gemm2<E>(n, columns, main, residual, init, [&](int64_t r, int64_t c, vf v) {
      T* to = y + (row + r) * s.outputs + j + c;
      if (c + W <= columns)
        store(to, v);
      else
        store_n(to, v, int(columns - c));
    });
  }
};

template <class T>
void apply(const LowrankArguments& a, const LowrankShape& s, float scale, int threads) {
  using E = typename Packed<T>::type;
  Job<T> job{pointer<const T>(a.x),
             pointer<const E>(a.weight),
             pointer<const E>(a.down),
             pointer<const E>(a.up),
             pointer<const T>(a.bias),
             pointer<const float>(a.mask),
             pointer<const int64_t>(a.concepts),
             pointer<T>(a.low),
             pointer<T>(a.y),
             s,
             scale};
  const int64_t row_tasks = s.samples * job.tasks_a_sample, column_tasks = (s.outputs + COLUMNS - 1) / COLUMNS;
  if (column_tasks == 1) {
    parallel_for(row_tasks, threads, [&](int64_t t) {
      job.low_rank(t);
      job.project(t, 1);
    });
    return;
  }
  parallel_for(row_tasks, threads, [&](int64_t t) { job.low_rank(t); });
  parallel_for(row_tasks * column_tasks, threads, [&](int64_t t) { job.project(t, column_tasks); });
}

template <class T>
void pack(intptr_t out, intptr_t source, int64_t columns, int64_t depth, bool rows_are_columns, int threads) {
  using E = typename Packed<T>::type;
  const int64_t panels = (columns + NR - 1) / NR;
  parallel_for(panels, threads, [&](int64_t p) {  // a panel's place: the full ones before it
    const int64_t n = std::min<int64_t>(NR, columns - p * NR);
    E* to = pointer<E>(out) + p * NR * round_up(depth, KS<E>);
    const T* from = pointer<const T>(source);
    if (rows_are_columns)
      pack_rows_as_columns<E, T>(to, from + p * NR * depth, depth, n, depth);
    else
      pack_rows<E, T>(to, from + p * NR, columns, n, depth);
  });
}

}  // namespace

int64_t packed_bytes(DType dtype, int64_t columns, int64_t depth) {
  return dtype == BFLOAT16 ? packed_size<Packed<bf16>::type>(columns, depth) * int64_t(sizeof(Packed<bf16>::type))
                           : packed_size<float>(columns, depth) * int64_t(sizeof(float));
}

void pack_operand(DType dtype, intptr_t out, intptr_t source, int64_t columns, int64_t depth, bool rows_are_columns,
                  int threads) {
  (dtype == BFLOAT16 ? pack<bf16> : pack<float>)(out, source, columns, depth, rows_are_columns, threads);
}

void lowrank_residual(DType dtype, const LowrankArguments& arguments, const LowrankShape& shape, float scale,
                      int threads) {
  (dtype == BFLOAT16 ? apply<bf16> : apply<float>)(arguments, shape, scale, threads);
}

int low_rank_width(DType dtype, int64_t rank) {
  return int(round_up(rank, dtype == BFLOAT16 ? PADDED<Packed<bf16>::type> : PADDED<float>));
}

}  // namespace PCS_ISA

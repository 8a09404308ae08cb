// y = a gelu(b) on rows [a | b]; one read of x each way.
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace PCS_ISA {
namespace {

constexpr int64_t CHUNK = 4096;  // elements a task

// Calls body(row) for every row, several short rows a task.
template <class Body>
void for_rows(int64_t rows, int64_t columns, int threads, const Body& body) {
  const int64_t rows_a_task = std::max<int64_t>(1, CHUNK / columns), tasks = (rows + rows_a_task - 1) / rows_a_task;
  parallel_for(tasks, threads, [&](int64_t t) {
    for (int64_t r = t * rows_a_task; r < std::min(rows, (t + 1) * rows_a_task); r++) body(r);
  });
}

template <class T>
PCS_INLINE vf gelu(vf b) {
  return b * 0.5f * (1.0f + erf<T>(b * 0.70710678118654752f));
}

template <class T>
void forward(const T* x, T* y, int64_t rows, int64_t F, int threads) {
  for_rows(rows, F, threads, [=](int64_t r) {
    const T *a = x + r * 2 * F, *b = a + F;
    T* to = y + r * F;
    over(F, [&](int64_t i, auto n) { store_n(to + i, load_n(a + i, n) * gelu<T>(load_n(b + i, n)), n); });
  });
}

struct Gradients {
  vf a, b;
};
template <class T>
PCS_INLINE Gradients gradients(vf dy, vf a, vf b) {
  const vf cdf = 0.5f + 0.5f * erf<T>(b * 0.70710678118654752f);
  const vf density = exp2<T>(b * b * (-0.5f * LOG2E)) * 0.39894228040143268f;
  return {dy * b * cdf, dy * a * (cdf + b * density)};
}

template <class T>
void backward(const T* dy, const T* x, T* dx, int64_t rows, int64_t F, int threads) {
  for_rows(rows, F, threads, [=](int64_t r) {
    const T *a = x + r * 2 * F, *b = a + F, *d = dy + r * F;
    T *da = dx + r * 2 * F, *db = da + F;
    over(F, [&](int64_t i, auto n) {
      const Gradients g = gradients<T>(load_n(d + i, n), load_n(a + i, n), load_n(b + i, n));
      store_n(da + i, g.a, n);
      store_n(db + i, g.b, n);
    });
  });
}

}  // namespace

void geglu_forward(DType dtype, intptr_t x, intptr_t y, int64_t rows, int64_t F, int threads) {
  if (dtype == BFLOAT16)
    forward(pointer<const bf16>(x), pointer<bf16>(y), rows, F, threads);
  else
    forward(pointer<const float>(x), pointer<float>(y), rows, F, threads);
}

void geglu_backward(DType dtype, intptr_t dy, intptr_t x, intptr_t dx, int64_t rows, int64_t F, int threads) {
  if (dtype == BFLOAT16)
    backward(pointer<const bf16>(dy), pointer<const bf16>(x), pointer<bf16>(dx), rows, F, threads);
  else
    backward(pointer<const float>(dy), pointer<const float>(x), pointer<float>(dx), rows, F, threads);
}

}  // namespace PCS_ISA

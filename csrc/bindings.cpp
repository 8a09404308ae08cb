// The table of native functions; the GIL is released while they run. One such module is built for each instruction set.
#include <pybind11/pybind11.h>

#include "ops.h"
#include "parallel.h"

namespace py = pybind11;
using namespace PCS_ISA;

namespace {

// A [B, H, N, D] tensor as Python passes it: (address, stride of b, of h, of n), address 0 where absent.
Heads heads(const py::tuple& t) {
  return {t[0].cast<intptr_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>()};
}
AttentionShape attention_shape(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<int64_t>()};
}
NormShape norm_shape(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(), t[4].cast<bool>()};
}
FrozenShape frozen_shape(const py::tuple& t) {
  int64_t n[11];
  for (int i = 0; i < 11; i++) n[i] = t[i].cast<int64_t>();
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10]};
}
Values values(const py::tuple& t) { return {t[0].cast<intptr_t>(), DType(t[1].cast<int>())}; }
AdamW adamw(const py::tuple& t) {
  return {t[0].cast<intptr_t>(), t[1].cast<intptr_t>(), t[2].cast<int64_t>(), t[3].cast<bool>()};
}

}  // namespace

PYBIND11_MODULE(PCS_MODULE, m) {
  m.def("use_openmp", [](intptr_t parallel, intptr_t number) {
    gomp_parallel = reinterpret_cast<gomp_parallel_fn>(parallel);
    thread_number = reinterpret_cast<thread_number_fn>(number);
  });

  m.def("self_attention_forward", [](int dtype, py::tuple q, py::tuple k, py::tuple v, py::tuple out, intptr_t lse,
                                     py::tuple shape, float scale, int threads) {
    const auto Q = heads(q), K = heads(k), V = heads(v), O = heads(out);
    const auto s = attention_shape(shape);
    py::gil_scoped_release release;
    self_attention_forward(DType(dtype), Q, K, V, O, lse, s, scale, threads);
  });
  m.def("self_attention_backward",
        [](int dtype, py::tuple dout, py::tuple q, py::tuple k, py::tuple v, py::tuple out, intptr_t lse, py::tuple dq,
           py::tuple dk, py::tuple dv, py::tuple shape, float scale, int threads) {
          const auto dO = heads(dout), Q = heads(q), K = heads(k), V = heads(v), O = heads(out), dQ = heads(dq),
                     dK = heads(dk), dV = heads(dv);
          const auto s = attention_shape(shape);
          py::gil_scoped_release release;
          self_attention_backward(DType(dtype), dO, Q, K, V, O, lse, dQ, dK, dV, s, scale, threads);
        });

  m.def("cross_attention_forward", [](int dtype, py::tuple q, py::tuple k, py::tuple v, py::tuple out, intptr_t capture,
                                      intptr_t maps, int64_t G, py::tuple shape, float scale, int threads) {
    const auto Q = heads(q), K = heads(k), V = heads(v), O = heads(out);
    const auto s = attention_shape(shape);
    py::gil_scoped_release release;
    cross_attention_forward(DType(dtype), Q, K, V, O, capture, maps, G, s, scale, threads);
  });
  m.def("cross_attention_backward",
        [](int dtype, py::tuple dout, intptr_t dmaps, py::tuple q, py::tuple k, py::tuple v, intptr_t capture,
           int64_t G, py::tuple dq, py::tuple dk, py::tuple dv, py::tuple shape, float scale, int threads) {
          const auto dO = heads(dout), Q = heads(q), K = heads(k), V = heads(v), dQ = heads(dq), dK = heads(dk),
                     dV = heads(dv);
          const auto s = attention_shape(shape);
          py::gil_scoped_release release;
          cross_attention_backward(DType(dtype), dO, dmaps, Q, K, V, capture, G, dQ, dK, dV, s, scale, threads);
        });

  m.def("geglu_forward", [](int dtype, intptr_t x, intptr_t y, int64_t rows, int64_t F, int threads) {
    py::gil_scoped_release release;
    geglu_forward(DType(dtype), x, y, rows, F, threads);
  });
  m.def("geglu_backward", [](int dtype, intptr_t dy, intptr_t x, intptr_t dx, int64_t rows, int64_t F, int threads) {
    py::gil_scoped_release release;
    geglu_backward(DType(dtype), dy, x, dx, rows, F, threads);
  });

  m.def("group_norm_silu_forward", [](int dtype, intptr_t x, intptr_t y, py::tuple shape, py::tuple weight,
                                      py::tuple bias, intptr_t mean, intptr_t rstd, float eps, bool silu, int threads) {
    const auto s = norm_shape(shape);
    const auto gain = values(weight), shift = values(bias);
    py::gil_scoped_release release;
    group_norm_silu_forward(DType(dtype), x, y, s, gain, shift, mean, rstd, eps, silu, threads);
  });
  m.def("group_norm_silu_backward",
        [](int dtype, intptr_t dy, intptr_t x, py::tuple shape, intptr_t mean, intptr_t rstd, py::tuple weight,
           py::tuple bias, bool silu, intptr_t dx, intptr_t dweight, intptr_t dbias, int threads) {
          const auto s = norm_shape(shape);
          const auto gain = values(weight), shift = values(bias);
          py::gil_scoped_release release;
          group_norm_silu_backward(DType(dtype), dy, x, s, mean, rstd, gain, shift, silu, dx, dweight, dbias, threads);
        });

  m.def("adamw8bit_knows", &adamw8bit_knows);
  m.def("adamw8bit_step", [](int param_type, int grad_type, intptr_t param, intptr_t grad, intptr_t state1,
                             intptr_t state2, intptr_t absmax1, intptr_t absmax2, int64_t n, py::tuple settings,
                             int threads) {
    const auto s = adamw(settings);
    py::gil_scoped_release release;
    adamw8bit_step(DType(param_type), DType(grad_type), param, grad, state1, state2, absmax1, absmax2, n, s, threads);
  });
  m.def("adamw32bit_step", [](int param_type, int grad_type, intptr_t param, intptr_t grad, intptr_t exp_avg,
                              intptr_t exp_avg_sq, int64_t n, py::tuple settings, int threads) {
    const auto s = adamw(settings);
    py::gil_scoped_release release;
    adamw32bit_step(DType(param_type), DType(grad_type), param, grad, exp_avg, exp_avg_sq, n, s, threads);
  });

  m.def("int8_quantize",
        [](int dtype, intptr_t weight, intptr_t codes, intptr_t scales, int64_t rows, int64_t K, int threads) {
          py::gil_scoped_release release;
          int8_quantize(DType(dtype), weight, codes, scales, rows, K, threads);
        });
  m.def("int8_expand",
        [](int dtype, intptr_t codes, intptr_t scales, intptr_t weight, int64_t rows, int64_t K, int threads) {
          py::gil_scoped_release release;
          int8_expand(DType(dtype), codes, scales, weight, rows, K, threads);
        });

  m.def("frozen_product",
        [](int dtype, int kind, py::tuple a, py::tuple shape, bool backward, bool taps_last, int threads) {
          const FrozenArguments arguments{a[0].cast<intptr_t>(), a[1].cast<intptr_t>(), a[2].cast<intptr_t>(),
                                          a[3].cast<intptr_t>(), a[4].cast<intptr_t>()};
          const auto s = frozen_shape(shape);
          py::gil_scoped_release release;
          frozen_product(DType(dtype), WeightKind(kind), arguments, s, backward, taps_last, threads);
        });

  m.def("weight_gradient",
        [](int dtype, intptr_t x, intptr_t dy, intptr_t dw, py::tuple shape, bool taps_last, int threads) {
          const auto s = frozen_shape(shape);
          py::gil_scoped_release release;
          weight_gradient(DType(dtype), x, dy, dw, s, taps_last, threads);
        });

  m.def("packed_bytes",
        [](int dtype, int64_t columns, int64_t depth) { return packed_bytes(DType(dtype), columns, depth); });
  m.def("low_rank_width", [](int dtype, int64_t rank) { return low_rank_width(DType(dtype), rank); });
  m.def("pack_operand", [](int dtype, intptr_t out, intptr_t source, int64_t columns, int64_t depth,
                           bool rows_are_columns, int threads) {
    py::gil_scoped_release release;
    pack_operand(DType(dtype), out, source, columns, depth, rows_are_columns, threads);
  });
  m.def("lowrank_residual", [](int dtype, py::tuple a, py::tuple shape, float scale, int threads) {
    const LowrankArguments arguments{a[0].cast<intptr_t>(), a[1].cast<intptr_t>(), a[2].cast<intptr_t>(),
                                     a[3].cast<intptr_t>(), a[4].cast<intptr_t>(), a[5].cast<intptr_t>(),
                                     a[6].cast<intptr_t>(), a[7].cast<intptr_t>(), a[8].cast<intptr_t>()};
    const LowrankShape s{shape[0].cast<int64_t>(), shape[1].cast<int64_t>(), shape[2].cast<int64_t>(),
                         shape[3].cast<int64_t>(), shape[4].cast<int64_t>()};
    py::gil_scoped_release release;
    lowrank_residual(DType(dtype), arguments, s, scale, threads);
  });
}

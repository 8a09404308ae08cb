// The native ops. Addresses are of contiguous memory unless a Heads view says otherwise; 0 means absent.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

#include "tensor_view.h"
#include "vec.h"

namespace PCS_ISA {

// B batch, H heads, N queries, M keys, D head width.
struct AttentionShape {
  int64_t B, H, N, M, D;
};
void self_attention_forward(DType, const Heads& q, const Heads& k, const Heads& v, const Heads& out, intptr_t lse,
                            AttentionShape, float scale, int threads);
void self_attention_backward(DType, const Heads& dout, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                             intptr_t lse, const Heads& dq, const Heads& dk, const Heads& dv, AttentionShape,
                             float scale, int threads);

// capture [B, G, M] and maps [B, G, N] are float32; G = 0 without them.
void cross_attention_forward(DType, const Heads& q, const Heads& k, const Heads& v, const Heads& out, intptr_t capture,
                             intptr_t maps, int64_t G, AttentionShape, float scale, int threads);
void cross_attention_backward(DType, const Heads& dout, intptr_t dmaps, const Heads& q, const Heads& k, const Heads& v,
                              intptr_t capture, int64_t G, const Heads& dq, const Heads& dk, const Heads& dv,
                              AttentionShape, float scale, int threads);

void geglu_forward(DType, intptr_t x, intptr_t y, int64_t rows, int64_t F, int threads);
void geglu_backward(DType, intptr_t dy, intptr_t x, intptr_t dx, int64_t rows, int64_t F, int threads);

// A small parameter of either type; address 0 where absent.
struct Values {
  intptr_t address;
  DType dtype;
  float operator[](int64_t i) const {
    return dtype == BFLOAT16 ? to_float(pointer<const bf16>(address)[i]) : pointer<const float>(address)[i];
  }
};

// x [B, C, S] or, channels-last, [B, S, C]; the gradients of weight and bias are float32 [C].
struct NormShape {
  int64_t B, C, S, G;
  bool channels_last;
};
void group_norm_silu_forward(DType, intptr_t x, intptr_t y, const NormShape&, Values weight, Values bias, intptr_t mean,
                             intptr_t rstd, float eps, bool silu, int threads);
void group_norm_silu_backward(DType, intptr_t dy, intptr_t x, const NormShape&, intptr_t mean, intptr_t rstd,
                              Values weight, Values bias, bool silu, intptr_t dx, intptr_t dweight, intptr_t dbias,
                              int threads);

// One step's numbers, a row of twelve: nine floats in the order of `Update`, whether the step is taken, the bits of the
// random numbers' key, and the bits of the count of steps, which goes up where the step is taken. `finite` is a bool
// that must hold too; 0 where there is none.
struct AdamW {
  intptr_t row, finite;
  int64_t block_size;
  bool stochastic;
};
bool adamw8bit_knows(intptr_t qmap, bool is_signed);
void adamw8bit_step(DType param_type, DType grad_type, intptr_t param, intptr_t grad, intptr_t state1, intptr_t state2,
                    intptr_t absmax1, intptr_t absmax2, int64_t n, const AdamW&, int threads);
void adamw32bit_step(DType param_type, DType grad_type, intptr_t param, intptr_t grad, intptr_t exp_avg,
                     intptr_t exp_avg_sq, int64_t n, const AdamW&, int threads);

// Packed operands of lowrank_residual: B [depth, columns] from rows [columns, depth] or from itself.
int64_t packed_bytes(DType, int64_t columns, int64_t depth);
void pack_operand(DType, intptr_t out, intptr_t source, int64_t columns, int64_t depth, bool rows_are_columns,
                  int threads);
int low_rank_width(DType dtype, int64_t rank);

struct LowrankShape {
  int64_t samples, rows_a_sample, inputs, outputs, rank;
};
struct LowrankArguments {
  intptr_t x, weight, bias, down, up, mask, concepts, low, y;
};
void lowrank_residual(DType, const LowrankArguments&, const LowrankShape&, float scale, int threads);

// Rows [rows, K] of 8-bit codes with a bfloat16 scale for every 64 columns.
void int8_quantize(DType, intptr_t weight, intptr_t codes, intptr_t scales, int64_t rows, int64_t K, int threads);
void int8_expand(DType, intptr_t codes, intptr_t scales, intptr_t weight, int64_t rows, int64_t K, int threads);

// y from x, or dx from dy (backward), both channels-last; H, W and C are x's. A linear product has one row of pixels.
struct FrozenShape {
  int64_t B, H, W, C, O, out_h, out_w, kernel_h, kernel_w, stride, padding;
};
struct FrozenArguments {
  intptr_t from, weight, scales, bias, to;
};
enum WeightKind : int { PLAIN = 0, CODES = 1 };
// taps_last: the weight lies as [O, C, kh, kw], else as [O, kh, kw, C].
void frozen_product(DType, WeightKind, const FrozenArguments&, const FrozenShape&, bool backward, bool taps_last,
                    int threads);
void weight_gradient(DType, intptr_t x, intptr_t dy, intptr_t dw, const FrozenShape&, bool taps_last, int threads);

}  // namespace PCS_ISA

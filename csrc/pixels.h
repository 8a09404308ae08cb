// What the products of whole pictures share: which pixel is read where, and a thread's memory for blocks.
#pragma once
#include <memory>

#include "ops.h"
#include "parallel.h"

namespace PCS_ISA {

// The pixel that a tap reads: of x for a pixel of y, or (backward) of dy for a pixel of x. -1 in the padding, and
// between the strides of a backward.
inline int64_t source(const FrozenShape& s, bool backward, int64_t pixel, int64_t tap) {
  const int64_t height = backward ? s.H : s.out_h, width = backward ? s.W : s.out_w;
  const int64_t b = pixel / (height * width), h = pixel / width % height, w = pixel % width;
  const int64_t ky = tap / s.kernel_w, kx = tap % s.kernel_w;
  if (!backward) {
    const int64_t y = h * s.stride + ky - s.padding, x = w * s.stride + kx - s.padding;
    return y < 0 || y >= s.H || x < 0 || x >= s.W ? -1 : (b * s.H + y) * s.W + x;
  }
  const int64_t y = h + s.padding - ky, x = w + s.padding - kx;
  if (y < 0 || x < 0 || y % s.stride || x % s.stride || y / s.stride >= s.out_h || x / s.stride >= s.out_w) return -1;
  return (b * s.out_h + y / s.stride) * s.out_w + x / s.stride;
}

// A thread's floats for its tasks, of which it keeps the most it has needed: new pages in each call would cost as much
// as the smaller products.
inline float* scratch(int64_t count) {
  static thread_local std::unique_ptr<Buffer<float>> kept;
  static thread_local int64_t size = 0;
  if (size < count) {
    size = 0;
    kept.reset();
    kept = std::make_unique<Buffer<float>>(count);
    std::fill_n(kept->get(), count, 0.0f);
    size = count;
  }
  return kept->get();
}

}  // namespace PCS_ISA

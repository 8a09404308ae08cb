// How Python hands tensors over: integer addresses and strides in elements; the last dimension has stride 1.
#pragma once
#include <cstdint>

namespace PCS_ISA {

enum DType : int { FLOAT32 = 0, BFLOAT16 = 1 };

// A [B, H, N, D] tensor with unit stride on D.
struct Heads {
  intptr_t address;
  int64_t batch, head, row;
  template <class T>
  T* at(int64_t b, int64_t h, int64_t n) const {
    return reinterpret_cast<T*>(address) + b * batch + h * head + n * row;
  }
};

template <class T>
T* pointer(intptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace PCS_ISA

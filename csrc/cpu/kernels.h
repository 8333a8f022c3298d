// The row kernels, one table per instruction set (kernels.cpp is compiled once for each).
#pragma once

#include "../rows.h"

namespace kto {

// Per-row outputs of the forward; max and sum (of exp(scale (u - max)) over the whole row) feed
// the backward and may both be null.
struct RowOutputs {
  float* logps;
  float* max;
  float* sum;
};

struct RowStatistics {
  const float* logps;
  const float* max;
  const float* sum;
};

// Where the gradient goes: the logits themselves (in place) or another buffer of the same type.
struct Output {
  void* data;
  int64_t stride_b, stride_t;
};

struct Kernels {
  const char* name;
  void (*forward)(const Rows&, const Scale&, const RowOutputs&, int64_t begin, int64_t end);
  void (*backward)(const Rows&, const Scale&, const Gradient&, const RowStatistics&, const Output&,
                   int64_t begin, int64_t end);
};

extern const Kernels kKernels_baseline;
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;

}  // namespace kto

// The row kernels, one table per instruction set (kernels.cpp is compiled once for each).
#pragma once

#include "../rows.h"

namespace kto {

// Per-row outputs of the forward. sum is that of exp(z - outer * reference) over the whole row; it
// and the reference, a u = z / outer near the highest, feed the backward.
struct RowOutputs {
  float* logps;
  float* reference;
  float* sum;
};

// Per-row outputs of the scoring pass; of the by-products, null where one is not asked for.
struct ScoreOutputs {
  float* logps;
  float* entropy;
  float* mean_logits;
  bool* is_top1;  // whether the label is the first argmax
};

struct RowStatistics {
  const float* logps;
  const float* reference;
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
  // Both passes over a row while it is in the core's cache; gradient is null or the logits.
  void (*score)(const Rows&, const Scale&, const ScoreOutputs&, void* gradient, int64_t begin,
                int64_t end);
};

extern const Kernels kKernels_baseline;
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;

}  // namespace kto

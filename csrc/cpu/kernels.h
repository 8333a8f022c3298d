// The kernels that read logits, in one table for each instruction set that kernels.cpp is compiled
// for.
#pragma once

#include "../rows.h"

namespace kto {

// The results of the pass over a chunk, one for each row. Outputs that are not asked for are null.
struct ChunkScores {
  float* logps;
  float* entropy;
  float* mean_logits;
  bool* is_top1;  // whether the label is the first argmax
};

// Per-row results of the forward, which the backward reads: the label's log-probability, and
// the statistics of the row's softmax. The origin is a score, near the row's highest; the sum is
// that of exp(outer * (u - origin)).
struct RowStatistics {
  float* logps;
  float* origin;
  float* sum;
};

// Where the backward writes the gradient: over the logits, or to another buffer of their type.
struct Destination {
  void* data;
  int64_t stride_b, stride_t;
};

struct Kernels {
  const char* name;
  void (*forward)(const Rows&, const Scale&, const RowStatistics&, int64_t begin, int64_t end);
  void (*backward)(const Rows&, const Scale&, const Gradient&, const RowStatistics&,
                   const Destination&, int64_t begin, int64_t end);
  // Forward and backward of each row in turn, so that the second pass finds the row in the core's
  // cache. `gradient` is the logits' address, or null for no backward.
  void (*chunk)(const Rows&, const Scale&, const ChunkScores&, void* gradient, int64_t begin,
                int64_t end);
};

extern const Kernels kKernels_baseline;
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;

}  // namespace kto

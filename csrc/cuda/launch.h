// What the CUDA backend's launchers are told. kernels.cu runs them on a GPU, emulation.cpp on the
// host; bindings.cpp binds either.
#pragma once

#include "../rows.h"

namespace kto {

// Floating values given by the caller, read in their own type.
struct Values {
  const void* data;  // null: absent
  int type;          // that of DType, or kF64
  int64_t stride;
};
constexpr int kF64 = 3;

// The softmax of some scores u of a row: their maximum, and the sum of exp(outer (u - maximum)).
struct Share {
  double sum;
  float maximum;
};

// One set of logits: policy, reference, KL policy or KL reference.
struct RowSet {
  Rows rows;
  int64_t first;   // number of its first row among the rows of all sets
  float* logps;    // (N,)
  float* maximum;  // (N,), and sum: what the backward needs; null where there is none
  float* sum;
  double* sums;    // (B,) sequence log-probabilities
  double* counts;  // (B,) scored tokens; null where nobody asks
};

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

// Stages kl_reference_point, value and loss.
struct Stages {
  bool wanted;  // false: token log-probabilities only
  bool average;
  Reduction reduction;
  int64_t n_sequences, n_kl;
  const double* logps;   // (B,)
  const double* counts;  // (B,), where average
  Values ref_logps;      // (B,); absent: reference-free
  Values kl_logps;       // (K,); absent: kl, or else kl_value
  Values kl_ref_logps;   // (K,) or absent
  Values kl;             // ()
  double kl_value;
  const bool* desirable;
  int64_t desirable_stride;
  ValueOptions options;
  float* loss;  // (B,) under Reduction::none, else one value
  double* ref_logps_out;
  float* rewards;
  float* kl_out;
  float* coefficients;
};

constexpr int kMaxSets = 4;

struct ForwardArguments {
  RowSet sets[kMaxSets];
  int n_sets;
  int64_t n_rows;  // of all sets
  int splits;      // blocks that share a row
  Share* shares;   // (n_rows, splits), used where splits > 1
  // Zeros, left as zeros: one counts the rows, and one for each row its shares where splits > 1.
  unsigned* arrivals;
  Scale scale;
  Stages stages;
};

struct BackwardArguments {
  Rows rows;
  Scale scale;
  Gradient gradient;
  const float *logps, *maximum, *sum;
  void* out;
  int64_t out_stride_b, out_stride_t;
  int splits;
};

// A chunk of logits: one pass scores each row, a second one overwrites it by its gradient.
struct ChunkArguments {
  Rows rows;
  Scale scale;
  void* gradient;  // the logits themselves, or null: they stay
  float* logps;    // (N,), as are the outputs: null where nobody asks
  float *entropy, *mean_logits;
  bool* is_top1;
};

// Multiplies `count` elements by the () factor.
struct MultiplyArguments {
  void* data;
  DType dtype;
  int64_t count;
  Values factor;
  int blocks;
};

// Where a launch goes; the emulation ignores it.
struct Target {
  int device;
  void* stream;
};

// Throw std::runtime_error naming the kernel where the launch fails.
void launch_forward(const ForwardArguments&, Target);
void launch_backward(const BackwardArguments&, Target);
void launch_chunk(const ChunkArguments&, Target);
void launch_multiply(const MultiplyArguments&, Target);

}  // namespace kto

// The launches of the CUDA backend and their arguments. kernels.cu launches on a GPU, emulation.cpp
// on the host; bindings.cpp binds either of them.
#pragma once

#include "../rows.h"

namespace kto {

// A tensor of floating-point values from the caller, in any floating type.
struct Values {
  const void* data;  // null: absent
  int type;          // a number of DType, or kF64
  int64_t stride;
};
constexpr int kF64 = 3;

// The statistics of the softmax over a share of a row's scores u: the origin, here their maximum,
// and the sum of exp(outer (u - origin)).
struct Share {
  double sum;
  float origin;
};

// The logits of one side: the policy, the reference, or either of them on the mismatched
// completions. Results that nobody asks for are null.
struct RowSet {
  Rows rows;
  int64_t first;  // how many rows the sets before this one have
  float* logps;   // (N,)
  float* origin;  // (N,), like sum: the statistics for the backward
  float* sum;
  double* sums;    // (B,) sequence log-probabilities
  double* counts;  // (B,) scored tokens
};

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

// The arguments and results of the stages kl_reference_point, value and loss.
struct Stages {
  bool wanted;  // false: the launch ends with the token log-probabilities
  bool average;
  Reduction reduction;
  int64_t n_sequences, n_kl;
  const double* logps;   // (B,)
  const double* counts;  // (B,), used where average is set
  Values ref_logps;      // (B,); absent: reference-free
  Values kl_logps;       // (K,); absent: z0 is kl or, where that is absent too, kl_value
  Values ref_kl_logps;   // (K,) or absent
  Values kl;             // ()
  double kl_value;
  const bool* desirable;
  int64_t desirable_stride;
  ValueOptions options;
  float* loss;  // (B,) with Reduction::none, else one value
  double* ref_logps_out;
  float* rewards;
  float* kl_out;
  float* coefficients;
};

constexpr int kMaxSets = 4;

struct ForwardArguments {
  RowSet sets[kMaxSets];
  int n_sets;
  int64_t n_rows;  // of all sets together
  int splits;      // blocks that share a row
  Share* shares;   // (n_rows, splits), used where splits > 1
  // Counters, 0 before and after the launch: the first counts finished rows, and where splits > 1
  // each row has one more, which counts the row's finished shares.
  unsigned* arrivals;
  Scale scale;
  Stages stages;
};

struct BackwardArguments {
  Rows rows;
  Scale scale;
  Gradient gradient;
  const float *logps, *origin, *sum;
  void* out;
  int64_t out_stride_b, out_stride_t;
  int splits;
};

// A chunk of logits: a first pass scores each row, a second one overwrites it by its gradient.
struct ChunkArguments {
  Rows rows;
  Scale scale;
  void* gradient;  // the logits' own address, or null for no second pass
  float* logps;    // (N,), as are the outputs, which are null where nobody asks for them
  float *entropy, *mean_logits;
  bool* is_top1;
};

// `count` elements, and the scalar to multiply them by.
struct MultiplyArguments {
  void* data;
  DType dtype;
  int64_t count;
  Values factor;
  int blocks;
};

// Sequences that are closed together, from hidden states. Results that nobody asks for are null.
struct SequencesArguments {
  const float* token_logps;  // (S,), used without `sums`, as are the offsets
  const int64_t* offsets;    // (B + 1,), where each sequence begins among the S rows
  int64_t n_sequences;
  const double* sums;    // (B,)
  bool average;          // the means are taken of the sums
  const double* counts;  // (B,) scored tokens on all ranks; null: `lengths`
  const int64_t*
      lengths;       // (B,) scored tokens on this rank, used with `average` and with `divisor`
  Values ref_logps;  // (B,); absent: reference-free
  Values z0;         // ()
  const bool* desirable;
  int64_t desirable_stride;
  ValueOptions options;
  double reduced_by;  // the slopes are divided by it
  double* logps;      // (B,), null only where the sums are given
  double* slopes;     // (B,) d loss / d token log-probability
  double* losses;     // (B,) without the reduction, as are the rewards
  double* rewards;
  double* divisor;  // (), raised to the power of two below the largest slope
  double* factor;   // (), the divisor before, over the divisor now
};

// The device and the stream of a launch; the emulation ignores them.
struct Target {
  int device;
  void* stream;
};

// Where a launch fails, these throw std::runtime_error with the kernel's name.
void launch_forward(const ForwardArguments&, Target);
void launch_backward(const BackwardArguments&, Target);
void launch_chunk(const ChunkArguments&, Target);
void launch_multiply(const MultiplyArguments&, Target);
void launch_sequences(const SequencesArguments&, Target);

}  // namespace kto

// The CPU backend's entry points: validated plain data in, results written through pointers.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace kto {

// Names of the instruction sets this machine runs, best first.
std::vector<std::string> instruction_sets();
// The one in use: KTO_KERNELS_CPU_ISA if set (std::invalid_argument where it cannot be), else the
// best.
const Kernels& kernels();

// Finds the OpenMP runtime that `torch_library`, loaded already, computes with. Its threads do the
// work from then on, and its file is returned; empty where there is none: every call then starts
// threads of its own. To be called once, before any other function here runs.
std::string find_openmp(const std::string& torch_library);

void token_logps_forward(const Rows&, const Scale&, const RowStatistics&, int threads);
void logits_backward(const Rows&, const Scale&, const Gradient&, const RowStatistics&,
                     const Destination&, int threads);
void score_chunk(const Rows&, const Scale&, const ChunkScores&, void* gradient, int threads);

// Asks the system to back a large fresh buffer with huge pages: writing it first is otherwise
// mostly page faults. A hint: no error where the system knows no such thing.
void advise_huge_pages(void* data, size_t bytes);

// Whether a label is neither ignore_index nor in [0, vocab). Reads the labels and nothing else of
// the rows.
bool has_outside_label(const Rows&);

// Stage sequence_logps: sums (or means over scored tokens) in fp64; also the scored tokens' count.
void sequence_logps(const Rows&, const float* logps, bool average, double* sums, int64_t* counts);

// Stages kl_reference_point, value and loss.
struct SequenceInputs {
  int64_t n_sequences;
  const double* logps;
  const double* ref_logps;  // null: reference-free, 0
  const bool* desirable;
  const int64_t* counts;  // scored tokens of each sequence; used where average
  bool average;
};
struct KLInputs {
  int64_t n_sequences;  // K
  const double* logps;  // null: kl is the given number
  const double* ref_logps;
  double kl;
};
enum class Reduction : int { none = 0, mean = 1, sum = 2 };
struct SequenceOutputs {
  float* loss;  // (B,) under Reduction::none, else one value
  float* rewards;
  float* kl;
  float* coefficients;  // d loss / d token log-probability, per sequence
};
// Stages value and loss of each sequence by itself, in fp64.
struct ValueOutputs {
  double* losses;
  double* slopes;  // d loss / d sequence log-probability
  double* rewards;
};
void value_stages(const SequenceInputs&, double z0, const ValueOptions&, const ValueOutputs&);

void sequence_stages(const SequenceInputs&, const KLInputs&, const ValueOptions&, Reduction,
                     const SequenceOutputs&);

}  // namespace kto

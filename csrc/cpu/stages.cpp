// The O(N) stages after the seam, in fp64 and in index order: the same bits at any thread count.
#include <algorithm>

#include "engine.h"

namespace kto {

bool has_outside_label(const Rows& rows) {
  for (int64_t n = 0; n < rows.n_rows; ++n) {
    const int64_t label = index_at(rows.labels, labels_offset(rows, n));
    if (label != rows.ignore_index && (label < 0 || label >= rows.vocab)) return true;
  }
  return false;
}

void sequence_logps(const Rows& rows, const float* logps, bool average, double* sums,
                    int64_t* counts) {
  for (int64_t i = 0; i < rows.n_sequences; ++i) {
    const Range range = sequence_range(rows, i);
    double sum = 0;
    int64_t scored = 0;
    for (int64_t n = range.begin; n < range.end; ++n) {
      sum += logps[n];
      scored += label_of(rows, n) >= 0;
    }
    sums[i] = average ? sum / double(std::max<int64_t>(1, scored)) : sum;
    counts[i] = scored;
  }
}

namespace {

double reference_point(const KLInputs& inputs) {
  double mean = inputs.kl;
  if (inputs.logps != nullptr) {
    double sum = 0;
    for (int64_t j = 0; j < inputs.n_sequences; ++j)
      sum += difference(inputs.logps[j], inputs.ref_logps ? inputs.ref_logps[j] : 0.0);
    mean = sum / double(std::max<int64_t>(1, inputs.n_sequences));
  }
  return mean < 0 ? 0 : mean;  // NaN stays NaN
}

}  // namespace

void value_stages(const SequenceInputs& inputs, double z0, const ValueOptions& options,
                  const ValueOutputs& out) {
  for (int64_t i = 0; i < inputs.n_sequences; ++i) {
    const double log_ratio =
        difference(inputs.logps[i], inputs.ref_logps ? inputs.ref_logps[i] : 0.0);
    const SequenceLoss loss = sequence_loss(log_ratio, z0, inputs.desirable[i], options);
    out.losses[i] = loss.loss;
    out.slopes[i] = loss.slope;
    out.rewards[i] = options.beta * log_ratio;
  }
}

void sequence_stages(const SequenceInputs& inputs, const KLInputs& kl, const ValueOptions& options,
                     Reduction reduction, const SequenceOutputs& out) {
  const double z0 = reference_point(kl);
  *out.kl = float(z0);
  const double factor =
      reduction == Reduction::mean ? 1.0 / double(std::max<int64_t>(1, inputs.n_sequences)) : 1.0;
  double total = 0;
  for (int64_t i = 0; i < inputs.n_sequences; ++i) {
    const double log_ratio =
        difference(inputs.logps[i], inputs.ref_logps ? inputs.ref_logps[i] : 0.0);
    const SequenceLoss loss = sequence_loss(log_ratio, z0, inputs.desirable[i], options);
    const double tokens = inputs.average ? double(std::max<int64_t>(1, inputs.counts[i])) : 1.0;
    out.rewards[i] = float(options.beta * log_ratio);
    out.coefficients[i] = float(loss.slope * factor / tokens);
    if (reduction == Reduction::none) out.loss[i] = float(loss.loss);
    total += loss.loss;
  }
  if (reduction != Reduction::none) *out.loss = float(total * factor);
}

}  // namespace kto
